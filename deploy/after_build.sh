#!/bin/sh
# Runs after `docker build` and before the push. For what needs the image: tests, assets built inside it.
# A non-zero exit status stops the deploy. As it is, this file does nothing.
#
# In the environment, beside what before_build.sh gets:
#   DOCKER_TAG             the local image, as `docker run` takes it; with several builds the first service's
#   DOCKER_TAG_<SERVICE>   each service's, its name in capitals: DOCKER_TAG_WEB
#
# What DOCKER_TAG names after this hook is what is pushed. For example:
#   docker run --rm "$DOCKER_TAG" rake test
