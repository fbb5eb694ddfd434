#!/bin/sh
# Rails: write the commit to REVISION so the app can display it.
set -e
echo "${GIT_HASH:-unknown}" > REVISION
