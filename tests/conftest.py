"""The two environments the tests deploy in: recording stand-ins, and the sandbox with the real programs."""

from __future__ import annotations

import contextlib
import importlib.machinery
import itertools
import json
import marshal
import os
import py_compile
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
import standin
from forkserver import Forked, Server
from standin import Rule
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "convox_deploy.py"
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "sandbox")]

ECR = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
COMPOSE = (
    f"version: '2'\nservices:\n  web:\n    image: {ECR}/shop:TAG\n  redis:\n    image: redis:7\n"
)
STANDIN = ROOT / "tests" / "standin"
REAL_GIT = shutil.which("git") or "git"
SHORT_ID = "3cbf733dcc19"
IMAGE_ID = "sha256:" + SHORT_ID * 5 + "abcd"
DIGEST = "sha256:" + "d" * 64
# What the stand-in for convox answers about releases and containers. A test may write them anew.
RELEASE = {
    "app": "shop",
    "build": "BNEWBUILDXX",
    "created": "2026-11-02T10:00:00.5Z",
    "description": "",
    "env": "KEY=value",
    "id": "RNEWRELEASE",
    "manifest": "services:\n  web: {}\n",
}
OLD_RELEASE = {
    **RELEASE,
    "build": "BOLDBUILDXX",
    "created": "2026-11-01T10:00:00.25Z",
    "id": "ROLDRELEASE",
}
STEPS = [
    "preflight",
    "before_build",
    "build",
    "after_build",
    "push",
    "release",
    "before_release",
    "promote",
]
REFUSALS = [  # of a login that may not read releases
    "ERROR: forbidden",
    "ERROR: response status: 403",
    "ERROR: you are unauthorized to access this",
    "ERROR: operation not permitted for deploy keys",
]
NO_CONTAINERS = {"overview": {"services": None}, "summary": {}}  # without empty lists
RACK_FILES = {
    "releases.json": json.dumps([RELEASE, OLD_RELEASE]),
    "release.json": json.dumps({**RELEASE, "id": "%s"}) + "\n",  # of any other release
    "release.ROLDRELEASE.json": json.dumps(OLD_RELEASE) + "\n",
    "deploy-debug.json": json.dumps(NO_CONTAINERS) + "\n",
}
HOMES: dict[int, Path] = {}  # of deploys, by process ID
INTERPRETER = ("PYTHON", "COVERAGE_", "LANG", "LC_", "TZ")  # variables it reads when it starts
SERVER_ENV = {"LANG": "C.UTF-8"}
WITH_CONSTANTS = """
import sys
sys.path[0] = {directory!r}
import convox_deploy
sys.argv[0] = {tool!r}
vars(convox_deploy).update({constants!r})
convox_deploy.main()
"""


class Ran(NamedTuple):
    """The result of a deploy."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def before_total(self) -> str:
        """The output up to the last line, which says how long a deploy took."""
        return re.sub(r"Total: \d+\.\d s\n\Z", "", self.out)


@dataclass(frozen=True)
class Call:
    """A recorded call of a stand-in."""

    pid: str
    cwd: str
    stdin: str
    argv: list[str]
    home: Path

    @property
    def line(self) -> str:
        return " ".join(self.argv)

    @property
    def env(self) -> dict[str, str]:
        """The environment, limited to the variables whose names are valid in a shell."""
        text = (self.home / f"env.{self.pid}").read_bytes().decode(errors="surrogateescape")
        words = shlex.split(text)
        return dict(word.split("=", 1) for word in words if word != "export" and "=" in word)

    @property
    def upload(self) -> dict[str, str]:
        """The files that were passed to `convox build`, by their paths in the directory."""
        directory = self.home / f"upload.{self.pid}"
        files = (path for path in sorted(directory.rglob("*")) if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes().decode() for path in files}


class World:
    """An app directory, and stand-ins for all programs that a deploy runs."""

    def __init__(self, home: Path, responses: Path, server: Server) -> None:
        self.home, self.app, self.bin, self.tmp = home, home / "shop", home / "bin", home / "tmp"
        for directory in (self.app, self.bin, self.tmp):
            directory.mkdir()
        for program in ("docker", "aws", "convox", "git"):
            (self.bin / program).symlink_to(STANDIN)
        self.pipes = {name: Announcements(home / name) for name in ("hanging", "termed")}
        (home / "running").write_text("ROLDRELEASE\n")
        for name, text in RACK_FILES.items():
            (home / name).write_text(text)
        self.write("Dockerfile", "FROM scratch\n")
        self.write("docker-compose.yml", COMPOSE)
        self.rules: dict[str, Rule] = {}
        self.constants: dict[str, Any] = {
            "POLL_SECONDS": 0.05
        }  # overrides for the tool's constants
        self.server, self.deploys = server, list[subprocess.Popen[str]]()
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(home),
            "TMPDIR": str(self.tmp),
            "STANDIN": str(home),
            "STANDIN_PYTHON": sys.executable,
            "STANDIN_DISTURB": str(responses / "standin.pyc"),
            "STANDIN_RESPONSES": str(responses),
            "STANDIN_SEPARATOR": "\x1f",
            "STANDIN_IMAGE_ID": IMAGE_ID,
            "STANDIN_DIGEST": DIGEST,
            "REAL_GIT": REAL_GIT,
            "APP_NAME": "shop",
            "CONVOX_HOST": "rack.example.com",
            "CONVOX_PASSWORD": "the/rack's secret",
            "LANG": "C.UTF-8",
            **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
        }

    def write(self, name: str, text: str | bytes, mode: int = 0o644) -> Path:
        path = self.app / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return path

    def add_hooks(self, *names: str) -> None:
        """Add recording hooks. Rules apply to them under their names, such as `before_build`."""
        (self.app / "deploy").mkdir(exist_ok=True)
        for name in names or ("before_build", "after_build", "before_release"):
            (self.app / "deploy" / f"{name}.sh").symlink_to(STANDIN)

    def describe(self, release: str, description: str) -> None:
        """Give a release a description, which the rack answers."""
        known = {**OLD_RELEASE, "id": release, "description": description}
        (self.home / f"release.{release}.json").write_text(json.dumps(known) + "\n")

    def add_git(self, message: str = "Sell more") -> str:
        """Make the app a git repository with one commit. Return the commit's short hash."""
        git = [REAL_GIT, "-c", "user.name=test", "-c", "user.email=test@localhost"]
        for words in (
            ["init", "--quiet", "--initial-branch=main", "--template="],
            ["add", "."],
            ["commit", "--quiet", "--message", message],
        ):
            subprocess.run([*git, *words], cwd=self.app, check=True)
        done = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], cwd=self.app, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def ready_standins(self) -> None:
        """Write the files the stand-ins read: the rules, and the calls so far."""
        for rule in self.rules.values():
            for each in (rule, *rule.get("sequence", []), *rule.get("words", {}).values()):
                assert each.keys() <= Rule.__annotations__.keys(), f"no such rule: {each}"
        plain = json.loads(json.dumps(self.rules))  # numbers instead of signals
        (self.home / "rules.marshal").write_bytes(marshal.dumps(plain))
        (self.home / "rules").write_text("".join(f"{start}\n" for start in self.rules))
        (self.home / "calls").touch()

    def start(
        self, *args: str, env: Mapping[str, str | None] | None = None, **how: Any
    ) -> subprocess.Popen[str]:
        """Start a deploy, or `program` if given, with our Python or with `python`. A variable that is None is unset.

        A deploy is forked from the server unless it is to be `real`, or to start in an unusual way.
        """
        real, program, python = (how.pop(name, "") for name in ("real", "program", "python"))
        self.ready_standins()
        environment = {
            name: value for name, value in {**self.env, **(env or {})}.items() if value is not None
        }
        is_usual = interpreter_variables(environment) == interpreter_variables(SERVER_ENV)
        constants = WITH_CONSTANTS.format(
            tool=str(TOOL), directory=str(ROOT), constants=self.constants
        )
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        how = {**streams, "text": True, "cwd": self.app, "env": environment, **how}
        process: subprocess.Popen[str]
        if is_usual and not (real or program or "preexec_fn" in how):
            process = Forked(self.server, constants, [*args], **how)
        else:
            command = [python or sys.executable, *(program or ["-c", constants]), *args]
            process = subprocess.Popen(command, **{"preexec_fn": heed_signals, **how})
        self.deploys.append(process)
        HOMES[process.pid] = self.home
        return process

    def deploy(self, *args: str, env: Mapping[str, str | None] | None = None, **how: Any) -> Ran:
        """Deploy and return the result."""
        return ended(self.start(*args, env=env, **how))

    def deploy_and_signal(self, signum: int, *args: str, **how: Any) -> Ran:
        """Deploy, and send the signal once a command with the rule `hang` is hanging. SIGALRM simulates a step's timeout."""
        process = self.start(*args, **how)
        self.await_hanging()
        process.send_signal(signum)
        return ended(process)

    @property
    def calls(self) -> list[Call]:
        records = (
            (self.home / "calls").read_bytes().decode(errors="surrogateescape").split("\x1e")[:-1]
        )
        fields = [record.split("\x1f") for record in records]
        return [Call(pid, cwd, stdin, argv, self.home) for pid, cwd, stdin, *argv in fields]

    def commands(self, *starts: str) -> list[str]:
        """Return the command lines so far, or only those that start with one of `starts`.

        The reading of a release's description is left out, unless one of `starts` names it.
        """
        lines = [call.line for call in self.calls]
        if not any(standin.RELEASE in start for start in starts):
            lines = standin.without_descriptions(lines)
        return [line for line in lines if line.startswith(starts or "")]

    def call(self, start: str) -> Call:
        """Return the only call whose command line starts with `start`."""
        [found] = [call for call in self.calls if call.line.startswith(start)]
        return found

    def await_hanging(self) -> int:
        """Wait until a command with the rule `hang` is hanging. Return its process ID."""
        return self.pipes["hanging"].read()

    def await_term(self) -> None:
        """Wait until a command with the rule `ignore_term` has received SIGTERM."""
        self.pipes["termed"].read()

    @property
    def running(self) -> str:
        """The app's running release."""
        return (self.home / "running").read_text().strip()

    def nothing_is_left(self) -> bool:
        return not list(self.tmp.iterdir())


class Announcements:
    """A named pipe that stand-ins write their process IDs to. It buffers them until they are read."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.descriptor = os.open(path, os.O_RDWR)

    def read(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.descriptor], [], [], 30)
            assert ready, "no command is hanging"
            line += os.read(self.descriptor, 1)
        return int(line)

    def close(self) -> None:
        os.close(self.descriptor)


def paired(values: Iterable[Any], others: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Give each value one of the others, in turn: each is tried, and not each with each."""
    return list(zip(values, itertools.cycle(others)))


def interpreter_variables(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(INTERPRETER)}


def ended(process: subprocess.Popen[str]) -> Ran:
    """Return the result of a deploy. One that is stuck is killed, with all its commands."""
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        kill_all(HOMES[process.pid])
        out, err = process.communicate()
        pytest.fail(f"the deploy is stuck:\n{out}{err}")
    return Ran(process.returncode, out or "", err or "")


def kill_all(home: Path) -> None:
    """Kill the deploys of a World and everything they have started: all inherit its variables."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if os.fsencode(f"STANDIN={home}\0") in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def heed_signals() -> None:
    """Restore signals that a shell ignores for background commands, and that nohup ignores."""
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while it is read
        return False
    return state != "Z"


def has_ended(pid: int) -> bool:
    """Wait until a process ends. One that was killed takes a moment."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 5)[0])
    finally:
        os.close(descriptor)


@pytest.fixture(scope="session")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the sandbox's convox, which the stand-in prints too, so that it is defined only once.

    With it comes what applies the rules, compiled.
    """
    directory = tmp_path_factory.mktemp("responses")
    py_compile.compile(str(STANDIN.with_suffix(".py")), str(directory / "standin.pyc"))
    path = str(ROOT / "examples" / "sandbox" / "convox")
    loader = importlib.machinery.SourceFileLoader("sandbox_convox", path)
    convox: Any = types.ModuleType(loader.name)
    loader.exec_module(convox)
    for convox.CLI in ("v2", "v3"):
        of_cli = directory / convox.CLI
        of_cli.mkdir()
        for command in convox.COMMANDS:
            (of_cli / f"{command}.help").write_text(convox.help_of(command))
        formats = {"build": convox.build_output(False), "build.id": convox.build_output(True)}
        formats["api"] = convox.app_output("shop", "%s", "running")
        for name, text in formats.items():
            (of_cli / name).write_text(text.replace("\n", "\\n") + "\n")
    return directory


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Deploys are forked from it. Where tests run in parallel, they give way to those of the sandbox, which take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.nice(5)
    server = Server(ROOT, SERVER_ENV)
    yield server
    server.close()


@pytest.fixture
def world(tmp_path: Path, responses: Path, server: Server) -> Iterator[World]:
    world = World(tmp_path, responses, server)
    yield world
    for process in world.deploys:
        process.kill()  # unless it has ended
        process.wait()
    for pipe in world.pipes.values():
        pipe.close()
    child = tmp_path / "child"
    outlived = child.exists() and not has_ended(int(child.read_text()))
    kill_all(tmp_path)
    assert not outlived, "a child of a command outlived the deploy"


# --- the sandbox ----------------------------------------------------------------------


class SandboxOnOneWorker(LoadScopeScheduling):  # type: ignore[misc]
    """Run all tests that need the sandbox on the same worker, because there is only one sandbox."""

    def _split_scope(self, nodeid: str) -> str:
        needs_sandbox = "test_sandbox.py" in nodeid or "test_external.py" in nodeid
        return "sandbox" if needs_sandbox else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SandboxOnOneWorker:
    return SandboxOnOneWorker(config, log)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Any]:
    """One sandbox for all tests. Where it can't run, its tests are skipped, or fail if REQUIRE_E2E is set."""
    from sandbox import Sandbox, SandboxError

    os.environ["CONVOX_STANDIN_SECOND"] = "0.005"
    running = Sandbox(report=lambda text: None)
    try:
        running.__enter__()
    except SandboxError as error:
        if os.environ.get("REQUIRE_E2E"):
            pytest.fail(f"REQUIRE_E2E is set, but the sandbox did not start: {error}")
        pytest.skip(str(error))
    yield running
    running.__exit__(None, None, None)


@pytest.fixture(params=["legacy builder", "BuildKit"])
def builder(sandbox: Any, request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment of each builder in turn."""
    return dict(sandbox.buildkit_env if request.param == "BuildKit" else sandbox.legacy_env)


def documented_copy_of_a_build() -> list[str]:
    """Return the lines of docs/staging-and-production.md: for staging, and for production."""
    text = (ROOT / "docs" / "staging-and-production.md").read_text()
    return re.findall("```bash\n(.*?)```", text, re.DOTALL)


def name_for(builder: Mapping[str, str], name: str) -> str:
    """Return the name of an app that is deployed with each builder."""
    return f"{name}-{builder['DOCKER_BUILDKIT']}"


def add_app(sandbox: Any, directory: Path, name: str) -> Path:
    """Copy the sample app to a directory and create it on the rack under the given name."""
    app = directory / name
    shutil.copytree(ROOT / "examples" / "sandbox" / "app", app)
    manifest = app / "docker-compose.yml"
    manifest.write_text(
        manifest.read_text().replace(f"{ECR}/hello", f"{sandbox.registry_host}/{name}")
    )
    sandbox.check("convox", "apps", "create", name)
    return app


def add_context(sandbox: Any, directory: Path) -> Path:
    """Return a docker configuration like that of Docker Desktop: the current context is not `default`."""
    from sandbox import create_docker_config

    config = create_docker_config(directory / "docker-config")
    of_user, contexts = config / "cli-plugins", config / "contexts"
    plugins = [path.resolve() for path in of_user.glob("*")]
    for link in (of_user, contexts):
        link.unlink(missing_ok=True)
    of_user.mkdir()
    for plugin in plugins:
        (of_user / plugin.name).symlink_to(plugin)
    path = config / "config.json"
    without_context = {**json.loads(path.read_text()), "currentContext": ""}
    path.write_text(
        json.dumps(without_context)
    )  # docker creates none if the current one is missing
    host = "{{.Endpoints.docker.Host}}"
    engine = sandbox.check("docker", "context", "inspect", "--format", host).strip()
    create = ["context", "create", "desktop-linux", "--docker", f"host={engine}"]
    for words in (create, ["context", "use", "desktop-linux"]):
        sandbox.check("docker", "--config", str(config), *words)
    return config


@pytest.fixture
def new_app(sandbox: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that adds a copy of the sample app with the given name."""
    return partial(add_app, sandbox, tmp_path)
