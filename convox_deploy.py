#!/usr/bin/env python3
"""Build an app's Docker images off-cluster and deploy them to Convox.

Copy this file into the root of your app, give the image in docker-compose.yml or convox.yml
the literal tag TAG (image: <registry>/<repository>:TAG), and run

    APP_NAME=shop CONVOX_HOST=rack.example.com CONVOX_PASSWORD=... ./convox_deploy.py

The lifecycle is the function deploy, near the end. Above it, from top to bottom: settings, the
manifest, running commands, git, docker and ECR, convox, and hooks. Below it: the outcome and the
command line.
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["click>=8.1", "sh>=2.2.2,<3", "PyYAML>=6.0"]
# ///

import sys

if (version := sys.version_info) < (3, 9):  # needs Python 3.9 or later
    # Python 2.7 to 3.7 cannot parse the line above, and show it.
    sys.stderr.write(
        f"convox_deploy.py needs Python 3.9 or later, not {version[0]}.{version[1]}.\n"
    )
    sys.exit(2)
IS_SCRIPT = __name__ == "__main__" and not __spec__
if IS_SCRIPT and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # the app's directory: its yaml.py or queue.py must not be imported here

import os
import signal

if IS_SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports

import codecs
import difflib
import errno
import json
import re
import shlex
import shutil
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGQUIT, SIGTERM
from typing import Any, NamedTuple, Optional, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

try:
    import click
    import sh
    import yaml
except ImportError as error:
    sys.stderr.write(
        f"convox_deploy.py needs the Python package {error.name!r}. Use one of these:\n"
        f"  uv run {sys.argv[0]}\n"
        "  python3 -m venv .venv && .venv/bin/pip install click sh PyYAML"
        f" && .venv/bin/python {sys.argv[0]}\n"
        "  pipx install . (in a clone of convox-deploy; then run convox-deploy)\n"
    )
    sys.exit(2)

__version__ = "0.2.0"

HOOKS = ["before_build", "after_build", "before_release"]
STEPS = [
    "preflight", "before_build", "build", "after_build",
    "push", "release", "before_release", "promote",
]  # fmt: skip
FAILED, NOT_STARTED, TIMED_OUT, BROKEN_PIPE = 1, 2, 124, 141  # exit codes; 128 + n after signal n
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL, like docker stop
PUSH_PAUSES = [1, 5, 15]  # seconds before a push is retried
POLL_SECONDS = 5  # between polls of a rack that is updating
PATIENCE_SECONDS = 120  # for a rack that does not respond after a promote
LAST_WORDS_SECONDS = 5  # to ask what is running after a failed promote
HEARTBEAT_SECONDS = 60  # CI systems kill jobs that print nothing for ten minutes
MAX_PARALLEL = 4
T = TypeVar("T")


class DeployError(Exception):
    """One or more errors that the user can fix. Each says what is wrong and how to fix it."""

    exit_code = FAILED

    def __str__(self) -> str:
        items = [str(arg).replace("\n", "\n    ") for arg in self.args]
        return "\n".join(f"  - {item}" for item in items) if items[1:] else str(self.args[0])


# --- settings -------------------------------------------------------------------------

RELEASE_ID = "R[A-Z]{9,10}"


def env(name: str) -> str:
    return os.environ.get(name, "")


class Settings(NamedTuple):
    """Settings from the command line and the environment. Contains no secrets."""

    app: str
    rack: str  # empty if not given, like the others
    file: str
    tag: str
    skip_ecr_login: bool
    timeout: float  # minutes for each step, 0 for no limit
    result: str
    quiet: bool
    no_verify: bool
    cache_from_running: bool
    dry_run: bool
    no_promote: bool
    release: str
    docker_build_args: tuple[str, ...]
    directory: str  # the project root

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the options, and how to fix it."""
        if not re.fullmatch("[a-z][a-z0-9-]*", self.app):
            yield (
                f"Invalid app name {self.app!r}: use lowercase letters, digits and dashes, starting"
                " with a letter. Set APP_NAME or --app (the default is the directory name)."
            )
        if not re.fullmatch("([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?", self.tag):
            yield (
                f"Invalid image tag {self.tag!r}: use up to 128 letters, digits, dots, dashes and"
                " underscores, not starting with a dot or dash. Set IMAGE_TAG or --tag, or neither."
            )
        if self.release and not re.fullmatch(RELEASE_ID, self.release):
            yield f"{self.release!r} is not a release ID. `convox releases` lists them."
        if self.release and self.no_promote:
            yield "--release and --no-promote cannot be used together."
        for word in self.docker_build_args[:1]:
            if not word.startswith("-"):
                yield (
                    f"Unexpected argument {word!r}. Deploying takes no arguments. To promote an"
                    " existing release, use --release. Put docker build arguments after `--`."
                )
        if {"--push", "--push=true"} & {*self.docker_build_args}:
            yield "Remove --push from the docker build arguments. The push step pushes the image."
        if self.result and (problem := result_problem(Path(self.result))):
            yield problem

    def resume_command(self, release: str) -> str:
        """Return a command that promotes a release from any directory."""
        command = [
            sys.executable, sys.argv[0], "--app", self.app, *option("--rack", self.rack),
            *option("--file", self.file if self.file != default_manifest() else ""),
            *(["--no-verify"] if self.no_verify else []), "--release", release,
        ]  # fmt: skip
        return f"cd {shlex.quote(self.directory)} && {shlex.join(command)}"


class Rack(NamedTuple):
    """The rack of a deploy, for all its commands and hooks."""

    label: str  # shown to the user
    name: str  # value of --rack; may be empty
    environment: dict[str, str]  # for the convox CLI and the hooks


CURRENT_RACK = "the convox CLI's current rack"


def choose_rack(option: str) -> Rack:
    """Return the rack named by --rack or the environment, else the app's own, else the CLI's.

    CLIs up to v2 read CONVOX_HOST and CONVOX_PASSWORD, those from v2 on read RACK_URL.
    """
    url = rack_url()
    host = url.netloc.rpartition("@")[2] or env("CONVOX_HOST")
    if host and not option and not is_console(host):
        password = unquote(url.password or "") or env("CONVOX_PASSWORD")
        url_text = env("RACK_URL") or f"https://convox:{url_quote(password)}@{host}"
        login = {"CONVOX_HOST": host, "CONVOX_PASSWORD": password, "RACK_URL": url_text}
        return Rack(host, "", {**os.environ, **login})
    name = option or local_setting("rack")
    variables = {"CONVOX_RACK": name} if name else {}
    label = f"{name} via {host}" if host else name  # a Console, for some CLIs a rack
    return Rack(label or CURRENT_RACK, name, {**os.environ, **variables})


def rack_url() -> SplitResult:
    with suppress(ValueError):
        return urlsplit(env("RACK_URL"))
    return urlsplit("")


def url_quote(text: str) -> str:
    return quote(os.fsencode(text), safe="")


def is_console(host: str) -> bool:
    return host.lower().partition(":")[0] == "console.convox.com"


def local_setting(name: str) -> str:
    """Return one of the convox CLI's local settings, such as .convox/rack. v2 uses .convox2."""
    for directory in (".convox", ".convox2"):
        path = Path(directory, name)
        try:
            if text := path.read_text().strip():
                return text
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise click.UsageError(f"{path} cannot be read: {error}") from None
    return ""


def rack_problems(option: str) -> Iterator[str]:
    """Yield where the variables that name a rack are incomplete or contradictory."""
    host, url_host = env("CONVOX_HOST"), rack_url().hostname
    valid = re.fullmatch(r"(?i:https?)://[^/?#\s]+:[^/?#\s]+@[^/?#@\s]+/?", env("RACK_URL"))
    if env("RACK_URL") and not (url_host and valid):
        yield "RACK_URL must be https://convox:PASSWORD@HOST, with PASSWORD percent-encoded."
    if url_host and (option or host.lower().partition(":")[0] not in ("", url_host)):
        yield "RACK_URL and CONVOX_HOST or CONVOX_RACK name different racks. Unset one of them."
    if not re.fullmatch(r"([A-Za-z0-9.-]+(:\d+)?)?", host):
        shown = re.sub("[^/]*@", "***@", host)
        yield f"CONVOX_HOST must be a host name like rack.example.com, not {shown!r}."
    console = url_host or host
    if is_console(console) and (url_host or not (option or local_setting("rack"))):
        yield (
            f"{console} is the Convox Console, not a rack. Name the rack with --rack or"
            " CONVOX_RACK."
        )
    if env("CONVOX_PASSWORD") != env("CONVOX_PASSWORD").strip():
        yield "CONVOX_PASSWORD starts or ends with whitespace or a newline. Remove it."
    for name, other in [("CONVOX_HOST", "CONVOX_PASSWORD"), ("CONVOX_PASSWORD", "CONVOX_HOST")]:
        if env(name) or option or url_host:
            continue
        if similar := difflib.get_close_matches(name, os.environ.keys() - {name}, 1, 0.84):
            yield f"{name} is not set, but {similar[0]} is. Rename it to {name}."
        elif env(other):
            yield (
                f"{other} is set, but {name} is not. With only one of them, the convox CLI would"
                " use the rack it is logged in to. Set both, or set CONVOX_RACK."
            )


def result_problem(path: Path) -> str:
    """Return why the result cannot be written. It may replace an empty file or our own."""
    may_replace = not os.path.lexists(path)
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if path.is_file() and not path.is_symlink():
            text = path.read_text()
            may_replace = not text or json.loads(text)["tool"] == "convox-deploy"
    if not may_replace:
        return f"--result {path} would replace a file that is not a result. Choose another file."
    if not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        return f"Cannot write --result {path}. Choose a file in an existing, writable directory."
    return ""


def remove_result(path: Path) -> None:
    """Remove an earlier result, so that it is not mistaken for a new one."""
    if os.path.isfile(path) and not result_problem(path):
        with suppress(OSError):
            path.unlink()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the result file atomically. Raise OSError or DeployError."""
    if problem := result_problem(path):
        raise DeployError(problem)
    unfinished = path.with_name(f".result-{os.urandom(8).hex()}")
    try:
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- the manifest ---------------------------------------------------------------------

MANIFESTS = [
    "convox.yml",
    "docker-compose.yml",
    "docker-compose.yaml",
    "compose.yaml",
    "compose.yml",
]
EXAMPLE_IMAGE = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
ALMOST_TAG = r"(?i)(.+):(\$?TAG|\$\{TAG.*\})\s*"
REPOSITORY = r"""(?x)
    (localhost | [A-Za-z0-9-]+ (\.[A-Za-z0-9-]+)+ | [A-Za-z0-9-]+ (?=:)) (:\d+)?  # registry
    (/ [a-z0-9]+ ((\. | _ | __ | -+) [a-z0-9]+)* )+                               # path
"""
BUILD_KEYS = {"path": "context", "manifest": "dockerfile"}  # convox.yml: compose


class Build(NamedTuple):
    """The arguments of a docker build. Services with equal builds share one image."""

    context: str = "."
    dockerfile: str = ""  # relative to the context
    args: tuple[str, ...] = ()
    target: str = ""


class Service(NamedTuple):
    """A service whose image ends in :TAG."""

    name: str
    repository: str
    build: Build
    tag_offset: int  # where TAG is in the manifest's text


class Scalar(str):
    """A YAML scalar as written, with its position in the text."""

    start = end = 0


class Loader(yaml.SafeLoader):
    """Loads all scalars as written, numbers included, and refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"duplicate key {key.value!r}. Remove one."
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node

    def scalar(self, node: Any) -> Scalar:
        scalar = Scalar(node.value)
        scalar.start, scalar.end = node.start_mark.index, node.end_mark.index
        return scalar


for kind in ("str", "bool", "int", "float", "timestamp", "value"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.scalar)
Loader.add_multi_constructor("!", lambda *_: None)  # custom tags, such as !reset


class Manifest(NamedTuple):
    """A docker-compose.yml or convox.yml, and its services whose image ends in :TAG."""

    text: str
    services: list[Service]

    @classmethod
    def load(cls, path: str) -> "Manifest":
        """Read a manifest. Raise DeployError."""
        try:
            text = Path(path).read_bytes().decode()  # keep CRLF line endings
            return cls(text, read_services(text))
        except OSError as error:
            problems: Iterable[Any] = [f"{error.strerror}. {where_to_look()}"]
        except RecursionError:
            problems = ["nested too deeply."]
        except (yaml.YAMLError, UnicodeError, OverflowError) as error:
            mark: Any = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark else ""
            problems = [f"{line}not valid YAML: {getattr(error, 'problem', error)}"]
        except ValueError as error:
            problems = error.args
        raise DeployError(*(f"{path}: {problem}" for problem in problems))

    def with_tags(self, tags: dict[int, str]) -> str:
        """Return the text with TAG replaced at each offset, and nothing else changed."""
        text = self.text
        for offset, tag in sorted(tags.items(), reverse=True):
            text = text[:offset] + tag + text[offset + len("TAG") :]
        return text

    def conflicts(self, custom_tag: str) -> Iterator[str]:
        """Yield services that would get the tag of another build."""
        builds: dict[Any, Build] = {}
        for service in self.services:
            key = service.repository if custom_tag else service.tag_offset
            if builds.setdefault(key, service.build) != service.build:
                yield (
                    f"service {service.name} would get the same image and tag as a service with"
                    " different build settings. Give it its own `image:`."
                )


def where_to_look() -> str:
    """Suggest where the manifest is."""
    for directory in (Path.cwd(), *Path.cwd().parents):
        for name in MANIFESTS:
            if os.path.isfile(directory / name):
                is_here = directory == Path.cwd()
                return f"Set DOCKER_COMPOSE={name}." if is_here else f"Run this in {directory}."
    return "Run this from the project root, or set DOCKER_COMPOSE to your manifest."


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def services_in(text: str) -> dict[str, dict[str, Any]]:
    """Return the keys of each service in a manifest. Raise yaml.YAMLError."""
    top = mapping(yaml.load(text, Loader))
    services = mapping(top.get("services", top))  # compose v1 has them at the top level
    return {str(name): mapping(keys) for name, keys in services.items()}


def read_services(text: str) -> list[Service]:
    """Return the services to build. Raise ValueError with all problems, or yaml.YAMLError."""
    services, problems = list[Service](), list[str]()
    for name, keys in services_in(text).items():
        init_image = mapping(keys.get("initContainer")).get("image")
        try:
            services += read_service(name, keys, text)
            if re.fullmatch(ALMOST_TAG, str(init_image)):
                services += read_service(name, {**keys, "image": init_image}, text)
        except ValueError as error:
            problems.append(f"service {name}: {error}")
    if not services and not problems:
        problems.append(f"no image ends in :TAG. Set, for example, image: {EXAMPLE_IMAGE}")
    if problems:
        raise ValueError(*problems)
    return services


def read_service(name: str, keys: dict[str, Any], text: str) -> Iterator[Service]:
    """Yield the service, or nothing if its image is third-party. Raise ValueError."""
    image: Any = keys.get("image")
    if image is None:
        raise ValueError(f"the cluster would build it. Set image: {EXAMPLE_IMAGE}")
    match = re.fullmatch(ALMOST_TAG, str(image))
    if not match:
        if keys.get("build") is not None:
            raise ValueError(f"{image} is not built. Change its tag to TAG, or remove `build:`.")
        return
    if not str(image).endswith(":TAG"):
        raise ValueError(f"only a literal :TAG is replaced. Set image: {match[1]}:TAG")
    offset = text.rfind(":TAG", image.start, image.end)
    if offset < 0 or not re.fullmatch(REPOSITORY, match[1]):
        raise ValueError(
            f"image {image} must name a registry and a repository, in lowercase and without"
            f" variables or escapes, such as {EXAMPLE_IMAGE}, or docker.io/<user>/<repository>:TAG"
        )
    yield Service(name, match[1], read_build(keys.get("build"), keys.get("dockerfile")), offset + 1)


def read_build(build: Any, dockerfile: Any) -> Build:
    """Read `build:`, with the keys of compose or convox.yml. Raise ValueError."""
    given = build if isinstance(build, dict) else {"context": build}
    read: dict[str, Any] = {"dockerfile": dockerfile} if dockerfile else {}
    for key, value in given.items():
        field_name = BUILD_KEYS.get(key, key)
        if field_name not in Build._fields:
            raise ValueError(f"build.{key} is not supported. Use a docker build option after `--`.")
        if value is not None and value != "":
            read[field_name] = value
    args = read.pop("args", [])
    if isinstance(args, dict):
        args = [
            f"{name}={value}" if isinstance(value, str) else value or name
            for name, value in args.items()
        ]
    args = args if isinstance(args, list) else [args]
    for word in [*read.values(), *args]:
        if not isinstance(word, str) or "$" in word:
            raise ValueError(
                f"`build:` contains {word!r}. Write a string without variables, or use a docker"
                " build option after `--`."
            )
    return Build(args=tuple(args), **read)


# --- running commands -----------------------------------------------------------------


class Secrets(set[str]):
    """Values to redact: the secrets in the environment, and those learned later."""

    def learn(self, *secrets: str) -> None:
        lines = [line.strip() for secret in secrets for line in secret.splitlines()]
        # Shorter ones occur in ordinary words.
        self.update(line for line in lines if len(line) >= 6)
        longest_first = sorted(self, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(any_spelling, longest_first)) or "(?!)")

    def hide(self, text: str) -> str:
        return self.pattern.sub("***", text)


def any_spelling(secret: str) -> str:
    """Return a pattern for a secret whose characters may be escaped or percent-encoded."""
    return "".join(
        char if re.match("[A-Za-z0-9]", char) else rf"\\?({re.escape(char)}|(?i:{url_quote(char)}))"
        for char in secret
    )


SECRETS, url_password = Secrets(), rack_url().password or ""
SECRETS.learn(
    url_password,
    unquote(url_password),
    *(
        value
        for name, value in os.environ.items()
        if re.search("PASSWORD|SECRET|TOKEN", name, re.I)
    ),
)


COLOR = False if env("NO_COLOR") or env("TERM") == "dumb" else bool(env("FORCE_COLOR")) or None


def echo(text: str, err: bool = False, **style: Any) -> None:
    """Print a line, redacted, in color if COLOR says so or, if that is None, on a terminal."""
    click.echo(click.style(SECRETS.hide(text), **style), err=err, color=COLOR)


def warn(text: str) -> None:
    echo(f"warning: {text}", fg="yellow")


class CommandFailed(DeployError):
    """A command that failed, or that succeeded without usable output (status 0)."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(output)
        self.argv, self.status, self.output, self.advice = argv, status, output, ""

    @property
    def reason(self) -> str:
        return self.output.splitlines()[-1]

    def __str__(self) -> str:
        ended = f"exited with code {self.status}." if self.status else "succeeded, but:"
        if self.status < 0:
            ended = f"was ended by signal {-self.status} ({signal.strsignal(-self.status)})."
        output = [f"  {line}" for line in self.output.splitlines()[-5:]]
        lines = [f"`{short_name(self.argv)}` {ended}", *output, self.advice]
        return "\n".join(filter(None, lines))


class NotStarted(CommandFailed):
    """A command that is not installed or not executable."""

    def __str__(self) -> str:
        return self.output


class Stopped(DeployError):
    """The deploy was stopped by a signal. SIGALRM means that a step timed out."""

    def __init__(self, signum: int, when: str, minutes: float) -> None:
        self.exit_code = 128 + signum
        why = f"Stopped by {signal.Signals(signum).name} {when}."
        if signum == SIGALRM:
            self.exit_code = TIMED_OUT
            why = f"Timed out after {minutes:g} minutes {when}. Raise --timeout or DEPLOY_TIMEOUT."
        super().__init__(why)


STOP_SIGNALS = [SIGINT, SIGTERM, SIGHUP, SIGQUIT]  # that stop a deploy
LAST_SIGNALS = [SIGKILL, 0]  # to stop commands, after SIGTERM; 0 gives up


class Shell:
    """Runs commands through sh, each in its own process group.

    A signal, a timeout (SIGALRM) or a failure in parallel stops all groups: with SIGTERM, then,
    after GRACE_SECONDS or a second Ctrl-C, with SIGKILL. What survives even that is left behind.
    The handler raises nothing, because it may interrupt sh between fork and exec. Commands raise
    once they have ended.
    """

    dry_run = quiet = False
    minutes = 0.0  # timeout of a step
    started = heard = 0.0  # when the step started, and when it last printed something
    doing = ""  # for messages, while several commands wait
    stopped_by = 0  # the signal
    signals = 0  # received

    def __init__(self) -> None:
        self.hidden: deque[str] = deque(maxlen=100_000)  # output hidden by --quiet
        self.signals_left = [SIGTERM, *LAST_SIGNALS]
        self._groups: set[int] = set()

    def capture(self, *argv: str, **options: Any) -> str:
        """Run a command silently, even in a dry run. Return its stdout, which no error shows."""
        return self._run(argv, _iter_noblock=True, **options)

    def run(self, *argv: str, **options: Any) -> None:
        """Show a command and run it with our stdout and stderr. A dry run only shows it."""
        if self.quiet:
            self.stream(*argv, **options)
            return
        self.show(argv)
        if not self.dry_run:
            self._run(argv, _out=1, _err=2, **options)

    def stream(self, *argv: str, label: str = "", only: str = "", **options: Any) -> str:
        """Show a command, run it, and print its output, redacted. Return its stdout.

        That includes stderr, unless only="err", which prints stderr alone.
        """
        self.show(argv)
        if self.dry_run:
            return ""
        # Of a long log, only the last lines are kept.
        options.update(_iter_noblock=only or True, _err_to_out=not only, _internal_bufsize=1000)
        return self._run(argv, lambda line: self.say(label + line), **options)

    def parallel(self, function: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
        """Call a function for each value in parallel. The first failure stops the rest."""
        failures: list[Exception] = []

        def attempt(value: Any) -> T:
            try:
                return function(value)
            except Exception as failure:
                failures.append(failure)
                self.stop(SIGTERM)
                raise

        with ThreadPoolExecutor(MAX_PARALLEL) as pool:
            futures = [pool.submit(attempt, value) for value in values]
            while wait(futures, 0.1).not_done:
                pass  # waiting without end, the main thread might not notice a signal
        for failure in failures:
            raise failure
        return [future.result() for future in futures]

    def show(self, *pipe: Sequence[str]) -> None:
        """Show a command, or a pipeline, as it could be typed."""
        self.say("$ " + " | ".join(shlex.join(map(SECRETS.hide, argv)) for argv in pipe), dim=True)

    def say(self, text: str, **style: Any) -> None:
        """Print a line that --quiet hides."""
        if self.quiet:
            self.hidden.append(text)
        else:
            echo(text, **style)
            self.heard = time.monotonic()

    def handle_signals(self) -> None:
        """Let signals stop the deploy, except those that our parent ignores."""
        for signum in (SIGCHLD, SIGALRM):  # which we depend on
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for signum in (*STOP_SIGNALS, SIGALRM):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.stop)

    def stop(self, signum: int, _frame: Any = None) -> None:
        """Stop all commands and start no others. Use more force on a second SIGALRM or Ctrl-C."""
        self.signals += signum != SIGALRM
        if not self.stopped_by:
            self.stopped_by = signum
        elif signum not in (SIGALRM, SIGINT):
            return
        if self.signals_left:
            now = self.signals_left.pop(0)
            for group in list(self._groups):
                kill_group(group, now)
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS if now == SIGTERM else 2)

    @contextmanager
    def last_words(self, seconds: float) -> Iterator[None]:
        """Allow commands again after a stop, for a limited time."""
        self.stopped_by, self.signals_left = 0, [*LAST_SIGNALS]
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)

    def raise_if_stopped(self, when: str = "between two commands") -> None:
        if self.stopped_by:
            raise Stopped(self.stopped_by, when, self.minutes)

    def _run(
        self, argv: Sequence[str], show: Callable[[str], None] = lambda line: None, **options: Any
    ) -> str:
        """Run a command to its end and return its stdout. Raise CommandFailed or Stopped."""
        command, doing = self._start(argv, **options), self.doing or f"running `{short_name(argv)}`"
        # Stops reading 2 s after the command has ended: a daemon may keep the pipe open.
        waiting = threading.Thread(target=command.wait, daemon=True)
        waiting.start()
        try:
            for line in self._lines(command, waiting, doing):
                show(line)
        except OSError:  # our own output is closed
            self.stop(SIGPIPE)
            raise
        finally:
            if self.stopped_by:
                doing += self._await_group(command.pgid)
            self._groups.discard(command.pgid)
        self.raise_if_stopped(f"while {doing}")
        if -command.exit_code in (*STOP_SIGNALS, SIGPIPE):  # which is about to reach us, too
            raise Stopped(-command.exit_code, f"while {doing}", self.minutes)
        stdout = os.fsdecode(command.stdout)
        if command.exit_code:
            output = os.fsdecode(command.stderr) or (stdout if "_err_to_out" in options else "")
            unknown = "See its output above." if "_out" in options else "It gave no reason."
            raise CommandFailed(argv, command.exit_code, SECRETS.hide(output.strip() or unknown))
        return stdout

    def _start(self, argv: Sequence[str], **options: Any) -> Any:
        self.raise_if_stopped()
        if "_out" not in options:
            options["_tty_out"] = False  # keeps programs from drawing progress bars
        try:
            command = sh.Command(argv[0])(
                *argv[1:], _bg=True, _new_session=True,
                _ok_code=[*range(-64, 256)], _encoding="as_it_came",
                **{"_env": without_rack_login(), **options},
            )  # fmt: skip
        except (sh.CommandNotFound, sh.ForkException, OSError):
            fix = "Install it, or add it to the PATH."
            if "/" in argv[0]:
                fix = "It must be an executable script."
            raise NotStarted(argv, 0, f"Cannot run {argv[0]}. {fix}") from None
        self._groups.add(command.pgid)
        if self.stopped_by:  # in the meantime
            kill_group(command.pgid, SIGTERM)
        return command

    def _lines(self, command: Any, waiting: threading.Thread, doing: str) -> Iterator[str]:
        """Yield the lines of a command's output. Print a sign of life while there are none."""
        options, patience = command.call_args, HEARTBEAT_SECONDS
        if options["out"]:  # its output goes straight through
            patience = sys.maxsize if sys.stdout.isatty() else 5 * HEARTBEAT_SECONDS
        for line in command if options["iter_noblock"] else ticks(waiting):
            now = time.monotonic()
            if not self.signals_left:
                return
            if line != errno.EWOULDBLOCK:
                yield line.rstrip("\n")
            elif now - self.heard > patience:
                self.heard = now
                with suppress(OSError):
                    echo(f"Still {doing} ({(now - self.started) / 60:.0f} min)")

    def _await_group(self, group: int) -> str:
        """Wait until a stopped command's children have ended. Return which ones cannot be ended."""
        while True:
            problem = ""
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return ""
            except PermissionError:
                problem = f", which another user runs and we cannot end (process group {group})"
            if not self.signals_left:
                return problem
            time.sleep(0.05)


shell = Shell()


def ticks(thread: threading.Thread) -> Iterator[Any]:
    while thread.is_alive():
        yield errno.EWOULDBLOCK
        thread.join(0.1)


def as_it_came(name: str) -> Optional[codecs.CodecInfo]:
    """A codec for sh that keeps bytes that are not UTF-8, in paths, arguments and output."""
    if name != "as_it_came":
        return None
    return codecs.CodecInfo(
        lambda text, _="": codecs.utf_8_encode(text, "surrogateescape"),
        lambda data, _="": codecs.utf_8_decode(data, "surrogateescape", True),
    )


codecs.register(as_it_came)
codecs.lookup("as_it_came")  # now, because a child must not import between fork and exec


def without_rack_login() -> dict[str, str]:
    """Return our environment for programs that don't need the rack's password."""
    return {k: v for k, v in os.environ.items() if k not in ("CONVOX_PASSWORD", "RACK_URL")}


def kill_group(group: int, signum: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def short_name(argv: Sequence[str]) -> str:
    """Return a command without its arguments: docker push, convox releases promote."""
    return " ".join([argv[0], *(word for word in argv[1:3] if re.fullmatch("[a-z][a-z-]*", word))])


@contextmanager
def advice(table: dict[str, str]) -> Iterator[None]:
    """Add the advice for the first pattern that matches a failed command's output."""
    try:
        yield
    except CommandFailed as failure:
        matches = (text for pattern, text in table.items() if re.search(pattern, failure.output))
        failure.advice = failure.advice or next(matches, "")
        raise


def option(name: str, value: str) -> list[str]:
    return [name, value] if value else []


# --- git ------------------------------------------------------------------------------

BRANCHES = ["BRANCH_NAME", "GIT_BRANCH", "GITHUB_HEAD_REF", "GITHUB_REF_NAME", "CI_COMMIT_BRANCH"]


class Commit(NamedTuple):
    """The checked-out commit. All empty outside a git repository."""

    hash: str = ""
    branch: str = ""
    describe: str = ""
    title: str = ""  # short hash and subject
    git_dir: str = ""


def read_commit() -> Commit:
    """Return the checked-out commit. Raise CommandFailed."""

    def git(*args: str) -> str:
        return re.sub(r"[\x00-\x1f\x7f]+", " ", shell.capture("git", *args)).strip()

    if not any(
        os.path.exists(directory / ".git") for directory in (Path.cwd(), *Path.cwd().parents)
    ):
        return Commit()
    sha, _, title = git("log", "-1", "--no-show-signature", "--format=%H %h %s").partition(" ")
    branch, git_dir = git("rev-parse", "--abbrev-ref", "HEAD", "--absolute-git-dir").split(" ", 1)
    if branch == "HEAD":  # detached, as in CI
        branch = next(filter(None, map(env, BRANCHES)), branch).replace("origin/", "", 1)
    return Commit(sha, branch, git("describe", "--always", "--dirty"), title, git_dir)


def run_url() -> str:
    """Return the URL of the CI run, "" outside CI."""
    if run := env("GITHUB_RUN_ID"):
        return f"{env('GITHUB_SERVER_URL')}/{env('GITHUB_REPOSITORY')}/actions/runs/{run}"
    return env("BUILD_URL") or env("CI_JOB_URL")


# --- docker and ECR -------------------------------------------------------------------

PUSHED = "digest: (sha256:[0-9a-f]{64}) size: "
IMMUTABLE = "because the (tag|repository) is immutable"
MISSING = r"\bEOF\b|repository .* does not exist|name unknown"  # a repository, says docker
ECR_ADVICE = {
    "no basic auth credentials|unauthorized": "docker is not logged in to this registry. Run"
    " `docker login`, or remove --skip-ecr-login.",
    "403 Forbidden|authorization token has expired": "Either the ECR login has expired (with"
    " --skip-ecr-login, log in again), or this AWS user is not allowed to push.",
    "not authorized|AccessDenied|denied": "This AWS user or role is not allowed to push. Grant it"
    " access (for example with the AmazonEC2ContainerRegistryPowerUser policy), or set AWS_PROFILE"
    " to a profile that has it.",
}
PUSH_ADVICE = {
    IMMUTABLE: "This tag already exists and the repository's tags are immutable. Unset IMAGE_TAG or"
    " choose a new tag.",
    MISSING: "The repository may not exist. Create it, or correct its name.",
    "(?i)no basic auth|unauthorized|denied|forbidden": "Run `docker login` for this registry, and"
    " check that you are allowed to push to this repository.",
    "no space left": "The disk is full. `docker system prune` frees space used by docker.",
}
TRANSIENT = r"""(?x)
    \bEOF\b | (?i:
    status (\ ?code)? [^\n]* :\ ? (429 | 50[0234]) \b | too\ ?many\ ?requests | rate\ exceeded
    | error\ from\ registry:\ internal | connection\ (reset | refused | timed\ out) | broken\ pipe
    | use\ of\ closed\ network\ connection | (i/o | handshake)\ timeout
    | timeout\ awaiting\ response\ headers | client\ connection\ lost
    | server\ closed\ idle\ connection )
"""
ECR_HOST = r"""(?x)
    (?P<account>\d{12}) \.dkr[.-]ecr (-fips)? \. (?P<region>[a-z0-9-]+) \.
    (amazonaws\.(com(\.cn)? | eu) | on\.(aws | amazonwebservices\.com\.cn)
     | sc2s\.sgov\.gov | c2s\.ic\.gov | cloud\.adc-e\.uk | csp\.hci\.ic\.gov)
"""


@dataclass
class Ecr:
    """A repository in ECR, accessed with the aws CLI."""

    registry: str
    name: str
    region: str
    account: str
    refusal: Optional[str] = None  # of ECR to create it; empty if it exists, None if not asked
    password: str = ""

    @classmethod
    def of(cls, repository: str) -> Optional["Ecr"]:
        """Return the repository, or None if its registry is not ECR."""
        registry, _, name = repository.partition("/")
        match = re.fullmatch(ECR_HOST, registry)
        return match and cls(registry, name, match["region"], match["account"])

    @property
    def get_password(self) -> list[str]:
        return ["aws", "ecr", "get-login-password", "--region", self.region]

    def read_password(self) -> None:
        """Get the password for docker login, valid for 12 hours."""
        with advice(AWS_ADVICE):
            self.password = shell.capture(*self.get_password).strip()
            if not re.fullmatch("[!-~]+", self.password):
                raise CommandFailed(self.get_password, 0, "It printed no password.")
        SECRETS.learn(self.password)

    def create(self) -> bool:
        """Create the repository. Return False if it exists, or if ECR refuses."""
        where = ["--region", self.region, "--registry-id", self.account]
        create = ["aws", "ecr", "create-repository", *where, "--repository-name", self.name]
        shell.show(create)
        try:
            shell.capture(*create)
            self.refusal = ""
        except CommandFailed as failure:
            exists = "RepositoryAlreadyExists" in failure.output
            self.refusal = "" if exists else str(failure)
            return False
        return True


AWS_ADVICE = {
    "[Ii]nvalid choice": "This AWS CLI is older than 1.17.10. Install a newer one.",
    "": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`.",
}


@dataclass
class Image:
    """One docker build, and what is known about its image."""

    build: Build
    services: list[Service]
    local: str  # its name in docker, unique per deploy
    id: str = "sha256:IMAGE_ID"
    platform: str = ""  # such as linux/amd64
    tag: str = ""
    cache: list[str] = field(default_factory=list)  # options of docker build

    @property
    def short_id(self) -> str:
        return self.id.partition(":")[2][:12]


class Docker(NamedTuple):
    build_args: Sequence[str]  # the user's
    names: set[str]  # of images, to be removed in the end

    def check(self) -> None:
        with advice({"": "Start Docker and try again."}):
            shell.capture("docker", "version", "--format", "{{.Server.Version}}")

    def missing_files(self, images: Sequence[Image]) -> Iterator[str]:
        """Yield what docker build would find only after the builds before it."""
        names_file = re.search(r"(^| )(-f|--file)", " ".join(self.build_args))
        for build in (image.build for image in images if "://" not in image.build.context):
            dockerfile = Path(build.context, build.dockerfile or "Dockerfile")
            if not os.path.isdir(build.context):
                yield f"Build context {build.context!r} is not a directory. Correct `build:`."
            elif not dockerfile.is_file() and not names_file:
                yield f"{dockerfile} not found. Create it, or name another one under `build:`."

    def login(self, ecr: Ecr) -> None:
        login = ["docker", "login", "--username", "AWS", "--password-stdin", ecr.registry]
        shell.show(ecr.get_password, login)
        try:
            with advice(
                {"": "Check that docker can reach the registry, and this machine's clock."}
            ):
                if not shell.dry_run:
                    shell.capture(*login, _in=ecr.password)
        except CommandFailed as failure:
            # Credential helpers that fetch passwords themselves cannot store any.
            if not re.search("error storing credentials.*not implemented", failure.output):
                raise

    def require_buildkit(self) -> None:
        if "--secret" not in shell.capture("docker", "build", "--help"):
            raise CommandFailed(["docker"], 0, "this needs BuildKit.")

    def build(self, image: Image) -> None:
        build = image.build
        self.names.add(image.local)
        shell.run(
            "docker", "build", "--tag", image.local, *image.cache,
            *option("--file", build.dockerfile and os.path.join(build.context, build.dockerfile)),
            *(word for arg in build.args for word in ("--build-arg", arg)),
            *option("--target", build.target),
            *self.build_args,
            build.context,
            # By default, the attestations of buildx give each build a new image ID.
            _env={"BUILDX_NO_DEFAULT_ATTESTATIONS": "1", **without_rack_login()},
        )  # fmt: skip

    def inspect(self, image: Image) -> None:
        """Record the image's ID and platform. Raise CommandFailed if docker does not know it."""
        inspect = ["docker", "image", "inspect", "--format", "{{.Id}} {{.Os}}/{{.Architecture}}"]
        with advice({"": "If the builder does not load images into docker, add `-- --load`."}):
            answer = shell.capture(*inspect, image.local).strip()
            image.id, _, image.platform = answer.partition(" ")
            if not re.fullmatch("sha256:[0-9a-f]{64}", image.id):
                raise CommandFailed(inspect, 0, "It printed no image ID.")

    def push(self, image: Image, reference: str, ecr: Optional[Ecr], label: str) -> Optional[str]:
        """Tag and push an image. Return the digest, if known. Retry on transient errors.

        docker's messages about a missing repository differ between versions, so ask ECR to create
        it: once, and only after a failed push, because an account may create repositories on push,
        from a template.
        """
        self.names.add(reference)
        shell.run("docker", "tag", image.local, reference)
        pauses = list(PUSH_PAUSES)
        while True:
            try:
                with advice({**(ECR_ADVICE if ecr else {}), **PUSH_ADVICE}):
                    return self.push_once(reference, label)
            except CommandFailed as failure:
                if not failure.status:  # it printed no digest
                    raise
                if re.search(IMMUTABLE, failure.output) and reference.endswith(image.short_id):
                    shell.say(f"{label}{reference} is already in the registry.")
                    return None
                if ecr and ecr.refusal is None and ecr.create():
                    continue
                if not (self.may_recover(failure, ecr) and pauses):
                    raise
                warn(f"`docker push` failed: {failure.reason} Retrying in {pauses[0]} s.")
            shell.capture("sleep", str(pauses.pop(0)))  # unlike time.sleep, a signal ends it

    def may_recover(self, failure: CommandFailed, ecr: Optional[Ecr]) -> bool:
        """Return whether to retry a failed push. Add ECR's refusal to create the repository."""
        is_missing = re.search(MISSING, failure.output)
        is_transient = re.search(TRANSIENT, failure.output)
        if not (ecr and ecr.refusal):  # ECR takes some seconds to know a new repository
            return bool(is_transient or (ecr and is_missing))
        if is_missing or not failure.advice:
            failure.advice = f"The repository may not exist, and was not created. {ecr.refusal}"
        return bool(is_transient and not (is_missing and "AccessDenied" in ecr.refusal))

    def push_once(self, reference: str, label: str) -> Optional[str]:
        push = ["docker", "push", reference]
        if sys.stdout.isatty() and not label and not shell.quiet:
            shell.stream(*push, only="err", _out=1)  # with docker's own progress bars
            return None
        digest = re.search(PUSHED, shell.stream(*push, label=label))
        if not digest and not shell.dry_run:
            raise CommandFailed(push, 0, f"It printed no digest: {reference} was not pushed.")
        return digest and digest[1]

    def remove_names(self) -> None:
        """Remove image names. The layers stay, as cache for the next build."""
        with suppress(DeployError):
            shell.capture("docker", "image", "rm", "--no-prune", *self.names)


# --- convox ---------------------------------------------------------------------------

CONVOX_ADVICE = {  # builds first: their logs may contain the others
    "no matching manifest|no match for platform": "The image is for another architecture than the"
    " rack. Build it with `-- --platform linux/amd64`.",
    "build failed": "See the rack's output above. If it is not allowed to pull the image, add the"
    " registry's credentials with `convox registries add`.",
    "ERROR: rollback": "The new containers did not become healthy. Run `convox logs` to find out"
    " why. If you see `exec format error`, the image is for another architecture: build it with"
    " `-- --platform linux/amd64`.",
    "no such app": "Create the app with `convox apps create`, or check APP_NAME.",
    "could not find rack": "Check --rack or CONVOX_RACK. `convox racks` lists the racks.",
    # only in the last line: an app's own log may contain them, too
    r"(dial tcp|no such host|connection refused|i/o timeout|x509|tls: |: 50\d).*\Z": "Check"
    " CONVOX_HOST, and that this machine can reach the rack.",
    r"\b401$|[Uu]nable to authenticate|authentication failed|no current rack": "Check CONVOX_HOST"
    " and CONVOX_PASSWORD, or log in with `convox login`.",
}


class App(NamedTuple):
    """The state of the app according to the rack."""

    release: str = ""
    status: str = "unknown"


class Convox:
    """The convox CLI, any version since 2016. Its --help shows which options it has."""

    def __init__(self, app: str, rack: Rack) -> None:
        self.app, self.env = app, rack.environment
        self.rack_option = option("--rack", rack.name)
        self.services: dict[str, dict[str, Any]] = {}  # by release, once they have been read
        self.options = {
            "build": {"--manifest", "--description", "--id"},
            "releases promote": {"--wait"},
        }

    def read_help(self) -> None:
        for command in self.options:
            text = shell.capture("convox", *command.split(), "--help", _err_to_out=True)
            self.options[command] = {*re.findall("--[a-z][a-z-]*", text)}
        if "--app" not in self.options["build"] & self.options["releases promote"]:
            raise DeployError("`convox` is not the Convox CLI, or too old. Install a new one.")
        if "--rack" not in self.options["build"]:
            self.rack_option = []  # CONVOX_RACK names it

    def check(self, no_verify: bool) -> str:
        """Return the running release. With --no-verify, only check the login."""
        self.read_help()
        if no_verify:
            self.ask("rack", *self.rack_option)  # which every login is allowed to run
            return ""
        with advice({"": "A deploy key that is not allowed to read the app needs --no-verify."}):
            return self.read_app().release

    def ask(self, *words: str) -> str:
        """Return a command's output. It may contain secrets, so no error shows it."""
        with advice(CONVOX_ADVICE):
            return shell.capture("convox", *words, _env=self.env)

    def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Return what `read` finds in a response of the rack's API. Raise CommandFailed."""
        question = ["api", "get", *self.rack_option, f"/apps/{self.app}{path}"]
        answer = self.ask(*question)
        with suppress(Exception):
            return read(json.loads(answer))
        raise CommandFailed(["convox", *question], 0, "It printed no usable answer.")

    def read_app(self) -> App:
        return self.get("", lambda app: App(str(app["release"] or ""), str(app["status"])))

    def check_still_running(self, before: str) -> None:
        """Raise DeployError if the app is running another release, perhaps on another rack."""
        if (now := self.read_app().release) != before:
            raise DeployError(
                f"{self.app} is running {now or 'no release'}, but was running"
                f" {before or 'no release'} when this deploy started. Either someone else has"
                " deployed, or `convox switch` has changed the rack. Deploy again, with --rack."
            )

    def image_of(self, services: Iterable[Service], release: str) -> str:
        """Return the image that one of the services has in a release. Raise CommandFailed."""
        if not release:
            raise CommandFailed(["convox"], 0, "no running release is known.")
        if release not in self.services:
            self.services[release] = self.get(
                f"/releases/{release}", lambda answer: services_in(answer["manifest"])
            )
        for service in services:
            if image := self.services[release].get(service.name, {}).get("image"):
                return str(image)
        raise CommandFailed(["convox"], 0, f"{release} has no image for it.")

    def newer_release(self, release: str) -> str:
        """Return the newest release if it is a different one and this login can list releases."""
        with suppress(CommandFailed):
            newest = self.get("/releases", lambda releases: dict(releases[0]))
            if newest.get("id") not in (None, release):
                return f"{newest['id']} ({newest.get('description') or 'no description'})"
        return ""

    def build(self, directory: str, manifest: str, description: str, git_dir: str) -> str:
        """Build a release from the manifest in a directory. Return its ID."""
        known = self.options["build"]
        build = [
            "convox", "build", "--app", self.app, *self.rack_option,
            *option("--manifest" if "--manifest" in known else "--file", manifest),
            *option("--description", description if "--description" in known else ""),
            *(known & {"--id"}), directory,
        ]  # fmt: skip
        variables = {**self.env, **({"GIT_DIR": git_dir} if git_dir else {})}  # sets BUILD_GIT_SHA
        with advice(CONVOX_ADVICE):
            only = "err" if "--id" in known else ""
            output = shell.stream(*build, only=only, _env=variables).strip()
            if shell.dry_run:
                return "RELEASE_ID"
            # With --id, it is the whole output. Without, it is the last line.
            match = re.search(rf"(?m)(\A|^Release: )({RELEASE_ID})\Z", output)
            if not match:
                raise CommandFailed(
                    build, 0, f"It printed no release ID, but {SECRETS.hide(output)[-60:]!r}."
                )
        return match[2]

    def promote_command(self, release: str) -> list[str]:
        wait = self.options["releases promote"] & {"--wait"}
        return [
            "convox", "releases", "promote", "--app", self.app, *self.rack_option, *wait, release,
        ]  # fmt: skip

    def promote(self, release: str) -> None:
        with advice(CONVOX_ADVICE):
            shell.stream(*self.promote_command(release), _env=self.env)

    def await_running(self, release: str) -> None:
        """Wait until the rack has reported the release as running, twice in a row."""
        app, before, answered = App(), App(), time.monotonic()
        while app != before or app.status != "running":
            before, now = app, time.monotonic()
            try:
                app, answered = self.read_app(), now
            except CommandFailed:
                app = App()
                if now - answered > PATIENCE_SECONDS:
                    raise
            if app.status == "failed":
                raise DeployError(f"The status of {self.app} is failed. See `convox logs`.")
            if app.status != "running":
                shell.doing = f"waiting for {self.app} (status: {app.status})"
                shell.capture("sleep", str(POLL_SECONDS))
        if app.release != release:
            raise DeployError(
                f"The rack accepted the promote, but {self.app} is running"
                f" {app.release or 'no release'}, not {release}. Either the rack rolled back, or"
                " someone else promoted another release."
            )


# --- hooks ----------------------------------------------------------------------------

SHEBANG = r"#!\s*(\S*/env\s+((-\S+|\w+=\S*)\s+)*)?(?P<program>\S+).*\n?"


def hook_path(name: str) -> Path:
    return Path("deploy", f"{name}.sh")


def check_hook(name: str) -> Iterator[str]:
    """Yield why a hook cannot run, or nothing if it can or does not exist."""
    path = hook_path(name)
    if not os.path.lexists(path):
        files = {file.name for file in path.parent.glob("*") if file.suffix in ("", ".sh")}
        for similar in difflib.get_close_matches(path.name, files, 1, 0.85):
            yield f"{path.parent / similar} is never run. Rename it to {path} to make it a hook."
    elif not path.is_file():
        yield f"{path} is a directory or a broken symlink. Replace it with a script, or remove it."
    elif not os.access(path, os.X_OK):
        yield f"{path} is not executable. Run: chmod +x {path}"
    elif os.access(path, os.R_OK):
        with path.open("rb") as script:
            line = os.fsdecode(script.readline(256))
        shebang = re.fullmatch(SHEBANG, line)
        if line.startswith("#!") and line.endswith("\r\n"):
            yield f"{path} has Windows (CRLF) line endings. Convert them to LF."
        elif shebang and not shutil.which(shebang["program"]):
            yield f"{path}: interpreter {shebang['program']!r} not found. Install it or fix line 1."
        elif not shebang and not line.startswith("\x7fELF"):
            yield f"{path} has no shebang line. Add one as the first line, such as #!/bin/sh"


# --- the lifecycle --------------------------------------------------------------------


@dataclass
class Outcome:
    """What is known so far. All of it goes into the result file."""

    release: str = ""
    running_before: str = ""
    promote_requested: bool = False
    verified: bool = False
    running: str = ""  # reported by the rack after the promote
    images: list[dict[str, Any]] = field(default_factory=list)  # that were pushed
    seconds: dict[str, float] = field(default_factory=dict)  # by step


class Deploy:
    """One deploy. Its methods are the steps. The function deploy runs them in order."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rack = settings, choose_rack(settings.rack)
        self.docker = Docker(settings.docker_build_args, set())
        self.convox = Convox(settings.app, self.rack)
        self.current_step = "preflight"
        self.commit = Commit()
        self.manifest = Manifest("", [])
        self.images: list[Image] = []
        self.hooks: list[str] = []  # found in preflight
        self.registries: dict[str, Ecr] = {}
        self.unreachable: list[str] = []  # problems despite which a dry run continues
        self.outcome = Outcome(release=settings.release)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Give a step its header, its timeout and its time in the summary."""
        shell.raise_if_stopped()
        echo(header(name), fg="cyan", bold=True)
        started = shell.started = shell.heard = time.monotonic()
        self.current_step = name
        shell.hidden.clear()
        signal.setitimer(signal.ITIMER_REAL, shell.minutes * 60)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.outcome.seconds[name] = round(time.monotonic() - started, 3)

    def preflight(self) -> None:
        """Check everything that can be checked ahead, and log in to the registries."""
        with self.step("preflight"):
            if problems := [*self.local_problems()]:
                raise DeployError(*problems)
            checks = [self.check_git, self.check_convox]
            if not self.settings.release:
                checks = [self.get_passwords, self.docker.check, *checks]  # the slowest first
            self.unreachable = [*filter(None, shell.parallel(problem_of, checks))]
            if self.unreachable and not shell.dry_run:
                raise DeployError(*self.unreachable)
            if self.unreachable:
                echo(f"A deploy would fail:\n{DeployError(*self.unreachable)}", err=True)
            echo(introduction(self), bold=True)
            self.log_in()

    def local_problems(self) -> Iterator[str]:
        """Yield problems with settings, hooks and manifest."""
        yield from self.settings.problems()
        yield from rack_problems(self.settings.rack)
        hooks = HOOKS[2:] if self.settings.release else HOOKS
        self.hooks = [name for name in hooks if os.path.lexists(hook_path(name))]
        for name in hooks:
            yield from check_hook(name)
        if os.path.isdir("deploy") and not os.access("deploy", os.R_OK | os.X_OK):
            yield "The directory deploy is not readable. Run: chmod +rx deploy"
        if self.settings.release and os.path.isfile(self.settings.file):
            return  # so this is the app's root
        try:
            self.load_manifest()
        except DeployError as error:
            yield from error.args
        yield from self.manifest.conflicts(self.settings.tag)
        if "before_build" not in self.hooks:  # it may create missing files
            yield from self.docker.missing_files(self.images)

    def load_manifest(self) -> None:
        self.manifest, images = Manifest.load(self.settings.file), dict[Build, Image]()
        for service in self.manifest.services:
            local = f"{self.settings.app}:deploy-{os.urandom(4).hex()}"
            image = images.setdefault(service.build, Image(service.build, [], local))
            image.services.append(service)
        self.images = [*images.values()]

    def check_git(self) -> None:
        try:
            with advice({"": "The image tag names the commit. Fix this, or set IMAGE_TAG."}):
                self.commit = read_commit()
        except CommandFailed:
            if not self.settings.tag and not self.settings.release:
                raise

    def check_convox(self) -> None:
        self.outcome.running_before = self.convox.check(self.settings.no_verify)

    def get_passwords(self) -> None:
        for service in self.manifest.services if not self.settings.skip_ecr_login else []:
            ecr = Ecr.of(service.repository)
            if ecr and ecr.registry not in self.registries:
                ecr.read_password()
                self.registries[ecr.registry] = ecr

    def log_in(self) -> None:
        """Log in to one registry at a time. The build may need images from there."""
        for ecr in self.registries.values():
            self.docker.login(ecr)

    def hook(self, name: str) -> None:
        """Run a hook as a step, or print one line if there is none."""
        path = hook_path(name)
        if name not in self.hooks and not os.path.lexists(path):
            return echo(f"{header(name)}: skipped, no {path}", fg="cyan")
        with self.step(name):
            if problems := [*check_hook(name)]:
                raise DeployError(*problems)
            shell.run(str(path), _in=0, _env=hook_environment(self, name))

    def build(self) -> None:
        with self.step("build"):
            if Manifest.load(self.settings.file) != self.manifest:  # before_build has edited it
                self.load_manifest()
                self.get_passwords()
                self.log_in()
            conflicts = self.manifest.conflicts(self.settings.tag)
            if problems := [*conflicts, *self.docker.missing_files(self.images)]:
                raise DeployError(*problems)
            for image in self.images:
                if self.settings.cache_from_running:
                    use_running_image_as_cache(self, image)
                self.docker.build(image)

    def push(self) -> None:
        with self.step("push"):
            if Manifest.load(self.settings.file) != self.manifest:
                raise DeployError(
                    f"{self.settings.file} has changed. Edit it in deploy/before_build.sh."
                )
            describe = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.commit.describe).lstrip(".-")[:100]
            for image in self.images:
                if not shell.dry_run:
                    self.docker.inspect(image)
                    names = ", ".join(dict.fromkeys(service.name for service in image.services))
                    shell.say(f"Image for {names}: {image.platform}")
                image.tag = self.settings.tag or "-".join(filter(None, [describe, image.short_id]))
            repositories = {service.repository for service in self.manifest.services}
            shell.parallel(self.push_to, sorted(repositories))

    def push_to(self, repository: str) -> None:
        """Push a repository's images one at a time: the first may have to create it."""
        ecr = Ecr.of(repository)
        is_alone = {service.repository for service in self.manifest.services} == {repository}
        for image in self.images:
            services = [s.name for s in image.services if s.repository == repository]
            if names := [*dict.fromkeys(services)]:  # an init container has its service's name
                reference, label = f"{repository}:{image.tag}", "" if is_alone else f"{names[0]} | "
                digest = self.docker.push(image, reference, ecr, label)
                self.docker.names.discard(reference)
                self.outcome.images.append(
                    {
                        "image": reference,
                        "digest": digest,
                        "platform": image.platform,
                        "services": names,
                    }
                )

    def release(self) -> None:
        """Build a release. Only the manifest is uploaded: the rack pulls the images."""
        with self.step("release"):
            name, images = os.path.basename(self.settings.file), self.images
            tags = {service.tag_offset: image.tag for image in images for service in image.services}
            text = self.manifest.with_tags(tags)
            if shell.dry_run:
                before, after = self.manifest.text.splitlines(), text.splitlines()
                diff = difflib.unified_diff(before, after, name, f"{name} as uploaded", lineterm="")
                shell.say("\n".join(diff))
            elif self.rack.label == CURRENT_RACK and not self.settings.no_verify:
                self.convox.check_still_running(self.outcome.running_before)
            about = f"{self.commit.title or images[0].tag} {run_url()}".strip()
            with tempfile.TemporaryDirectory(prefix="convox-deploy-") as directory:
                Path(directory, name).write_bytes(text.encode())
                release = self.convox.build(directory, name, about, self.commit.git_dir)
            if release == self.outcome.running_before:
                raise DeployError(f"`convox build` returned {release}, which is already running.")
            self.outcome.release = release
            if not shell.dry_run:
                echo(f"Built release {release} (not live yet). To resume from here:")
                echo(f"  {self.settings.resume_command(release)}")

    def promote(self) -> None:
        with self.step("promote"):
            release = self.outcome.release
            if shell.dry_run:
                return self.convox.promote(release)
            if newer := self.convox.newer_release(release):
                warn(
                    f"{newer} is newer than {release}. Promoting {release} reverts the changes made"
                    " in between, such as new environment variables."
                )
            self.outcome.promote_requested = True
            self.convox.promote(release)
            if not self.settings.no_verify:
                self.convox.await_running(release)
                self.outcome.running, self.outcome.verified = release, True


def deploy(settings: Settings) -> None:
    """Run the lifecycle. A step that fails raises DeployError, and nothing runs after it."""
    shell.dry_run, shell.minutes = settings.dry_run, settings.timeout
    shell.quiet = settings.quiet and not settings.dry_run
    run = Deploy(settings)
    with reporting(run):
        run.preflight()
        if not settings.release:
            run.hook("before_build")
            run.build()
            run.hook("after_build")
            run.push()
            run.release()
        if not settings.no_promote:
            run.hook("before_release")
            run.promote()


def hook_environment(run: Deploy, name: str) -> dict[str, str]:
    environment = {
        **run.rack.environment,
        "APP_NAME": run.settings.app,
        "RACK_NAME": run.rack.name,
        "GIT_HASH": run.commit.hash,
        "GIT_BRANCH": run.commit.branch,
        "GIT_DESCRIPTION": run.commit.title,
    }
    images = [] if name == "before_build" else run.images
    if images:
        environment["DOCKER_TAG"] = images[0].local
    for image in images:
        for service in image.services:
            suffix = re.sub("[^A-Z0-9]", "_", service.name.upper())
            environment[f"DOCKER_TAG_{suffix}"] = image.local
    if run.outcome.release:
        environment["RELEASE_ID"] = run.outcome.release
    return environment


def use_running_image_as_cache(run: Deploy, image: Image) -> None:
    """Let the build reuse layers of the running image, and later builds reuse ours."""
    try:
        run.docker.require_buildkit()
        image.cache = ["--build-arg", "BUILDKIT_INLINE_CACHE=1"]
        source = run.convox.image_of(image.services, run.outcome.running_before)
        # Docker 20.10 passes on the cache only of images that it has pulled.
        shell.stream("docker", "pull", "--quiet", source)
        image.cache += ["--cache-from", source]
    except CommandFailed as failure:
        name = image.services[0].name
        warn(f"Building {name} without the running image as cache: {failure.reason}")


def introduction(run: Deploy) -> str:
    """Return what is deployed where, and which manifest is used."""
    settings, subject = run.settings, run.commit.title.partition(" ")[2]
    what = f"{settings.app} {settings.release or run.commit.describe}".rstrip()
    what += f' "{subject}"' if subject and not settings.release else ""
    running = run.outcome.running_before and f" (running: {run.outcome.running_before})"
    there = filter(os.path.exists, MANIFESTS)
    others = [name for name in there if not os.path.samefile(name, settings.file)]
    manifests = ", not ".join([settings.file, *others])
    return f"Deploying {what} to {run.rack.label}{running}\nManifest: {manifests}"


def header(step: str) -> str:
    return f"\n==> [{STEPS.index(step) + 1}/{len(STEPS)}] {step}"


def problem_of(check: Callable[[], None]) -> str:
    try:
        check()
    except Stopped:
        raise
    except DeployError as error:
        return str(error)
    return ""


# --- the outcome ----------------------------------------------------------------------


@contextmanager
def reporting(run: Deploy) -> Iterator[None]:
    """Turn the end of a deploy into clean-up, messages, a result file and an exit code."""
    error: Optional[DeployError] = None
    file = Path(run.settings.result)
    has_file = run.settings.result and not shell.dry_run and not result_problem(file)
    try:
        prepare_streams()
        shell.handle_signals()
        yield
        shell.raise_if_stopped()
    except Exception as caught:
        error = explained(caught)
    code, note = error.exit_code if error else 0, clean_up(run, error)
    if run.unreachable or (run.current_step == "preflight" and code == FAILED):
        code = NOT_STARTED
    if has_file:
        try:
            write_result(file, result(run, error, code))
        except (OSError, DeployError) as unwritten:
            code, note = code or FAILED, f"The result was not written: {unwritten}\n{note}"
    if code != BROKEN_PIPE:
        with suppress(OSError):  # our output is closed
            tell(run, error, note)
    os._exit(code)  # unlike sys.exit, not changed by a signal or by closed output


def prepare_streams() -> None:
    streams: list[Any] = [sys.stdin, sys.stdout, sys.stderr]
    if None in streams:
        raise DeployError("Standard input, output or error is closed. Use /dev/null instead.")
    for stream in streams[1:]:  # keep bytes that are not UTF-8
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
        os.set_blocking(stream.fileno(), True)  # a full pipe must not be an error


def explained(error: Exception) -> DeployError:
    """Return the error, or one that says what to do about it."""
    if isinstance(error, DeployError):
        return error
    if isinstance(error, BrokenPipeError):
        return Stopped(SIGPIPE, "because nothing reads the output", 0)
    if isinstance(error, OSError):
        what = f"{error.filename or 'Cannot write'}: {error.strerror or error}"
        return DeployError(f"{what.rstrip('.')}. Free some disk space, or set TMPDIR.")
    if env("DEPLOY_DEBUG"):
        traceback.print_exc()
    return DeployError(
        f"Unexpected {type(error).__name__}: {' '.join(str(error).split())}. This is a bug in"
        f" convox_deploy.py {__version__}: please report it, with the output of DEPLOY_DEBUG=1."
    )


def clean_up(run: Deploy, error: Optional[DeployError]) -> str:
    """Remove our image names from docker. After a failed promote, return what is running."""
    live, outcome = "", run.outcome
    if error and outcome.promote_requested and shell.signals < 2:
        with shell.last_words(LAST_WORDS_SECONDS):
            live = what_is_live(run)
    if run.docker.names and not shell.dry_run:
        with shell.last_words(GRACE_SECONDS):
            run.docker.remove_names()
    return live


def what_is_live(run: Deploy) -> str:
    app, outcome = run.settings.app, run.outcome
    try:
        release, status = run.convox.read_app()
    except DeployError:
        return f"Could not find out what {app} is running."
    if status != "running":
        return f"{app} is {status} (release {release})."
    outcome.running = release
    return f"{app} is {'still' if release == outcome.running_before else 'now'} running {release}."


def tell(run: Deploy, error: Optional[DeployError], note: str) -> None:
    """Print the outcome."""
    settings, outcome = run.settings, run.outcome
    if not shell.dry_run and run.current_step != "preflight":
        with suppress(OSError):  # a closed stdout must not keep the error from stderr
            for line in ["", *summary(outcome)]:
                shell.say(line)
    if error:
        for line in shell.hidden:
            echo(line, err=True)
        count = f" ({len(error.args)} problems)" if error.args[1:] else ""
        echo(f"\n{run.current_step} failed{count}:", err=True, fg="red", bold=True)
        echo("\n".join(filter(None, [str(error), note, state(run, error)])), err=True)
        return
    if note:
        echo(note, err=True, fg="red")
    if shell.dry_run:
        echo("\nIMAGE_ID and RELEASE_ID are known once the image and the release are built.")
        but = ", but a deploy would fail (see above)" if run.unreachable else ""
        echo(f"Dry run: nothing was changed{but}.", bold=True)
    elif settings.no_promote:
        echo(f"\nBuilt release {outcome.release}, and did not promote it. To do so:", bold=True)
        echo(f"  {settings.resume_command(outcome.release)}")
    elif settings.no_verify:
        done = f"\nPromoted {outcome.release}. What is running was not verified (--no-verify)."
        echo(done, fg="yellow")
    else:
        echo(f"\n{settings.app} is now running {outcome.release}.", fg="green", bold=True)
        if outcome.running_before not in ("", outcome.release):
            back = run.convox.promote_command(outcome.running_before)
            echo(f"To roll back: {shlex.join(back)}")


def summary(outcome: Outcome) -> Iterator[str]:
    for step, seconds in {**outcome.seconds, "total": sum(outcome.seconds.values())}.items():
        yield f"{step:<16}{seconds:8.1f} s"
    for image in outcome.images:
        yield f"image   {image['image']}"
        if image["digest"]:
            yield f"digest  {image['digest']}"


def state(run: Deploy, error: DeployError) -> str:
    """Return the state that a failed deploy leaves behind."""
    app, outcome = run.settings.app, run.outcome
    where = shlex.join(["--app", app, *run.convox.rack_option])
    before = outcome.running_before
    was = before and f" {app} was running {before} when this deploy started."
    if shell.dry_run or run.current_step == "preflight":
        return "Nothing has been changed."
    resume = run.settings.resume_command(outcome.release)
    if outcome.promote_requested:
        return (
            f"The promote of {outcome.release} was requested and may still be in progress.\n"
            f"  Check:  convox apps info {where}\n"
            f"  Cancel: convox apps cancel {where}\n"
            f"  Retry:  {resume}"
        )
    if outcome.release:
        built = f"Release {outcome.release} is built. To resume from here:\n  {resume}"
        return f"Nothing was promoted.{was} {built}"
    if run.current_step == "release" and error.exit_code != FAILED:
        return (
            f"Nothing was promoted.{was} The build may still be running on the rack (check `convox"
            f" builds {where}`). Its release does not go live unless someone promotes it."
        )
    return f"Nothing was released or promoted.{was}"


def result(run: Deploy, error: Optional[DeployError], code: int) -> dict[str, Any]:
    """Return the contents of the result file, as described in docs/reference.md."""
    return {
        "tool": "convox-deploy",
        "status": "failed" if error else "succeeded",
        "exit_status": code,
        "app": run.settings.app,
        **asdict(run.outcome),
        "failed_step": run.current_step if error else "",
        "error": SECRETS.hide(str(error or "")),
    }


# --- the command line -----------------------------------------------------------------


def default_app() -> str:
    """Return the name that the convox CLI would use: the local setting, or the directory's name."""
    return local_setting("app") or Path(working_directory()).name.lower().replace(".", "-")


def working_directory() -> str:
    with suppress(OSError):
        return os.getcwd()
    return ""  # it no longer exists


def default_manifest() -> str:
    return "convox.yml" if os.path.lexists("convox.yml") else "docker-compose.yml"


def minutes(text: str) -> float:
    """Parse a timeout in minutes: 30, 30m, 90s or 1.5h."""
    if match := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smh]?)", text):
        return float(match[1]) * {"s": 1 / 60, "h": 60}.get(match[2], 1)
    raise click.BadParameter(f"{text!r} is not a number of minutes, such as 30, 90s or 1h.")


class Command(click.Command):
    """Removes an earlier result even if the command line is invalid, and explains `--`."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        words = args[: [*args, "--"].index("--")]
        if not context.resilient_parsing and {"-h", "--help", "--version"}.isdisjoint(words):
            lenient = self.make_context(
                "", words, resilient_parsing=True, ignore_unknown_options=True
            )
            if not lenient.params["dry_run"]:
                remove_result(Path(lenient.params["result"] or ""))
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            message = f"{error.format_message()} Put docker build options after `--`."
            raise click.UsageError(message, context) from None


def not_empty(_context: Any, _parameter: Any, value: Any) -> Any:
    if value == "":
        raise click.BadParameter("it is empty.")
    return "" if value is None else value


def setting(name: str, variable: Any, about: str, **details: Any) -> Callable[[Any], Any]:
    return click.option(
        name, envvar=variable, show_envvar=True, help=about, callback=not_empty, **details
    )


@click.command(
    cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@setting("--app", "APP_NAME", "Name of the Convox app.  [default: the directory name]")
@setting("--rack", ["CONVOX_RACK", "RACK_NAME"], "Name of the rack.  [default: the convox CLI's]")
@setting(
    "--file",
    "DOCKER_COMPOSE",
    "The manifest.  [default: convox.yml or docker-compose.yml]",
    default=default_manifest,
)
@setting("--tag", "IMAGE_TAG", "Image tag.  [default: <git describe>-<image id>]")
@setting("--skip-ecr-login", "SKIP_ECR_AUTH", "Use docker's existing login to ECR.", is_flag=True)
@setting(
    "--timeout",
    "DEPLOY_TIMEOUT",
    "Timeout for each step, in minutes; 0 means no limit.",
    type=minutes,
    default="60",
    show_default=True,
)
@setting("--result", "DEPLOY_RESULT", "Write the result to this JSON file.")
@setting("--quiet", "DEPLOY_QUIET", "Show the output of a step only if it fails.", is_flag=True)
@setting(
    "--no-verify",
    "DEPLOY_NO_VERIFY",
    "Do not check what is running, for deploy keys.",
    is_flag=True,
)
@setting(
    "--cache-from-running",
    "DEPLOY_CACHE_FROM_RUNNING",
    "Reuse the running image's layers.",
    is_flag=True,
)
@setting(
    "--dry-run",
    None,
    "Show the commands and the manifest's diff, and change nothing.",
    is_flag=True,
)
@setting("--no-promote", None, "Build the release but do not promote it.", is_flag=True)
@setting("--release", None, "Resume from a release that is already built.", metavar="R...")
@click.version_option(__version__)
@click.argument(
    "docker_build_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- DOCKER_BUILD_ARGS...]"
)
def main(**options: Any) -> None:
    """Build an app's images locally, push them to ECR, and release them on Convox.

    Set CONVOX_HOST and CONVOX_PASSWORD to choose the rack; otherwise the convox CLI's login is
    used. Arguments after -- are passed to docker build.
    """
    options["app"] = options["app"] or default_app()
    deploy(Settings(**options, directory=working_directory()))


if __name__ == "__main__":
    main()
