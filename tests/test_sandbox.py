"""Whole deploys with the real docker, a real registry behind a login, and the real aws CLI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TOOL

NewApp = Callable[[str], Path]


def deploy(sandbox: Any, app: Path, *args: str, status: int = 0, **env: str) -> str:
    """Deploys the app in `app`, checks the exit status, and returns all that was said."""
    done = subprocess.run(
        [sys.executable, TOOL, *args],
        cwd=app,
        env={**sandbox.env, "TMPDIR": str(app.parent), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def answer(sandbox: Any, name: str) -> str:
    url = sandbox.check("convox", "services", "--app", name).split()[-1]
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode().strip())


def need_ecr(sandbox: Any) -> None:
    if not sandbox.has_ecr:
        (pytest.fail if os.environ.get("REQUIRE_E2E") else pytest.skip)(
            "There is no ECR without root on Debian."
        )


def add_before_release(app: Path, script: str) -> Path:
    hook = app / "deploy" / "before_release.sh"
    hook.parent.mkdir()
    hook.write_text(script)
    hook.chmod(0o755)
    return hook


def images(sandbox: Any, name: str) -> list[str]:
    listed = sandbox.check("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    return [
        image
        for image in listed
        if f"/{name}:" in image and not image.startswith("convox-standin/")
    ]


@pytest.mark.parametrize("cli", ["2016", "2018", "v2", "v3"])
def test_two_versions_go_live_one_after_the_other(sandbox: Any, new_app: NewApp, cli: str) -> None:
    name = f"shop-{cli}"
    app = new_app(name)
    deploy(sandbox, app, CONVOX_STANDIN_CLI=cli)
    assert answer(sandbox, name) == "v1"
    (app / "www" / "index.html").write_text("v2\n")
    said = deploy(sandbox, app, CONVOX_STANDIN_CLI=cli)
    assert answer(sandbox, name) == "v2"
    release = json.loads(sandbox.check("convox", "api", "get", f"/apps/{name}"))["release"]
    assert f"{name} is now running {release}." in said


def test_an_unchanged_app_deploys_again_under_the_same_tag(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("same")
    deploy(sandbox, app)
    [image] = images(sandbox, "same")
    deploy(sandbox, app)
    assert images(sandbox, "same") == [image]


def test_a_hook_runs_a_one_off_in_the_release_before_it_is_live(
    sandbox: Any, new_app: NewApp
) -> None:
    app = new_app("migrate")
    deploy(sandbox, app)
    (app / "www" / "index.html").write_text("v2\n")
    add_before_release(app, (ROOT / "examples" / "sandbox" / "before_release.sh").read_text())
    said = deploy(sandbox, app, CONVOX_STANDIN_CLI="v3")
    assert "which is not live yet:\nv2\n" in said


def test_a_hook_that_fails_leaves_the_old_version_live_and_the_release_at_hand(
    sandbox: Any, new_app: NewApp
) -> None:
    app = new_app("careful")
    deploy(sandbox, app)
    (app / "www" / "index.html").write_text("v2\n")
    hook = add_before_release(app, "#!/bin/sh\nexit 7\n")
    said = deploy(sandbox, app, status=1)
    assert answer(sandbox, "careful") == "v1"
    hook.unlink()
    resume = said.strip().splitlines()[-1]
    done = subprocess.run(resume, shell=True, cwd="/", env=sandbox.env, check=False)
    assert done.returncode == 0
    assert answer(sandbox, "careful") == "v2"


def test_the_hooks_in_examples_work(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("rails")
    shutil.copytree(ROOT / "examples" / "deploy", app / "deploy")
    bundle = app / "bundle"  # as a Rails app would answer
    bundle.write_text(
        "#!/bin/sh\n"
        '[ "$3" = assets:precompile ] && echo compiled > /www/index.html\n'
        '[ "$3" = db:migrate ] && echo "migrated by what is $(cat /www/index.html)"\nexit 0\n'
    )
    bundle.chmod(0o755)
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("COPY bundle /bin/bundle\n")
    said = deploy(sandbox, app)
    assert "\nmigrated by what is compiled\n" in said
    assert answer(sandbox, "rails") == "compiled"
    assert (app / "REVISION").exists()


def test_several_services_with_builds_of_their_own(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("several")
    (app / "api" / "www").mkdir(parents=True)
    (app / "api" / "www" / "index.html").write_text("api\n")
    (app / "api" / "Dockerfile.api").write_text(
        (app / "Dockerfile").read_text().replace("COPY", "ARG X\nCOPY")
    )
    host = sandbox.registry_host
    (app / "docker-compose.yml").unlink()
    (app / "convox.yml").write_text(
        f"services:\n  web:\n    image: {host}/several:TAG\n    ports: [8080]\n"
        f"  worker:\n    image: {host}/several:TAG\n"
        f"  api:\n    image: {host}/team/api:TAG\n    ports: [8080]\n"
        "    build: {path: api, manifest: Dockerfile.api, args: [X=1]}\n"
    )
    said = deploy(sandbox, app)
    assert said.count("$ docker build") == said.count(" digest: sha256:") == 2
    assert said.count("$ aws ecr create-repository") == 2 * sandbox.has_ecr
    services = sandbox.check("convox", "services", "--app", "several").split()[2:]
    pages = {}
    for service, url in zip(services[::2], services[1::2]):
        with urllib.request.urlopen(url, timeout=10) as response:
            pages[service] = response.read().decode().strip()
    assert pages == {"web": "v1", "api": "api"}


def test_a_rack_that_rolls_back_is_a_failed_deploy(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("broken")
    deploy(sandbox, app)
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write('CMD ["no-such-program"]\n')
    said = deploy(sandbox, app, status=1)
    assert "ERROR: rollback" in said
    assert answer(sandbox, "broken") == "v1"


def test_a_wrong_password_or_app_stops_the_deploy_before_anything_is_built(
    sandbox: Any, new_app: NewApp
) -> None:
    app = new_app("strict")
    said = deploy(sandbox, app, status=2, CONVOX_PASSWORD="wrong")
    assert "Unable to authenticate" in said and "$ docker build" not in said
    said = deploy(sandbox, app, status=2, APP_NAME="nobody")
    assert "no such app: nobody" in said and "Create the app with `convox apps create`" in said


def test_a_deploy_key_deploys_with_no_verify(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("by-key")
    said = deploy(sandbox, app, status=2, CONVOX_PASSWORD="deploy-key")
    assert "Command not supported for deploy key" in said and "needs --no-verify" in said
    said = deploy(sandbox, app, "--no-verify", CONVOX_PASSWORD="deploy-key")
    assert "Nobody checked what is running." in said
    assert answer(sandbox, "by-key") == "v1"


def test_a_push_without_the_ecr_login_is_refused(sandbox: Any, new_app: NewApp) -> None:
    need_ecr(sandbox)
    app = new_app("outsider")
    said = deploy(sandbox, app, status=1, SKIP_ECR_AUTH="1", DOCKER_CONFIG=str(app / "no-login"))
    assert "no basic auth credentials" in said
    assert "push failed:" in said and "Nothing was released or promoted." in said


def test_a_registry_that_is_down_when_the_push_begins_gets_the_image_once_it_is_back(
    sandbox: Any, new_app: NewApp
) -> None:
    need_ecr(sandbox)
    app = new_app("patient")
    process = subprocess.Popen(
        [sys.executable, TOOL],
        cwd=app,
        env=sandbox.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    said = ""
    for line in process.stdout:
        if "] build" in line:
            sandbox.front.stop()
        if "Retrying in 1 s." in line:
            sandbox.front.start()
        said += line
    assert process.wait(120) == 0, said
    assert "warning: `docker push` failed:" in said
    assert answer(sandbox, "patient") == "v1"


def test_a_large_directory_costs_the_rack_nothing(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("large")
    with (app / "dump.sql").open("wb") as dump:
        dump.truncate(300 * 1024 * 1024)
    (app / ".dockerignore").write_text("*\n!www\n")
    deploy(sandbox, app)
    log = Path(sandbox.env["CONVOX_STANDIN"], "uploads").read_text().splitlines()
    [upload] = [line for line in map(json.loads, log) if line["app"] == "large"]
    assert upload["files"] == ["docker-compose.yml"] and upload["bytes"] < 1000


def test_nothing_of_a_deploy_is_left_but_the_pushed_image(
    sandbox: Any, new_app: NewApp, tmp_path: Path
) -> None:
    app = new_app("tidy")
    (tmp_path / "tmp").mkdir()
    before = set(app.rglob("*"))
    deploy(sandbox, app, TMPDIR=str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert set(app.rglob("*")) == before
    assert sandbox.check("docker", "image", "ls", "--quiet", "tidy") == ""


def test_without_ecr_a_registry_on_localhost_takes_the_images(
    sandbox: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the sandbox does not run as root, or not on Debian. The last test: it takes the base image away."""
    from sandbox import ECR, Sandbox

    monkeypatch.setenv("DOCKER_HOST", sandbox.env.get("DOCKER_HOST", ""))
    plain = Sandbox(say=lambda text: None)
    plain.has_ecr = False
    with plain:
        app = tmp_path / "plain"
        shutil.copytree(ROOT / "examples" / "sandbox" / "app", app)
        manifest = app / "docker-compose.yml"
        manifest.write_text(manifest.read_text().replace(ECR, plain.registry_host))
        plain.check("convox", "apps", "create", "plain")
        said = deploy(plain, app)
        assert "aws" not in said
        assert answer(plain, "plain") == "v1"
