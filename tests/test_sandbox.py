"""Complete deploys with the real docker, a real registry with authentication, and the real aws CLI."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, TOOL, add_app, add_context, name_for

from sandbox import create_docker_config, wait_for  # isort: skip

NewApp = Callable[[str], Path]
OPTION = "--cache-from-running"
LOGGED_IN: Any = {"SKIP_ECR_AUTH": "1"}  # saves the second that the aws CLI takes
ALL_OUTPUT: dict[str, Any] = {  # stdout and stderr together, as text
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
}


QUICK = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import convox_deploy
convox_deploy.DEBUG_SECONDS, convox_deploy.POLL_SECONDS = [0.5, 0.5], 0.2
convox_deploy.main()
"""


def deploy(
    sandbox: Any, app: Path, *args: str, status: int = 0, is_patient: bool = True, **env: str
) -> str:
    """Deploy the app in `app`, check the exit code and return the output."""
    tool = [TOOL] if is_patient else ["-c", QUICK]
    done = subprocess.run(
        [sys.executable, *tool, *args],
        cwd=app,
        env={**sandbox.env, "TMPDIR": str(app.parent), **env},
        check=False,
        timeout=120,
        **ALL_OUTPUT,
    )
    assert done.returncode == status, done.stdout
    return str(done.stdout)


def start(app: Path, env: dict[str, str]) -> Any:
    """Start a deploy whose output is to be read while it is running."""
    return subprocess.Popen([sys.executable, TOOL], cwd=app, env=env, **ALL_OUTPUT)


def page(sandbox: Any, name: str) -> str:
    url = sandbox.check("convox", "services", "--app", name).split()[-1]
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode().strip())


def in_the_app(sandbox: Any, name: str, *command: str) -> str:
    """Run a command in the app's container and return its output."""
    ours = ["--filter", f"label=convox.app={name}"]
    [container] = sandbox.check("docker", "ps", "--quiet", *ours).split()
    return str(sandbox.check("docker", "exec", container, *command))


def require(is_there: bool, what: str) -> None:
    if not is_there:
        (pytest.fail if os.environ.get("REQUIRE_E2E") else pytest.skip)(f"There is no {what} here.")


def require_ecr(sandbox: Any) -> None:
    require(sandbox.has_ecr, "ECR, which needs root on Debian,")


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


class Live(NamedTuple):
    """An app that runs on the rack, with its directory and what was around it before its deploy."""

    app: Path
    paths: set[Path]


@pytest.fixture(scope="module")
def live(sandbox: Any, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Deploy an app from a git repository with a large file. It runs until the engine is wiped by a test below."""
    app = add_app(sandbox, tmp_path_factory.mktemp("live"), "live")
    (app / ".dockerignore").write_text("*\n!www\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init"], ["add", "."], ["commit", "--message", "Sell more"]):
        subprocess.run([*git, *words], cwd=app, check=True, capture_output=True)
    with (app / "dump.sql").open("wb") as dump:
        dump.truncate(300 * 1024 * 1024)
    paths = set(app.parent.rglob("*"))
    deploy(sandbox, app)
    return Live(app, paths)


def test_a_deploy_leaves_nothing_behind_but_the_pushed_image(sandbox: Any, live: Live) -> None:
    assert set(live.app.parent.rglob("*")) == live.paths  # TMPDIR is there, too
    assert sandbox.check("docker", "image", "ls", "--quiet", "live") == ""


def test_the_running_app_knows_the_commit_it_was_built_from(sandbox: Any, live: Live) -> None:
    head = sandbox.check("git", "rev-parse", "HEAD", cwd=live.app)
    assert f"BUILD_GIT_SHA={head}" in in_the_app(sandbox, "live", "env")


def test_a_large_directory_is_not_uploaded_to_the_rack(sandbox: Any, live: Live) -> None:
    log = Path(sandbox.env["CONVOX_STANDIN"], "uploads").read_text().splitlines()
    uploads = [line for line in map(json.loads, log) if line["app"] == "live"]
    assert uploads[0]["files"] == ["docker-compose.yml"] and uploads[0]["bytes"] < 1000


def test_an_unchanged_app_is_deployed_again_with_the_same_tag(sandbox: Any, live: Live) -> None:
    [image] = images(sandbox, "live")
    deploy(sandbox, live.app)
    assert images(sandbox, "live") == [image]


def test_a_rollback_fails_the_deploy(sandbox: Any, live: Live, tmp_path: Path) -> None:
    app = tmp_path / "live"
    shutil.copytree(live.app, app, ignore=shutil.ignore_patterns("dump.sql"))
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write('CMD ["no-such-program"]\n')
    output = deploy(sandbox, app, status=1, is_patient=False)
    assert "ERROR: rollback" in output
    assert page(sandbox, "live") == "v1"


def running(sandbox: Any, name: str) -> str:
    return str(json.loads(sandbox.check("convox", "api", "get", f"/apps/{name}"))["release"])


def test_a_hook_can_stop_a_release_which_is_resumed_and_rolled_back_and_forth(
    sandbox: Any, new_app: NewApp
) -> None:
    name = "careful"
    v3: Any = {"CONVOX_STANDIN_CLI": "v3"}
    app = new_app(name)
    deploy(sandbox, app)
    first = running(sandbox, name)
    (app / "www" / "index.html").write_text("v2\n")
    one_off = (ROOT / "examples" / "sandbox" / "before_release.sh").read_text()
    hook = add_before_release(app, f"{one_off}exit 7\n")
    output = deploy(sandbox, app, status=1, **v3, **LOGGED_IN)
    assert "which is not live yet:\nv2\n" in output
    assert "`deploy/before_release.sh` exited with code 7." in output
    assert page(sandbox, name) == "v1"
    hook.unlink()
    [second] = re.findall(r"run the same command with --release (\w+)", output)
    output = deploy(sandbox, app, DEPLOY_RELEASE=second, DEPLOY_NO_PROMOTE="1", **v3)
    assert page(sandbox, name) == "v2"
    assert f"run the same command with --rollback {first} " in output
    output = deploy(sandbox, app, "--rollback", first)
    copy = running(sandbox, name)
    assert page(sandbox, name) == "v1" and copy not in (first, second)
    assert f"{name} is now running {copy}, a copy of {first}" in output
    assert f"run the same command with --rollback {second} " in output
    deploy(sandbox, app, DEPLOY_ROLLBACK=second, **v3)
    assert page(sandbox, name) == "v2"


def test_a_crash_loop_is_told_while_it_happens(sandbox: Any, new_app: NewApp) -> None:
    """The rack's CLI gives up after 35 minutes, and the rack rolls back after 50: here, a second is 2 ms."""
    name = "crashing"
    app = new_app(name)
    v3: Any = {"CONVOX_STANDIN_CLI": "v3", "CONVOX_STANDIN_SECOND": "0.002"}
    deploy(sandbox, app, **v3)
    first = running(sandbox, name)
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("CMD echo no database at //app:pa55word@db/; exit 3\n")
    output = deploy(sandbox, app, status=1, is_patient=False, **v3, **LOGGED_IN)
    told, failed = output.index("\nwarning: web: CrashLoopBackOff"), output.index("promote failed:")
    assert told < failed, output
    assert f"The rack rolled back to {first}: " in output[failed:]
    assert "\n  | no database at //app:***@db/\n" in output[failed:], output
    assert f"{name} is running {first}" in output[failed:]
    assert page(sandbox, name) == "v1"


@pytest.mark.parametrize("builder", ["BuildKit"], indirect=True)
def test_the_example_hooks_work(sandbox: Any, new_app: NewApp, builder: Any) -> None:
    name = name_for(builder, "rails")
    app = new_app(name)
    shutil.copytree(ROOT / "examples" / "deploy", app / "deploy")
    shutil.copy(ROOT / "deploy" / "before_release.sh", app / "deploy")
    bundle = app / "bundle"  # responds like a Rails app's bundle
    bundle.write_text(
        "#!/bin/sh\n"
        '[ "$3" = assets:precompile ] && echo compiled > /www/index.html\n'
        '[ "$3" = db:migrate ] && echo "migrated by what is $(cat /www/index.html)"\nexit 0\n'
    )
    bundle.chmod(0o755)
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("COPY bundle /bin/bundle\n")
    output = deploy(sandbox, app, status=0, **builder)
    assert "\nmigrated by what is compiled\n" in output
    assert page(sandbox, name) == "compiled"
    assert (app / "REVISION").exists()


def test_a_build_that_fails_is_shown_in_full(sandbox: Any, new_app: NewApp, builder: Any) -> None:
    app = new_app(name_for(builder, "failing"))
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN echo the reason is this >&2; exit 9\n")
    output = deploy(sandbox, app, status=1, **builder, **LOGGED_IN)
    assert "build failed:\n`docker build` for web exited with code" in output
    assert re.search(r"^(#\d+ [\d.]+ |\x1b\[91m)?the reason is this$", output, re.MULTILINE)


def test_a_signal_during_a_build_ends_it(sandbox: Any, new_app: NewApp, builder: Any) -> None:
    app = new_app(name_for(builder, "stopped"))
    with (app / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN echo begun; exec sleep 600.5\n")
    output = ""
    with start(app, {**builder, **LOGGED_IN}) as process:
        for line in process.stdout:
            output += line
            if re.search(r"^(#\d+ [\d.]+ )?begun$", line):
                process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM, output
    assert "Stopped by SIGTERM while running `docker build` for web." in output
    wait_for(lambda: not is_running("sleep\0600.5"), "the end of the build step")


def is_running(command: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command in path.read_text(errors="replace"):
                return True
    return False


def test_several_services_with_separate_builds(sandbox: Any, new_app: NewApp) -> None:
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
    output = deploy(sandbox, app)
    assert output.count("$ docker build") == output.count(" digest: sha256:") == 2
    assert output.count("$ aws ecr create-repository") == 2 * sandbox.has_ecr
    services = sandbox.check("convox", "services", "--app", "several").split()[2:]
    pages = {}
    for service, url in zip(services[::2], services[1::2]):
        with urllib.request.urlopen(url, timeout=10) as response:
            pages[service] = response.read().decode().strip()
    assert pages == {"web": "v1", "api": "api"}


def test_a_wrong_password_or_app_stops_the_deploy_before_anything_is_built(
    sandbox: Any, new_app: NewApp
) -> None:
    app = new_app("strict")
    output = deploy(sandbox, app, status=2, CONVOX_PASSWORD="wrong", **LOGGED_IN)
    assert "invalid authentication" in output and "$ docker build" not in output
    output = deploy(sandbox, app, status=2, APP_NAME="nobody", **LOGGED_IN)
    assert "app not found: nobody" in output and "convox apps create" in output


def test_a_deploy_key_can_deploy(sandbox: Any, new_app: NewApp) -> None:
    app = new_app("by-key")
    deploy(sandbox, app, CONVOX_PASSWORD="deploy-key")
    assert page(sandbox, "by-key") == "v1"


def test_a_push_without_an_ecr_login_fails(sandbox: Any, new_app: NewApp) -> None:
    require_ecr(sandbox)
    app = new_app("outsider")
    no_login = str(create_docker_config(app / "no-login"))
    output = deploy(sandbox, app, status=1, SKIP_ECR_AUTH="1", DOCKER_CONFIG=no_login)
    assert "no basic auth credentials" in output
    assert "push failed:" in output and "Nothing was released or promoted." in output


def test_a_push_is_repeated_once_the_registry_is_back(sandbox: Any, new_app: NewApp) -> None:
    require_ecr(sandbox)
    app = new_app("patient")
    output = ""
    with start(app, sandbox.env) as process:
        for line in process.stdout:
            if line == "==> build\n":
                sandbox.proxy.stop()
            if "Trying once more in 5 s." in line:
                sandbox.proxy.start()
            output += line
    assert process.wait(120) == 0, output
    assert "warning: `docker push` for web exited with code 1. Trying once more" in output
    assert page(sandbox, "patient") == "v1"


def warm_app(sandbox: Any, new_app: NewApp, name: str) -> Path:
    """Create an app with an expensive build step whose result differs in each image."""
    require_ecr(sandbox)
    require(sandbox.has_own_engine, "engine of the sandbox's own")
    app = new_app(name)
    dockerfile = app / "Dockerfile"
    step = "RUN head -c 16 /dev/urandom | od >/expensive\n"
    dockerfile.write_text(dockerfile.read_text().replace("COPY", f"{step}COPY"))
    return app


def test_a_machine_without_images_reuses_the_layers_of_the_running_image(
    sandbox: Any, new_app: NewApp
) -> None:
    """Docker 20.10 loses a layer's cache record when it reuses the layer: each second deploy is cold."""
    app = warm_app(sandbox, new_app, "warm")
    output = deploy(sandbox, app, OPTION, **sandbox.buildkit_env)
    assert "Building without the running images as cache: no running release is known." in output
    layers = [in_the_app(sandbox, "warm", "cat", "/expensive")]
    for version in ("v2", "v3"):
        sandbox.wipe_engine()
        (app / "www" / "index.html").write_text(f"{version}\n")
        deploy(sandbox, app, OPTION, **sandbox.buildkit_env, **LOGGED_IN)
        assert page(sandbox, "warm") == version
        layers.append(in_the_app(sandbox, "warm", "cat", "/expensive"))
    is_reused = [before == after for before, after in itertools.pairwise(layers)]
    engine = sandbox.check("docker", "version", "--format", "{{.Server.Version}}")
    assert is_reused == [True, not engine.startswith("20.")]


def test_a_build_continues_if_the_running_image_cannot_be_used_as_a_cache(
    sandbox: Any, new_app: NewApp
) -> None:
    app = warm_app(sandbox, new_app, "cold")
    cold = "warning: Building without the running images as cache: "
    assert f"{cold}this needs BuildKit.\n" in deploy(sandbox, app, OPTION, **sandbox.legacy_env)
    sandbox.wipe_engine()
    repository = "registry/docker/registry/v2/repositories/cold"
    shutil.rmtree(sandbox.directory / repository)  # like a lifecycle policy
    output = deploy(sandbox, app, OPTION, "--no-promote", **sandbox.buildkit_env, **LOGGED_IN)
    by_tool, by_buildkit = f"{cold}Error response from daemon: ", r"#\d+ ERROR: "
    assert re.search(f"^({by_tool}|{by_buildkit}).*/cold:.* not found", output, re.MULTILINE)


def test_docker_still_finds_the_users_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are next to docker's configuration, which the sandbox replaces."""
    from sandbox import Sandbox

    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "mine"))
    monkeypatch.delenv("DOCKER_CERT_PATH", raising=False)
    sandbox = Sandbox()
    sandbox.directory = tmp_path
    assert sandbox.clean_environment()["DOCKER_CERT_PATH"] == str(tmp_path / "mine")


PLUGIN = """#!/bin/sh
case $1 in
    docker-cli-plugin-metadata) echo '{"SchemaVersion": "0.1.0", "Vendor": "test", "Version": "1"}' ;;
    *) echo "our plugin" ;;
esac
"""


def test_without_ecr_images_are_pushed_to_a_registry_on_localhost(
    sandbox: Any, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without root or Debian, where Docker Desktop may have chosen the context."""
    from sandbox import ECR, Sandbox

    config = add_context(sandbox, tmp_path)
    plugin = config / "cli-plugins" / "docker-ours"
    plugin.write_text(PLUGIN)
    plugin.chmod(0o755)
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    request.addfinalizer(sandbox.create_base_image)  # the other sandbox removes it
    plain = Sandbox(report=lambda text: None)
    plain.has_ecr = False
    with plain:
        assert "DOCKER_HOST" not in plain.env
        context = plain.check("docker", "context", "inspect", "--format", "{{.Name}}").strip()
        assert (context, plain.check("docker", "ours")) == ("desktop-linux", "our plugin\n")
        app = tmp_path / "plain"
        shutil.copytree(ROOT / "examples" / "sandbox" / "app", app)
        manifest = app / "docker-compose.yml"
        manifest.write_text(manifest.read_text().replace(ECR, plain.registry_host))
        plain.check("convox", "apps", "create", "plain")
        output = deploy(plain, app)
        assert "aws" not in output
        assert page(plain, "plain") == "v1"
