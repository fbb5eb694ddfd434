"""The two worlds that the tests deploy in: one of recording stand-ins, and the sandbox with the real programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "convox_deploy.py"
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "sandbox")]

ECR = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
COMPOSE = f"version: '2'\nservices:\n  web:\n    image: {ECR}/shop:TAG\n  redis:\n    image: redis:7\n"
HOOK = '#!/bin/sh\nexec "$HOOK_STANDIN/{name}" "$@"\n'


class Ran(NamedTuple):
    """A deploy that has ended."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class World:
    """An app in a directory, and stand-ins for all programs that a deploy runs."""

    home: Path

    def __post_init__(self) -> None:
        self.app, self.bin, self.tmp = self.home / "shop", self.home / "bin", self.home / "tmp"
        for directory in (self.app, self.bin, self.tmp):
            directory.mkdir()
        for program in ("docker", "aws", "convox", "git"):
            (self.bin / program).symlink_to(ROOT / "tests" / "standin")
        (self.bin / "python3").symlink_to(sys.executable)
        (self.bin / "sleep").symlink_to(shutil.which("sleep") or "sleep")
        (self.home / "running").write_text("ROLDRELEASE")
        self.write("Dockerfile", "FROM scratch\n")
        self.write("docker-compose.yml", COMPOSE)
        self.rules: dict[str, dict[str, Any]] = {}
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "STANDIN": str(self.home),
            "STANDIN_PYTHON": sys.executable,
            "STANDIN_CONVOX": str(ROOT / "examples" / "sandbox" / "convox"),
            "CONVOX_STANDIN": str(self.home / "rack"),
            "REAL_GIT": shutil.which("git") or "git",
            "HOOK_STANDIN": str(self.bin),
            "APP_NAME": "shop",
            "CONVOX_HOST": "rack.example.com",
            "CONVOX_PASSWORD": "the/rack's secret",
            "LANG": "C.UTF-8",
        }

    def write(self, name: str, text: str | bytes, mode: int = 0o644) -> Path:
        path = self.app / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return path

    def add_hooks(self, *names: str) -> None:
        """Adds recording hooks; a rule for `before_build` and so on disturbs one."""
        for name in names or ("before_build", "after_build", "before_release"):
            (self.bin / name).symlink_to(ROOT / "tests" / "standin")
            self.write(f"deploy/{name}.sh", HOOK.format(name=name), 0o755)

    def add_git(self, message: str = "Sell more") -> str:
        """Makes the app a checkout with one commit, and returns the commit's short hash."""
        git = [self.env["REAL_GIT"], "-c", "user.name=test", "-c", "user.email=test@localhost"]
        for words in (
            ["init", "--quiet", "--initial-branch=main"],
            ["add", "."],
            ["commit", "--quiet", "--message", message],
        ):
            subprocess.run([*git, *words], cwd=self.app, check=True)
        done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], cwd=self.app, check=True, capture_output=True)
        return done.stdout.decode().strip()

    def ready_standins(self) -> None:
        """Gives the stand-ins what they read: the rules, and the calls so far."""
        (self.home / "rules.json").write_text(json.dumps(self.rules))
        (self.home / "calls.jsonl").touch()

    def start(self, *args: str, env: dict[str, str | None] | None = None, **how: Any) -> subprocess.Popen[str]:
        """Starts a deploy, or the `program` given, with our Python or the one given. A variable that is None is not set."""
        program, python = how.pop("program", [TOOL]), how.pop("python", sys.executable)
        self.ready_standins()
        environment = {name: value for name, value in {**self.env, **(env or {})}.items() if value is not None}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        pipes.update(stdin=subprocess.DEVNULL, preexec_fn=heed_signals)
        return subprocess.Popen([python, *program, *args], cwd=self.app, env=environment, **{**pipes, **how})

    def deploy(self, *args: str, env: dict[str, str | None] | None = None, **how: Any) -> Ran:
        """Deploys, and returns how that ended."""
        process = self.start(*args, env=env, **how)
        out, err = process.communicate(timeout=60)
        return Ran(process.returncode, out or "", err or "")

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "calls.jsonl").read_text().splitlines()]

    def commands(self, *starts: str) -> list[str]:
        """Returns the command lines so far, those that begin with one of `starts` if there are any."""
        lines = [" ".join(call["argv"]) for call in self.calls]
        return [line for line in lines if not starts or line.startswith(starts)]

    def call(self, start: str) -> dict[str, Any]:
        """Returns the one call whose command line begins with `start`."""
        [found] = [call for call in self.calls if " ".join(call["argv"]).startswith(start)]
        return found

    def await_hanging(self) -> int:
        """Waits for a command with the rule `hang`, and returns its process id."""
        return int(await_content(self.home / "hanging"))

    def nothing_is_left(self) -> bool:
        return not list(self.tmp.iterdir())


def heed_signals() -> None:
    """Undoes what a shell does to a command in the background, and nohup: to have it ignore signals."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def await_content(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    if (tmp_path / "child").exists() and is_alive(pid := int((tmp_path / "child").read_text())):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a child of a command outlived the deploy")


# --- the sandbox ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Any]:
    """The sandbox, once for all tests. Without an engine its tests are skipped, unless REQUIRE_E2E is set."""
    from sandbox import Sandbox, SandboxError

    running = Sandbox(say=lambda text: None)
    try:
        running.__enter__()
    except SandboxError as error:
        if os.environ.get("REQUIRE_E2E"):
            pytest.fail(f"REQUIRE_E2E is set, and the sandbox does not start: {error}")
        pytest.skip(str(error))
    yield running
    running.__exit__(None, None, None)


@pytest.fixture
def new_app(sandbox: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the sample app, known to the rack by the name given."""

    def make(name: str) -> Path:
        app = tmp_path / name
        shutil.copytree(ROOT / "examples" / "sandbox" / "app", app)
        manifest = app / "docker-compose.yml"
        manifest.write_text(manifest.read_text().replace(f"{ECR}/hello", f"{sandbox.registry_host}/{name}"))
        sandbox.check("convox", "apps", "create", name)
        return app

    return make
