#!/bin/sh
# Rails: migrate the database with the new release's code before it goes live. During the promote, old and new code run
# side by side, so migrations must work with both.
set -e
convox run --app "$APP_NAME" --release "$RELEASE_ID" web bundle exec rake db:migrate
