#!/bin/sh
# Rails: compile the assets inside the new image and commit them to it.
set -e
command=$(docker image inspect --format '{{json .Config.Cmd}}' "$DOCKER_TAG")
container=$(docker create "$DOCKER_TAG" bundle exec rake assets:precompile)
trap 'docker rm --force "$container" > /dev/null' EXIT
docker start --attach "$container"
docker commit --change "CMD $command" "$container" "$DOCKER_TAG" > /dev/null
