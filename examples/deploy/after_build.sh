#!/bin/sh
# Rails: compile the assets inside the new image and commit them to it. The dummy key is enough to boot the app (Rails 7.1
# and later), and is set for this one command: with `docker create --env`, it would end up in the image.
set -e
command=$(docker image inspect --format '{{json .Config.Cmd}}' "$DOCKER_TAG")
container=$(docker create "$DOCKER_TAG" \
  env SECRET_KEY_BASE_DUMMY=1 bundle exec rake assets:precompile)
trap 'docker rm --force "$container" > /dev/null' EXIT
docker start --attach "$container"
docker commit --change "CMD $command" "$container" "$DOCKER_TAG" > /dev/null
