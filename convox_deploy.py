#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Source, license and newer versions: https://git.example.com/convox-deploy
"""Build an app's Docker images off-cluster and deploy them to Convox.

Copy this file into the root of your app and run

    APP_NAME=shop CONVOX_HOST=rack.example.com CONVOX_PASSWORD=... ./convox_deploy.py

A deploy is the method Deploy.run: read it first. What is known about docker, ECR and convox
(their options, output and errors) is in the class of that name above it.
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["click>=8.1", "sh>=2.2.2,<3", "PyYAML>=6.0"]
# ///

from __future__ import annotations

import sys

if (version := sys.version_info) < (3, 9):  # needs Python 3.9 or later
    sys.exit(f"convox_deploy.py needs Python 3.9 or later, not {version[0]}.{version[1]}.")
if sys.platform == "win32":
    sys.exit("convox_deploy.py needs Linux, macOS or WSL (Windows Subsystem for Linux).")
is_script = __name__ == "__main__" and not __spec__
if is_script and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]  # the app's directory: its yaml.py or queue.py must not be imported here

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from signal import SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

try:
    import click
    import sh
    import yaml
except ImportError as error:
    me = sys.argv[0]
    sys.stderr.write(f"""\
convox_deploy.py needs the Python package {error.name!r}. Use one of these:
  uv run {me}
  python3 -m venv .venv && .venv/bin/pip install click sh PyYAML && .venv/bin/python {me}
  pipx install . (in a clone of convox-deploy; then run convox-deploy)
""")
    sys.exit(2)

__version__ = "0.3.0.dev0"

TOOL = "convox-deploy"
HOOKS = "before_build after_build before_release".split()
STEPS = "preflight before_build build after_build push release before_release promote".split()
FAILED, NOT_STARTED, TIMED_OUT = 1, 2, 124  # exit codes; 128 + n after signal n
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL; GitHub kills a canceled job after 10
REPEAT_SECONDS = 0.3  # within which a signal counts once
PUSH_PAUSES = [1, 5, 15]  # seconds before a push is retried
POLL_SECONDS = 5  # between polls of a rack that is updating
PATIENCE_SECONDS = 120  # for a rack that does not respond after a promote
LAST_WORDS_SECONDS = 5  # to ask what is running after a failed promote
HEARTBEAT_SECONDS = 60  # CI systems kill jobs that print nothing for ten minutes
TERMINAL_HEARTBEAT_SECONDS = 15
T = TypeVar("T")


class DeployError(Exception):
    """One or more errors that the user can fix. Each says what is wrong and how to fix it."""

    exit_code = FAILED
    status: int | None = 0  # of the command that failed, None if it did not start
    service = ""  # whose build or push failed

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join("  - " + str(arg).replace("\n", "\n    ") for arg in self.args)


# --- settings -------------------------------------------------------------------------

RELEASE_ID = "R[A-Z]{9,10}"
CONSOLE = r"(?i)console\.convox\.com(:443)?"
RACK_URL = r"https?://[^/?#\s:@]+:[^][/?#\s]+@(?P<host>[A-Za-z0-9.-]+(:\d+)?)(/[^?#@\s]*)?"
PRINT_ENCODED = 'import os, urllib.parse as u; print(u.quote(os.environ["CONVOX_PASSWORD"], ""))'


def env(name: str) -> str:
    return os.environ.get(name, "")


class Settings(SimpleNamespace):
    """The values of `main`'s options and variables, by name. Contains no secrets."""


class Rack:
    """The rack of a deploy. Without a name and a host, the convox CLI chooses it."""

    def __init__(self, name: str | None) -> None:
        self.name, self.url, self.password = name or "", env("RACK_URL"), env("CONVOX_PASSWORD")
        self.url_match = re.fullmatch(RACK_URL, self.url)
        self.host = self.url_match["host"] if self.url_match else env("CONVOX_HOST")
        self.encoded_password = quote(self.password, safe="")

    @property
    def label(self) -> str:
        # CLIs up to v2 follow the host, whatever the name.
        return " via ".join(filter(None, [self.name, self.host])) or "the convox CLI's current rack"

    def problems(self) -> Iterator[str]:
        """Yield where the variables that name the rack are incomplete or contradictory."""
        convox_host = env("CONVOX_HOST")
        if self.url and not self.url_match:
            yield "RACK_URL must be https://convox:PASSWORD@HOST, with PASSWORD percent-encoded."
        if re.fullmatch(CONSOLE, self.host) and (self.url or not self.name):
            yield f"{self.host} is the Convox Console, not a rack. Set --rack or CONVOX_RACK."
        if self.url and (self.name or convox_host not in self.url):
            yield "RACK_URL and CONVOX_HOST or CONVOX_RACK name different racks. Unset one of them."
        if not re.fullmatch(r"([A-Za-z0-9.-]+(:\d+)?)?", convox_host):
            shown = convox_host.rpartition("@")[2]
            yield f"CONVOX_HOST must be a host name like rack.example.com, not {shown!r}."
        if self.password != self.password.strip():
            yield "CONVOX_PASSWORD starts or ends with whitespace or a newline. Remove it."
        if bool(convox_host) != bool(self.password) and not self.name and not self.url:
            missing = "CONVOX_PASSWORD" if convox_host else "CONVOX_HOST"
            why = f"{missing} is not set, so convox would use the rack it is logged in to."
            yield f"{why} Set both CONVOX_HOST and CONVOX_PASSWORD, or set CONVOX_RACK."

    def export(self) -> None:
        """Set what makes convox and the hooks reach this rack.

        CLIs up to v2 read CONVOX_HOST and CONVOX_PASSWORD, those from v2 on read RACK_URL.
        """
        if self.name:
            os.environ["CONVOX_RACK"] = self.name
        elif self.host and not self.url:
            os.environ["RACK_URL"] = f"https://convox:{self.encoded_password}@{self.host}"

    def typed(self, command: str, reads_url: bool) -> str:
        """Return a command that reaches this rack from the user's shell. It contains no secret."""
        password = "${CONVOX_PASSWORD:?}"
        if self.name or not self.host:
            return command
        if self.url:
            return f'RACK_URL="${{RACK_URL:?}}" {command}'
        if not reads_url:
            return f'CONVOX_HOST={self.host} CONVOX_PASSWORD="{password}" {command}'
        if self.encoded_password != self.password:
            password = f"$(python3 -c '{PRINT_ENCODED}')"
        return f'RACK_URL="https://convox:{password}@{self.host}" {command}'


# --- the manifest ---------------------------------------------------------------------

MANIFESTS = ["convox.yml", "docker-compose.yml"]
EXAMPLE_IMAGE = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
ALMOST_TAG = r"(?i)(.+):(\$?TAG|\$\{TAG.*\})\s*"
REPOSITORY = r"""(?x)
    (localhost | [A-Za-z0-9-]+ (\.[A-Za-z0-9-]+)+ | [A-Za-z0-9-]+ (?=:)) (:\d+)?  # registry
    (/ [a-z0-9]+ ((\. | _ | __ | -+) [a-z0-9]+)* )+                               # path
"""
CONVOX_KEYS = {"path": "context", "manifest": "dockerfile", "args": "args"}
IGNORED_KEYS = {"cache_from", "cache_to", "tags", "labels"}  # the image is the same


class Build(NamedTuple):
    """The arguments of a docker build. Services with equal builds share one image."""

    context: str = "."
    dockerfile: str = "Dockerfile"  # relative to the context
    args: tuple[str, ...] = ()
    target: str = ""
    platform: str = ""

    @property
    def path(self) -> str:
        """Return where `convox build` expects the Dockerfile."""
        return os.path.normpath(os.path.join(self.context, self.dockerfile))


class Service(NamedTuple):
    """A service to build. Its image is pushed to its repository or, by convox, to the rack's."""

    name: str
    build: Build
    repository: str = ""  # empty if the manifest names no image
    tag_offset: int = -1  # where TAG is in the manifest's text


class Scalar(str):
    """A YAML scalar as written, with its position in the text."""

    start = end = 0


class Loader(yaml.SafeLoader):
    """Loads scalars as written: 1.10 stays 1.10, and yes stays yes."""

    def scalar(self, node: Any) -> Scalar:
        scalar = Scalar(node.value)
        scalar.start, scalar.end = node.start_mark.index, node.end_mark.index
        return scalar


for kind in ("str", "bool", "int", "float", "timestamp", "value"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.scalar)
Loader.add_multi_constructor("!", lambda *_: None)  # custom tags, such as !reset


@dataclass
class Manifest:
    """A docker-compose.yml or convox.yml, and its services to build."""

    path: str = ""
    text: str = ""
    has_services_key: bool = True
    services: list[Service] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Read a manifest. Raise DeployError with all its problems."""
        if not os.path.isfile(path):
            fix = "Run this in the app's root, or set DOCKER_COMPOSE to your manifest."
            raise DeployError(f"{path} is not a file. {fix}")
        try:
            manifest = cls(path, Path(path).read_bytes().decode())  # keep CRLF line endings
            top = top_level(manifest.text)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise DeployError(f"{path}: not valid YAML: {error}") from None
        manifest.has_services_key = "services" in top
        manifest.read(services_in(top))
        return manifest

    @property
    def is_compose(self) -> bool:
        return "compose" in os.path.basename(self.path)

    @property
    def repositories(self) -> list[str]:
        """The repositories of all services, with "" for the rack's own."""
        return sorted({service.repository for service in self.services})

    def read(self, services: dict[str, dict[str, Any]]) -> None:
        """Find the services to build. Raise DeployError."""
        problems, others = list[str](), list[str]()
        for name, keys in services.items():
            try:
                if service := self.read_service(name, keys):
                    self.services.append(service)
                else:
                    others.append(f"{name} ({keys['image']})")
            except ValueError as error:
                problems.append(f"{self.path}: service {name}: {error}")
        if not self.services and not problems:
            found = ", ".join(others) or "no services"
            fix = f"`build: .` (Convox v3), or an image with the tag TAG: {EXAMPLE_IMAGE}"
            problems.append(f"{self.path}: there is nothing to build: {found}. Add {fix}")
        if problems:
            raise DeployError(*problems)

    def read_service(self, name: str, keys: dict[str, Any]) -> Service | None:
        """Return the service, or None if its image is third-party. Raise ValueError."""
        image = keys.get("image")
        if image is None:
            if self.is_compose and not keys.get("build"):
                raise ValueError("it has neither `image:` nor `build:`. Add one of them.")
            if not self.has_services_key:
                fix = "Move it under `services:`, or add `image:`."
                raise ValueError(f"Convox v3 ignores services at the top level. {fix}")
            return Service(name, self.read_build(keys))
        match = re.fullmatch(ALMOST_TAG, str(image))
        if not match:
            if not keys.get("build"):
                return None
            raise ValueError(f"{image} is not built. Change its tag to TAG, or remove `build:`.")
        if not image.endswith(":TAG"):
            raise ValueError(f"only a literal :TAG is replaced. Set image: {match[1]}:TAG")
        offset = self.text.rfind(":TAG", image.start, image.end)
        if offset < 0 or not re.fullmatch(REPOSITORY, match[1]):
            problem = f"image {image} must name a registry and repository, in lowercase."
            fix = f"Write it as {EXAMPLE_IMAGE} or docker.io/<user>/<repository>:TAG"
            raise ValueError(f"{problem} {fix}")
        return Service(name, self.read_build(keys), match[1], offset + 1)

    def read_build(self, keys: dict[str, Any]) -> Build:
        """Return how a service is built. Raise ValueError."""
        build = keys.get("build")
        # Without an image, Convox v3 reads a Compose file as it reads a convox.yml.
        is_compose = self.is_compose and keys.get("image")
        if not isinstance(build, dict):
            build = {"context" if is_compose else "path": build}
        read = {"platform": keys.get("platform")}
        if is_compose:  # In compose v1, the dockerfile is a key of the service.
            read["dockerfile"] = keys.get("dockerfile")
        for key, value in build.items():
            name = key if is_compose else CONVOX_KEYS.get(key)
            if name in Build._fields:
                read[name] = value
            elif not is_compose:
                fix = "Use path, manifest and args or, in a Compose file, add `image:`."
                raise ValueError(f"Convox ignores build.{key}. {fix}")
            elif key in IGNORED_KEYS:
                self.warnings.append(f"build.{key} is ignored. It does not change the image.")
            else:
                fix = "Use a docker build option after `--`."
                raise ValueError(f"build.{key} is not supported. {fix}")
        return build_with(read)

    def with_tags(self, tags: dict[int, str]) -> str:
        """Return the text with TAG replaced at each offset, and nothing else changed."""
        text = self.text
        for offset, tag in sorted(tags.items(), reverse=True):
            if offset >= 0:  # not for an image that the manifest does not name
                text = text[:offset] + tag + text[offset + len("TAG") :]
        return text

    def conflicts(self, custom_tag: str | None) -> Iterator[str]:
        """Yield services that would get the image of another build."""
        builds: dict[Any, Build] = {}
        for service in self.services:
            path = service.build.path
            key: Any = service.repository if custom_tag else service.tag_offset
            if not service.repository:
                key = path  # by which alone `convox build` tells builds apart
                if path.startswith(("..", "/")) or "://" in service.build.context:
                    yield f"service {service.name}: {path} is outside the project. Move it inside."
            if builds.setdefault(key, service.build) != service.build:
                fix = "Give it its own `image:`."
                yield f"service {service.name} would get the image of another build. {fix}"


def build_with(arguments: dict[str, Any]) -> Build:
    """Return a build with these arguments. Raise ValueError if they are not plain strings."""
    args = arguments.pop("args", None) or []
    if isinstance(args, dict):
        args = [
            f"{name}={value}" if isinstance(value, str) else value or name
            for name, value in args.items()
        ]
    given = {name: value for name, value in arguments.items() if value}
    for word in list(given.values()) + list(args):
        if not isinstance(word, str) or "$" in word:
            fix = "Write a string without variables, or use a docker build option after `--`."
            raise ValueError(f"`build:` contains {word!r}. {fix}")
    for name in ("context", "dockerfile"):  # equal builds share one image, as `.` and `./`
        if name in given and "://" not in given[name]:
            given[name] = os.path.normpath(given[name])
    return Build(args=tuple(args), **given)


def top_level(text: str) -> dict[str, Any]:
    """Return the keys of a manifest. Raise yaml.YAMLError."""
    return mapping(yaml.load(text, Loader))


def services_in(top: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys of each service."""
    at_top = {name: keys for name, keys in top.items() if str(name)[:2] != "x-"}  # compose v1
    services = mapping(top.get("services", at_top))
    return {str(name): mapping(keys) for name, keys in services.items()}


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- running commands -----------------------------------------------------------------

SECRETS: set[str] = set()
IN_GITHUB, IN_GITLAB = env("GITHUB_ACTIONS") == "true", env("GITLAB_CI") == "true"
USES_COLOR = not env("NO_COLOR") and (IN_GITHUB or IN_GITLAB or None)  # None: on terminals


def learn_secrets(variables: Mapping[str, str]) -> None:
    """Redact the values of variables with such names, except short ones: they occur in words."""
    for name, value in variables.items():
        if re.search("(?i)PASSWORD|SECRET|TOKEN", name):
            for line in map(str.strip, value.splitlines()):
                if len(line) >= 6:
                    SECRETS.update([line, quote(line, safe="")])


url_password = env("RACK_URL").rpartition("@")[0].rpartition(":")[2]
learn_secrets(os.environ)
learn_secrets({"PASSWORD": f"{url_password}\n{unquote(url_password)}"})


def redact(text: str) -> str:
    for secret in sorted(SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def echo(text: str, err: bool = False, **style: Any) -> None:
    """Print a line, redacted, in place of a sign of life."""
    if shell.has_sign_of_life:
        click.echo("\r\x1b[K", nl=False)
    text = redact(text)
    click.echo(click.style(text, **style) if style else text, err=err, color=USES_COLOR)
    shell.heard, shell.has_sign_of_life = time.monotonic(), False


def warn(text: str) -> None:
    echo(f"warning: {text}", fg="yellow")


class CommandFailed(DeployError):
    """A command that failed, did not start (status None), or printed nothing usable."""

    def __init__(
        self,
        output: str,
        name: str = "",
        status: int | None = None,
        advice: str | dict[str, str] = "",
        service: str = "",
    ) -> None:
        super().__init__(output)
        self.output, self.name, self.status, self.service = output, name, status, service
        table = {"": advice} if isinstance(advice, str) else advice
        self.advice = next((table[each] for each in table if re.search(each, output)), "")

    def __str__(self) -> str:
        """Show the output from its first line that starts with ERROR:, or from the last five on."""
        if self.status is None:
            return self.output
        ended = f"exited with code {self.status}."
        if self.status < 0:
            ended = f"was ended by signal {-self.status} ({signal.strsignal(-self.status)})."
        lines = self.output.splitlines()
        errors = [number for number, line in enumerate(lines) if line.startswith("ERROR:")]
        start = min([*errors[:1], max(len(lines) - 5, 0)])
        shown = "".join(f"\n  {line}" for line in lines[start : start + 21])
        return f"{self.name} {ended}{shown}\n{self.advice}".rstrip()


class Stopped(DeployError):
    """The deploy was stopped by a signal. SIGALRM means that a step timed out."""

    def __init__(self, signum: int, doing: str) -> None:
        self.exit_code = 128 + signum
        why = f"Stopped by {signal.Signals(signum).name} while {doing}."
        if signum == SIGALRM:
            self.exit_code = TIMED_OUT
            fix = "Raise --timeout or DEPLOY_TIMEOUT."
            why = f"Timed out after {shell.minutes:g} minutes while {doing}. {fix}"
        super().__init__(why)


STOP_SIGNALS = [SIGINT, SIGTERM, SIGHUP, SIGQUIT]
HOW_PROGRAMS_START = (
    "It must be executable and for this machine's architecture."
    " The first line of a script must be #! and an installed interpreter, and end in LF."
)
WHERE_TO_GET = {
    "docker": "https://docs.docker.com/get-docker/",
    "convox": "https://docs.convox.com/installation/cli/",
    "aws": "https://aws.amazon.com/cli/ (or use --skip-ecr-login if docker logs in by itself)",
    "git": "https://git-scm.com/downloads",
}


class Shell:
    """Runs commands through sh, each in its own process group.

    The deploy runs in a second thread. The main thread gets the signals, keeps the time and prints
    signs of life. To stop a deploy, it ends all process groups: with SIGTERM and, after
    GRACE_SECONDS or a second signal, with SIGKILL.
    """

    dry_run = False
    minutes = 0.0  # timeout of a step
    max_parallel = 4
    started = heard = 0.0  # when the step started, and when it last printed something
    deadline = float("inf")
    doing = ""  # for messages, while it polls
    has_sign_of_life = False  # on the terminal's last line
    stopped: Stopped | None = None
    stopped_at = 0.0
    is_killing = False

    def __init__(self) -> None:
        self.groups: set[int] = set()  # process groups of the running commands
        self.names: list[str] = []  # of commands that run or are about to start
        self.stopping = threading.Event()

    def run(self, words: str, *arguments: str, **options: Any) -> None:
        """Show a command and run it with our stdout and stderr. A dry run only shows it."""
        self.show(words, *arguments)
        if not self.dry_run:
            self.capture(words, *arguments, _out=1, _err=2, **options)

    def stream(self, words: str, *arguments: str, only: str = "", **options: Any) -> str:
        """Show a command, run it, print its output and return it.

        With only="err", print only its stderr and return only its stdout.
        """
        self.show(words, *arguments)
        if self.dry_run:
            return ""
        # Of a long log, only the last lines are kept.
        options.update(_iter=only or True, _err_to_out=not only, _internal_bufsize=1000)
        return self.capture(words, *arguments, **options)

    def capture(
        self, words: str, *arguments: str, advice: str | dict[str, str] = "", about: str = "",
        prefix: str = "", **options: Any,
    ) -> str:  # fmt: skip
        """Run a command silently, even in a dry run, and return its stdout, which no error shows.

        A command is its first words and further arguments, which may contain spaces. Errors name
        what it is about. Raise CommandFailed or Stopped.
        """
        self.raise_if_stopped()
        name = f"`{words.partition(' -')[0]}`{about and ' for '}{about}"
        with self.named(name):
            command = start(words.split() + list(arguments), options)
            self.groups.add(command.pgid)
            if "_out" in options:  # we do not see what is passed through
                self.heard += float("inf") if sys.stdout.isatty() else 4 * HEARTBEAT_SECONDS
            if self.stopped:  # in the meantime
                kill_group(command.pgid, SIGTERM)
            try:
                if "_iter" in options:
                    self.print_lines(command, prefix)
            finally:
                self.await_end(command)
        self.raise_if_stopped()
        if command.exit_code:
            output = command.stderr.decode(errors="replace")
            if "_err_to_out" in options:
                output = f"{command}{output}"
            output = redact(output.strip() or "Its output, if any, is above.")
            raise CommandFailed(output, name, command.exit_code, advice, about)
        return str(command)

    def parallel(self, function: Callable[[Any], T], values: Iterable[Any]) -> list[T]:
        """Call a function for each value at once. The first failure stops the others."""
        with ThreadPoolExecutor(self.max_parallel) as pool:
            futures = [pool.submit(function, value) for value in values]
            done = wait(futures, None, FIRST_EXCEPTION).done
            failed = [future for future in done if future.exception()]
            if failed:
                self.stop(SIGTERM)
        return [future.result() for future in failed or futures]

    def show(self, words: str, *arguments: str) -> None:
        """Show a command as it could be typed."""
        echo(f"$ {words} {shlex.join(arguments)}".rstrip(), dim=not self.dry_run)

    def pause(self, seconds: float) -> None:
        self.stopping.wait(seconds)
        self.raise_if_stopped()

    def start_timer(self, seconds: float) -> None:
        self.doing = ""
        self.started = self.heard = time.monotonic()
        self.deadline = self.started + (seconds or float("inf"))

    def allow_commands(self, seconds: float) -> None:
        """Allow commands again after a stop, for a limited time."""
        self.stopped = None
        self.stopping.clear()
        self.start_timer(seconds)

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise self.stopped

    def watch(self, work: Callable[[], T]) -> T:
        """Call a function in a second thread, and watch over it until it ends."""
        signal.signal(SIGCHLD, signal.SIG_DFL)  # or exit codes would be lost
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for signum in [SIGALRM, *STOP_SIGNALS]:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                signal.signal(signum, self.stop)
        patience = TERMINAL_HEARTBEAT_SECONDS if sys.stdout.isatty() else HEARTBEAT_SECONDS
        ending = ThreadPoolExecutor(1).submit(work)
        while wait([ending], 0.1).not_done:
            now = time.monotonic()
            if now > self.deadline:
                self.stop(SIGALRM)
            if (self.names or self.doing) and now - self.heard > patience:
                self.give_sign_of_life(now)
        return ending.result()

    def give_sign_of_life(self, now: float) -> None:
        sign, seconds = f"Still {self.what_is_running()}", now - self.started
        with suppress(OSError):  # a closed output is for the next echo to report
            if not sys.stdout.isatty():
                return echo(f"{sign} ({seconds / 60:.0f} min)")
            click.echo(f"\r\x1b[K{sign} ({seconds:.0f} s)", nl=False)
            self.heard, self.has_sign_of_life = now + 1 - TERMINAL_HEARTBEAT_SECONDS, True

    def stop(self, signum: int, _frame: Any = None) -> None:
        """Stop all commands and start no others. Kill them the second time.

        It raises nothing, as a signal handler. Commands raise Stopped once they have ended.
        """
        now = time.monotonic()
        if self.stopped and now < self.stopped_at + REPEAT_SECONDS:
            return  # `uv run` passes on a signal that has reached us, too
        self.is_killing, self.stopped_at = self.stopped is not None, now
        self.stopped = self.stopped or Stopped(signum, self.what_is_running())
        self.stopping.set()
        for group in list(self.groups):
            kill_group(group, SIGKILL if self.is_killing else SIGTERM)
        self.deadline = now + GRACE_SECONDS

    def what_is_running(self) -> str:
        names = ", ".join(self.names)
        return self.doing or (names and f"running {names}") or "between two commands"

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        self.names.append(name)
        try:
            yield
        finally:
            self.names.remove(name)

    def print_lines(self, command: Any, prefix: str) -> None:
        # This ends the iteration even if a daemon keeps the output open.
        threading.Thread(target=command.wait, daemon=True).start()
        try:
            for line in command:
                if line.strip() or not prefix:
                    echo(prefix + line.rstrip("\n"))
        except OSError:  # our own output is closed
            self.stop(SIGTERM)
            raise

    def await_end(self, command: Any) -> None:
        """Wait until a command and, if it was stopped, its children have ended."""
        status = command.exit_code  # waits
        if -status in STOP_SIGNALS and not self.stopped:  # which is about to reach us, too
            self.stop(-status)
        while self.stopped and not self.is_killing and is_alive(command.pgid):
            time.sleep(0.05)
        self.groups.remove(command.pgid)


shell = Shell()


def start(argv: list[str], options: dict[str, Any]) -> Any:
    """Start a command in a process group of its own. Raise CommandFailed."""
    program = argv[0]
    options.setdefault("_in", "")
    if "_out" not in options:
        options["_tty_out"] = False  # keeps programs from drawing progress bars
    try:
        return sh.Command(program)(
            *argv[1:], _bg=True, _new_session=True, _ok_code=list(range(-64, 256)),
            _encoding="utf-8", _decode_errors="replace", **options,
        )  # fmt: skip
    except (sh.CommandNotFound, sh.ForkException, OSError):
        why = f"Cannot run {program}. {HOW_PROGRAMS_START}"
        if program in WHERE_TO_GET and not shutil.which(program):
            why = f"{program} is not installed, or not on the PATH. Get it: {WHERE_TO_GET[program]}"
        raise CommandFailed(why) from None


def kill_group(group: int, signum: int) -> bool:
    """Send a signal to a process group. Return whether it exists."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)
        return True
    return False


def is_alive(group: int) -> bool:
    """Return whether a process group has processes. Reap those that are left to us, as pid 1."""
    with suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    return kill_group(group, 0)


def option(name: str, value: str | None) -> list[str]:
    return [name, value] if value else []


# --- git and CI -----------------------------------------------------------------------

BRANCHES = """
    BRANCH_NAME GIT_BRANCH GITHUB_HEAD_REF GITHUB_REF_NAME CI_COMMIT_BRANCH BUILDKITE_BRANCH
    CIRCLE_BRANCH TRAVIS_BRANCH DRONE_BRANCH BITBUCKET_BRANCH
""".split()
RUN_URLS = """
    BUILD_URL CI_JOB_URL BUILDKITE_BUILD_URL CIRCLE_BUILD_URL TRAVIS_BUILD_WEB_URL DRONE_BUILD_LINK
""".split()


class Commit(NamedTuple):
    """The checked-out commit. All empty outside a git repository."""

    hash: str = ""
    branch: str = ""
    describe: str = ""
    subject: str = ""
    git_dir: str = ""

    @property
    def title(self) -> str:
        return f"{self.describe} {self.subject}".strip()


def read_commit() -> Commit:
    """Return the checked-out commit. Raise CommandFailed."""

    def git(words: str) -> str:
        fix = "The image tag names the commit. Fix this, or set IMAGE_TAG."
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", shell.capture(f"git {words}", advice=fix))
        return text.replace("##[", "## [").strip()  # which would be a command in GitHub Actions

    if not any(Path(parent, ".git").exists() for parent in Path(".git").absolute().parents):
        return Commit()
    sha, _, subject = git("log -1 --no-show-signature --format=%H%x20%s").partition(" ")
    branch, git_dir = git("rev-parse --abbrev-ref HEAD --absolute-git-dir").split(" ", 1)
    if branch == "HEAD":  # detached, as in CI
        branch = next(filter(None, map(env, BRANCHES)), branch).removeprefix("origin/")
    return Commit(sha, branch, git("describe --always --dirty"), subject, git_dir)


def run_url() -> str:
    """Return the URL of the CI run, "" outside CI."""
    if run := env("GITHUB_RUN_ID"):
        return f"{env('GITHUB_SERVER_URL')}/{env('GITHUB_REPOSITORY')}/actions/runs/{run}"
    return next(filter(None, map(env, RUN_URLS)), "")


def header(step: str) -> str:
    return f"==> [{STEPS.index(step) + 1}/{len(STEPS)}] {step}"


@contextmanager
def folded(step: str) -> Iterator[None]:
    """Print a step's header. GitHub and GitLab fold what follows."""
    style: dict[str, Any] = {"fg": "cyan", "bold": True}
    if IN_GITHUB:  # which reads only lines that start with ::
        echo(f"::group::{header(step)}")
    elif IN_GITLAB:
        echo(f"\x1b[0Ksection_start:{time.time():.0f}:{step}\r\x1b[0K{header(step)}", **style)
    else:
        echo(f"\n{header(step)}", **style)
    try:
        yield
    finally:
        if IN_GITHUB:
            echo("::endgroup::")
        elif IN_GITLAB:
            echo(f"\x1b[0Ksection_end:{time.time():.0f}:{step}\r\x1b[0K")


def report_to_github(outcome: Outcome) -> None:
    """Give a deploy's outcome to its workflow, as an annotation, outputs and a summary."""
    status, error = outcome.status, outcome.error
    outputs = f"status={status}\nrelease={outcome.release}\nrunning={outcome.running}\n"
    summary = f"### {outcome.app}: deploy {status}\n\n{outputs}\n{error}\n"
    summary = summary.replace("\n", "\n    ")  # which shows it as it is
    if error:
        text = error.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        echo(f"::error title={outcome.failed_step} failed::{text}")
    for variable, text in ("GITHUB_OUTPUT", outputs), ("GITHUB_STEP_SUMMARY", summary):
        with suppress(OSError), open(env(variable), "a") as file:
            file.write(text)


# --- docker and ECR -------------------------------------------------------------------

IMMUTABLE = "because the (tag|repository) is immutable"
NO_REPOSITORY = r"repository .* does not exist|name unknown"
BUILDKIT_ARG = "(TARGET|BUILD)(PLATFORM|OS|ARCH|VARIANT)|BUILDKIT_.*"  # which it sets itself
DENIED = r"(?i)(?<!/)\b(forbidden|denied|not authorized|HTTP 403)\b(?!-)"
DOCKER_ADVICE = {
    "permission denied while": "Your user is not allowed to use Docker."
    " Run `sudo usermod -aG docker $USER`. Then log in again or, in CI, restart the agent.",
    "docker endpoint: context": "The docker context does not exist."
    " Run `docker context use default`, or unset DOCKER_CONTEXT.",
    "client version .* is too": "The docker client does not fit the engine."
    " Unset DOCKER_API_VERSION, or install a newer client.",
    "error during connect|tcp://|HTTPS server|ca.pem": "DOCKER_HOST's engine cannot be reached."
    " Correct DOCKER_HOST and DOCKER_CERT_PATH or, in GitLab, add the service docker:dind.",
    "": "Start Docker Desktop, or run `sudo systemctl start docker`.",
}
HELPER_ADVICE = {
    "credentials - err: (exec|docker-cred)": "docker's credential helper is missing."
    ' Install it, or remove "credsStore" and "credHelpers" from ~/.docker/config.json.',
    "not implemented": "A credential helper logs docker in to this registry: set SKIP_ECR_AUTH=1.",
    "credentials - err": "docker cannot use its store of credentials."
    ' Unlock it, or remove "credsStore" from ~/.docker/config.json.',
}
LOGIN_ADVICE = {
    **HELPER_ADVICE,
    "saving credentials: (mkdir|open)": "docker cannot write its configuration."
    " Set DOCKER_CONFIG to a directory of your own, such as `$(mktemp -d)`.",
    "400 Bad Request": "ECR does not accept the password."
    " `aws ecr get-login-password` must print one line and nothing else.",
    "": "Check that docker can reach the registry, and this machine's clock.",
}
BUILD_ADVICE = (
    "If it could not pull a base image, log docker in to that registry in deploy/before_build.sh."
)
PUSH_ADVICE = {  # other errors may be transient: the push is retried
    **HELPER_ADVICE,
    IMMUTABLE: "This tag already exists and the repository's tags are immutable."
    " Unset IMAGE_TAG or choose a new tag.",
    "maximum allowed number": "ECR's limit is reached. Give the repository a lifecycle policy."
    " Delete old tags or images with `aws ecr batch-delete-image`.",
    NO_REPOSITORY: "The repository may not exist. Create it, or correct its name.",
    "(?i)token has expired": "Log in again. If docker has just done so, an older login is used:"
    " run `docker logout https://<registry>`.",
    r"(?i)(?<!/)\b(no basic auth|unauthorized)": "docker is not logged in to this registry."
    " Run `docker login <registry>`, or unset SKIP_ECR_AUTH.",
    DENIED: "You are not allowed to push to this repository, or docker's login has expired."
    " For ECR, see IAM policies in docs/ci.md of convox-deploy.",
    "x509: ": "Docker does not trust the registry's certificate."
    " Put its CA into /etc/docker/certs.d/<registry>/ca.crt.",
    "no space left": "The disk is full. `docker system prune` frees space used by docker.",
}
AWS_ADVICE = {
    "AssumeRole": "AWS does not let this login assume the role. Check the role's trust policy.",
    "AccessDenied": "This AWS user or role lacks a permission. See IAM policies in docs/ci.md of"
    " convox-deploy, or attach AmazonEC2ContainerRegistryPowerUser.",
    "Signature (expired|not yet current)": "This machine's clock is wrong. Correct it.",
    "MFA": "Nobody can enter an MFA code here."
    " Use credentials that need none, or run `aws sso login` beforehand.",
    "(?i)sso|expired": "Your AWS credentials have expired. Renew them, or run `aws sso login`.",
    r"(?i)\bconnect|CERTIFICATE": "This machine cannot reach ECR in this region."
    " Check the region in the image's name, and the network or proxy.",
    "config profile": "AWS_PROFILE names a profile that does not exist on this machine.",
    r"\A'[0-9a-f]{40}'\Z": "The AWS CLI's cache is damaged. Run `rm -r ~/.aws/cli/cache`.",
    "": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`.",
}
ECR_HOST = r"(?P<account>\d{12})\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.[a-z.-]+"


class Ecr(NamedTuple):
    """A registry in ECR. For another kind, write a class like this, for Deploy.get_passwords."""

    host: str
    account: str
    region: str
    username: str = "AWS"

    @classmethod
    def of(cls, repository: str) -> Ecr | None:
        """Return the registry of a repository, or None if it is not ECR."""
        host = repository.partition("/")[0]
        match = re.fullmatch(ECR_HOST, host)
        return match and cls(host, match["account"], match["region"])

    @property
    def get_password(self) -> str:
        return f"aws ecr get-login-password --region {self.region}"

    def password(self) -> str:
        """Return the password for docker login, valid for 12 hours."""
        password = shell.capture(self.get_password, advice=AWS_ADVICE).strip()
        if not re.fullmatch("[!-~]+", password):
            raise DeployError(f"`{self.get_password}` printed no password.")
        learn_secrets({"password": password})
        return password

    def create(self, repository: str) -> None:
        """Create a repository. Raise CommandFailed, also if it exists."""
        name = repository.partition("/")[2]
        where = f"--region {self.region} --registry-id {self.account} --repository-name {name}"
        shell.show(f"aws ecr create-repository {where}")
        shell.capture(f"aws ecr create-repository {where}")


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
    arguments: dict[str, str] = field(default_factory=dict)  # values for the Dockerfile's ARGs
    build_seconds: float = 0

    @property
    def name(self) -> str:
        return self.services[0].name

    @property
    def is_in_a_registry(self) -> bool:
        return all(service.repository for service in self.services)

    @property
    def short_id(self) -> str:
        return self.id.partition(":")[2][:12]


class Docker:
    version = 0  # of the engine, such as 29

    def __init__(self, build_args: list[str]) -> None:
        self.build_args = build_args  # the user's
        self.names: set[str] = set()  # of images, to be removed in the end
        self.requested: set[str] = set()  # repositories that ECR was asked to create

    def check(self) -> None:
        words = "docker version --format {{.Server.Version}}"
        answer = shell.capture(words, advice=DOCKER_ADVICE, _err_to_out=True)
        self.version = max(map(int, re.findall(r"(?m)^(\d+)\.", answer)), default=0)

    def dockerfile(self, build: Build) -> Path:
        """Return the path of a build's Dockerfile, which `--file` after `--` overrides."""
        given = re.search(r"(?:^|\0)(?:-f|--file)[\0=]?([^\0]+)", "\0".join(self.build_args))
        return Path(given[1] if given else build.path)

    def missing_files(self, images: Sequence[Image]) -> Iterator[str]:
        """Yield what docker build would find only after the builds before it."""
        for build in (image.build for image in images if "://" not in image.build.context):
            path = self.dockerfile(build)
            if not os.path.isdir(build.context):
                yield f"Build context {build.context!r} is not a directory. Correct `build:`."
            elif not path.is_file():
                yield f"{path} not found. Create it, or name another one under `build:`."

    def arguments(self, build: Build) -> dict[str, bool]:
        """Return the ARGs of a build's Dockerfile that nothing sets: True with a default."""
        path = self.dockerfile(build)
        text = path.read_text(errors="replace") if path.is_file() else ""
        options = [f"--build-arg={arg}" for arg in build.args] + self.build_args
        given = re.findall(r"--build-arg[ =](\w+)", " ".join(options))
        found = dict[str, bool]()
        # As racks do, which read one ARG per line.
        for name, default in re.findall(r"(?im)^[ \t]*ARG[ \t]+(\w+)(=?)", text):
            if not re.fullmatch(BUILDKIT_ARG, name) and name not in given:
                found[name] = found.get(name, False) or bool(default)
        return found

    def login(self, registry: Ecr, password: str) -> None:
        login = f"docker login --username {registry.username} --password-stdin {registry.host}"
        shell.show(f"{registry.get_password} | {login}")
        if not shell.dry_run:
            shell.capture(login, _in=password, advice=LOGIN_ADVICE)

    @cached_property
    def has_buildkit(self) -> bool:
        return "--secret" in shell.capture("docker build --help")

    def build(self, image: Image, prefix: str) -> None:
        """Build an image. With a prefix, read docker's output and put it before each line."""
        build, started = image.build, time.monotonic()
        self.names.add(image.local)
        options = [
            *image.cache, *option("--file", "" if build.dockerfile == "Dockerfile" else build.path),
            *(word for arg in (*build.args, *image.arguments) for word in ("--build-arg", arg)),
            *option("--target", build.target), *option("--platform", build.platform),
            *self.build_args, build.context,
        ]  # fmt: skip
        # By default, the attestations of buildx give each build a new image ID.
        variables = {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1", **os.environ, **image.arguments}
        run = shell.stream if prefix else shell.run
        run(
            "docker build --tag", image.local, *options,
            about=image.name, advice=BUILD_ADVICE, prefix=prefix, _env=variables,
        )  # fmt: skip
        image.build_seconds = round(time.monotonic() - started, 3)

    def inspect(self, image: Image) -> None:
        """Record the image's ID and platform. Raise CommandFailed if docker does not know it."""
        fields = "{{.Id}} {{.Os}}/{{.Architecture}}"
        fix = "If the builder does not load images into docker, add `-- --load`."
        how = {"about": image.name, "advice": fix}
        answer = shell.capture("docker image inspect --format", fields, image.local, **how)
        image.id, _, image.platform = answer.strip().partition(" ")
        if not re.fullmatch("sha256:[0-9a-f]{64}", image.id):
            raise DeployError(f"`docker image inspect {image.local}` printed no image ID. {fix}")

    def push(self, image: Image, repository: str, prefix: str) -> str | None:
        """Tag and push an image. Return the digest, if known. Retry unless it is hopeless.

        docker's messages about a missing repository differ between versions, so ask ECR to create
        it: once, and only after a failed push, because an account may create repositories on push.
        """
        reference, pauses = f"{repository}:{image.tag}", list(PUSH_PAUSES)
        self.names.add(reference)
        shell.run("docker tag", image.local, reference, about=image.name)
        while True:
            try:
                digest = self.push_once(image, reference, prefix)
                self.names.discard(reference)
                return digest
            except CommandFailed as failure:
                if re.search(IMMUTABLE, failure.output) and reference.endswith(image.short_id):
                    echo(f"{prefix}{reference} is already in the registry.")
                    return None
                if self.create_missing(repository, failure):
                    continue
                if failure.status is None or failure.advice or not pauses:
                    raise
                reason = failure.output.splitlines()[-1]
                warn(f"{failure.name} failed: {reason} Retrying in {pauses[0]} s.")
            shell.pause(pauses.pop(0))

    def push_once(self, image: Image, reference: str, prefix: str) -> str | None:
        how: dict[str, Any] = {"about": image.name, "advice": PUSH_ADVICE, "prefix": prefix}
        if sys.stdout.isatty() and not prefix:
            how.update(only="err", _out=1)  # with docker's own progress bars
        output = shell.stream("docker push", reference, **how)
        digest = re.search("digest: (sha256:[0-9a-f]{64}) size: ", output)
        return digest and digest[1]

    def create_missing(self, repository: str, failure: CommandFailed) -> bool:
        """Create a repository in ECR that a failed push may have missed. Correct the advice."""
        ecr, advice = Ecr.of(repository), ""  # ECR takes some seconds to know a new repository
        if not ecr or failure.status is None:
            return False
        if repository not in self.requested:
            self.requested.add(repository)
            try:
                ecr.create(repository)
                return True
            except CommandFailed as refusal:
                if "RepositoryAlreadyExists" not in refusal.output:
                    advice = f"The repository may not exist, and was not created. {refusal}"
        if re.search(rf"\bEOF\b|{NO_REPOSITORY}", failure.output):
            failure.advice = advice
        return False

    def remove_names(self) -> None:
        """Remove image names. The layers stay, as cache for the next build."""
        with suppress(DeployError):
            shell.capture("docker image rm --no-prune", *self.names)


# --- convox ---------------------------------------------------------------------------

NO_LOGIN = r"(?m)^ERROR: .*(\b401$|nable to authenticate|authentication failed|no current rack)"
# Only in the last line: an app's own log may contain them, too.
UNREACHABLE = r"(dial tcp|no such host|connection re|i/o timeout|x509|tls: |EOF|: 50\d).*\Z"
BUILD_ENDED = "build failed|ERROR: exit status|from daemon:|required env:|validation errors"
REFUSED = "(?im)^ERROR: .*(forbidden|: 403|deploy key|not authorized)"
CONVOX_ADVICE = {  # builds before the rest: their logs may contain it
    "(?m)^ERROR: rollback": "The new containers did not become healthy."
    " `convox logs` or, with Convox v3, `convox deploy-debug` says why."
    " If it is `exec format error`, the image is for another architecture:"
    " build it with `-- --platform linux/amd64`.",
    "not published for": "The rack has nodes of two architectures. Build the image for both:"
    " `-- --platform linux/amd64,linux/arm64`.",
    "no matching manifest|no match for platform": "The image is not for the rack's architecture."
    " Build it with `-- --platform linux/amd64`.",
    "(?m)^ERROR: .*(will drop env var|required env:)": "Set the app's variables with"
    " `convox env set NAME=VALUE`.",
    "not authorized to perform: ecr:": "The rack is not allowed to read this repository."
    " Name it <rack>/your-app, or run `convox rack params set ecr_full_access=true`.",
    "(?m)^(ERROR: )?.*build failed": "See the rack's output above. If the rack cannot pull the"
    " image, add the registry's credentials with `convox registries add`.",
    # from docker on this machine, with --external
    "Error response from daemon": "Check docker's logins, and that it can reach the registry.",
    r"(no such app|app not found).*\Z": "Check APP_NAME and the rack."
    " To create the app, run `convox apps create <name>`.",
    "(?m)^ERROR: could not find rack": "Check --rack or CONVOX_RACK. `convox racks` lists them.",
    NO_LOGIN: "Check CONVOX_HOST and CONVOX_PASSWORD (sudo drops them), or run `convox login`.",
    UNREACHABLE: "Check CONVOX_HOST, and that this machine can reach the rack.",
}
ASK_ADVICE = {
    REFUSED: "A deploy key that is not allowed to read the app needs --no-verify.",
    **CONVOX_ADVICE,
}


class App(NamedTuple):
    """The state of the app according to the rack."""

    release: str = ""
    status: str = "unknown"


class Convox:
    """The convox CLI, any version since 2016. Its --help shows which options it has."""

    def __init__(self, app: str, rack: Rack) -> None:
        self.app, self.rack = app, rack
        self.running: dict[str, dict[str, Any]] = {}  # services, once they have been read
        self.options = {
            "build": {"--manifest", "--description", "--id", "--external"},
            "releases promote": {"--wait"},
        }

    @property
    def target(self) -> list[str]:
        return ["--app", self.app, *option("--rack", self.rack.name)]

    @property
    def where(self) -> str:
        return f"{self.app} on {self.rack.label}"

    @property
    def has_external(self) -> bool:
        return "--external" in self.options["build"]  # v3

    @property
    def reads_rack_url(self) -> bool:
        return "--manifest" in self.options["build"]  # since v2

    def check(self, no_verify: bool) -> App:
        """Return what is running. With --no-verify, only check the login."""
        for command in self.options:
            text = shell.capture(f"convox {command} --help", _err_to_out=True)
            self.options[command] = {*re.findall("--[a-z][a-z-]*", text)}
        if not all("--app" in options for options in self.options.values()):
            where = WHERE_TO_GET["convox"]
            raise DeployError(f"`convox` is not the Convox CLI, or too old. Get a new one: {where}")
        if self.rack.url and not self.reads_rack_url:
            raise DeployError("This convox CLI ignores RACK_URL. Set CONVOX_HOST instead.")
        self.find_rack()
        if no_verify:
            self.ask("convox rack")  # which every login is allowed to run
            return App("", "running")
        return self.read_app()

    def find_rack(self) -> None:
        """Ask the CLI for its current rack, so that nothing changes it during the deploy."""
        if not self.rack.name and not self.rack.host:
            with suppress(CommandFailed):
                name = shell.capture("convox switch").strip().rpartition("\n")[2]
                if re.fullmatch(r"[\w./-]+", name):
                    self.rack.name = name
        self.rack.export()

    def ask(self, words: str, *arguments: str) -> str:
        """Return a command's output. It may contain secrets, so no error shows it."""
        arguments = (*option("--rack", self.rack.name), *arguments)
        return shell.capture(words, *arguments, about=self.where, advice=ASK_ADVICE)

    def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Return what `read` finds in a response of the rack's API. Raise CommandFailed."""
        answer = self.ask("convox api get", f"/apps/{self.app}{path}")
        with suppress(Exception):
            # v3 may print errors of other racks before it
            return read(json.loads(re.split(r"(?m)^(?=[{\[])", answer, maxsplit=1)[-1]))
        why = f"`convox api get` for {self.where} printed no usable answer."
        raise CommandFailed(f"{why} Check that this is a Convox rack.")

    def read_app(self) -> App:
        return self.get("", lambda app: App(str(app["release"] or ""), str(app["status"])))

    @cached_property
    def environment(self) -> dict[str, str]:
        """The app's environment in its newest release. Raise CommandFailed."""
        lines = self.ask("convox env", "--app", self.app).split("\n")
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        learn_secrets(variables)
        return variables

    def image_of(self, image: Image, release: str) -> str:
        """Return the image that the services have in a release. Raise CommandFailed."""
        if not release:
            raise CommandFailed("no running release is known.")
        if not self.running:
            path = f"/releases/{release}"
            self.running = self.get(path, lambda answer: services_in(top_level(answer["manifest"])))
        for service in image.services:
            if found := self.running.get(service.name, {}).get("image"):
                return str(found)
        raise CommandFailed(f"{release} has no image for it.")

    def newer_release(self, release: str) -> str:
        """Return the newest release if it is a different one and this login can list releases."""
        with suppress(CommandFailed):
            newest = self.get("/releases", lambda releases: dict(releases[0]))
            if newest.get("id") not in (None, release):
                return f"{newest['id']} ({newest.get('description') or 'no description'})"
        return ""

    def build(
        self, directory: str, manifest: str, about: str, own_images: Sequence[Image], git_dir: str
    ) -> str:
        """Build a release from the manifest in a directory. Return its ID.

        convox pushes `own_images`, which the manifest does not name, to the rack's registry.
        """
        known, external, variables = self.options["build"], list[str](), dict(os.environ)
        if own_images:
            external = ["--external"]
            # Other builders do not find our images, and images of others must fit the rack, too.
            variables["BUILDX_BUILDER"] = "default"
            variables["DOCKER_DEFAULT_PLATFORM"] = own_images[0].platform
        if git_dir:
            variables["GIT_DIR"] = git_dir  # from which convox sets BUILD_GIT_SHA
        options = [
            *external, *self.target, "--manifest" if self.reads_rack_url else "--file", manifest,
            *option("--description", about if "--description" in known else ""),
            *(known & {"--id"}), directory,
        ]  # fmt: skip
        only = "err" if "--id" in known else ""
        output = shell.stream(
            "convox build", *options, only=only, advice=CONVOX_ADVICE, _env=variables
        )
        if shell.dry_run:
            return "RELEASE_ID"
        match = re.search(rf"(?m)^(Release: )?({RELEASE_ID})\Z", output.strip())
        if not match:
            raise CommandFailed(redact(f"It printed no release ID.\n{output}"), "`convox build`", 0)
        return match[2]

    def promote(self, release: str) -> None:
        shell.stream(*self.promote_command(release), advice=CONVOX_ADVICE)

    def promote_command(self, release: str) -> list[str]:
        wait = self.options["releases promote"] & {"--wait"}
        return ["convox releases promote", *self.target, *wait, release]

    def typed(self, words: str, *arguments: str) -> str:
        """Return a convox command for the user to type."""
        command = f"{words} {shlex.join(arguments)}"
        return self.rack.typed(command, self.reads_rack_url)

    def about_app(self, words: str) -> str:
        return self.typed(words, *self.target)

    def await_running(self, release: str) -> None:
        """Wait until the rack reports the release as running. Raise DeployError."""
        app, answered = App(), time.monotonic()
        while app.status != "running":
            try:
                app, answered = self.read_app(), time.monotonic()
            except CommandFailed:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            if app.status == "failed":
                raise DeployError(f"The status of {self.app} is failed. See `convox logs`.")
            if app.status != "running":
                shell.doing = f"waiting for {self.app} (status: {app.status})"
                shell.pause(POLL_SECONDS)
        if app.release != release:
            raise DeployError(
                f"{self.app} is running {app.release or 'no release'}, not {release}."
                " Either the rack rolled back, or someone else promoted another release."
            )


# --- the lifecycle --------------------------------------------------------------------


def hook_path(name: str) -> Path:
    return Path("deploy", f"{name}.sh")


def hook_problems() -> Iterator[str]:
    """Yield hooks that cannot run, and files that look like hooks and never run."""
    for path in filter(os.path.lexists, map(hook_path, HOOKS)):
        if not path.is_file():
            yield f"{path} is not a file. Replace it with a script, or remove it."
        elif not os.access(path, os.X_OK):
            yield f"{path} is not executable. Run: chmod +x {path}"
    renames = dict[Path, Path]()
    for path in Path().glob("[Dd][Ee][Pp][Ll][Oo][Yy]/*"):
        name = path.name.partition(".")[0].lower()
        for hook in difflib.get_close_matches(name, HOOKS, 1, 0.85):
            renames[path] = hook_path(hook)
            if not os.path.lexists("deploy"):
                renames = {path.parent: Path("deploy")}
    for wrong, right in renames.items():
        if not os.path.lexists(right):
            yield f"{wrong} is never run. Run: mv {shlex.join([str(wrong), str(right)])}"


def result_images(path: str) -> list[dict[str, Any]]:
    """Return the images of an earlier deploy's result. Raise DeployError."""
    problem = "is not a result that can be read"
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        result = json.loads(Path(path).read_text())
        if result["tool"] == TOOL:
            images = [{**image, "services": list(image["services"])} for image in result["images"]]
            if result["status"] == "succeeded" and images:
                return images
            problem = "is of a failed deploy" if images else "has no images"
    fix = "Use the --result of a deploy that built images and succeeded."
    raise DeployError(f"--from {path} {problem}. {fix}")


def problem_of(check: Callable[[], None]) -> str:
    try:
        check()
    except Stopped:
        raise
    except DeployError as error:
        return str(error)
    return ""


def names_of(services: Iterable[Service]) -> str:
    return ", ".join(service.name for service in services)


@dataclass
class Outcome:
    """What is known so far. It is written as the result file (docs/reference.md)."""

    tool: str = TOOL
    status: str = "succeeded"
    exit_status: int = 0
    app: str = ""
    release: str = ""
    running_before: str = ""
    promote_requested: bool = False
    verified: bool = False
    running: str = ""  # as far as the rack has reported it
    images: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by step
    failed_step: str = ""
    failed_service: str = ""
    error: str = ""


class Deploy:
    """One deploy. `run` is the lifecycle, and the methods that follow it are the steps."""

    step_name = "preflight"
    release_requested = False
    remains = ""  # what a failed deploy leaves behind, and what to do

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rack = settings, Rack(settings.rack)
        self.docker = Docker(list(settings.docker_build_args))
        self.convox = Convox(settings.app, self.rack)
        self.builds_images = not (settings.release or settings.images_from)
        self.commit, self.manifest = Commit(), Manifest()
        self.images: list[Image] = []
        self.tags: dict[int, str] = {}  # by offset in the manifest
        self.hooks: list[str] = []  # found in preflight
        self.passwords: dict[Ecr, str] = {}
        self.unreachable: list[str] = []  # problems despite which a dry run continues
        self.outcome = Outcome(app=settings.app, release=settings.release or "")

    def run(self) -> None:
        """Run the lifecycle. A step that fails raises DeployError, and nothing runs after it."""
        self.preflight()
        if self.builds_images:
            self.hook("before_build")
            self.build()
            self.hook("after_build")
            self.push()
        elif self.settings.images_from:
            self.skip(STEPS[1:5], f"--from {self.settings.images_from}")
        if not self.settings.release:
            self.release()
        if not self.settings.no_promote:
            self.hook("before_release")
            self.promote()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Give a step its header, its timeout and its time."""
        shell.raise_if_stopped()
        self.step_name = name
        shell.start_timer(shell.minutes * 60)
        try:
            with folded(name):
                yield
        finally:
            seconds = self.outcome.seconds[name] = round(time.monotonic() - shell.started, 3)
            with suppress(OSError):  # a closed output is for the next echo to report
                echo(f"{name}: {seconds:.1f} s", dim=True)

    def skip(self, steps: Iterable[str], why: str) -> None:
        for name in steps:
            echo(f"\n{header(name)}: skipped, {why}", fg="cyan")

    def preflight(self) -> None:
        """Check everything that can be checked ahead, and log in to the registries."""
        with self.step("preflight"):
            if problems := list(self.local_problems()):
                raise DeployError(*problems)
            checks = [self.check_git, self.check_convox]
            if self.builds_images:
                checks = [self.get_passwords, self.docker.check, *checks]  # the slowest first
            problems = shell.parallel(problem_of, checks)
            if not any(problems):
                problems = [problem_of(self.set_arguments)]
            self.unreachable = list(filter(None, problems))
            if self.unreachable and not shell.dry_run:
                raise DeployError(*self.unreachable)
            for problem in self.unreachable:
                warn(problem)
            echo(self.introduction(), bold=True)
            for text in self.manifest.warnings:
                warn(text)
            self.export()
            self.log_in()

    def local_problems(self) -> Iterator[str]:
        """Yield problems with settings, hooks and manifest."""
        yield from self.rack.problems()
        yield from hook_problems()
        self.hooks = [name for name in HOOKS if os.path.lexists(hook_path(name))]
        may_change = "before_build" in self.hooks and self.builds_images
        if may_change and not shell.dry_run and not os.path.lexists(self.settings.file):
            return  # before_build.sh may create it
        if self.settings.release and os.path.isfile(self.settings.file):
            return  # so this is the app's root
        try:
            self.load_manifest()
            if self.settings.images_from:
                yield from self.take_images(result_images(self.settings.images_from))
        except DeployError as error:
            yield from error.args
        yield from self.image_problems(may_change)

    def load_manifest(self) -> None:
        self.manifest, images = Manifest.load(self.settings.file), dict[Build, Image]()
        for service in self.manifest.services:
            local = f"{self.settings.app}:deploy-{os.urandom(4).hex()}"
            image = images.setdefault(service.build, Image(service.build, [], local))
            image.services.append(service)
        self.images = list(images.values())

    def image_problems(self, files_may_change: bool) -> Iterator[str]:
        custom_tag = self.settings.tag if self.builds_images else None
        yield from self.manifest.conflicts(custom_tag)
        if self.builds_images and not files_may_change:
            yield from self.docker.missing_files(self.images)

    def check_external(self) -> None:
        """Raise DeployError if the convox CLI cannot push the images that have no repository."""
        services = [service for service in self.manifest.services if not service.repository]
        if services and not self.convox.has_external:
            raise DeployError(
                f"{self.settings.file}: no `image:` for {names_of(services)}."
                f" This convox CLI has no `build --external`: set image: {EXAMPLE_IMAGE},"
                " or use a CLI and a rack of Convox v3."
            )

    def take_images(self, images: list[dict[str, Any]]) -> Iterator[str]:
        """Use an earlier deploy's images. Yield services that have none."""
        for service in self.manifest.services:
            for image in images:
                repository, _, tag = str(image.get("image")).rpartition(":")
                if service.name in image["services"] and repository == service.repository != "":
                    self.tags[service.tag_offset] = tag
                    if image not in self.outcome.images:
                        self.outcome.images.append(image)
            if not service.repository:
                yield (
                    f"service {service.name}: its image went to a rack's own registry, and is in no"
                    " other. Deploy here without --from. The build cache makes it fast."
                )
            elif service.tag_offset not in self.tags:
                yield f"service {service.name}: --from has no image for {service.repository}."

    def check_git(self) -> None:
        try:
            self.commit = read_commit()
        except CommandFailed:
            if not self.settings.tag and self.builds_images:
                raise

    def check_convox(self) -> None:
        app = self.convox.check(self.settings.no_verify)
        self.outcome.running_before = self.outcome.running = app.release
        if app.status != "running":
            waits = "wait for that." if self.convox.has_external else "fail until that is over."
            warn(f"{self.settings.app} is {app.status}. A promote will {waits}")
        self.check_external()

    def export(self) -> None:
        """Set the variables that hooks get."""
        os.environ.update(
            APP_NAME=self.settings.app,
            RACK_NAME=self.rack.name,
            GIT_HASH=self.commit.hash,
            GIT_BRANCH=self.commit.branch,
            GIT_DESCRIPTION=self.commit.title,
        )

    def set_arguments(self) -> None:
        """Give the Dockerfiles' ARGs the values that they would have on the rack."""
        for image in self.images if self.builds_images else []:
            values = {"BUILD_APP": self.settings.app, "BUILD_GIT_SHA": self.commit.hash}
            arguments = self.docker.arguments(image.build)
            unknown = {name: arguments[name] for name in arguments if name not in values}
            if unknown:
                try:
                    values = {**self.convox.environment, **values}
                except CommandFailed as failure:
                    self.report_unknown(unknown, failure.output.splitlines()[-1])
            image.arguments = {name: values[name] for name in arguments if name in values}

    def report_unknown(self, arguments: dict[str, bool], why: str) -> None:
        """Warn of ARGs whose values are not known. Raise DeployError if one has no default."""
        required = [name for name in arguments if not arguments[name]]
        needed = required or list(arguments)
        problem = (
            f"ARG {', '.join(needed)} may come from the app's environment, which cannot be read:"
            f" {why}\nTo give a value, set the variable and add `-- --build-arg {needed[0]}`."
        )
        if required:
            raise DeployError(problem)
        warn(problem)

    def get_passwords(self) -> None:
        for repository in self.manifest.repositories if not self.settings.skip_ecr_login else []:
            ecr = Ecr.of(repository)
            if ecr and ecr not in self.passwords:
                self.passwords[ecr] = ecr.password()

    def log_in(self) -> None:
        """Log in to one registry at a time. The build may need images from there."""
        for registry, password in self.passwords.items():
            self.docker.login(registry, password)

    def hook(self, name: str) -> None:
        """Run a hook as a step, or print one line if there is none."""
        path = hook_path(name)
        if name not in self.hooks and not os.path.lexists(path):
            return self.skip([name], f"no {path}")
        if self.outcome.release:
            os.environ["RELEASE_ID"] = self.outcome.release
        with self.step(name):
            shell.run(str(path), _in=0)

    def build(self) -> None:
        with self.step("build"):
            if "before_build" in self.hooks and not shell.dry_run:
                self.reread()
            for image in self.images if self.settings.cache_from_running else []:
                self.use_running_image_as_cache(image)
            is_parallel = self.images[1:] and shell.max_parallel > 1 and not shell.dry_run
            if is_parallel and self.docker.has_buildkit:
                shell.parallel(lambda each: self.docker.build(each, f"{each.name} | "), self.images)
            else:
                for image in self.images:
                    self.docker.build(image, "")
            if "after_build" in self.hooks and not shell.dry_run:  # the hook may run the images
                for image in self.images:
                    self.docker.inspect(image)
        os.environ["DOCKER_TAG"] = self.images[0].local
        for image in self.images:
            for service in image.services:
                suffix = re.sub("[^A-Z0-9]", "_", service.name.upper())
                os.environ[f"DOCKER_TAG_{suffix}"] = image.local

    def reread(self) -> None:
        """Check and use what before_build.sh may have changed. Raise DeployError."""
        if Manifest.load(self.settings.file) != self.manifest:
            self.load_manifest()
            self.get_passwords()
            self.log_in()
        if problems := list(self.image_problems(files_may_change=False)):
            raise DeployError(*problems)
        self.check_external()
        self.set_arguments()

    def use_running_image_as_cache(self, image: Image) -> None:
        """Let the build reuse layers of the running image, and later builds reuse ours."""
        try:
            if not self.docker.has_buildkit:
                raise CommandFailed("this needs BuildKit.")
            image.cache = ["--build-arg", "BUILDKIT_INLINE_CACHE=1"]
            source = self.convox.image_of(image, self.outcome.running_before)
            if self.docker.version < 23:
                # Engines before 23 pass on the cache only of images that they have pulled.
                shell.stream("docker pull --quiet", source)
            image.cache += ["--cache-from", source]
        except CommandFailed as failure:
            why = failure.output.splitlines()[-1]
            warn(f"Building {image.name} without the running image as cache: {why}")

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
                    echo(f"Image for {names_of(image.services)}: {image.platform}")
                image.tag = self.settings.tag or "-".join(filter(None, [describe, image.short_id]))
                self.tags.update({each.tag_offset: image.tag for each in image.services})
            shell.parallel(self.push_to, self.manifest.repositories)

    def push_to(self, repository: str) -> None:
        """Push a repository's images one at a time: the first may have to create it."""
        for image in self.images:
            services = [each for each in image.services if each.repository == repository]
            if not services:
                continue
            digest = None
            if repository:
                prefix = f"{services[0].name} | " if self.manifest.repositories[1:] else ""
                pushed = replace(image, services=services)  # errors name the first
                digest = self.docker.push(pushed, repository, prefix)
            else:
                echo(f"The release step pushes {names_of(services)} to the rack's registry.")
            self.outcome.images.append(
                {
                    "image": repository and f"{repository}:{image.tag}",
                    "digest": digest,
                    "platform": image.platform,
                    "services": [service.name for service in services],
                    "build_seconds": image.build_seconds,
                }
            )

    def release(self) -> None:
        """Build a release. Only the manifest and the names of our images are uploaded."""
        with self.step("release"):
            name = os.path.basename(self.settings.file)
            files = {name: self.manifest.with_tags(self.tags)}
            if shell.dry_run:
                self.show_diff(name, files[name])
            own_images = [image for image in self.images if not image.is_in_a_registry]
            files.update({image.build.path: f"FROM {image.local}\n" for image in own_images})
            subject = self.commit.title or next(iter(self.tags.values()))
            about = self.settings.description or f"{subject} {run_url()}".strip()
            with tempfile.TemporaryDirectory(prefix="convox-deploy-") as directory:
                for path, text in files.items():
                    Path(directory, path).parent.mkdir(parents=True, exist_ok=True)
                    Path(directory, path).write_bytes(text.encode())
                self.release_requested = True
                release = self.convox.build(directory, name, about, own_images, self.commit.git_dir)
            self.release_requested = False
            if release == self.outcome.running_before:
                raise DeployError(f"`convox build` returned {release}, which is already running.")
            self.outcome.release = release
            if not shell.dry_run:
                echo(f"Built release {release} (not live yet). {self.how_to_resume(release)}")

    def show_diff(self, name: str, text: str) -> None:
        before, after = self.manifest.text.splitlines(), text.splitlines()
        for line in difflib.unified_diff(before, after, name, f"{name} as uploaded", lineterm=""):
            echo(line, fg={"+": "green", "-": "red"}.get(line[:1]))

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
            self.outcome.promote_requested, self.outcome.running = True, ""
            self.convox.promote(release)
            if not self.settings.no_verify:
                self.convox.await_running(release)
                self.outcome.running, self.outcome.verified = release, True

    def introduction(self) -> str:
        """Return what is deployed where, and which manifest is used."""
        settings, commit, before = self.settings, self.commit, self.outcome.running_before
        subject = commit.subject and f' "{commit.subject}"'
        what = f"{settings.app} {settings.release or commit.describe + subject}".rstrip()
        running = before and f" (running: {before})"
        return f"Deploying {what} to {self.rack.label}{running}\nManifest: {settings.file}"

    def how_to_resume(self, release: str, intro: str = "To resume from here") -> str:
        """Return a command that promotes a release, from any directory or in a job in CI."""
        launcher = ["uv", "run"] if env("UV_RUN_RECURSION_DEPTH") else [sys.executable]
        command = [
            *launcher, sys.argv[0], *self.convox.target, "--file", self.settings.file,
            *(["--no-verify"] if self.settings.no_verify else []), "--release", release,
        ]  # fmt: skip
        # These cannot be used with --release.
        unset = [f"{name}= " for name in ("DEPLOY_NO_PROMOTE", "DEPLOY_FROM") if env(name)]
        resume = "".join(unset) + shlex.join(command)
        if env("CI") or env("JENKINS_URL"):
            return f"{intro}, in a job:\n  {resume}"
        typed = self.rack.typed(resume, reads_url=False)
        return f"{intro}:\n  cd {shlex.quote(os.getcwd())} && {typed}"

    def state(self, error: DeployError) -> str:
        """Return what a failed deploy leaves behind, and what to do."""
        app, outcome, before = self.settings.app, self.outcome, self.outcome.running_before
        was = before and f" {app} was running {before} when this deploy started."
        if shell.dry_run or self.step_name == "preflight":
            return "Nothing has been changed."
        if outcome.promote_requested:
            return self.state_after_promote(error)
        if outcome.release:
            resume = self.how_to_resume(outcome.release)
            return f"Nothing was promoted.{was} Release {outcome.release} is built. {resume}"
        has_ended = re.search(BUILD_ENDED, str(error))
        if self.release_requested and error.status is not None and not has_ended:
            return (
                f"Nothing was promoted.{was} The build may still be running on the rack, or may"
                f" have made a release. Find it with:\n  {self.convox.about_app('convox builds')}\n"
                f"{self.how_to_resume('RELEASE', 'To continue, replace RELEASE with its ID')}"
            )
        return f"Nothing was released or promoted.{was}"

    def state_after_promote(self, error: DeployError) -> str:
        """Ask the rack what is running after a failed promote, and return what to do."""
        name, release, app = self.settings.app, self.outcome.release, App()
        if not isinstance(error, Stopped):
            shell.allow_commands(LAST_WORDS_SECONDS)
            with suppress(DeployError):
                app = self.convox.read_app()
        before = self.outcome.running_before
        is_others = app.release not in (release, before, "") and not self.settings.no_verify
        if app.status == "running":
            self.outcome.running = app.release
            if app.release == release:
                return f"{name} is running {release} after all."
            if is_others:
                return f"{name} is running {app.release}, which someone else has promoted."
            again = f"{app.release} again" if app.release else "no release"
            return f"{name} is running {again}. Fix the cause and deploy again."
        if is_others:
            return f"{name} is {app.status}: someone else is promoting {app.release}."
        return (
            f"The promote of {release} was requested and may still be in progress.\n"
            f"  Check:  {self.convox.about_app('convox apps info')}\n"
            f"  Cancel: {self.convox.about_app('convox apps cancel')}\n"
            f"{self.how_to_resume(release)}"
        )

    def fail(self, error: DeployError) -> None:
        """Record an error, and what it leaves behind."""
        outcome, step = self.outcome, self.step_name
        outcome.status, outcome.failed_step, outcome.error = "failed", step, redact(str(error))
        outcome.exit_status = error.exit_code
        if step == "preflight" and error.exit_code == FAILED:
            outcome.exit_status = NOT_STARTED
        if step in ("build", "push"):
            outcome.failed_service = error.service
        self.remains = self.state(error)

    def print_outcome(self) -> None:
        settings, outcome = self.settings, self.outcome
        release, before = outcome.release, outcome.running_before
        if outcome.status == "failed":
            echo(f"\n{outcome.failed_step} failed:", err=True, fg="red", bold=True)
            return echo(f"{outcome.error}\n{self.remains}", err=True)
        if shell.dry_run:
            echo("\nIDs in capital letters are known only during a deploy.")
            if self.unreachable:
                echo(f"A deploy would fail:\n{DeployError(*self.unreachable)}", err=True)
            return echo("Dry run: nothing was changed.", bold=True)
        echo(f"Total: {sum(outcome.seconds.values()):.1f} s", dim=True)
        if settings.no_promote:
            echo(f"\nBuilt release {release}, and did not promote it.", bold=True)
            echo(self.how_to_resume(release))
        elif settings.no_verify:
            done = f"\nPromoted {release}. What is running was not verified (--no-verify)."
            echo(done, fg="yellow")
        else:
            echo(f"\n{settings.app} is now running {release}.", fg="green", bold=True)
            echo(f"Verified: {self.rack.label} reports {release} running.")
            if before not in ("", release):
                echo(f"To roll back:\n  {self.convox.typed(*self.convox.promote_command(before))}")


# --- the outcome ----------------------------------------------------------------------


def run_deploy(settings: Settings) -> int:
    """Deploy. Turn the end into a result file, messages and an exit code."""
    shell.dry_run, shell.minutes = settings.dry_run, float(settings.timeout)
    shell.max_parallel = settings.parallel
    deploy = Deploy(settings)
    outcome = deploy.outcome
    try:
        deploy.run()
        shell.raise_if_stopped()
    except Exception as caught:
        deploy.fail(as_deploy_error(caught))
    if deploy.unreachable:
        outcome.exit_status = outcome.exit_status or NOT_STARTED
    code = outcome.exit_status
    if settings.result and not settings.dry_run:
        try:
            Path(settings.result).write_text(json.dumps(asdict(outcome), indent=2) + "\n")
        except OSError as unwritten:
            code = code or FAILED
            with suppress(OSError):  # our output is closed
                echo(f"The result was not written: {unwritten}", err=True, fg="red")
    with suppress(OSError):  # our output is closed
        deploy.print_outcome()
        if IN_GITHUB and not settings.dry_run:
            report_to_github(outcome)
    if deploy.docker.names and not settings.dry_run:
        shell.allow_commands(GRACE_SECONDS)
        deploy.docker.remove_names()
    return code


def as_deploy_error(error: Exception) -> DeployError:
    """Return the error, or one that says what to do about it."""
    if isinstance(error, DeployError):
        return error
    if isinstance(error, OSError):
        what = f"{error.filename or 'Cannot write'}: {error.strerror or error}".rstrip(".")
        return DeployError(f"{what}. Check its permissions and the disk's space, or set TMPDIR.")
    if env("DEPLOY_DEBUG"):
        traceback.print_exc()
    return DeployError(
        f"Unexpected {type(error).__name__}: {' '.join(str(error).split())}."
        f" This is a bug in convox_deploy.py {__version__}."
        " Please report it, with the output of DEPLOY_DEBUG=1."
    )


# --- the command line -----------------------------------------------------------------


class Text(click.ParamType):  # type: ignore[type-arg]
    """A value that must match a pattern."""

    name = "text"

    def __init__(self, pattern: str, what: str) -> None:
        self.pattern, self.what = pattern, what

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not re.fullmatch(self.pattern, value):
            self.fail(f"{value!r} is not {self.what}", param, ctx)
        return value


class Command(click.Command):
    """Says where options of docker build belong."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            fix = "Put docker build options after `--`."
            raise click.UsageError(
                f"No such option {error.option_name!r}. {fix}", context
            ) from None


NAME = Text("(?s).+", "a name. Leave the option out instead.")
APP = Text(
    "[a-z][a-z0-9-]*",
    "an app name. Set APP_NAME (default: the directory name) to lowercase letters, digits, dashes.",
)
TAG = Text(
    "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}",
    "an image tag. Use up to 128 letters, digits, dots, dashes and underscores.",
)
RELEASE = Text(RELEASE_ID, "a release ID. `convox releases` lists them.")
COUNT = click.IntRange(1, 64)
MANIFEST_HELP = "The manifest.  [default: convox.yml or docker-compose.yml]"
BUILD_ARGS = "[-- DOCKER_BUILD_ARGS...]"
MINUTES = Text(r"\d{1,6}(\.\d+)?", "a number of minutes, such as 30 or 1.5.")


def default_app() -> str:
    """Return the name that the convox CLI would use."""
    try:
        return Path.cwd().name.lower().replace(".", "-")
    except FileNotFoundError:
        raise click.UsageError("The working directory no longer exists.") from None


def default_file() -> str:
    return next(filter(os.path.lexists, MANIFESTS), MANIFESTS[-1])


def usage_problems(settings: Settings, variables: Sequence[str]) -> Iterator[str]:
    """Yield options that cannot be used together, and misspelled variables."""
    for name in variables:
        # one typing mistake
        similar = difflib.get_close_matches(name, os.environ, 1, 1 - 1.1 / len(name))
        if similar and similar[0][0] == name[0] and name not in os.environ:
            yield f"{similar[0]} looks like a misspelling of {name}. Rename or unset it."
    args = settings.docker_build_args
    if args and not args[0].startswith("-"):
        yield (
            f"Unexpected argument {args[0]!r}. Deploying takes no arguments. To promote an existing"
            " release, use --release. Put docker build arguments after `--`."
        )
    if settings.release and (settings.no_promote or settings.images_from):
        yield "--release cannot be used with --no-promote or --from."
    paths = [os.path.realpath(path) for path in (settings.images_from, settings.result) if path]
    if len(paths) == 2 and paths[0] == paths[1]:
        yield "--from and --result name the same file. Use two files."


def prepare_result(path: Path) -> None:
    """Remove an earlier result, so that it is not mistaken for a new one."""
    if not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise click.UsageError(f"--result {path} is not in an existing, writable directory.")
    if os.path.lexists(path):
        is_plain = path.is_file() and not path.is_symlink()  # not /dev/null, as root
        can_be_ours = is_plain and os.access(path, os.R_OK)
        text = path.read_text(errors="replace") if can_be_ours else "something else"
        if text and f'"tool": "{TOOL}"' not in text:
            raise click.UsageError(f"--result {path} would replace a file that is not a result.")
        path.unlink()


def setting(
    name: str, kind: Any, variables: str, about: str, *names: str, **details: Any
) -> Callable[[Any], Any]:
    details.update(type=kind, envvar=variables.split(), show_envvar=True, help=about)
    return click.option(name, *names, is_flag=kind is bool, **details)


@click.command(
    cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@setting("--app", APP, "APP_NAME CONVOX_APP", "[default: the directory name]", default=default_app)
@setting("--rack", NAME, "CONVOX_RACK RACK_NAME", "The rack.  [default: the convox CLI's]")
@setting("--file", NAME, "DOCKER_COMPOSE", MANIFEST_HELP, default=default_file)
@setting("--tag", TAG, "IMAGE_TAG", "The images' tag.  [default: <git describe>-<image id>]")
@setting("--skip-ecr-login", bool, "SKIP_ECR_AUTH", "Use docker's existing login to ECR.")
@setting(
    "--timeout", MINUTES, "DEPLOY_TIMEOUT", "Of a step, in minutes.  [default: 60]", default="60"
)
@setting("--result", NAME, "DEPLOY_RESULT", "Write the result to this JSON file.")
@setting("--from", NAME, "DEPLOY_FROM", "Deploy the images of this result.", "images_from")
@setting("--description", NAME, "DEPLOY_DESCRIPTION", "Of the release.  [default: the commit]")
@setting("--no-verify", bool, "DEPLOY_NO_VERIFY", "Do not check what is running, for deploy keys.")
@setting("--cache-from-running", bool, "DEPLOY_CACHE_FROM_RUNNING", "Reuse the running image.")
@setting(
    "--parallel", COUNT, "DEPLOY_PARALLEL", "Builds and pushes at once.  [default: 4]", default=4
)
@setting("--dry-run", bool, "DEPLOY_DRY_RUN", "Show commands and changes, and change nothing.")
@setting("--no-promote", bool, "DEPLOY_NO_PROMOTE", "Build the release but do not promote it.")
@setting("--release", RELEASE, "DEPLOY_RELEASE", "Resume from a built release.", metavar="R...")
@click.version_option(__version__)
@click.argument("docker_build_args", nargs=-1, type=click.UNPROCESSED, metavar=BUILD_ARGS)
def main(**options: Any) -> None:
    """Build an app's images here, push them, and release them on Convox.

    Set CONVOX_HOST and CONVOX_PASSWORD to choose the rack; otherwise the convox CLI's login is
    used. Arguments after -- are passed to docker build.
    """
    settings = Settings(**options)
    variables = ["CONVOX_HOST", "CONVOX_PASSWORD", "RACK_URL"]
    for parameter in main.params:
        variables += parameter.envvar or []
    if problems := list(usage_problems(settings, variables)):
        raise click.UsageError("\n".join(problems))
    if settings.result and not settings.dry_run:
        prepare_result(Path(settings.result))
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # as set in a git hook
        os.environ.pop(variable, None)
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        stream.reconfigure(encoding="utf-8", errors="replace")
        os.set_blocking(stream.fileno(), True)  # a full pipe must not be an error
    code = shell.watch(lambda: run_deploy(settings))
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # unlike sys.exit, not changed by a signal or by closed output


if __name__ == "__main__":
    main()
