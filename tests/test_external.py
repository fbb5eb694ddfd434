"""`convox build --external`: images built here go to the rack's own registry, and the manifest stays as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TOOL, add_context, documented_copy_of_a_build, name_for
from test_sandbox import ALL_OUTPUT, is_running, require_ecr

from sandbox import wait_for  # isort: skip

SAMPLE = ROOT / "examples" / "sandbox" / "app"
BY_URL = "https://convox:sandbox-password@rack.sandbox"
UNKNOWN = "(name unknown|error from registry): "  # the latter with the containerd image store
THREE_SERVICES = """\
services:
  web:
    build: .
    port: 8080
  job:
    build: .
    port: 8080
  worker:
    build:
      path: worker
      manifest: Dockerfile.prod
    port: 8080
"""


with_buildkit, with_the_legacy_builder = (
    pytest.mark.parametrize("builder", [name], indirect=True)
    for name in ("BuildKit", "legacy builder")
)


class Rack:
    """The rack, used with a v3 CLI and one of the builders."""

    def __init__(self, sandbox: Any, builder: dict[str, str]) -> None:
        self.sandbox = sandbox
        self.env = {**builder, "CONVOX_STANDIN_CLI": "v3", "RACK_URL": BY_URL}
        self.state = Path(sandbox.env["CONVOX_STANDIN"])
        self.registry = json.loads((self.state / "own-registry.json").read_text())

    def run(self, *argv: str, **how: Any) -> Any:
        return self.sandbox.run(*argv, **{"env": self.env, **how})

    def check(self, *argv: str, **how: Any) -> str:
        return str(self.sandbox.check(*argv, **{"env": self.env, **how}))

    def build(self, app: str, directory: Path) -> Any:
        about = ["--description", "Sell more", "--manifest", "convox.yml", "--id"]
        return self.run("convox", "build", "--external", "--app", app, *about, str(directory))

    def builds(self, app: str) -> list[str]:
        """Return the status of each build, the newest first."""
        lines = self.check("convox", "builds", "--app", app).splitlines()[1:]
        return [line.split()[1] for line in lines]

    def releases(self, app: str) -> list[Any]:
        return list(json.loads(self.check("convox", "api", "get", f"/apps/{app}/releases")))

    def pages(self, app: str) -> dict[str, str]:
        """Return each service's response."""
        words = self.check("convox", "services", "--app", app).split()[2:]
        pages = {}
        for service, url in zip(words[::2], words[1::2]):
            with urllib.request.urlopen(url, timeout=10) as response:
                pages[service] = response.read().decode().strip()
        return pages

    def layers(self, image: str) -> str:
        return self.check("docker", "image", "inspect", "--format", "{{json .RootFS}}", image)

    def forget(self, *names: str) -> None:
        """Remove local images by parts of their names."""
        listed = self.check("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}")
        found = [line for line in listed.split() if any(name in line for name in names)]
        self.check("docker", "image", "rm", "--force", *found)


@pytest.fixture
def rack(sandbox: Any, builder: dict[str, str]) -> Rack:
    return Rack(sandbox, builder)


@pytest.fixture
def new(rack: Rack, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that creates an app on the rack, and a directory with a manifest and other files."""

    def make(name: str, manifest: str, files: Iterable[tuple[str, str]] = ()) -> Path:
        directory = tmp_path / name
        for path, text in [("convox.yml", manifest), *files]:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
        rack.check("convox", "apps", "create", name)
        return directory

    return make


def server(page: str) -> str:
    """Return a Dockerfile for an image that serves a page."""
    return (
        f"FROM convox-sandbox-base\nRUN mkdir /www && echo {page} >/www/index.html\n"
        'CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]\n'
    )


def build_local(rack: Rack, image: str, dockerfile: str) -> None:
    rack.check("docker", "build", "--tag", image, "-", input=dockerfile)


@with_buildkit
def test_a_release_runs_images_that_were_built_before(rack: Rack, new: Any) -> None:
    """A Dockerfile of one line, FROM a local image, makes the CLI push that image."""
    name = name_for(rack.env, "one-line")
    one_line = [
        ("Dockerfile", f"FROM {name}:web\n"),
        ("worker/Dockerfile.prod", f"FROM {name}:worker\n"),
    ]
    directory = new(name, THREE_SERVICES, one_line)
    for service in ("web", "worker"):
        build_local(rack, f"{name}:{service}", server(f"{name}-{service}"))
    built = rack.build(name, directory)
    assert built.returncode == 0, built.stderr
    assert re.fullmatch("R[A-Z]+", built.stdout)
    assert built.stderr.count("Building: ") == 2
    assert built.stderr.count("Running: docker push ") == 3
    newest, first = rack.releases(name)
    assert newest["id"] == built.stdout and newest["build"] == first["build"]
    assert (newest["description"], first["description"]) == ("Sell more", "")
    assert newest["manifest"] == THREE_SERVICES
    assert rack.builds(name) == ["complete"]
    tag = f"web.{newest['build']}"
    for image in (f"sandbox/{name}:{tag}", f"{rack.registry['host']}/{name}:{tag}"):
        assert rack.layers(image) == rack.layers(f"{name}:web")

    rack.forget(f"{name}:", *re.findall("docker tag ([0-9a-f]{40}) ", built.stderr))
    rack.check("convox", "releases", "promote", "--app", name, built.stdout)
    page = f"{name}-web"
    assert rack.pages(name) == {"web": page, "job": page, "worker": f"{name}-worker"}


def test_an_image_for_another_platform_must_be_named_with_it(rack: Rack, new: Any) -> None:
    """Otherwise BuildKit looks for an image of the engine's own platform, on Docker Hub."""
    name = name_for(rack.env, "foreign")
    image, text = f"{name}:web", "FROM scratch\nCOPY convox.yml /\n"
    directory = new(name, "services:\n  web: {}\n", [("Dockerfile", text)])
    platform = ["--platform", "linux/s390x"]
    rack.check("docker", "build", *platform, "--tag", image, str(directory))
    (directory / "Dockerfile").write_text(f"FROM --platform=linux/s390x {image}\n")
    built = rack.build(name, directory)
    assert built.returncode == 0, built.stderr
    pushed = f"{rack.registry['host']}/{name}:web.{rack.releases(name)[0]['build']}"
    inspect = ["docker", "image", "inspect", "--format", "{{.Os}}/{{.Architecture}}"]
    assert rack.check(*inspect, pushed) == "linux/s390x\n"
    (directory / "Dockerfile").write_text(f"FROM {image}\n")
    assert rack.build(name, directory).returncode == (rack.env["DOCKER_BUILDKIT"] == "1")


@with_the_legacy_builder
def test_the_environment_reaches_the_args_of_a_dockerfile(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "args")
    dockerfile = server("$GREETING-$NAME").replace("RUN", "ARG GREETING\nARG NAME=world\nRUN")
    directory = new(name, "services:\n  web:\n    port: 8080\n", [("Dockerfile", dockerfile)])
    rack.check("convox", "env", "set", "--app", name, "GREETING=hello", "OTHER=x")
    built = rack.build(name, directory)
    assert built.returncode == 0, built.stderr
    rack.check("convox", "releases", "promote", "--app", name, built.stdout)
    assert rack.pages(name) == {"web": "hello-world"}


@with_buildkit
def test_images_of_others_are_pulled_and_pushed(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "mixed")
    image = f"{rack.registry['host']}/{name}-theirs:1"
    build_local(rack, image, server("theirs"))
    login = ["docker", "login", "--username", rack.registry["username"], "--password-stdin"]
    rack.check(*login, rack.registry["host"], input=rack.registry["password"])
    rack.check("docker", "push", image)
    rack.forget(image)
    manifest = f"services:\n  web:\n    image: {image}\n    port: 8080\n  job: {{}}\n"
    directory = new(name, manifest, [("Dockerfile", server("ours"))])
    built = rack.build(name, directory)
    assert built.returncode == 0, built.stderr
    assert f"Running: docker pull {image}\n" in built.stderr
    rack.check("convox", "releases", "promote", "--app", name, built.stdout)
    assert rack.pages(name) == {"web": "theirs"}


@pytest.fixture
def own_registry(rack: Rack) -> Any:
    """Return a function that changes the rack's answer about its own registry until the end of the test."""
    path = rack.state / "own-registry.json"
    yield lambda **changes: path.write_text(json.dumps({**rack.registry, **changes}))
    path.write_text(json.dumps(rack.registry))


def refuse_pushes(sandbox: Any, own_registry: Any) -> None:
    """Let the rack's own registry be ECR, where a repository that does not exist refuses a push."""
    from sandbox import ECR, REGISTRY_PASSWORD

    require_ecr(sandbox)
    own_registry(host=ECR, username="AWS", password=REGISTRY_PASSWORD)


@with_buildkit
def test_a_push_that_fails_fails_the_build(
    sandbox: Any, rack: Rack, new: Any, own_registry: Any
) -> None:
    name = name_for(rack.env, "refused")
    directory = new(name, "services:\n  web: {}\n", [("Dockerfile", server("v1"))])
    refuse_pushes(sandbox, own_registry)
    built = rack.build(name, directory)
    assert (built.returncode, built.stdout) == (1, "")
    assert "Login Succeeded" in built.stderr
    assert re.search(f"\nERROR: .*{UNKNOWN}.*'{name}' does not exist", built.stderr, re.DOTALL)
    assert rack.builds(name) == ["failed"] and rack.releases(name) == []


@with_buildkit
def test_a_login_that_fails_fails_the_build(rack: Rack, new: Any, own_registry: Any) -> None:
    name = name_for(rack.env, "stranger")
    directory = new(name, "services:\n  web: {}\n", [("Dockerfile", server("v1"))])
    own_registry(password="wrong")
    built = rack.build(name, directory)
    assert (built.returncode, built.stdout) == (1, "")
    assert built.stderr.endswith("ERROR: exit status 1\n")
    assert rack.builds(name) == ["failed"]


@with_the_legacy_builder
@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("Dockerfile", "RUN nothing\n", "exit status 1"),
        ("other", "", "open .*/Dockerfile: no such"),
    ],
)
def test_a_build_that_fails(rack: Rack, new: Any, path: str, text: str, message: str) -> None:
    name = name_for(rack.env, f"failed-{path}".lower())
    built = rack.build(name, new(name, "services:\n  web: {}\n", [(path, text)]))
    assert (built.returncode, built.stdout) == (1, "")
    assert re.search(f"ERROR: {message}.*\n$", built.stderr)
    assert rack.builds(name) == ["failed"]


@with_buildkit
def test_a_build_whose_cli_is_killed_stays_running(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "killed")
    slow = server("v1").replace("RUN", "RUN echo begun; sleep 600.7;")
    directory = new(name, "services:\n  web: {}\n", [("Dockerfile", slow)])
    command = ["convox", "build", "--external", "--app", name, "--manifest", "convox.yml"]
    started: Any = subprocess.Popen(
        [*command, str(directory)], env=rack.env, start_new_session=True, **ALL_OUTPUT
    )
    with started as process:
        for line in process.stdout:
            if re.search(r"^(#\d+ [\d.]+ )?begun$", line):
                os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
    assert rack.builds(name) == ["running"]
    wait_for(lambda: not is_running("sleep\000600.7"), "the end of the build step")


@with_buildkit
@pytest.mark.parametrize("option", [[], ["--no-cache"]])
def test_without_id_all_is_on_stdout(rack: Rack, new: Any, option: list[str]) -> None:
    name = name_for(rack.env, f"plain{len(option)}")
    directory = new(name, "services:\n  web: {}\n", [("Dockerfile", server("v1"))])
    words = ["--app", name, "--manifest", "convox.yml", *option, str(directory)]
    output = rack.check("convox", "build", "--external", *words)
    assert "Building: ." in output
    assert re.search(r"\nBuild:   B[A-Z]+\nRelease: R[A-Z]+\n$", output)


# --- deploys --------------------------------------------------------------------------

AFTER_BUILD = """\
#!/bin/sh
set -e
container=$(docker create "$DOCKER_TAG_WORKER" sh -c "echo committed >/www/index.html")
docker start --attach "$container"
docker commit --change 'CMD ["httpd", "-f", "-p", "8080", "-h", "/www"]' "$container" "$DOCKER_TAG_WORKER"
docker rm "$container"
"""
BEFORE_RELEASE = """\
#!/bin/sh
convox run --app "$APP_NAME" --release "$RELEASE_ID" worker -- sh -c 'echo "the worker is $(cat /www/index.html)"'
"""


def three_services(new: Any, name: str) -> Path:
    worker = server(f"{name}-worker").replace("FROM", "# not the context\nFROM")
    files = [("Dockerfile", server(f"{name}-web")), ("worker/Dockerfile.prod", worker)]
    return Path(new(name, THREE_SERVICES, files))


def add_hooks(app: Path, **scripts: str) -> None:
    for name, script in scripts.items():
        hook = app / "deploy" / f"{name}.sh"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(script)
        hook.chmod(0o755)


def start(rack: Rack, app: Path, *args: str, **env: str) -> Any:
    """Start a deploy of an app by a v3 CLI, with only host and password of the rack."""
    by_host = {name: value for name, value in rack.env.items() if name != "RACK_URL"}
    return subprocess.Popen(
        [sys.executable, TOOL, *args], cwd=app, env={**by_host, "TMPDIR": str(app.parent), **env}, **ALL_OUTPUT
    )  # fmt: skip


def deploy(rack: Rack, app: Path, *args: str, status: int = 0, **env: str) -> str:
    with start(rack, app, *args, **env) as process:
        output = str(process.communicate(timeout=120)[0])
    assert process.returncode == status, output
    return output


def uploads(rack: Rack, name: str) -> list[Any]:
    lines = map(json.loads, (rack.state / "uploads").read_text().splitlines())
    return [upload["files"] for upload in lines if upload["app"] == name]


def local_images(rack: Rack) -> set[str]:
    """Return the names that the tool gives to images in docker, and removes in the end."""
    listed = rack.check("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    return {name for name in listed if ":deploy-" in name}


def test_an_unmodified_convox_yml_with_hooks(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "as-it-is")
    app = three_services(new, name)
    add_hooks(app, after_build=AFTER_BUILD, before_release=BEFORE_RELEASE)
    before = local_images(rack)
    output = deploy(rack, app)
    assert output.count("$ docker build") == 2
    assert "\nthe worker is committed\n" in output
    assert "aws" not in output and "docker login" not in output
    newest = rack.releases(name)[0]
    assert newest["manifest"] == THREE_SERVICES
    assert f"{name} is now running {newest['id']}" in output
    page = f"{name}-web"
    assert rack.pages(name) == {"web": page, "job": page, "worker": "committed"}
    assert uploads(rack, name) == [["Dockerfile", "convox.yml", "worker/Dockerfile.prod"]]
    assert local_images(rack) == before
    assert [path for path in app.parent.iterdir() if path != app] == []


@with_buildkit
def test_the_build_that_runs_in_staging_is_released_in_production(rack: Rack, new: Any) -> None:
    """With the lines of docs/staging-and-production.md."""
    staging, production = documented_copy_of_a_build()
    app = three_services(new, "your-app-staging")
    shutil.copy(TOOL, app)
    rack.check("convox", "apps", "create", "your-app")
    env = {**rack.env, "PATH": f"{Path(sys.executable).parent}:{rack.env['PATH']}"}
    rack.check("/bin/sh", "-ec", staging, cwd=app, env=env)
    output = rack.check("/bin/sh", "-ec", production, cwd=app, env=env)
    assert "$ docker" not in output and "your-app is now running R" in output
    assert rack.pages("your-app") == rack.pages("your-app-staging")


@pytest.fixture
def desktop(sandbox: Any, builder: dict[str, str], tmp_path: Path) -> Rack:
    """The rack, used with a docker whose context is not `default`, like Docker Desktop's, and with buildx."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker").symlink_to(ROOT / "tests" / "standin-buildx")
    env = {
        **builder,
        "REAL_DOCKER": str(shutil.which("docker", path=builder["PATH"])),
        "PATH": os.pathsep.join([str(programs), builder["PATH"]]),
        "DOCKER_CONFIG": str(add_context(sandbox, tmp_path)),
    }
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        env.pop(name, None)
    return Rack(sandbox, env)


@with_buildkit
def test_the_builder_of_the_current_context_builds(desktop: Rack, rack: Rack, new: Any) -> None:
    """buildx refuses the builder of any other context, even that of `default` for the same engine."""
    name = name_for(rack.env, "desktop")
    app = three_services(new, name)
    others = {**desktop.env, "BUILDX_BUILDER": "default"}
    refused = desktop.run("docker", "build", str(app), env=others)
    text = 'ERROR: use `docker --context=default buildx` to switch to context "default"\n'
    assert refused.returncode == 1 and text in refused.stderr
    deploy(desktop, app, "--no-promote")
    rack.check("convox", "releases", "promote", "--app", name, rack.releases(name)[0]["id"])
    assert rack.pages(name)["worker"] == f"{name}-worker"


@with_buildkit
def test_a_release_is_resumed_without_building_again(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "resumed")
    app = three_services(new, name)
    deploy(rack, app, "--no-promote")
    [release, _] = rack.releases(name)
    assert rack.pages(name) == {}
    output = deploy(rack, app, "--release", release["id"])
    assert "$ docker build" not in output and "$ convox build" not in output
    assert rack.pages(name)["worker"] == f"{name}-worker"


@with_the_legacy_builder
def test_a_push_to_the_rack_that_fails_fails_the_deploy(
    sandbox: Any, rack: Rack, new: Any, own_registry: Any
) -> None:
    name = name_for(rack.env, "not-pushed")
    app = three_services(new, name)
    refuse_pushes(sandbox, own_registry)
    before = local_images(rack)
    output = deploy(rack, app, status=1)
    assert re.search(f"{UNKNOWN}The repository", output) and "release failed:" in output
    assert rack.builds(name) == ["failed"] and rack.releases(name) == []
    assert local_images(rack) == before
    own_registry()
    deploy(rack, app)
    assert rack.pages(name)["worker"] == f"{name}-worker"


@with_buildkit
def test_a_signal_in_the_release_step(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "signaled")
    app = three_services(new, name)
    before = local_images(rack)
    output = ""
    with start(rack, app) as process:
        for line in process.stdout:
            output += line
            if line.startswith("Running: docker push"):  # by the convox CLI
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Stopped by SIGTERM" in output and "convox build" in output
    assert rack.pages(name) == {}
    assert local_images(rack) == before
    assert [path for path in app.parent.iterdir() if path != app] == []


@with_the_legacy_builder
def test_staging_then_production_with_the_same_images(
    sandbox: Any, rack: Rack, new_app: Callable[[str], Path], tmp_path: Path
) -> None:
    """Images that went to a registry of one's own are deployed again elsewhere, without docker and aws."""
    name = name_for(rack.env, "staging")
    app, result = new_app(name), tmp_path / "deploy.json"
    deploy(rack, app, "--result", str(result))
    production = name.replace("staging", "production")
    rack.check("convox", "apps", "create", production)
    first = json.loads(result.read_text())
    assert first["images"][0]["image"]
    output = deploy(
        rack,
        app,
        "--from",
        str(result),
        "--app",
        production,
        "--dry-run",
        DOCKER_HOST="unix:///nowhere",
    )
    assert "docker build" not in output
    (app / "www" / "index.html").write_text("not this\n")
    output = deploy(rack, app, "--from", str(result), "--app", production)
    assert "==> build" not in output and "$ docker" not in output and "$ aws" not in output
    assert rack.pages(production) == rack.pages(name) == {"web": "v1"}


@with_buildkit
def test_images_in_a_racks_own_registry_are_in_no_other(
    rack: Rack, new: Any, tmp_path: Path
) -> None:
    name = name_for(rack.env, "only-here")
    app, result = three_services(new, name), tmp_path / "deploy.json"
    deploy(rack, app, "--no-promote", "--result", str(result))
    assert {image["image"] for image in json.loads(result.read_text())["images"]} == {""}
    output = deploy(rack, app, "--from", str(result), status=2)
    assert "rack's own registry" in output


@with_buildkit
def test_an_arg_gets_the_value_that_the_rack_would_have_given_it(rack: Rack, new: Any) -> None:
    name = name_for(rack.env, "with-arg")
    step = "ARG API_TOKEN\nRUN echo $API_TOKEN >/www/index.html\n"
    app = new(name, "services:\n  web:\n    port: 8080\n", [("Dockerfile", server("none") + step)])
    rack.check("convox", "env", "set", "--app", name, "API_TOKEN=swordfish-42", "OTHER=x")
    output = deploy(rack, app)
    assert "--build-arg API_TOKEN " in output and "OTHER" not in output
    assert "API_TOKEN=swordfish-42" not in output
    assert rack.pages(name) == {"web": "swordfish-42"}


@with_buildkit
def test_the_first_of_several_builds_that_fails_stops_the_others(
    sandbox: Any, rack: Rack, new: Any
) -> None:
    app = three_services(new, "together")
    for path, step in (
        ("Dockerfile", "exec sleep 600.25"),
        ("worker/Dockerfile.prod", "echo bad; exit 3"),
    ):
        with (app / path).open("a") as dockerfile:
            dockerfile.write(f"RUN {step}\n")
    output = deploy(rack, app, "--result", "result.json", status=1)
    assert re.search(r"^worker \| .*bad$", output, re.MULTILINE)
    assert re.search(r"^web \| .", output, re.MULTILINE)
    assert not re.search(r"^\w+ \| *$", output, re.MULTILINE)
    assert "build failed:\n`docker build` for worker exited with code 1." in output
    assert json.loads((app / "result.json").read_text())["failed_service"] == "worker"
    wait_for(lambda: not is_running("sleep\0600.25"), "the end of the other build")
