#!/bin/sh
# The same deploy as a plain sequence of commands: the baseline for the benchmark. SERVICES is a list of name=context
# pairs. For each service, the app's manifest must contain the line `image: $REGISTRY/$APP_NAME-NAME:TAG`.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
commit=$(git describe --always --dirty)
description=$(git log -1 --format='%h %s')
aws ecr get-login-password --region "$REGION" | docker login --username AWS --password-stdin "$REGISTRY"
for service in $SERVICES; do
    docker build --iidfile "$work/${service%%=*}.id" --tag "$APP_NAME-${service%%=*}" "${service#*=}"
done
cp docker-compose.yml "$work/manifest"
for service in $SERVICES; do
    repository=$APP_NAME-${service%%=*}
    tag=$commit-$(cut -c 8-19 "$work/${service%%=*}.id")
    aws ecr describe-repositories --region "$REGION" --repository-names "$repository" >"$work/answer" 2>&1 ||
        aws ecr create-repository --region "$REGION" --repository-name "$repository"
    docker tag "$repository" "$REGISTRY/$repository:$tag"
    docker push "$REGISTRY/$repository:$tag"
    sed "s|/$repository:TAG|/$repository:$tag|" "$work/manifest" >"$work/next"
    mv "$work/next" "$work/manifest"
done
mkdir "$work/upload"
mv "$work/manifest" "$work/upload/docker-compose.yml"
cd "$work/upload"
release=$(convox build --app "$APP_NAME" --manifest docker-compose.yml --description "$description" --id)
convox releases promote --app "$APP_NAME" --wait "$release"
