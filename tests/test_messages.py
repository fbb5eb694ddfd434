"""Every error message in full, as recorded in messages.txt, where they can be read one after another."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import ECR, TOOL, World

from convox_deploy import DeployError, Manifest

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


def rule(start: str, **what: Any) -> Arrange:
    return lambda world: world.rules.update({start: what})


def rules(**what: dict[str, Any]) -> Arrange:
    return lambda world: world.rules.update(
        {start.replace("_", " "): how for start, how in what.items()}
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


def image(name: str) -> Arrange:
    return file("docker-compose.yml", f"web:\n  image: {name}\n")


def link(target: str) -> Arrange:
    def arrange(world: World) -> None:
        (world.app / "deploy").mkdir()
        (world.app / "deploy" / "after_build.sh").symlink_to(target)

    return arrange


def two_images_with_one_tag(world: World) -> Any:
    world.write("a/Dockerfile", "FROM scratch\n")
    world.write("docker-compose.yml", f"web:\n  image: {IMAGE}\na:\n  image: {IMAGE}\n  build: a\n")
    return (), {"IMAGE_TAG": "v1"}


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


def under_another_name(name: str) -> Arrange:
    def arrange(world: World) -> None:
        (world.app / "docker-compose.yml").rename(world.app / name)

    return arrange


def in_a_subdirectory(world: World) -> None:
    world.app = world.app / "lib"
    world.app.mkdir()


def several(world: World) -> Any:
    world.write("deploy/before_build.sh", "#!/bin/sh\n")
    world.write("docker-compose.yml", "web:\n  build: .\n")
    return (), {"IMAGE_TAG": "a/b"}


def several_that_programs_find(world: World) -> None:
    world.rules["docker version"] = {"status": 1, "err": "Cannot connect to the Docker daemon\n"}
    world.rules["convox api get"] = {"status": 1, "err": "ERROR: no such app: shop\n"}


def hook_that(script: str, name: str = "before_build") -> Arrange:
    def arrange(world: World) -> None:
        for each in ("before_build", "after_build", "before_release"):
            world.write(f"deploy/{each}.sh", "#!/bin/sh\n", 0o755)
        world.write(f"deploy/{name}.sh", f"#!/bin/sh\n{script}\n", 0o755)

    return arrange


LOCKED_OUT = {"status": 1, "err": "ERROR: forbidden\n"}
MISTAKES: dict[str, Arrange] = {
    # the most likely mistakes on a first run
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
    "a wrong password": rule(
        "convox api get", status=1, err="ERROR: Unable to authenticate.\nTry `convox login`.\n"
    ),
    "an app that does not exist": rule(
        "convox api get", status=1, err="ERROR: no such app: shop\n"
    ),
    "no :TAG": image("redis:7"),
    "a hook that is not executable": hook("#!/bin/sh\n", 0o644),
    "a push that is denied": rules(
        docker_push={"status": 1, "err": DENIED}, aws_ecr_create={"status": 254, "err": EXISTS}
    ),
    "no convox CLI": without("convox"),
    "a convox CLI that is too old": rule("convox build --help", out="convox build\n"),
    "outside the project root": without("docker-compose.yml"),
    # options and variables
    "an option of docker build": settings("--platform", "linux/amd64"),
    "an unexpected argument": settings("shop"),
    "promote as an argument": settings("promote", "RABCDEFGHIJ"),
    "help as an argument": settings("help"),
    "deploy as an argument": settings("deploy"),
    "an app name in upper case": settings(APP_NAME="Shop"),
    "a tag with a slash": settings(IMAGE_TAG="feature/x"),
    "a build ID instead of a release ID": settings("--release", "BABCDEFGHIJ"),
    "an empty option": settings("--release", ""),
    "a release with --no-promote": settings("--release", "RABCDEFGHIJ", "--no-promote"),
    "a build that pushes": settings("--", "--push"),
    "a timeout that is not a number": settings(DEPLOY_TIMEOUT="an hour"),
    "a result in a missing directory": settings("--result", "no/such/dir.json"),
    "a result that would replace the manifest": settings("--result", "docker-compose.yml"),
    # the rack
    "a rack and a URL": settings(
        CONVOX_RACK="a", RACK_URL="https://x:password@y", CONVOX_HOST=None, CONVOX_PASSWORD=None
    ),
    "a URL with another host": settings(RACK_URL="https://convox:x@other"),
    "a URL without a host": settings(
        RACK_URL="rack.example.com", CONVOX_HOST=None, CONVOX_PASSWORD=None
    ),
    "a URL instead of a host": settings(CONVOX_HOST="https://rack.example.com"),
    "a host with a newline": settings(CONVOX_HOST="rack.example.com\n"),
    "a password with a newline": settings(CONVOX_PASSWORD="secret\n"),
    "a host without a password": settings(CONVOX_PASSWORD=None),
    "a password without a host": settings(CONVOX_HOST=None),
    "a password under a wrong name": settings(CONVOX_PASSWORD=None, CONVOX_PASS="secret"),
    "a host under a wrong name": settings(CONVOX_HOST=None, CONVOX_HOSTNAME="rack.example.com"),
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
    "credentials that cannot read the app": rule("convox api get", **LOCKED_OUT),
    # a manifest with another name or in another directory
    "compose.yaml": under_another_name("compose.yaml"),
    "docker-compose.yaml": under_another_name("docker-compose.yaml"),
    "a subdirectory": in_a_subdirectory,
    # programs
    "no docker": without("docker"),
    "no aws CLI": without("aws"),
    "an aws CLI that is too old": rule(
        "aws ecr get-login-password",
        status=2,
        err="aws: error: argument operation: Invalid choice, valid choices are:\n",
    ),
    "an ECR login that docker refuses": rule(
        "docker login", status=1, err="Error response from daemon: 400\n"
    ),
    "git that fails": broken_git,
    "git without a commit": git_without_a_commit,
    # builds
    "no Dockerfile": without("Dockerfile"),
    "a missing build context": file("docker-compose.yml", f"web: {{image: '{IMAGE}', build: no}}"),
    "one tag for two images": two_images_with_one_tag,
    "an image shared by alias": file(
        "docker-compose.yml",
        f"a:\n  image: &i {IMAGE}\n  build: .\nb:\n  image: *i\n  build: {{context: ., target: b}}\n",
    ),
    # hooks
    "a hook that is a broken symlink": link("nowhere"),
    "a hook that is a directory": lambda world: (world.app / "deploy" / "after_build.sh").mkdir(
        parents=True
    ),
    "a hook without a shebang line": hook("exit 0\n"),
    "a hook whose interpreter does not exist": hook("#!/no/such/shell\n"),
    "a hook whose interpreter env cannot find": hook("#!/usr/bin/env bashh\n"),
    "a hook with Windows line endings": hook(b"#!/bin/sh\r\n"),
    "a hook with another name": file("deploy/after-build.sh", "#!/bin/sh\n", 0o755),
    # several at once
    "several problems": several,
    "several problems found by commands": several_that_programs_find,
    # the steps
    "a hook that fails": hook("#!/bin/sh\nexit 3\n"),
    "a hook that disappears": hook_that("/bin/rm deploy/after_build.sh"),
    "a hook that breaks another": hook_that("/bin/chmod -x deploy/after_build.sh"),
    "a hook that breaks the manifest": hook_that("echo 'web: {build: .}' >docker-compose.yml"),
    "a hook that edits the manifest too late": hook_that(
        "echo '# more' >>docker-compose.yml", "after_build"
    ),
    "a build that fails": rule("docker build", status=1),
    "a builder that does not load the image": rule("docker build", out="ok\n"),
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
    "a switch of racks during the build": both(
        rule(
            "convox api get /apps/shop",
            sequence=[
                {"out": '{"release": "ROLDRELEASE", "status": "running"}'},
                {"out": '{"release": "ROTHERRACKS", "status": "running"}'},
            ],
        ),
        CONVOX_HOST=None,
        CONVOX_PASSWORD=None,
    ),
    "a repository that cannot be created": rules(
        docker_push={"status": 1, "err": NO_REPOSITORY},
        aws_ecr_create={"status": 254, "err": NO_CREATE},
    ),
    "a push that pushed nothing": rule("docker push", out="ok\n"),
    "a release that the rack cannot build": rule(
        "convox build --app", status=1, err="pull access denied for shop\nERROR: build failed\n"
    ),
    "a release whose image the rack cannot pull": rule(
        "convox build --app",
        status=1,
        err="Error: no basic auth credentials\nERROR: build failed\n",
    ),
    "an image for another architecture": rule(
        "convox build --app",
        status=1,
        err="no matching manifest for linux/amd64 in the manifest list entries\nERROR: build failed\n",
    ),
    "a build that names no release": rule("convox build --app", out="OK\n"),
    "a build that names the running release": rule("convox build --app", out="ROLDRELEASE"),
    "a promote that is rolled back": rule(
        "convox releases promote --app", status=1, err="ERROR: rollback\n"
    ),
    "another running release": rule("convox releases promote --app", out="OK\n"),
    "a command that is killed": rule("docker push", signal=signal.SIGKILL),
    "a timeout": both(rule("docker build", hang=True), "--timeout", "0.3s"),
}

MANIFESTS = {
    "an empty manifest": "",
    "a manifest without services": "just a text",
    "a tab in the manifest": "services:\n  web:\n\timage: x",
    "two documents": "a: 1\n---\nb: 2",
    "a manifest that is not text": "\xff\xfe",
    "a manifest that is nested too deeply": "[" * 2000,
    "a duplicate key": f"web:\n  image: {IMAGE}\n  image: {IMAGE}\n",
    "a build without an image": "web:\n  build: .\n",
    "a build and another image": "web:\n  build: .\n  image: r.io/shop:latest\n",
    "neither image nor build": f"services:\n  api:\n    image: {IMAGE}\n  web:\n    port: 3000\n",
    "a variable in the image": "web:\n  image: ${REPO}:TAG\n",
    "a variable for the tag": f"web:\n  image: {ECR}/shop:${{TAG}}\n",
    "the tag in lower case": f"web:\n  image: {ECR}/shop:tag\n",
    "trailing whitespace after TAG": "web:\n  image: 'r.io/shop:TAG '\n",
    "no registry": "web:\n  image: shop:TAG\n",
    "an image in upper case": f"web:\n  image: {ECR}/Shop:TAG\n",
    "an image with escapes": f'web:\n  image: "{ECR}/shop:T\\x41G"\n',
    "a build option that is not supported": f"web:\n  image: {IMAGE}\n  build: {{context: ., cache_from: [x]}}\n",
    "a variable in the build": f"web:\n  image: {IMAGE}\n  build: {{context: $DIR}}\n",
    "build arguments that are not strings": f"web:\n  image: {IMAGE}\n  build: {{args: [{{A: 1}}]}}\n",
    "several mistakes": "services:\n  a:\n    build: .\n  b:\n    image: b:TAG\n",
}


def message_of(world: World, mistake: str) -> str:
    args, env = MISTAKES[mistake](world) or ((), {})
    ran = world.deploy(*args, env=env)
    assert ran.status != 0
    assert "Traceback" not in ran.text
    assert world.nothing_is_left()
    if ran.status == 2:
        assert (
            world.commands("docker build", "convox build --app", "convox releases promote --app")
            == []
        )
    text = ran.err.replace(f"{sys.executable} {TOOL}", "python3 convox_deploy.py").replace(
        str(world.home), "/home/me"
    )
    return re.sub(r"shop:deploy-[0-9a-f]{8}", "shop:deploy-...", text).strip()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_recorded_message(world: World, mistake: str) -> None:
    assert message_of(world, mistake) == TEXTS[mistake]


def message_of_manifest(directory: Path, mistake: str) -> str:
    os.chdir(directory)
    Path("convox.yml").write_bytes(MANIFESTS[mistake].encode("latin-1"))
    with pytest.raises(DeployError) as caught:
        Manifest.load("convox.yml")
    return str(caught.value).strip()


@pytest.mark.parametrize("mistake", MANIFESTS)
def test_a_mistake_in_the_manifest_gets_the_recorded_message(tmp_path: Path, mistake: str) -> None:
    assert message_of_manifest(tmp_path, mistake) == TEXTS[mistake]


def test_every_recorded_message_belongs_to_a_mistake() -> None:
    assert TEXTS.keys() == {*MISTAKES, *MANIFESTS}
