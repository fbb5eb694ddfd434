#!/bin/sh
# Rails: leaves the commit where the app can show it.
set -e
echo "${GIT_HASH:-unknown}" > REVISION
