#!/bin/sh
# Runs before `docker build`, in the project root. Use it to prepare the build: generate files, run checks.
# A non-zero exit status stops the deploy. This template does nothing by itself.
#
# Environment variables, in addition to the caller's (CONVOX_HOST, CONVOX_PASSWORD, AWS_*):
#   APP_NAME          the app
#   RACK_NAME         the name of the rack, unless it was chosen by host
#   GIT_HASH          the commit SHA
#   GIT_BRANCH        the branch
#   GIT_DESCRIPTION   the commit (git describe --always --dirty) and its subject
#
# Example:
#   npm ci && npm run build
