#!/bin/sh
# Runs once the release is built, before it is promoted. For what must be done before it is live: migrations.
# A non-zero exit status stops the deploy, and the release that runs stays. As it is, this file does nothing.
#
# In the environment, beside what after_build.sh gets:
#   RELEASE_ID       the release that is built and not live yet
#
# For example:
#   convox run --app "$APP_NAME" --release "$RELEASE_ID" web rake db:migrate
