#!/bin/sh
# Runs before $RELEASE_ID goes live. A real app would run its database migrations here, as in
# deploy/before_release.sh of this project; this one prints its page.
set -e
echo "One-off in $RELEASE_ID, which is not live yet:"
convox run --app "$APP_NAME" --release "$RELEASE_ID" web cat /www/index.html
