#!/bin/sh
# Runs after the release is built and before it is promoted. Use it for anything that must happen before it goes live,
# such as migrations. A non-zero exit status stops the deploy, and the current release keeps running. This template
# does nothing by itself.
#
# Environment variables, in addition to those of after_build.sh:
#   RELEASE_ID   the release that is built but not live yet
#
# With --release or --from, no image is built and DOCKER_TAG is not set. With --rollback, no hook runs.
#
# For a migration, start from examples/deploy/before_release.sh of convox-deploy: `convox run` may exit 0 although the
# connection was lost.
