#!/bin/sh
# Runs after `docker build` and before the push. Use it for anything that needs the image, such as tests or asset
# compilation. A non-zero exit status stops the deploy. This template does nothing by itself.
#
# Environment variables, in addition to those of before_build.sh:
#   DOCKER_TAG             the local image, to use with `docker run` (the first service's, if there are several images)
#   DOCKER_TAG_<SERVICE>   each service's image, by the service name in capitals: DOCKER_TAG_WEB
#
# Whatever DOCKER_TAG points to when this hook exits is what gets released.
#
# Example:
#   docker run --rm "$DOCKER_TAG" rake test
