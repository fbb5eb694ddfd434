#!/usr/bin/env python3
"""Run two real deploys of a sample app in the sandbox and check each one over HTTP.

The first deploys convox.yml as it is: the image goes to the rack's own registry. The second deploys
docker-compose.yml, whose image goes to ECR.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from bootstrap import ROOT, use_environment

if TYPE_CHECKING:
    from sandbox import Sandbox

HERE = Path(__file__).resolve().parent
COMMAND = "$ APP_NAME=hello CONVOX_HOST=rack.sandbox CONVOX_PASSWORD=... ./convox_deploy.py"


def main() -> None:
    use_environment(HERE / "requirements.txt")
    started = time.monotonic()
    title("Setting up the sandbox: a Docker Engine, ECR and a rack")
    with sandbox_and_app() as (sandbox, app):
        deploy(app, "v1, with an unmodified convox.yml", sandbox.env)
        check_response(services(sandbox), "v1")

        change_app(app, sandbox.env)
        deploy(
            app,
            "v2 by a registry, with a before_release hook that runs a one-off command in the new release",
            {**sandbox.env, "DOCKER_COMPOSE": "docker-compose.yml"},
        )
        check_response(services(sandbox), "v2")
        title("Cleaning up")
    print(
        f"Two deploys in {time.monotonic() - started:.0f} s, including setup. The sandbox has been removed."
    )


@contextlib.contextmanager
def sandbox_and_app(report: Callable[[str], None] = print) -> Iterator[tuple[Sandbox, Path]]:
    """Yield a running sandbox and the sample app's directory. Exit if the sandbox can't run on this machine."""
    from sandbox import Sandbox, SandboxError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with Sandbox(report) as sandbox, tempfile.TemporaryDirectory() as home:
            app = Path(home, "hello")
            create_app(app, sandbox)
            yield sandbox, app
    except SandboxError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def create_app(app: Path, sandbox: Sandbox) -> None:
    """Write the first version of the sample app to the directory `app`, and create the app on the rack."""
    from sandbox import ECR

    shutil.copytree(HERE / "app", app)
    shutil.copy(HERE / "convox.yml", app)
    shutil.copy(ROOT / "convox_deploy.py", app)
    manifest = app / "docker-compose.yml"
    manifest.write_text(manifest.read_text().replace(ECR, sandbox.registry_host))
    sandbox.env["CONVOX_STANDIN_CLI"] = "v3"
    convox(sandbox, "apps", "create", "hello")
    commit(app, "first version", sandbox.env)


def change_app(app: Path, env: dict[str, str]) -> None:
    """Update the sample app to its second version: a new page, and a before_release hook that prints it."""
    (app / "www" / "index.html").write_text("v2\n")
    (app / "deploy").mkdir()
    shutil.copy(HERE / "before_release.sh", app / "deploy")
    commit(app, "second version", env)


def title(text: str) -> None:
    print(f"\n### {text}", flush=True)


def commit(app: Path, message: str, env: dict[str, str]) -> None:
    """Commit the app to git, for the image tag and the release description. Without git, do nothing."""
    if shutil.which("git"):
        git = ["git", "-c", "user.name=sandbox", "-c", "user.email=sandbox@localhost"]
        for words in (
            ["init", "--quiet"],
            ["add", "--all"],
            ["commit", "--quiet", "--message", message],
        ):
            subprocess.run([*git, *words], cwd=app, env=env, check=True, stderr=subprocess.DEVNULL)


def deploy(app: Path, what: str, env: dict[str, str]) -> None:
    title(f"Deploying {what}")
    manifest = env.get("DOCKER_COMPOSE")
    print(f"$ DOCKER_COMPOSE={manifest} {COMMAND[2:]}" if manifest else COMMAND, flush=True)
    done = subprocess.run(
        ["./convox_deploy.py"], cwd=app, env={**env, "APP_NAME": "hello"}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def services(sandbox: Sandbox) -> str:
    return convox(sandbox, "services", "--app", "hello")


def convox(sandbox: Sandbox, *words: str) -> str:
    """Run the CLI by the rack's URL: a CLI of v3 takes no rack from CONVOX_HOST and CONVOX_PASSWORD."""
    from sandbox import RACK_HOST, RACK_PASSWORD

    url = f"https://convox:{RACK_PASSWORD}@{RACK_HOST}"
    return sandbox.check("convox", *words, env={**sandbox.env, "RACK_URL": url})


def check_response(services: str, expected: str) -> None:
    """Print the app's response, and exit if it is not `expected`."""
    url = services.split()[-1]
    with urllib.request.urlopen(url, timeout=10) as response:
        body = response.read().decode().strip()
    print(f"\n$ curl {url}\n{body}", flush=True)
    if body != expected:
        sys.exit(f"The app returned {body!r}, not {expected!r}.")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
