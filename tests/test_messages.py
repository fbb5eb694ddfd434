"""Every error message, whole, as it is written down in messages.txt: to be read there one after another."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import ECR, TOOL, World

from convox_deploy import DeployError, read_manifest

IMAGE = f"{ECR}/shop:TAG"
DENIED = (
    "denied: User: arn:aws:iam::123456789012:user/dev is not authorized to perform: ecr:InitiateLayerUpload on"
    " resource: arn:aws:ecr:us-east-1:123456789012:repository/shop"
)


def texts() -> dict[str, str]:
    parts = re.split(r"^--- (.*)\n", (Path(__file__).parent / "messages.txt").read_text(), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2])}


TEXTS = texts()
Arrange = Callable[[World], Any]  # makes the mistake; returns how to deploy: arguments and environment, if any


def rule(start: str, **what: Any) -> Arrange:
    return lambda world: world.rules.update({start: what})


def settings(*args: str, **env: str | None) -> Arrange:
    return lambda world: (args, env)


def gone(*names: str) -> Arrange:
    def arrange(world: World) -> None:
        for name in names:
            (world.app / name if "." in name or name[0].isupper() else world.bin / name).unlink()

    return arrange


def hook(text: str | bytes, mode: int = 0o755) -> Arrange:
    return lambda world: world.write("deploy/after_build.sh", text, mode) and None


def link_to_nowhere(world: World) -> None:
    (world.app / "deploy").mkdir()
    (world.app / "deploy" / "after_build.sh").symlink_to("nowhere")


def directory_for_a_hook(world: World) -> None:
    (world.app / "deploy" / "after_build.sh").mkdir(parents=True)


def two_images_with_one_tag(world: World) -> Any:
    world.write("a/Dockerfile", "FROM scratch\n")
    world.write("docker-compose.yml", f"web:\n  image: {IMAGE}\na:\n  image: {IMAGE}\n  build: a\n")
    return (), {"IMAGE_TAG": "v1"}


def broken_git(world: World) -> None:
    world.add_git()
    world.rules["git"] = {"status": 128, "err": "fatal: detected dubious ownership in repository\n"}


def and_settings(arrange: Arrange, *args: str, **env: str | None) -> Arrange:
    def both(world: World) -> Any:
        arrange(world)
        return args, env

    return both


PLATFORM = settings(DOCKER_DEFAULT_PLATFORM="linux/amd64", STANDIN_PLATFORM="linux/arm64")
MISTAKES: dict[str, Arrange] = {
    # the ten most likely of the first run
    "docker is not running": rule(
        "docker version",
        status=1,
        err="Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?\n",
    ),
    "not logged in to aws": rule(
        "aws ecr get-login-password",
        status=253,
        err='\nUnable to locate credentials. You can configure credentials by running "aws configure".\n',
    ),
    "a wrong password": rule("convox api get", status=1, err="ERROR: Unable to authenticate.\nTry `convox login`.\n"),
    "an app that is not created": rule("convox api get", status=1, err="ERROR: no such app: shop\n"),
    "no :TAG": lambda world: world.write("docker-compose.yml", "web:\n  image: redis:7\n") and None,
    "a hook that is not executable": hook("#!/bin/sh\n", 0o644),
    "an image for another architecture": PLATFORM,
    "a repository in ECR denied": rule("docker push", status=1, err=DENIED),
    "no convox CLI": gone("convox"),
    "a convox CLI that is too old": rule("convox build --help", out="convox build\n"),
    "outside the app's root": gone("docker-compose.yml"),
    # preflight
    "no docker": gone("docker"),
    "no aws CLI": gone("aws"),
    "an aws CLI that is too old": rule(
        "aws ecr get-login-password",
        status=2,
        err="aws: error: argument operation: Invalid choice, valid choices are:\n",
    ),
    "an ECR login that docker refuses": rule("docker login", status=1, err="Error response from daemon: 400\n"),
    "a rack that cannot be reached": rule(
        "convox api get",
        status=1,
        err='ERROR: Get "https://rack.example.com/apps/shop": dial tcp: connect: connection refused\n',
    ),
    "a rack that answers with no JSON": rule("convox api get", out="<html>\n"),
    "git that fails": broken_git,
    "no Dockerfile": gone("Dockerfile"),
    "no build context": lambda world: (
        world.write("docker-compose.yml", f"web: {{image: '{IMAGE}', build: no}}") and None
    ),
    "one tag for two images": two_images_with_one_tag,
    "a hook that is a dangling link": link_to_nowhere,
    "a hook that is a directory": directory_for_a_hook,
    "a hook without a first line": hook("exit 0\n"),
    "a hook for a shell that is not here": hook("#!/no/such/shell\n"),
    "a hook with Windows line ends": hook(b"#!/bin/sh\r\n"),
    # settings
    "an app's name in upper case": settings(APP_NAME="Shop"),
    "a tag with a slash": settings(IMAGE_TAG="feature/x"),
    "a build's id for a release": settings("--release", "BABCDEFGHIJ"),
    "an empty option": settings("--release", ""),
    "a release and no promote": settings("--release", "RABCDEFGHIJ", "--no-promote"),
    "a release and build arguments": settings("--release", "RABCDEFGHIJ", "--", "--pull"),
    "an app as an argument": settings("shop"),
    "quiet and dry run": settings("--quiet", "--dry-run"),
    "two racks": settings(CONVOX_RACK="a", RACK_NAME="b"),
    "a rack and a URL": settings(CONVOX_RACK="a", RACK_URL="https://x@y"),
    "a URL of another host": settings(RACK_URL="https://convox:x@other"),
    "a URL for a host": settings(CONVOX_HOST="https://rack.example.com"),
    "a host without a password": settings(CONVOX_PASSWORD=None),
    "a result nowhere": settings("--result", "no/such/dir.json"),
    "a time-out in words": settings(DEPLOY_TIMEOUT="an hour"),
    # the steps
    "a hook that fails": hook("#!/bin/sh\nexit 3\n"),
    "a build that fails": rule("docker build", status=1),
    "a build without an image": rule("docker build", out="ok\n"),
    "an image that a hook removed": rule("docker image inspect --format {{.Id}}", status=1, err="No such image\n"),
    "a lookup that fails": rule("aws ecr describe", status=255, err="Could not resolve host\n"),
    "a push without a login": and_settings(
        rule("docker push", status=1, err="no basic auth credentials\n"), SKIP_ECR_AUTH="1"
    ),
    "a tag that is taken": and_settings(
        rule(
            "docker push",
            status=1,
            err="tag invalid: The image tag 'v1' already exists in the 'shop' repository and cannot be overwritten"
            " because the tag is immutable.\n",
        ),
        IMAGE_TAG="v1",
    ),
    "a repository that is not there": rule(
        "docker push", status=1, err="name unknown: The repository with name 'shop' does not exist in the registry\n"
    ),
    "a push that pushed nothing": rule("docker push", out="ok\n"),
    "a release that the rack cannot build": rule(
        "convox build --app", status=1, err="pull access denied for shop\nERROR: build failed\n"
    ),
    "a release whose image the rack may not pull": rule(
        "convox build --app", status=1, err="Error: no basic auth credentials\nERROR: build failed\n"
    ),
    "a build that names no release": rule("convox build --app", out="OK\n"),
    "a promote that is rolled back": rule("convox releases promote --app", status=1, err="ERROR: rollback\n"),
    "another release that runs": rule("convox releases promote --app", out="OK\n"),
    "a command that is ended": rule("docker push", signal=signal.SIGTERM),
    "a time-out": and_settings(rule("docker build", hang=True), "--timeout", "0.02"),
}

MANIFESTS = {
    "nothing in the manifest": "",
    "a tab in the manifest": "services:\n  web:\n\timage: x",
    "two documents": "a: 1\n---\nb: 2",
    "no text": "\xff\xfe",
    "nested too deeply": "[" * 2000,
    "a key twice": f"web:\n  image: {IMAGE}\n  image: {IMAGE}\n",
    "a build and no image": "web:\n  build: .\n",
    "a build and another image": "web:\n  build: .\n  image: r.io/shop:latest\n",
    "a variable in the image": "web:\n  image: ${REPO}:TAG\n",
    "no registry": "web:\n  image: shop:TAG\n",
    "an image in upper case": f"web:\n  image: {ECR}/Shop:TAG\n",
    "white space behind TAG": "web:\n  image: 'r.io/shop:TAG '\n",
    "build arguments as a text": f"web:\n  image: {IMAGE}\n  build: {{args: A=1}}\n",
    "an image that is a list": "web:\n  image: [x]\n",
    "an image with escapes": f'web:\n  image: "{ECR}/shop:T\\x41G"\n',
    "a build option of another kind": f"web:\n  image: {IMAGE}\n  build: {{context: ., cache_from: [x]}}\n",
    "a variable in the build": f"web:\n  image: {IMAGE}\n  build: {{context: $DIR}}\n",
    "an image shared by alias": f"a:\n  image: &i {IMAGE}\n  build: one\nb:\n  image: *i\n  build: two\n",
}


def message_of(world: World, mistake: str) -> str:
    args, env = MISTAKES[mistake](world) or ((), {})
    ran = world.deploy(*args, env=env)
    assert ran.status != 0
    assert "Traceback" not in ran.text
    assert world.nothing_is_left()
    if ran.status == 2:
        assert world.commands("docker build", "convox build --app", "convox releases promote --app") == []
    text = ran.err.replace(str(TOOL), "./convox_deploy.py")
    return re.sub(r"shop:web-[0-9a-f]{8}", "shop:web-...", text).strip()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_the_message_that_is_written_down(world: World, mistake: str) -> None:
    assert message_of(world, mistake) == TEXTS[mistake]


@pytest.mark.parametrize("mistake", MANIFESTS)
def test_a_mistake_in_the_manifest_gets_the_message_that_is_written_down(tmp_path: Path, mistake: str) -> None:
    os.chdir(tmp_path)
    Path("convox.yml").write_bytes(MANIFESTS[mistake].encode("latin-1"))
    with pytest.raises(DeployError) as caught:
        read_manifest("convox.yml")
    assert str(caught.value) == TEXTS[mistake]


def test_no_message_is_written_down_that_is_not_given() -> None:
    assert TEXTS.keys() == {*MISTAKES, *MANIFESTS}
