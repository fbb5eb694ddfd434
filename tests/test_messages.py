"""Every error message in full, as recorded in messages.txt, where they can be read one after another."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import pytest
from conftest import ECR, RELEASE, TOOL, World
from standin import Rule

from convox_deploy import HOOKS

if TYPE_CHECKING:
    from typing_extensions import Unpack

IMAGE = f"{ECR}/shop:TAG"
DENIED = (
    "denied: User: arn:aws:iam::123456789012:user/dev is not authorized to perform: ecr:InitiateLayerUpload on"
    " resource: arn:aws:ecr:us-east-1:123456789012:repository/shop"
)
EXISTS = "An error occurred (RepositoryAlreadyExistsException) when calling the CreateRepository operation: exists"
NO_CREATE = (
    "An error occurred (AccessDeniedException) when calling the CreateRepository operation: User:"
    " arn:aws:iam::123456789012:user/dev is not authorized to perform: ecr:CreateRepository"
)
NO_REPOSITORY = "name unknown: The repository with name 'shop' does not exist in the registry with id '123456789012'"


def texts() -> dict[str, str]:
    parts = re.split(
        r"^--- (.*)\n", (Path(__file__).parent / "messages.txt").read_text(), flags=re.MULTILINE
    )
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2])}


TEXTS = texts()
Arrange = Callable[
    [World], Any
]  # makes the mistake; may return the arguments and environment to deploy with


def rule(start: str, **what: Unpack[Rule]) -> Arrange:
    return lambda world: world.rules.update({start: what})


def rules(**what: Rule) -> Arrange:
    return lambda world: world.rules.update(
        {start.replace("___", " --").replace("_", " "): how for start, how in what.items()}
    )


def settings(*args: str, **env: str | None) -> Arrange:
    return lambda world: (args, env)


def both(arrange: Arrange, *args: str, **env: str | None) -> Arrange:
    def arranged(world: World) -> Any:
        arrange(world)
        return args, env

    return arranged


def without(*names: str) -> Arrange:
    def arrange(world: World) -> None:
        for name in names:
            (world.app / name if "." in name or name[0].isupper() else world.bin / name).unlink()

    return arrange


def file(name: str, text: str | bytes, mode: int = 0o644) -> Arrange:
    return lambda world: world.write(name, text, mode) and None


def hook(text: str | bytes, mode: int = 0o755) -> Arrange:
    return file("deploy/after_build.sh", text, mode)


def in_turn(*arrangements: Arrange) -> Arrange:
    def arrange(world: World) -> Any:
        return [arrangement(world) for arrangement in arrangements][-1]

    return arrange


def manifest(text: str | bytes) -> Arrange:
    return file("docker-compose.yml", text)


def image(name: str) -> Arrange:
    return manifest(f"web:\n  image: {name}\n")


def link(target: str) -> Arrange:
    def arrange(world: World) -> None:
        (world.app / "deploy").mkdir()
        (world.app / "deploy" / "after_build.sh").symlink_to(target)

    return arrange


def broken_git(world: World) -> None:
    world.add_git()
    error = "fatal: detected dubious ownership in repository at '/app'\nTo add an exception, call:\n\n\tgit config\n"
    world.rules["git"] = {"status": 128, "err": error}


def git_without_a_commit(world: World) -> None:
    import subprocess

    subprocess.run(
        [world.env["REAL_GIT"], "init", "--quiet", "--initial-branch=main"],
        cwd=world.app,
        check=True,
    )


RELEASES = "convox api get /apps/shop/releases"
CONVOX_YML = "services:\n  web:\n    build: ."


def created(release: str, moment: str) -> Arrange:
    """A release, and when it was created. Ours and the one that is running are in conftest.py."""
    text = json.dumps({**RELEASE, "id": release, "created": moment})
    return lambda world: (world.home / f"release.{release}.json").write_text(text) and None


def rack(*states: str, before: str = "ROLDRELEASE") -> Arrange:
    """What the rack reports after the promote: `RELEASE STATUS`, one after another."""
    apps = [dict(zip(["release", "status"], state.split(" "))) for state in states]
    settled = {"release": before, "status": "running"}
    answers = [settled, settled, [], *apps]  # before: the app twice, and the list of releases
    return rule("convox api get", sequence=[{"out": json.dumps(each)} for each in answers])


def unhealthy(world: World) -> Any:
    """A container that crashes, and with it the promote."""
    world.constants["DEBUG_SECONDS"] = [0.01, 60]
    pod = {
        "service": "web",
        "classification": "unhealthy",
        "ageSeconds": 0,
        "stateDetail": "CrashLoopBackOff",
        "hint": "The container starts and exits again and again.",
        "previousLogs": "starting\nerror: no database\n",
    }
    (world.home / "deploy-debug.json").write_text(json.dumps({"pods": [pod]}))
    rack("RNEWRELEASE updating", "ROLDRELEASE rollback", "ROLDRELEASE running")(world)
    world.rules["convox releases promote --app"] = {
        "once": "convox env",  # whose values are redacted: the next that is called
        "pause": 0.3,
        "status": 1,
        "err": "ERROR: rollback\n",
    }
    return (), {"CONVOX_STANDIN_CLI": "v3"}


SEVERAL = both(
    in_turn(file("deploy/before_build.sh", "#!/bin/sh\n"), image("b:TAG")),
    CONVOX_PASSWORD="secret\n",
)


def several_that_programs_find(world: World) -> None:
    world.rules["docker version"] = {"status": 1, "err": "Cannot connect to the Docker daemon\n"}
    world.rules["convox api get"] = {
        "pause": 0.3,  # after the other
        "status": 1,
        "err": "ERROR: app not found: shop\n",
    }


def hook_that(script: str, name: str = "before_build") -> Arrange:
    def arrange(world: World) -> None:
        for each in HOOKS:
            world.write(f"deploy/{each}.sh", "#!/bin/sh\n", 0o755)
        world.write(f"deploy/{name}.sh", f"#!/bin/sh\n{script}\n", 0o755)

    return arrange


def a_pipe_as_manifest(world: World) -> None:
    (world.app / "docker-compose.yml").unlink()
    os.mkfifo(world.app / "docker-compose.yml")


def convox_yml(text: str) -> Arrange:
    """A manifest whose services have no image, for a CLI that can build them."""
    return both(file("convox.yml", text), CONVOX_STANDIN_CLI="v3")


TAKEN: dict[str, Any] = {"image": f"{ECR}/shop:1a2b3c", "services": ["web"]}


def taken_from(changes: dict[str, Any]) -> Arrange:
    result = {"tool": "convox-deploy", "status": "succeeded", "images": [TAKEN], **changes}
    return both(
        file("deploy.json", json.dumps(result)), "--from", "deploy.json", CONVOX_STANDIN_CLI="v3"
    )


MISTAKES: dict[str, Arrange] = {
    # the most likely mistakes on a first run
    "a user who may not use Docker": rule(
        "docker version",
        status=1,
        err="permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock:"
        ' Get "http://%2Fvar%2Frun%2Fdocker.sock/v1.50/version": dial unix /var/run/docker.sock: connect:'
        " permission denied\n",
    ),
    "Docker is not running": rule(
        "docker version",
        status=1,
        err="Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n",
    ),
    "not logged in to AWS": rule(
        "aws ecr get-login-password",
        status=253,
        err='\nUnable to locate credentials. You can configure credentials by running "aws configure".\n',
    ),
    "AWS credentials that have expired": rule(
        "aws ecr get-login-password",
        status=254,
        err="An error occurred (ExpiredTokenException) when calling the GetAuthorizationToken operation: The"
        " security token included in the request is expired\n",
    ),
    "a wrong password": rule("convox api get", status=1, err="ERROR: invalid authentication\n"),
    "an app that does not exist": rule(
        "convox api get", status=1, err="ERROR: app not found: shop\n"
    ),
    "no :TAG": image("redis:7 # :TAG"),
    "a hook that is not executable": hook("#!/bin/sh\n", 0o644),
    "a push that is denied": rules(
        docker_push={"status": 1, "err": DENIED}, aws_ecr_create={"status": 254, "err": EXISTS}
    ),
    "no convox CLI": without("convox"),
    "a convox CLI that is too old": rule("convox build --help", out="convox build\n"),
    "outside the project root": without("docker-compose.yml"),
    # options and variables
    "an option of docker build": settings("--platform", "linux/amd64"),
    "an unknown option": settings("--no-promot"),
    "an unexpected argument": settings("shop"),
    "promote as an argument": settings("promote", "RABCDEFGHIJ"),
    "help as an argument": settings("help"),
    "deploy as an argument": settings("deploy"),
    "an app name in upper case": settings(APP_NAME="Shop"),
    "a tag with a slash": settings(IMAGE_TAG="feature/x"),
    "a build ID instead of a release ID": settings("--release", "BABCDEFGHIJ"),
    "an empty option": settings("--rack", ""),
    "an option of ours after the dashes": settings("--", "--release", "RABCDEFGHIJ"),
    "an option with another name": settings("--app-name", "shop"),
    "a negative timeout": settings("--timeout", "-1"),
    "a timeout that is not a number": settings(DEPLOY_TIMEOUT="an hour"),
    "a result in a missing directory": settings("--result", "no/such/dir.json"),
    "a result that would replace the manifest": settings("--result", "docker-compose.yml"),
    # the rack
    "a rack and a URL": settings(
        CONVOX_RACK="a", RACK_URL="https://x:password@y", CONVOX_HOST=None, CONVOX_PASSWORD=None
    ),
    "a URL with another host": settings(RACK_URL="https://convox:x@other"),
    "a URL instead of a host": settings(CONVOX_HOST="https://rack.example.com"),
    "a host with a newline": settings(CONVOX_HOST="rack.example.com\n"),
    "a password with a newline": settings(CONVOX_PASSWORD="secret\n"),
    "a password in quotes": settings(CONVOX_PASSWORD='"secret"'),
    "a host without a password": settings(CONVOX_PASSWORD=None),
    "a password without a host": settings(CONVOX_HOST=None),
    "a host in quotes": settings(CONVOX_HOST='"rack.example.com"'),
    "sudo, which drops variables": both(
        rule(
            "convox api get",
            status=1,
            err="ERROR: no current rack, use `convox racks` to list and `convox switch <name>` to select\n",
        ),
        CONVOX_HOST=None,
        CONVOX_PASSWORD=None,
    ),
    "a machine that is logged in to no rack": both(
        rule("convox api get", status=1, err="ERROR: no racks found, try `convox login`\n"),
        CONVOX_HOST=None,
        CONVOX_PASSWORD=None,
    ),
    "the Console instead of a rack": settings(CONVOX_HOST="console.convox.com"),
    "a rack that cannot be reached": rule(
        "convox api get",
        status=1,
        err='ERROR: Get "https://rack.example.com/apps/shop": dial tcp: connect: connection refused\n',
    ),
    "a rack that does not exist": rule(
        "convox api get", status=1, err="ERROR: could not find rack: org/prod\n"
    ),
    "a rack that does not answer in JSON": rule("convox api get", out="<html>\n"),
    "credentials that cannot read the app": rule(
        "convox api get", status=1, err="ERROR: forbidden\n"
    ),
    "an app that a person must repair": rule(
        "convox api get", out='{"release": "ROLDRELEASE", "status": "failed"}'
    ),
    "a deploy key that cannot push to the rack's registry": in_turn(
        rule("convox env", status=1, err="ERROR: operation not permitted for deploy keys\n"),
        convox_yml("services:\n  web:\n    build: .\n"),
    ),
    "a login that is only allowed to read": rule(
        "convox build --app",  # with --id, all but the ID is on stderr
        status=1,
        err="Starting build... ERROR: you are unauthorized to access this\n",
    ),
    # releases
    "a release that does not exist": both(
        rule(f"{RELEASES}/RABC", status=1, err="ERROR: release not found: RABCDEFGHIJ\n"),
        *("--release", "RABCDEFGHIJ"),
    ),
    "a rollback to a release that does not exist": both(
        rule(
            "convox api get --rack staging /apps/shop/releases",
            status=1,
            err='ERROR: releases.convox.com "rabcdefghij" not found\n',
        ),
        *("--rollback", "RABCDEFGHIJ", "--rack", "staging"),
        CONVOX_HOST=None,
        CONVOX_PASSWORD=None,
    ),
    "a release that is older than the one that is running": both(
        created("RABCDEFGHIJ", "2026-10-31T10:00:00Z"), "--release", "RABCDEFGHIJ"
    ),
    "a rollback to what is running": settings("--rollback", "ROLDRELEASE"),
    # programs
    "no docker": without("docker"),
    "no aws CLI": without("aws"),
    "an aws CLI that prints no password": rule("aws ecr get-login-password"),
    "an aws CLI that believes it has a terminal": rule(
        "aws ecr get-login-password", out="\x1b[?1h\x1b=\rtoken\r\n\x1b[?1l\x1b>"
    ),
    "an ECR login that docker refuses": rule(
        "docker login", status=1, err="Error response from daemon: 400\n"
    ),
    "git that fails": broken_git,
    "git without a commit": git_without_a_commit,
    # builds
    "no Dockerfile": without("Dockerfile"),
    "a missing build context": manifest(f"web: {{image: '{IMAGE}', build: no}}"),
    "one tag for two images": both(
        manifest(f"web: {{image: {IMAGE}}}\na: {{image: {IMAGE}, build: {{target: a}}}}\n"),
        IMAGE_TAG="v1",
    ),
    "an image shared by alias": manifest(
        f"a:\n  image: &i {IMAGE}\n  build: .\nb:\n  image: *i\n  build: {{context: ., target: b}}\n",
    ),
    # the manifest
    "an empty manifest": manifest(""),
    "a manifest without services": manifest("just a text"),
    "a tab in the manifest": manifest("services:\n  web:\n\timage: x"),
    "two documents": manifest("a: 1\n---\nb: 2"),
    "a manifest that is not text": manifest(b"\xff\xfe"),
    "a build without an image": manifest("services: {web: {build: .}}\n"),
    "a build without an image and services": manifest("web:\n  build: .\n"),
    "a build and another image": manifest("web:\n  build: .\n  image: r.io/shop:latest\n"),
    "neither image nor build": manifest(
        f"services:\n  api:\n    image: {IMAGE}\n  web:\n    port: 3000\n"
    ),
    "a variable in the image": manifest("web:\n  image: ${REPO}:TAG\n"),
    "a variable for the tag": manifest(f"web:\n  image: {ECR}/shop:${{TAG}}\n"),
    "the tag in lower case": manifest(f"web:\n  image: {ECR}/shop:tag\n"),
    "trailing whitespace after TAG": manifest("web:\n  image: 'r.io/shop:TAG '\n"),
    "no registry": manifest("web:\n  image: shop:TAG\n"),
    "an image in upper case": manifest(f"web:\n  image: {ECR}/Shop:TAG\n"),
    "an image with escapes": manifest(f'web:\n  image: "{ECR}/shop:T\\x41G"\n'),
    "a build option that is not supported": manifest(
        f"web:\n  image: {IMAGE}\n  build: {{context: ., network: host}}\n"
    ),
    "a variable in the build": manifest(f"web:\n  image: {IMAGE}\n  build: {{context: $DIR}}\n"),
    "build arguments that are not strings": manifest(
        f"web:\n  image: {IMAGE}\n  build: {{args: [{{A: 1}}]}}\n"
    ),
    "several mistakes": manifest("services:\n  a:\n    port: 80\n  b:\n    image: b:TAG\n"),
    "a manifest that is a pipe": a_pipe_as_manifest,
    "another manifest that does not exist": settings(DOCKER_COMPOSE="compose.production.yml"),
    "a key that convox.yml does not have": convox_yml(
        "services:\n  web:\n    build: {path: ., target: production}\n"
    ),
    # services without image
    "a Dockerfile outside the project": convox_yml("services:\n  web:\n    build: ../shop\n"),
    "builds that only their arguments distinguish": convox_yml(
        "services:\n  a:\n    build: {path: ., args: [A=1]}\n  b:\n    build: .\n"
    ),
    "an ARG without a default and an environment that cannot be read": in_turn(
        file("Dockerfile", "FROM scratch\nARG LICENSE_KEY\n"),
        rule("convox env", status=1, err="ERROR: forbidden\n"),
    ),
    "an ARG that docker itself would follow": both(
        file("Dockerfile", "FROM scratch\nARG HTTPS_PROXY\n"),
        STANDIN_APP_ENV="HTTPS_PROXY=http://proxy",
    ),
    "variables that the app does not have": both(
        file("convox.yml", f"{CONVOX_YML}\n    environment: [A=1, SECRET_KEY_BASE, PORT]\n"),
        CONVOX_STANDIN_CLI="v3",
        STANDIN_APP_ENV="PORT=80",
    ),
    "services that a CLI of v2 cannot build": file("convox.yml", CONVOX_YML),
    "services at the top level": convox_yml("web:\n  build: .\n"),
    "a Compose file that v3 does not read": both(
        in_turn(without("Dockerfile"), manifest("services: {redis: {image: redis}}")),
        CONVOX_STANDIN_CLI="v3",
    ),
    "a merge key that brings a build": convox_yml(
        "x: &base\n  build: .\nservices:\n  web:\n    <<: *base\n"
    ),
    "a merge key that brings services": convox_yml(
        "x: &base\n  web: {build: .}\nservices:\n  <<: *base\n"
    ),
    "build arguments that are a text": convox_yml(
        "services:\n  web:\n    build: {path: ., args: FOO=bar}\n"
    ),
    "an environment that is a mapping": convox_yml(f"{CONVOX_YML}\n    environment: {{A: b}}\n"),
    "a name that Convox does not allow": convox_yml("services:\n  my_web:\n    build: .\n"),
    "a manifest whose name ends in yaml": in_turn(
        without("docker-compose.yml"), file("convox.yaml", CONVOX_YML)
    ),
    "a subfolder of the app": in_turn(without("docker-compose.yml"), file("../convox.yml", "")),
    # images of an earlier deploy
    "no result to take images from": settings("--from", "deploy.json"),
    "another file to take images from": taken_from({"tool": "another", "images": [TAKEN]}),
    "a failed deploy to take images from": taken_from({"status": "failed"}),
    "a result without images": taken_from({"images": []}),
    "a result without the image of a service": taken_from(
        {"images": [{**TAKEN, "image": "r.io/other:1"}]}
    ),
    "a result of another service": taken_from({"images": [{**TAKEN, "services": ["worker"]}]}),
    "images that are in the registry of another rack": in_turn(
        convox_yml("services:\n  web:\n    build: .\n"),
        taken_from({"images": [{**TAKEN, "image": ""}]}),
    ),
    "the same file for --from and --result": settings("--from", "a.json", "--result", "a.json"),
    # hooks
    "a hook that is a broken symlink": link("nowhere"),
    "a hook that is a directory": lambda world: (world.app / "deploy" / "after_build.sh").mkdir(
        parents=True
    ),
    "a hook with another name": file("deploy/after-build.sh", "#!/bin/sh\n", 0o755),
    "a hook in another language": file("deploy/before_release.rb", "#!/bin/ruby\n", 0o755),
    "hooks in a directory with another name": file("Deploy/after_build.sh", "#!/bin/sh\n", 0o755),
    # several at once
    "several problems": SEVERAL,
    "several problems found by commands": several_that_programs_find,
    "a hook with Windows line endings": hook("#!/bin/sh\r\nexit 0\r\n"),
    "a hook that names no interpreter": hook("echo hello\n"),
    "a hook whose interpreter is missing": hook("#!/usr/bin/env bosh\n"),
    # the steps
    "a hook that fails": hook("#!/bin/sh\nexit 3\n"),
    "a hook for another machine": hook(b"\x7fELF\0\0"),
    "a hook that dies of a broken pipe": hook("#!/bin/sh\nkill -PIPE $$\n"),
    "a hook that disappears": hook_that("/bin/rm deploy/after_build.sh"),
    "a hook that breaks another": hook_that("/bin/chmod -x deploy/after_build.sh"),
    "a hook that breaks the manifest": hook_that(
        "echo 'services: {web: {build: .}}' >docker-compose.yml"
    ),
    "a hook that edits the manifest too late": hook_that(
        "echo '# more' >>docker-compose.yml", "after_build"
    ),
    "a build that fails": rule("docker build", status=1),
    "a builder that does not load the image": rule("docker build", out="ok\n"),
    "a docker that names no image": rule("docker image inspect", out="ok\n"),
    "a push without a login": both(
        rules(
            docker_push={"status": 1, "err": "no basic auth credentials\n"},
            aws_ecr_create={"status": 254, "err": EXISTS},
        ),
        SKIP_ECR_AUTH="1",
    ),
    "a login that has expired": both(
        rules(
            docker_push={
                "status": 1,
                "err": "unknown: unexpected status from HEAD request to https://r.io/v2/shop/blobs/x: 403 Forbidden\n",
            },
            aws_ecr_create={"status": 254, "err": EXISTS},
        ),
        SKIP_ECR_AUTH="1",
    ),
    "a tag that already exists": both(
        rules(
            docker_push={
                "status": 1,
                "err": "tag invalid: The image tag 'v1' already exists in the 'shop' repository and cannot be"
                " overwritten because the tag is immutable.\n",
            },
            aws_ecr_create={"status": 254, "err": EXISTS},
        ),
        IMAGE_TAG="v1",
    ),
    "a push that another registry denies": in_turn(
        image("docker.io/acme/shop:TAG"),
        rule("docker push", status=1, err="denied: requested access to the resource is denied\n"),
    ),
    "a promote whose log contains a network error": rule(
        "convox releases promote --app",
        status=1,
        err="Readiness probe failed: connection refused\nERROR: timeout\n",
    ),
    "a repository that cannot be created": rules(
        docker_push={"status": 1, "err": NO_REPOSITORY},
        aws_ecr_create={"status": 254, "err": NO_CREATE},
    ),
    "a release that the rack cannot build": rule(
        "convox build --app", status=1, err="pull access denied for shop\nERROR: build failed\n"
    ),
    "a release whose image the rack cannot pull": rule(
        "convox build --app",
        status=1,
        err="Error: no basic auth credentials\nERROR: build failed\n",
    ),
    "an image that the builder does not load": in_turn(
        hook_that("touch ran", "after_build"),
        rule("docker image inspect", status=1, err="Error: No such image: shop:deploy-...\n"),
    ),
    "an image that docker cannot pull for the release": both(
        in_turn(
            file("convox.yml", "services:\n  web:\n    build: .\n  cache:\n    image: redis:7\n"),
            rule(
                "convox build --external",
                status=1,
                err="Error response from daemon: Get https://registry-1.docker.io/v2/: i/o timeout\nERROR: exit status 1\n",
            ),
        ),
        CONVOX_STANDIN_CLI="v3",
    ),
    "an image for another architecture": rule(
        "convox build --app",
        status=1,
        err="no matching manifest for linux/amd64 in the manifest list entries\nERROR: build failed\n",
    ),
    "a release that would drop variables": rule(
        "convox build --app",
        status=1,
        err="ERROR: this build will drop env var(s) that are set in your running release ROLDRELEASE: A, B\n",
    ),
    "a release whose build loses its connection": rule(
        "convox build --app", status=1, err="a log line\nERROR: unexpected EOF\n"
    ),
    "a release whose build takes too long": both(
        rule("convox build --app", hang=True), "--timeout", "0.01", CONVOX_RACK="staging"
    ),
    "a build that names no release": rule("convox build --app", out="OK\n"),
    "a build that names the running release": rule("convox build --app", out="ROLDRELEASE"),
    "a promote that is rolled back": in_turn(
        rule("convox releases promote --app", status=1, err="ERROR: rollback\n"),
        rack("RNEWRELEASE rollback", "ROLDRELEASE rollback", "ROLDRELEASE running"),
    ),
    "a first promote that is rolled back": in_turn(
        rule("convox releases promote --app", status=1, err="ERROR: rollback\n"),
        rack("RNEWRELEASE updating", " running", before=""),
    ),
    "containers that do not become healthy": unhealthy,
    "a promote that is refused as older": in_turn(
        rule(
            "convox releases promote --app",
            status=1,
            out="Promoting RNEWRELEASE... ",
            err="ERROR: can not promote an older release, try rollback\n",
        ),
        rack("RTHEIRXXXXX running"),
    ),
    "a promote during another update": in_turn(
        rule(
            "convox releases promote --app",
            status=1,
            out="Promoting RNEWRELEASE... ",
            err="ERROR: app is currently updating\n",
        ),
        rack("ROLDRELEASE updating", "ROLDRELEASE running"),
    ),
    "a promote over the budget": rule(
        "convox releases promote --app",
        status=1,
        err="ERROR: budget cap exceeded for app shop: spent $120.00 of $100.00 cap this month; recovery options:"
        " (1) raise the cap\n",
    ),
    "a promote after an update that is rolled back": in_turn(
        rule(
            "convox releases promote --app",
            status=1,
            out="Waiting for app to be ready... ",
            err="ERROR: rollback\n",
        ),
        rack("ROLDRELEASE rollback", "ROLDRELEASE running"),
    ),
    "a promote that breaks the app's CloudFormation stack": in_turn(
        rule("convox releases promote --app", status=1, err="ERROR: rollback\n"),
        rack("ROLDRELEASE failed"),
    ),
    "a promote that takes too long": both(
        in_turn(
            rule("convox releases promote --app", status=1, err="ERROR: timeout\n"),
            rack("RNEWRELEASE updating"),
        ),
        *("--timeout", "0.01"),
    ),
    "a promote that loses its connection": both(
        rules(
            convox_releases_promote___app={"status": 1, "err": "ERROR: unexpected EOF\n"},
            convox_api_get={"since": 4, "status": 1, "err": "ERROR: unexpected EOF\n"},
        ),
        CONVOX_PASSWORD="secret",
    ),
    "a release that someone else promotes": in_turn(
        rule("convox releases promote --app", out="OK\n"), rack("ROTHERRELEA running")
    ),
    "a release that someone else has promoted during the build": in_turn(
        created("RTHEIRXXXXX", "2026-11-03T10:00:00Z"),
        rule(
            "convox api get /apps/shop",
            number=2,
            out='{"release": "RTHEIRXXXXX", "status": "running"}',
        ),
    ),
    "another running release": rule("convox releases promote --app", out="OK\n"),
    "a rollback of which only the copy is made": both(
        rule(
            "convox releases rollback --app",
            status=1,
            err="Rolling back to RABCDEFGHIJ... OK, RCOPYXXXXXX\nPromoting RCOPYXXXXXX... ERROR: app is currently"
            " updating\n",
        ),
        *("--rollback", "RABCDEFGHIJ"),
    ),
    "a result that cannot be written": both(
        in_turn(file("results/.keep", ""), hook_that("/bin/rm -r results")),
        *("--result", "results/deploy.json"),
    ),
    "a command that is killed": rule("docker push", signal=signal.SIGKILL),
    "a timeout": both(rule("docker build", hang=True), "--timeout", "0.05"),
}


def variants(mistake: str, shown: str, setting: str, *values: str) -> list[tuple[Any, ...]]:
    """Return other values that make the same mistake. The message shows them instead of `shown`."""
    arrangements = [
        settings(f"{setting}={value}") if setting[0] == "-" else settings(**{setting: value})
        for value in values
    ]
    return [
        (mistake, arrange, repr(shown), repr(value)) for arrange, value in zip(arrangements, values)
    ]


VARIANTS: list[tuple[Any, ...]] = [
    *((mistake, MISTAKES[mistake], "", "") for mistake in ["several problems"]),
    *variants(
        "an app name in upper case", "Shop", "APP_NAME", "my shop", "shop\n", "-shop", "'\"", "büro"
    ),
    *variants("a tag with a slash", "feature/x", "IMAGE_TAG", "-x", "v1\n", "x" * 129),
    *variants(
        "a build ID instead of a release ID", "BABCDEFGHIJ", "--release", "RABCDEFGHIJ\n", "R1"
    ),
    *variants("a timeout that is not a number", "an hour", "DEPLOY_TIMEOUT", "1d"),
    ("a negative timeout", settings("--timeout", "nan"), "-1", "nan"),
    *variants("a URL instead of a host", "https://rack.example.com", "CONVOX_HOST", "a b", "a/b"),
    ("a variable for the tag", image(f"{ECR}/shop:$TAG"), "", ""),
    ("a variable for the tag", image(f"{ECR}/shop:${{TAG:-latest}}"), "", ""),
    (
        "build arguments that are not strings",
        manifest(f"web: {{image: '{IMAGE}', build: {{args: {{A: [x]}}}}}}"),
        "{'A': '1'}",
        "['x']",
    ),
    (
        "build arguments that are not strings",
        manifest(f"web: {{image: '{IMAGE}', build: {{args: {{A: {{B: c}}}}}}}}"),
        "{'A': '1'}",
        "{'B': 'c'}",
    ),
]


def message_of(world: World, arrange: Arrange) -> str:
    world.constants = {"PUSH_PAUSE": 0, "POLL_SECONDS": 0.01, "PATIENCE_SECONDS": 0}
    args, env = arrange(world) or ((), {})
    result = world.home / "result.json"
    world.env["DEPLOY_RESULT"] = str(result)
    ran = world.deploy(*args, env=env)
    assert ran.status != 0
    error = json.loads(result.read_text())["error"] if result.exists() else ""
    above = re.findall("(?m)^  > (.*)$", error)  # what the message does not quote again
    assert bool(above) == ("Its output is above." in ran.err)
    assert [ran.text.splitlines().count(line) for line in above] == [1] * len(above)
    assert "Traceback" not in ran.text
    assert world.nothing_is_left()
    if ran.status == 2:
        changing = ["docker build --tag", "convox build --app", "convox releases promote --app"]
        assert world.commands(*changing) == []
    text = ran.err.replace(f"{sys.executable} {TOOL}", "python3 convox_deploy.py")
    text = text.replace(str(world.home), "/home/me")
    text = re.sub(r"(?<=deploy.json.)\d+", "...", text)
    return re.sub(r"shop:deploy-[0-9a-f]{8}", "shop:deploy-...", text).strip()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_recorded_message(world: World, mistake: str) -> None:
    assert message_of(world, MISTAKES[mistake]) == TEXTS[mistake]


@pytest.mark.parametrize(("mistake", "arrange", "shown", "instead"), VARIANTS)
def test_a_variant_of_a_mistake_gets_its_message_before_any_command_runs(
    world: World, mistake: str, arrange: Arrange, shown: str, instead: str
) -> None:
    assert message_of(world, arrange) == TEXTS[mistake].replace(shown, instead)
    assert world.calls == []


def test_every_recorded_message_belongs_to_a_mistake() -> None:
    assert [*TEXTS] == [*MISTAKES]
