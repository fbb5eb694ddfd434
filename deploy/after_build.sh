#!/bin/sh
# Runs the app's tests in the new image, and nothing is pushed if they fail.
#
# With several images, DOCKER_TAG is the first service's, and DOCKER_TAG_WORKER that of the service worker. What it
# points to in the end is what goes live.
set -e
docker run --rm "$DOCKER_TAG" bundle exec rake test # change this line
