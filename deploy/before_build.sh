#!/bin/sh
# Runs before `docker build`, in the app's root. For what the build needs: generated files, a check of the tree.
# A non-zero exit status stops the deploy. As it is, this file does nothing.
#
# In the environment, beside the caller's own (CONVOX_HOST, CONVOX_PASSWORD, AWS_*):
#   APP_NAME         the app
#   RACK_NAME        the rack, if CONVOX_RACK or --rack named one
#   GIT_HASH         the commit; GIT_BRANCH its branch; GIT_DESCRIPTION its one-line log
#
# For example:
#   npm ci && npm run build
