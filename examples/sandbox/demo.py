#!/usr/bin/env python3
"""Deploys a sample app twice in the sandbox, for real: image, push, release, promote, and an answer over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from bootstrap import ROOT, use_environment

HERE = Path(__file__).resolve().parent


def main() -> None:
    use_environment(HERE / "requirements.txt")
    from sandbox import ECR, Sandbox, SandboxError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    title("Setting up the sandbox: a Docker Engine, ECR and a rack")
    try:
        with Sandbox() as sandbox, tempfile.TemporaryDirectory() as home:
            app = Path(home, "hello")
            shutil.copytree(HERE / "app", app)
            shutil.copy(ROOT / "convox_deploy.py", app)
            shutil.copytree(ROOT / "deploy", app / "deploy")
            manifest = app / "docker-compose.yml"
            manifest.write_text(manifest.read_text().replace(ECR, sandbox.registry_host))
            sandbox.check("convox", "apps", "create", "hello")
            commit(app, "first version", sandbox.env)

            deploy(app, "v1", sandbox.env)
            answer_of(sandbox.check("convox", "services", "--app", "hello"), "v1")

            (app / "www" / "index.html").write_text("v2\n")
            shutil.copy(HERE / "before_release.sh", app / "deploy")
            commit(app, "second version", sandbox.env)
            deploy(app, "v2, with a before_release hook that runs a one-off in the new release", sandbox.env)
            answer_of(sandbox.check("convox", "services", "--app", "hello"), "v2")
            title("Cleaning up")
    except SandboxError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(f"Two deploys in {time.monotonic() - started:.0f} s, all set-up included. The sandbox is gone again.")


def title(text: str) -> None:
    print(f"\n### {text}", flush=True)


def commit(app: Path, message: str, env: dict[str, str]) -> None:
    """Makes the app a git checkout, for the tag and the release's description; without git it deploys as well."""
    if shutil.which("git"):
        git = ["git", "-c", "user.name=sandbox", "-c", "user.email=sandbox@localhost"]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", message]):
            subprocess.run([*git, *words], cwd=app, env=env, check=True, stderr=subprocess.DEVNULL)


def deploy(app: Path, what: str, env: dict[str, str]) -> None:
    title(f"Deploying {what}")
    print("$ APP_NAME=hello CONVOX_HOST=rack.sandbox CONVOX_PASSWORD=... ./convox_deploy.py", flush=True)
    done = subprocess.run(["./convox_deploy.py"], cwd=app, env={**env, "APP_NAME": "hello"}, check=False)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def answer_of(services: str, wanted: str) -> None:
    """Shows what the app answers, and fails if that is not `wanted`."""
    url = services.split()[-1]
    with urllib.request.urlopen(url, timeout=10) as response:
        answer = response.read().decode().strip()
    print(f"\n$ curl {url}\n{answer}", flush=True)
    if answer != wanted:
        sys.exit(f"The app answers {answer!r}, not {wanted!r}.")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
