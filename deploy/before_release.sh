#!/bin/sh
# Migrates the database with the new release's code before it goes live. During the promote, old and new code run
# side by side, so migrations must work with both.
#
# `convox run` before August 2026 may exit 0 although it lost the connection. So the migration counts only if the line
# that the container prints after it has arrived. The command is one argument, because convox takes flags such as -c
# anywhere for its own, and joins several arguments without quotes.
set -e
migrate="bundle exec rake db:migrate" # change this line, and web below
migrated="MIGRATED-$RELEASE_ID"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{
  convox run --app "$APP_NAME" --release "$RELEASE_ID" web \
    "sh -c '$migrate && echo $migrated'" || echo "convox run failed with exit code $?"
} | tee "$log"
if grep -q '^convox run failed' "$log" || ! tr -d '\r' < "$log" | grep -qx "$migrated"; then
  echo "The migration did not succeed, or its end was not seen." >&2
  exit 1
fi
