#!/bin/sh
# Rails: migrates the database in the new release, before it is live. While it is promoted the old code runs
# on beside the new, so a migration must suit both.
set -e
convox run --app "$APP_NAME" --release "$RELEASE_ID" web bundle exec rake db:migrate
