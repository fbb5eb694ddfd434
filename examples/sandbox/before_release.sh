#!/bin/sh
# Runs before $RELEASE_ID is live. A real app would migrate its database here; this one shows its page.
set -e
echo "One-off in $RELEASE_ID, which is not live yet:"
convox run --app "$APP_NAME" --release "$RELEASE_ID" web cat /www/index.html
