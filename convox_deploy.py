#!/usr/bin/env python3
"""Deploy an app to Convox from an image that is built here, off the cluster.

Copy this file into the root of your app, end the image in docker-compose.yml or convox.yml
in the literal tag TAG (`image: <registry>/<repository>:TAG`), and run

    APP_NAME=shop CONVOX_HOST=rack.example.com CONVOX_PASSWORD=... ./convox_deploy.py

It runs deploy/before_build.sh, builds the image with docker, runs deploy/after_build.sh,
pushes the image to ECR, has convox build a release of it, runs deploy/before_release.sh
and promotes the release. The first command that fails stops the deploy, and nothing is
promoted after a failure. `./convox_deploy.py --help` lists the settings.
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["click>=8.1", "sh>=2.2.2,<3", "PyYAML>=6.0"]
# ///

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple, TextIO, TypeVar

try:
    import click
    import sh
    import yaml
except ImportError as missing:
    print(
        f"convox_deploy.py: {missing}. Get what it needs with `python3 -m pip install click sh PyYAML`,"
        " or let uv do it: `uv run convox_deploy.py`.",
        file=sys.stderr,
    )
    sys.exit(2)

__version__ = "0.1.0"

STEPS = ("preflight", "before_build", "build", "after_build", "push", "release", "before_release", "promote")
FAILED, UNUSABLE, TIMED_OUT = 1, 2, 124  # exit statuses; after signal n it is 128 + n
RETRY_PAUSES = (1, 5, 15)  # seconds
GRACE_SECONDS = 10  # between TERM and KILL, as long as `docker stop` gives
AT_ONCE = 4  # checks or pushes side by side; docker itself sends 5 layers at once

APP = re.compile(r"[a-z][a-z0-9-]*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
RELEASE = re.compile(r"R[A-Z]{9,10}")  # the id of a build starts with B
IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
HOST = re.compile(r"[A-Za-z0-9.-]+(:\d+)?")
REPOSITORY = re.compile(
    r"(localhost|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:))(:\d+)?"
    r"(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)+"
)
ECR_REGISTRY = re.compile(
    r"(?P<account>\d{12})\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z0-9-]+)"
    r"\.(amazonaws\.(com(\.cn)?|eu)|on\.(aws|amazonwebservices\.com\.cn)"
    r"|sc2s\.sgov\.gov|c2s\.ic\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)"
)
PASSING = re.compile(  # reasons why a push or a call of ECR fails now and not a little later
    r"throttl|too ?many ?requests|rate exceeded|\b50[0234]\b|internal server error|service ?unavailable|bad gateway"
    r"|connection (reset|refused|was closed|timed out)|broken pipe|\bEOF\b|i/o timeout|handshake timeout|read timeout"
    r"|could not connect to the endpoint|temporary failure in name resolution",
    re.IGNORECASE,
)
# Other names that docker takes for an architecture.
ALIASES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "armel": "arm", "i386": "386"}
T = TypeVar("T")
NULL = "tag:yaml.org,2002:null"
EXAMPLE_IMAGE = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"


class DeployError(Exception):
    """Something that the user can mend. The text says what happened and what to do."""

    def __init__(self, message: str, exit_status: int = FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status


# --- settings -------------------------------------------------------------------------


class Settings(NamedTuple):
    """What to deploy and how, from options and environment. No secret is in it: those stay in the environment."""

    app: str
    rack: str | None
    file: str
    tag: str | None
    skip_ecr_login: bool
    timeout: float  # minutes
    result: str | None
    dry_run: bool
    no_promote: bool
    release: str | None
    quiet: bool
    docker_build_args: tuple[str, ...]

    def problems(self) -> list[str]:
        """Returns what is wrong with the settings themselves, each with the way out."""
        env, release, args = os.environ.get, self.release, self.docker_build_args
        host, url_host = env("CONVOX_HOST") or "", url_parts(env("RACK_URL") or "").host
        half_a_login = bool(host) != bool(env("CONVOX_PASSWORD")) and not self.rack and not url_host
        two_racks = self.rack == env("CONVOX_RACK") and env("RACK_NAME") not in (None, "", self.rack)
        empty = [name for name in ("rack", "file", "tag", "result", "release") if getattr(self, name) == ""]
        wrong = {
            f"--{''.join(empty[:1])} is empty. Give it a value, or leave it out.": empty,
            f"{self.app!r} is no name of a Convox app: those are lower-case letters, digits and dashes, a letter"
            " first. Set APP_NAME; without it the directory's name is taken.": not APP.fullmatch(self.app),
            f"IMAGE_TAG {self.tag!r} is no docker tag. Use at most 128 letters, digits, dots, dashes and underscores,"
            " no dot or dash first.": self.tag and not TAG.fullmatch(self.tag),
            f"--release {release!r} is no release id. Those look like RABCDEFGHIJ; `convox releases --app {self.app}`"
            " lists them.": release and not RELEASE.fullmatch(release),
            "--release with --no-promote leaves nothing to do. Leave one of them out.": release and self.no_promote,
            "--release builds nothing, so it takes no arguments for docker build. Leave them out.": release and args,
            "--quiet with --dry-run shows nothing. Leave one of them out.": self.quiet and self.dry_run,
            f"{''.join(args[:1])!r} is not understood. APP_NAME or --app names the app, and arguments for docker build"
            " go after `--`.": args and not args[0].startswith("-"),
            "CONVOX_RACK and RACK_NAME name different racks. Unset one of them.": two_racks,
            f"RACK_URL and CONVOX_RACK ({self.rack}) each name a rack. Unset one.": self.rack and url_host,
            f"RACK_URL and CONVOX_HOST ({host}) name different racks. Unset one.": host
            and url_host not in ("", host.partition(":")[0]),
            f"CONVOX_HOST {host!r} is no host name. Write it without https:// and without a path.": host
            and not HOST.fullmatch(host),
            "CONVOX_HOST and CONVOX_PASSWORD go together: with one of them alone, the convox CLI takes the rack that"
            " it is logged in to. Set both, or name the rack with CONVOX_RACK.": half_a_login,
            f"--result {self.result}: no file can be written there. Name a file in a directory that is there and"
            " writable.": self.result and not can_be_written(self.result),
        }
        return [message for message, is_so in wrong.items() if is_so]

    @property
    def platform(self) -> str:
        """The platform that docker is asked to build for, several with commas, empty where that is left to docker."""
        asked, words = [], iter(self.docker_build_args)
        for word in words:
            name, is_given, value = word.partition("=")
            if name == "--platform":
                asked.append(value if is_given else next(words, ""))
        return ",".join(asked) or os.environ.get("DOCKER_DEFAULT_PLATFORM") or ""

    def convox_environment(self) -> dict[str, str]:
        """Returns what the convox CLI and the hooks need beside our environment to reach the rack.

        CONVOX_HOST and CONVOX_PASSWORD name the rack up to Convox v2; v3 wants it as RACK_URL.
        """
        host, password = os.environ.get("CONVOX_HOST"), os.environ.get("CONVOX_PASSWORD")
        if self.rack:
            return {"CONVOX_RACK": self.rack}
        if host and password and not os.environ.get("RACK_URL"):
            return {"RACK_URL": f"https://convox:{percent_encoded(password)}@{host}"}
        return {}


class UrlParts(NamedTuple):
    password: str
    host: str


def url_parts(url: str) -> UrlParts:
    match = re.match(r"https?://(?:[^/@:]*:?([^/@]*)@)?([^/:?#]*)", url)
    return UrlParts(urllib.parse.unquote(match[1] or ""), match[2]) if match else UrlParts("", "")


def percent_encoded(secret: str) -> str:
    return urllib.parse.quote(os.fsencode(secret), safe="")


def can_be_written(path: str) -> bool:
    """Says whether a file can be put at `path`: a device or a link there would be replaced by it."""
    return os.access(os.path.dirname(path) or ".", os.W_OK) and (
        not os.path.lexists(path) or (os.path.isfile(path) and not os.path.islink(path))
    )


# --- manifest -------------------------------------------------------------------------


class Build(NamedTuple):
    """What `docker build` needs to know of a service. Services of equal builds share one image."""

    context: str = "."
    dockerfile: str | None = None  # as compose has it, relative to the context
    args: tuple[str, ...] = ()
    target: str | None = None

    @property
    def is_remote(self) -> bool:
        return "://" in self.context or self.context.startswith("git@")

    @property
    def file(self) -> str | None:
        """The Dockerfile as `docker build --file` takes it, None for the context's own."""
        return self.dockerfile if self.is_remote else self.dockerfile and os.path.join(self.context, self.dockerfile)


class Service(NamedTuple):
    """A service whose image ends in `:TAG`. `tag_offset` says where TAG stands in the text, in characters."""

    name: str
    repository: str
    build: Build
    tag_offset: int


class Manifest(NamedTuple):
    """The text of a docker-compose.yml or convox.yml, and those of its services that are ours to build."""

    text: str
    services: tuple[Service, ...]

    def with_tags(self, tags: Mapping[int, str]) -> str:
        """Returns the text with TAG replaced at each offset in `tags`, and nothing else changed."""
        text = self.text
        for offset in sorted(tags, reverse=True):
            text = text[:offset] + tags[offset] + text[offset + len("TAG") :]
        return text


def read_manifest(path: str) -> Manifest:
    """Reads a manifest of any shape that Convox takes. Raises DeployError, with a line for each thing wrong."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise DeployError(f"{path} is no file. Name the manifest with DOCKER_COMPOSE.")
        text = Path(path).read_bytes().decode("utf-8")
        return Manifest(text, tuple(find_services(text)))
    except FileNotFoundError:
        problem = "is not there. Run this from the root of the app, or name the manifest with DOCKER_COMPOSE."
    except OSError as error:
        problem = f"cannot be read: {error.strerror}."
    except UnicodeDecodeError:
        problem = "is not UTF-8 text. Save it as UTF-8."
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"is not valid YAML, line {mark.line + 1 if mark else '?'}: {error.problem or error.context}."
    except yaml.YAMLError as error:
        problem = f"is not valid YAML: {str(error).splitlines()[0]}."
    except RecursionError:
        problem = "is nested too deeply, or a merge key in it leads back to itself."
    except (ValueError, OverflowError) as error:
        problem = str(error)
    raise DeployError("\n".join(f"{path} {line}" for line in problem.splitlines()))


def find_services(text: str) -> list[Service]:
    """Returns the services to build. Raises ValueError, with a line for each thing wrong, and yaml.YAMLError."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("has no services in it. Is it a docker-compose.yml or a convox.yml?")
    problems = list(duplicate_keys(root))
    scalars = {token.end_mark.index: token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)}
    top = entries(root)
    nodes = entries(top["services"]) if "services" in top else top  # the first compose format has no `services:`
    services: list[Service] = []
    for name, node in nodes.items():
        try:
            services += read_service(name, given(entries(node)), text, scalars)
        except ValueError as error:
            problems.append(f"service {name}: {error}")
    builds: dict[int, Build] = {}
    for service in services:
        if builds.setdefault(service.tag_offset, service.build) != service.build:
            problems.append(
                f"service {service.name}: takes its image from a service that is built differently."
                " Give it an image of its own."
            )
    if not services and not problems:
        problems.append(f"has no image that ends in :TAG, so there is nothing to build. Write image: {EXAMPLE_IMAGE}")
    if problems:
        raise ValueError("\n".join(problems))
    return services


def duplicate_keys(root: yaml.Node) -> Iterator[str]:
    """Yields a problem for each key that stands twice in a mapping: YAML readers drop one of the two unseen."""
    todo, seen = [root], {root}
    while todo:
        node = todo.pop()
        children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for _, child in node.value]
            keys: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in keys:
                    yield f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice. Take one out."
                keys.add(key.value)
        todo += [child for child in children if child not in seen]
        seen.update(children)


@functools.cache  # each mapping once, however often aliases lead to it
def entries(node: yaml.Node) -> dict[str, yaml.Node]:
    """Returns the keys and values of a mapping, those of its merge keys (`<<: *base`) included."""
    own: dict[str, yaml.Node] = {}
    merged: dict[str, yaml.Node] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag == "tag:yaml.org,2002:merge":
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                merged = {**entries(source), **merged}
        else:
            own[str(key.value)] = value
    return {**merged, **own}


def given(mapping: Mapping[str, yaml.Node]) -> dict[str, yaml.Node]:
    return {key: node for key, node in mapping.items() if node.tag != NULL}


def read_service(
    name: str, service: Mapping[str, yaml.Node], text: str, scalars: Mapping[int, yaml.Token]
) -> list[Service]:
    """Returns the service if it is ours to build, nothing if its image is somebody else's. Raises ValueError."""
    if "image" not in service:
        if "build" in service:
            raise ValueError(f"has a build: and no image, so the cluster would build it. Add image: {EXAMPLE_IMAGE}")
        return []
    node = service["image"]
    image = scalar(node, "image")
    repository, _, tag = image.rpartition(":")
    if tag.strip() == "TAG" != tag:
        raise ValueError(f"image {image!r} has white space behind TAG. Take it out.")
    if tag != "TAG":
        if "build" in service:
            raise ValueError(f"its build: is not used, as {image} does not end in :TAG. Write :TAG, or drop the build:")
        return []
    if "$" in image:
        raise ValueError(f"image {image} has a variable in it. Write it out: only TAG is replaced.")
    if REPOSITORY.fullmatch(f"docker.io/{repository}") and not REPOSITORY.fullmatch(repository):
        raise ValueError(f"image {image} names no registry. Write {EXAMPLE_IMAGE}, or docker.io/{image} for Docker Hub")
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"image {image!r} is no image name. Write {EXAMPLE_IMAGE}, in lower case")
    token = scalars[node.end_mark.index]
    written = text[token.start_mark.index : token.end_mark.index]
    if written.count(":TAG") != 1:
        raise ValueError(f"image {image}: write it plainly, without escapes")
    return [Service(name, repository, read_build(service), token.start_mark.index + written.index(":TAG") + 1)]


def read_build(service: Mapping[str, yaml.Node]) -> Build:
    """Returns what to build for a service, by its `build:` in the words of compose or of convox.yml. Else `.`"""
    node = service.get("build")
    keys = given(entries(node)) if isinstance(node, yaml.MappingNode) else {"context": node} if node else {}
    if unknown := sorted(keys.keys() - {"context", "path", "dockerfile", "manifest", "args", "target"}):
        raise ValueError(f"build.{unknown[0]} is not passed on. Drop it, and give docker build its option after --")

    def text(*names: str) -> str | None:
        nodes = [keys[name] for name in names if name in keys]
        return written_out(nodes[0], f"build.{names[0]}") if nodes else None

    dockerfile = text("dockerfile", "manifest")
    if dockerfile is None and "dockerfile" in service:
        dockerfile = written_out(service["dockerfile"], "dockerfile")
    args = tuple(build_args(keys["args"])) if "args" in keys else ()
    return Build(text("context", "path") or ".", dockerfile, args, text("target"))


def build_args(node: yaml.Node) -> Iterator[str]:
    """Yields NAME=value, or NAME alone where docker is to take the value from the environment."""
    if isinstance(node, yaml.ScalarNode):
        raise ValueError("build.args is neither a list nor a mapping. Write args: {NAME: value}")
    if isinstance(node, yaml.SequenceNode):
        yield from (written_out(item, "build.args") for item in node.value)
    for name, value in entries(node).items():
        yield name if value.tag == NULL else f"{name}={written_out(value, 'build.args')}"


def written_out(node: yaml.Node, key: str) -> str:
    value = scalar(node, key)
    if "$" in value:
        raise ValueError(f"{key}: {value} has a variable in it. Write it out, or give it to docker build after --")
    return value


def scalar(node: yaml.Node, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{key} is not a single value. Write one text there.")
    return str(node.value)


# --- commands -------------------------------------------------------------------------


def environment_without_the_rack() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("CONVOX_PASSWORD", "RACK_URL")}


class Output(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line on stderr. Never of stdout: that may be a password."""
        return (self.err.strip() or "it said nothing").splitlines()[-1].strip()


LIVE, KEEP, TEE = "live", "keep", "tee"  # a stream goes straight to ours, is kept for us to read, or both


@dataclass
class Stream:
    """A stream of a running program that we read: the end of it is kept, and all is passed on to `sink`, if any.

    With a label, which is put before each line, it is one of several that are shown at the same time.
    """

    sink: TextIO | None = None
    label: str = ""
    kept: bytes = b""
    unshown: bytes = b""

    def take(self, chunk: bytes) -> None:
        self.kept = (self.kept + chunk)[-65536:]  # answers are short, and logs may be of any length
        if self.sink:
            whole_lines, line_end, self.unshown = (self.unshown + chunk).rpartition(b"\n")
            self.show(whole_lines + line_end)
            if len(self.unshown) > 65536:
                self.flush()

    def show(self, data: bytes) -> None:
        text = redacted(data.decode(errors="replace"))
        if self.label:
            text = "".join(f"{self.label} | {line}\n" for line in text.splitlines())
        if text and self.sink:
            try:
                click.echo(text, self.sink, nl=False)
            except OSError:
                if self.sink in (sys.stdout, sys.stderr):
                    raise  # while what is hidden may be lost, where there is no room for it

    def flush(self) -> None:
        self.show(self.unshown)
        self.unshown = b""


class Commands:
    """Runs external programs through sh, each in a session of its own.

    A signal to us, the time-out of a step, or a failure beside them, ends the whole process group of
    each running program: TERM, and KILL after GRACE_SECONDS or a second Ctrl-C. The handler only notes
    the signal; `run` raises DeployError for it once the program is gone.
    """

    def __init__(self, dry_run: bool, quiet: bool) -> None:
        self.dry_run, self.quiet = dry_run, quiet
        self.is_stopping = False
        self._signal: int | None = None  # None: what stops us is a failure
        self._groups: set[int] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self.one_docker_login = threading.Lock()  # docker rewrites its config.json whole, without a lock

    def handle_signals(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                signal.signal(signum, self._handle)
        signal.signal(signal.SIGALRM, self._handle)

    def begin(self, task: Callable[[], T]) -> Future[T]:
        """Calls a task that runs commands while we go on."""
        return self._threads.submit(task)

    def side_by_side(self, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """Calls tasks that run commands, AT_ONCE of them at a time, and returns what they return, in their order.

        The first that raises ends the commands of the others, and nothing can be run any more.
        """
        futures = [self.begin(task) for task in tasks]
        for future in as_completed(futures):
            if future.exception():
                self.end()
            future.result()
        return [future.result() for future in futures]

    def end(self) -> None:
        """Ends what still runs, and what a signal has not ended yet."""
        self._stop()
        self._threads.shutdown()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def ask(self, *argv: str, **how: Any) -> Output:
        """Runs a command unseen, also in a dry run, and returns what it said, whatever its exit status."""
        return self.run(argv, out=KEEP, err=KEEP, **how)

    def do(self, *argv: str, **how: Any) -> Output:
        """Shows and runs a command that changes something; a dry run only shows it. Raises DeployError if it fails."""
        self.show(argv, cwd=how.get("cwd"))
        output = Output(0, "", "") if self.dry_run else self.run(argv, **how)
        if output.status:
            raise failure(argv, output, how.get("label"))
        return output

    def show(self, *pipe: tuple[str, ...], cwd: str | None = None) -> None:
        if not self.quiet:
            show(*pipe, cwd=cwd)

    def run(self, argv: tuple[str, ...], repeatable: bool = False, **how: Any) -> Output:
        """Runs a command as `_run` does; a repeatable one again, after a pause, if it fails for a passing reason."""
        for seconds in RETRY_PAUSES if repeatable else ():
            output = self._run(argv, **how)
            if not output.status or not PASSING.search(output.err):
                return output
            warn(f"`{command_name(argv)}` failed: {output.complaint} Trying again in {seconds} s.")
            self._run(("sleep", str(seconds)))  # as a command, so that a signal ends it
        return self._run(argv, **how)

    def _run(
        self,
        argv: tuple[str, ...],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: int | str | None = None,
        out: str = LIVE,
        err: str = LIVE,
        label: str = "",
    ) -> Output:
        """Runs a command to its end, with `env` added to our environment; without it, less the rack's secrets.

        `stdin` is a file descriptor, a text, or None for an empty one. Of a stream that is kept the
        last 64 KiB are returned. A label is put before each line shown of a TEE. Raises DeployError
        if we are stopped.
        """
        self.raise_if_stopped()
        environment = environment_without_the_rack() if env is None else {**os.environ, **env}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            streams, ends = {}, []
            is_hidden = self.quiet and not out == err == KEEP
            hidden = ours.enter_context(tempfile.TemporaryFile("a+", errors="replace")) if is_hidden else None
            for number, sink, mode in ((1, sys.stdout, out), (2, sys.stderr, err)):
                if mode == LIVE:
                    ends.append(hidden.fileno() if hidden else number)
                else:
                    read_end, write_end = os.pipe()
                    ours.callback(os.close, read_end)
                    theirs.callback(os.close, write_end)
                    streams[read_end] = Stream((hidden or sink) if mode == TEE else None, label)
                    ends.append(write_end)
            options: dict[str, Any] = {
                "_env": environment,
                "_cwd": cwd,
                "_out": ends[0],
                "_err": ends[1],
            }
            options["_in"] = theirs.enter_context(open(os.devnull, "rb")) if stdin is None else stdin
            options.update(_ok_code=range(-64, 256), _encoding="utf-8", _bg=True, _bg_exc=False, _new_session=True)
            try:
                running = sh.Command(argv[0])(*argv[1:], **options)
            except (sh.CommandNotFound, sh.ForkException, OSError) as error:
                raise DeployError(why_not_started(argv[0], error)) from None
            theirs.close()
            group = running.process.pgid
            self._groups.add(group)
            if self.is_stopping:
                end_group(group, signal.SIGTERM)
            try:
                read_streams(streams, running)
            except OSError:  # nobody reads our output any more
                end_group(group, signal.SIGKILL)
                raise
            finally:
                status = running.wait().exit_code
                if self.is_stopping:
                    await_group_end(group)
                self._groups.discard(group)
            if status and hidden:
                show_hidden(argv, hidden)
        self.raise_if_stopped(f" during `{command_name(argv)}`")
        kept = [stream.kept.decode(errors="replace") for stream in streams.values()]
        texts = [kept.pop(0) if mode != LIVE else "" for mode in (out, err)]
        return Output(status, *texts)

    def raise_if_stopped(self, during: str = "") -> None:
        if self._signal == signal.SIGALRM:
            raise DeployError(f"The time was up{during}. DEPLOY_TIMEOUT sets the minutes for a step.", TIMED_OUT)
        if self._signal is not None:
            raise DeployError(f"Stopped by {signal.Signals(self._signal).name}{during}.", 128 + self._signal)
        if self.is_stopping:
            raise DeployError(f"Stopped by a failure beside it{during}.")

    def _handle(self, signum: int, _frame: object) -> None:
        if not self.is_stopping:
            self._signal = signum
            self._stop()
        elif signum in (signal.SIGALRM, signal.SIGINT):
            self._end_groups(signal.SIGKILL)

    def _stop(self) -> None:
        self.is_stopping = True
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self._end_groups(signal.SIGTERM)

    def _end_groups(self, signum: int) -> None:
        for group in tuple(self._groups):
            end_group(group, signum)


def end_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def await_group_end(group: int) -> None:
    """Waits for the children of a program that was stopped; the timer set in `_stop` kills them in the end."""
    deadline = time.monotonic() + GRACE_SECONDS + 1
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def read_streams(streams: Mapping[int, Stream], running: Any) -> None:
    """Reads until all writers are gone, or `running` is: a daemon that it left behind may keep a stream open."""
    left = set(streams)
    while left:
        is_alive = running.process.is_alive()[0]
        ready = select.select(left, [], [], 0.2)[0]
        for descriptor in ready:
            chunk = os.read(descriptor, 65536)
            streams[descriptor].take(chunk)
            left -= set() if chunk else {descriptor}
        if not ready:
            for stream in streams.values():
                stream.flush()
            if not is_alive:
                break
    for stream in streams.values():
        stream.flush()


def show_hidden(argv: tuple[str, ...], hidden: TextIO) -> None:
    """Shows a command that failed, and all that it said."""
    show(argv)
    hidden.seek(0)
    said = Stream(sys.stderr)
    while chunk := hidden.buffer.read(65536):
        said.take(chunk)
    said.flush()


def command_name(argv: tuple[str, ...]) -> str:
    """Returns a command as people call it: `docker push`, `convox releases promote`, `deploy/after_build.sh`."""
    words = [word for word in argv[1:3] if re.fullmatch("[a-z][a-z-]*", word)]
    return " ".join([argv[0], *words, *(["--help"] if argv[-1] == "--help" else [])])


def why_not_started(program: str, error: Exception) -> str:
    if isinstance(error, sh.CommandNotFound):
        return f"{program} is not installed, or not on the PATH.{GET_IT.get(program, '')}"
    return f"{program} cannot be started: {str(error).strip().splitlines()[-1]}."


GET_IT = {
    "docker": " Get it from https://docs.docker.com/engine/install/",
    "aws": " Get it from https://docs.aws.amazon.com/cli/",
    "convox": " Get it from https://docs.convox.com/installation/cli/",
}


ADVICE = {  # what to do, by what a command said; the rack's builds first, as their logs may hold any of the others
    "ERROR: .*build failed": "What the rack said is above. If it may not pull the image, give it"
    " the login with `convox registries add`.",
    "ERROR: rollback": "The new containers did not become healthy: `convox logs` shows why. If they say `exec format"
    " error`, the image is for another architecture: build with `-- --platform linux/amd64`.",
    "no basic auth credentials": "docker is not logged in to this registry. Run `docker login`, or leave out"
    " --skip-ecr-login.",
    "not authorized|AccessDenied": "This AWS user or role may not do that. Have it allowed to push to the repository"
    " (the policy AmazonEC2ContainerRegistryPowerUser does), or set AWS_PROFILE to one that may.",
    "immutable|tag invalid": "This tag is taken, and the repository lets none be replaced. Leave IMAGE_TAG unset, or"
    " give a new one.",
    "name unknown": "The repository is not there, and could not be made. Have somebody make it who may:"
    " `aws ecr create-repository`.",
    "no space left": "A disk is full. `docker system prune` makes room on docker's.",
}


def failure(argv: tuple[str, ...], output: Output, label: str | None = None) -> DeployError:
    name, status = f"`{command_name(argv)}`" + (f" for {label}" if label else ""), output.status
    if status in (-signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM):  # an abort on its way to us
        return DeployError(f"{name} was ended by {signal.Signals(-status).name}.", 128 - status)
    said = [f"  {line}" for line in output.err.strip().splitlines()[-5:]]
    advice = [text for pattern, text in ADVICE.items() if re.search(pattern, output.err)][:1]
    above = "" if said else " What it said, if anything, is above."
    ended = f"{name} failed with {'exit status' if status > 0 else 'signal'} {abs(status)}.{above}"
    return DeployError("\n".join([ended, *said, *advice]))


def redacted(text: str) -> str:
    """Returns `text` without the secrets that our environment holds, as they are or as part of a URL."""
    secrets = [value for name, value in os.environ.items() if re.search("PASSWORD|SECRET|TOKEN", name)]
    for secret in [*secrets, url_parts(os.environ.get("RACK_URL", "")).password]:
        if len(secret) >= 6:  # a shorter one would take ordinary words with it
            text = text.replace(secret, "***").replace(percent_encoded(secret), "***")
    return text


def say(text: str, err: bool = False, **style: Any) -> None:
    colour = False if os.environ.get("NO_COLOR") else None  # None: only on a terminal
    click.echo(click.style(redacted(text), **style), err=err, color=colour)


def show(*pipe: tuple[str, ...], cwd: str | None = None) -> None:
    """Shows a command, or several with pipes between them, as they could be typed."""
    there = f"cd {shlex.quote(cwd)} && " if cwd else ""
    say(f"$ {there}{' | '.join(shlex.join(map(redacted, argv)) for argv in pipe)}", dim=True)


def warn(text: str) -> None:
    say(f"warning: {text}", fg="yellow")


# --- the lifecycle --------------------------------------------------------------------


@dataclass
class Image:
    """One docker build, and the services and repositories it is for. It gets its tag when it is pushed."""

    build: Build
    local: str
    services: list[Service] = field(default_factory=list)
    tag: str = ""
    platform: str = ""  # such as linux/amd64
    digests: dict[str, str] = field(default_factory=dict)  # by image reference, once pushed

    @property
    def repositories(self) -> list[str]:
        return sorted({service.repository for service in self.services})


class Commit(NamedTuple):
    """What git says of the checkout, for the hooks and the tag. Empty outside a checkout."""

    hash: str = ""
    branch: str = ""
    description: str = ""
    describe: str = ""


def step(method: Callable[[Deploy], None]) -> Callable[[Deploy], None]:
    """Makes a method a step of the lifecycle: with a header, a time-out, and a line in the closing table."""

    @functools.wraps(method)
    def run(deploy: Deploy) -> None:
        name = method.__name__
        deploy.commands.raise_if_stopped()
        deploy.current_step = name
        deploy.tell("")
        say(f"==> [{STEPS.index(name)}/{len(STEPS) - 1}] {name}", fg="cyan", bold=True)
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, deploy.settings.timeout * 60)
        try:
            method(deploy)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            deploy.seconds[name] = time.monotonic() - started

    return run


class Deploy:
    """One deploy: what is known of it so far, and its steps as methods."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.commands = Commands(settings.dry_run, settings.quiet)
        self.commit = Commit()
        self.manifest = Manifest("", ())
        self.images: list[Image] = []
        self.local_tags: list[str] = []
        self.lookups: list[Future[None]] = []
        self.missing: set[str] = set()  # repositories to make
        self.unknown: list[str] = []  # repositories that aws may not look up
        self.build_flags = {"--manifest", "--description", "--id"}  # until the CLI has said what it takes
        self.promote_flags = {"--wait"}
        self.release_before: str | None = None  # what the rack ran; None where it may not be asked
        self.release_after: str | None = None
        self.release_id = settings.release or ""
        self.promote_asked = self.promoted = False
        self.problems: list[str] = []
        self.current_step = ""
        self.seconds: dict[str, float] = {}
        self.directory = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Turns errors and signals into a message and an exit status, and leaves nothing behind but the result file."""
        error: DeployError | None = None
        prepare_standard_streams()
        self.commands.handle_signals()
        try:
            yield
            self.commands.raise_if_stopped()
            if self.problems:  # of a dry run
                self.current_step = "preflight"
                raise DeployError("\n".join(self.problems))
        except DeployError as stopped:
            error = stopped
        except OSError as stopped:
            error = DeployError(f"{stopped.filename or 'Our own output'}: {stopped.strerror or stopped}.")
        finally:
            self.commands.end()
            self.clean_up()
        try:
            self.write_result(error)
        except OSError as unwritten:
            error = error or DeployError(f"--result {self.settings.result} cannot be written: {unwritten.strerror}.")
        try:
            self.report(error)
        except OSError:  # nobody reads it; the exit status and the result file tell
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if error:
            sys.exit(self.exit_status(error))

    @step
    def preflight(self) -> None:
        """Checks all that can be checked before anything is changed, and reports all problems at once."""
        self.directory = make_temporary_directory()
        wrong = self.settings.problems()
        self.remove_old_result()
        self.problems = [*wrong, *self.check_hooks()]
        if not self.release_id:
            self.problems += self.problems_of(self.check_manifest)
            self.begin_lookups()
        checks = [self.check_git, *([] if self.release_id else [self.check_docker, *self.logins()]), self.check_convox]
        for found in self.commands.side_by_side(functools.partial(self.problems_of, check) for check in checks):
            self.problems += [problem for problem in found if problem not in self.problems]
        there_is_a_plan = (self.images or self.release_id) and not wrong
        if self.problems and not (self.settings.dry_run and there_is_a_plan):
            raise DeployError("\n".join(self.problems))
        self.tell(self.summary())

    @step
    def before_build(self) -> None:
        self.run_hook()

    @step
    def build(self) -> None:
        self.local_tags = [image.local for image in self.images if not self.settings.dry_run]
        for number, image in enumerate(self.images):
            build, id_file = image.build, Path(self.directory, f"image-id-{number}")
            self.commands.do(
                *("docker", "build"),
                *option("--file", build.file),
                *(word for arg in build.args for word in ("--build-arg", arg)),
                *option("--target", build.target),
                *self.settings.docker_build_args,
                *("--iidfile", str(id_file), "--tag", image.local),
                f"./{build.context}" if build.context.startswith("-") else build.context,
            )
            if not self.settings.dry_run and not (id_file.exists() and IMAGE_ID.match(id_file.read_text())):
                raise DeployError("`docker build` reported success, but left no image id. Is this the real docker?")

    @step
    def after_build(self) -> None:
        self.run_hook()

    @step
    def push(self) -> None:
        for lookup in self.lookups if not self.problems else []:
            lookup.result()
        if self.unknown:
            warn(f"aws may not look up {' and '.join(self.unknown)} in ECR; the push will tell whether that is there.")
        for image in self.images:
            self.identify(image)
        self.commands.side_by_side(functools.partial(self.make_repository, name) for name in sorted(self.missing))
        pushes = [(image, repository) for image in self.images for repository in image.repositories]
        self.commands.side_by_side(
            functools.partial(self.push_image, *push, is_alone=len(pushes) == 1) for push in pushes
        )

    @step
    def release(self) -> None:
        """Has the rack build a release. Only the manifest is uploaded: the rack pulls the images."""
        text = self.manifest.with_tags({s.tag_offset: image.tag for image in self.images for s in image.services})
        name, directory = os.path.basename(self.settings.file), Path(self.directory, "manifest")
        directory.mkdir()
        (directory / name).write_bytes(text.encode())
        if self.settings.dry_run:
            self.tell(self.changes(name, text))
        output = self.commands.do(
            *self.convox("build"),
            *option("--manifest" if "--manifest" in self.build_flags else "--file", name),
            *option("--description", self.describe() if "--description" in self.build_flags else None),
            *({"--id"} & self.build_flags),
            cwd=str(directory),
            env=self.settings.convox_environment(),
            out=KEEP if "--id" in self.build_flags else TEE,
            err=TEE,
        )
        if self.settings.dry_run:
            self.release_id = "RELEASE_ID"
            return
        self.release_id = self.new_release(output.out)
        say(f"\nRelease {self.release_id} is built, and not live yet. To go on from here:\n  {self.way_on()}")

    @step
    def before_release(self) -> None:
        self.run_hook()

    @step
    def promote(self) -> None:
        """Promotes the release, and removes the local tags meanwhile: the last hook is done with them."""
        self.commands.side_by_side([self.promote_release, self.remove_local_tags])

    # --- the checks of preflight ---

    def problems_of(self, check: Callable[[], Iterable[str] | None]) -> list[str]:
        try:
            return list(check() or [])
        except DeployError as error:
            if self.commands.is_stopping:
                raise
            return [str(error)]

    def check_hooks(self) -> Iterator[str]:
        for name in ["before_release"] if self.release_id else ["before_build", "after_build", "before_release"]:
            if problem := hook_problem(hook_path(name)):
                yield f"{hook_path(name)} {problem}"

    def check_git(self) -> Iterable[str]:
        here = Path.cwd()
        try:
            if any((directory / ".git").exists() for directory in (here, *here.parents)):
                self.commit = self.read_commit()
        except DeployError as error:
            if self.commands.is_stopping:
                raise
            if not (self.settings.tag or self.release_id):
                return [f"{error} The tag is made from the commit: correct this, or set IMAGE_TAG."]
        return []

    def check_manifest(self) -> Iterator[str]:
        self.manifest = read_manifest(self.settings.file)
        images: dict[Build, Image] = {}
        run = uuid.uuid4().hex[:8]  # two deploys on one machine must not meet in one local tag
        for service in self.manifest.services:
            part = re.sub("[^a-z0-9]+", "-", service.name.lower()).strip("-") or "image"
            new = Image(service.build, f"{self.settings.app}:{part}-{run}")
            images.setdefault(service.build, new).services.append(service)
        self.images = list(images.values())
        repositories = [repository for image in self.images for repository in image.repositories]
        if self.settings.tag and len(set(repositories)) < len(repositories):
            yield "IMAGE_TAG would give different images in one repository the same tag. Unset it."
        for build in images:
            yield from self.check_build(build)

    def check_build(self, build: Build) -> Iterator[str]:
        options = {arg.partition("=")[0] for arg in self.settings.docker_build_args}
        if build.is_remote or hook_path("before_build").exists():  # the hook may make what is not there yet
            return
        if not Path(build.context).is_dir():
            yield f"The build context {build.context} is no directory. Correct the build: in {self.settings.file}."
        elif not (options & {"-f", "--file"} or Path(build.file or f"{build.context}/Dockerfile").is_file()):
            file = os.path.normpath(build.file or f"{build.context}/Dockerfile")
            yield f"There is no {file} to build. Write one, or say where it is: build: in {self.settings.file}."

    def check_docker(self) -> Iterator[str]:
        answer = self.commands.ask("docker", "version", "--format", "{{.Server.Version}}")
        if answer.status or not answer.out.strip():
            yield f"No docker engine answers; start Docker and try again. docker says: {answer.complaint}"

    def logins(self) -> list[Callable[[], None]]:
        """Logs docker in to ECR: before the build, which may want a base image from there and must not be in vain."""
        skip = self.settings.skip_ecr_login
        return [functools.partial(self.log_in, registry) for registry in self.registries() if not skip]

    def log_in(self, registry: str) -> None:
        region = ecr_options(registry)[:2]
        get_password = ("aws", "ecr", "get-login-password", *region)
        login = ("docker", "login", "--username", "AWS", "--password-stdin", registry)
        self.commands.show(get_password, login)
        answer = self.commands.ask(*get_password, repeatable=True)
        password = answer.out.strip()
        if answer.status or not re.fullmatch("[!-~]+", password):
            advice = "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`."
            if "invalid choice" in answer.err.lower():
                advice = f"This aws is too old.{GET_IT['aws']}"
            raise DeployError(f"aws gives no password for ECR in {region[1]}: {answer.complaint}\n{advice}")
        if not self.settings.dry_run:
            with self.commands.one_docker_login:
                said = self.commands.ask(*login, stdin=password, repeatable=True)
            # A credential helper that cannot store a login is one that needs none.
            if said.status and "error storing credentials" not in said.err:
                raise DeployError(
                    f"docker login to {registry} failed: {said.complaint.replace(password, '***')}\n"
                    "Check whether docker reaches the registry, and this machine's clock."
                )

    def check_convox(self) -> Iterator[str]:
        self.build_flags = self.flags_of("build")
        self.promote_flags = self.flags_of("releases", "promote")
        if not (self.build_flags & {"--manifest", "--file"} and "--app" in self.promote_flags):
            too_old = "This convox CLI is too old, or not Convox's: its help lists no --manifest, --file or --app."
            yield too_old + GET_IT["convox"]
        elif APP.fullmatch(self.settings.app):
            try:
                self.release_before = self.running_release(may_be_refused=True)
            except DeployError as error:
                if self.commands.is_stopping:
                    raise
                app = self.settings.app
                no_app = f"The rack has no app {app}. Create it with `convox apps create {app}`, or correct APP_NAME."
                advice = "Check CONVOX_HOST and CONVOX_PASSWORD, or log in with `convox login`."
                if re.search("dial tcp|no such host|refused|timeout", str(error)):
                    advice = "Check CONVOX_HOST, and whether this machine reaches the rack."
                yield no_app if "no such app" in str(error) else f"{error}\n{advice}"

    def flags_of(self, *command: str) -> set[str]:
        """Returns the options that a command of this generation of the convox CLI lists in its help."""
        answer = self.commands.ask("convox", *command, "--help")
        if answer.status:
            raise failure(("convox", *command), answer)
        return set(re.findall(r"--[a-z][a-z-]*", answer.out + answer.err))

    # --- parts of the steps ---

    def registries(self) -> dict[str, list[str]]:
        """Returns the names of our repositories in each registry of ECR; any other is used as docker is logged in."""
        names: dict[str, set[str]] = {}
        for repository in (repository for image in self.images for repository in image.repositories):
            registry, _, name = repository.partition("/")
            if ECR_REGISTRY.fullmatch(registry):
                names.setdefault(registry, set()).add(name)
        return {registry: sorted(names[registry]) for registry in sorted(names)}

    def run_hook(self) -> None:
        path = hook_path(self.current_step)
        if problem := hook_problem(path):  # an earlier hook may have made it
            raise DeployError(f"{path} {problem}")
        if not path.exists():
            return self.tell(f"There is no {path}.")
        variables = self.hook_variables()
        if self.settings.dry_run:
            self.tell("\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()))
        self.commands.do(str(path), env={**self.settings.convox_environment(), **variables}, stdin=0)

    def hook_variables(self) -> dict[str, str]:
        """Returns what a hook gets beside our environment: all that is known by then."""
        commit = self.commit
        known = {"APP_NAME": self.settings.app, "RACK_NAME": self.settings.rack or "", "GIT_HASH": commit.hash}
        known.update(GIT_BRANCH=commit.branch, GIT_DESCRIPTION=commit.description)
        for image in reversed(self.images) if self.current_step != "before_build" else []:
            known["DOCKER_TAG"] = image.local  # in the end the first service's
            for service in image.services:
                known["DOCKER_TAG_" + re.sub("[^A-Z0-9]", "_", service.name.upper())] = image.local
        return {**known, "RELEASE_ID": self.release_id} if self.release_id else known

    def read_commit(self) -> Commit:
        branch = self.git("rev-parse", "--abbrev-ref", "HEAD")
        if branch == "HEAD":  # Jenkins checks out a commit, and says in a variable of which branch
            branch = os.environ.get("BRANCH_NAME") or os.environ.get("GIT_BRANCH") or branch
        commit, _, description = self.git("log", "-1", "--no-show-signature", "--format=%H %h %s").partition(" ")
        describe = self.git("describe", "--always", "--dirty")
        return Commit(commit, re.sub("^origin/", "", branch), description, describe)

    def git(self, *args: str) -> str:
        answer = self.commands.ask("git", *args)
        if answer.status or not answer.out.strip():
            raise DeployError(f"`git {args[0]}` failed: {answer.complaint}.")
        return re.sub(r"[\x00-\x1f\x7f]+", " ", answer.out).strip()

    def identify(self, image: Image) -> None:
        """Sets the image's platform and its tag, of commit and image id: racks cache images by their tag.

        Both are read here, after the hooks: after_build may have committed changes to the image.
        """
        image_id = "sha256:IMAGE_ID"
        if not self.settings.dry_run:
            ask_for = ("docker", "image", "inspect", "--format", "{{.Id}} {{.Os}}/{{.Architecture}}")
            image_id, _, image.platform = self.commands.ask(*ask_for, image.local).out.strip().partition(" ")
            if not IMAGE_ID.fullmatch(image_id):
                raise DeployError(f"docker has no image {image.local} any more. Did deploy/after_build.sh remove it?")
            self.check_platform(image)
        commit = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.commit.describe).lstrip(".-")[:100]
        image.tag = self.settings.tag or "-".join(filter(None, [commit, image_id[len("sha256:") :][:12]]))

    def check_platform(self, image: Image) -> None:
        names = " and ".join(service.name for service in image.services)
        self.tell(f"The image of {names} is for {image.platform}.")
        asked = self.settings.platform
        words = [ALIASES.get(word, word) for word in asked.lower().split("/")[:2]]
        if asked not in ("", "local") and "," not in asked and not set(words) <= set(image.platform.split("/")):
            raise DeployError(
                f"The image of {names} is for {image.platform}, and {asked} was asked for. Its base image is probably"
                f" here for {image.platform} alone: get it with `docker pull --platform {asked}`, and look for a"
                " --platform in the Dockerfile."
            )

    def begin_lookups(self) -> None:
        """Begins to find out which repositories of ECR are missing, with one call of aws for each registry."""
        if not self.settings.skip_ecr_login or shutil.which("aws"):
            for item in self.registries().items():
                self.lookups.append(self.commands.begin(functools.partial(self.look_up, *item)))

    def look_up(self, registry: str, names: list[str]) -> None:
        """Notes which repositories are missing, and which may not be asked for: there the push decides."""
        argv = ("aws", "ecr", "describe-repositories", *ecr_options(registry), "--repository-names", *names)
        answer = self.commands.ask(*argv, repeatable=True)
        if "RepositoryNotFoundException" in answer.err and len(names) == 1:
            self.missing.add(f"{registry}/{names[0]}")
        elif "RepositoryNotFoundException" in answer.err:
            for name in names:
                self.look_up(registry, [name])
        elif answer.status and (self.settings.skip_ecr_login or "AccessDenied" in answer.err):
            self.unknown += names
        elif answer.status:
            raise failure(argv, answer)

    def make_repository(self, repository: str) -> None:
        registry, _, name = repository.partition("/")
        create = ("aws", "ecr", "create-repository", *ecr_options(registry), "--repository-name", name)
        self.commands.show(create)
        if self.settings.dry_run:
            return
        answer = self.commands.ask(*create, repeatable=True)
        if "AccessDenied" in answer.err:
            warn(f"aws may not make the repository {name}; the push will tell whether it is there.")
        elif answer.status and "RepositoryAlreadyExistsException" not in answer.err:
            raise failure(create, answer)

    def push_image(self, image: Image, repository: str, is_alone: bool) -> None:
        """Tags and pushes. Beside others, each line of the push is marked with the service that the image is for."""
        reference = f"{repository}:{image.tag}"
        self.commands.do("docker", "tag", image.local, reference)
        service = next(service.name for service in image.services if service.repository == repository)
        how = {"err": TEE} if is_alone else {"out": TEE, "err": TEE, "label": service}
        push = functools.partial(self.commands.do, "docker", "push", reference, repeatable=True, **how)
        try:
            push()
        except DeployError as error:
            registry = repository.split("/")[0]
            if "token has expired" not in str(error) or not ecr_options(registry):
                raise
            self.log_in(registry)
            push()
        image.digests[reference] = self.pushed_digest(reference)

    def pushed_digest(self, reference: str) -> str:
        """Returns the digest by which the registry knows the image. Docker has one only after a real push."""
        if self.settings.dry_run:
            return ""
        answer = self.commands.ask("docker", "image", "inspect", "--format", "{{json .RepoDigests}}", reference)
        repository = re.sub("^docker.io/(library/)?", "", reference.rpartition(":")[0])
        digest = re.search(rf'"{re.escape(repository)}@(sha256:[0-9a-f]+)"', answer.out)
        if not digest:
            raise DeployError(
                f"`docker push` reported success, but {reference} has no digest: it was not pushed."
                " Push it by hand to see what docker says."
            )
        return digest[1]

    def promote_release(self) -> None:
        self.promote_asked = not self.settings.dry_run
        wait = {"--wait"} & self.promote_flags
        env = self.settings.convox_environment()
        self.commands.do(*self.convox("releases", "promote"), *wait, self.release_id, env=env, out=TEE, err=TEE)
        if self.settings.dry_run:
            return
        if self.release_before is not None:
            self.release_after = self.running_release()
            if self.release_after != self.release_id:
                raise DeployError(
                    f"The rack took the promote, but {self.settings.app} runs {self.release_after or 'no release'}, not"
                    f" {self.release_id}. Somebody else may have promoted, or the rack has rolled back."
                )
        self.promoted = True

    def convox(self, *command: str) -> tuple[str, ...]:
        return ("convox", *command, "--app", self.settings.app, *self.rack_option())

    def rack_option(self) -> tuple[str, ...]:
        return option("--rack", self.settings.rack if "--rack" in self.build_flags else None)

    def describe(self) -> str:
        description = self.commit.description or self.images[0].tag
        return " ".join(filter(None, [description, os.environ.get("BUILD_URL")]))

    def new_release(self, output: str) -> str:
        """Returns the release id: the last word that every `convox build` prints, with --id or without."""
        last_word = (output.split() or [""])[-1]
        if not RELEASE.fullmatch(last_word) or last_word == self.release_before:
            raise DeployError(
                f"`convox build` reported success, but named no new release: it ends in {redacted(last_word)[:40]!r}."
                f" `convox releases --app {self.settings.app}` shows what there is."
            )
        return last_word

    def running_release(self, may_be_refused: bool = False) -> str | None:
        """Returns the release that the app runs, empty for none. None: a deploy key may release, but not ask."""
        argv = ("convox", "api", "get", *self.rack_option(), f"/apps/{self.settings.app}")
        answer = self.commands.ask(*argv, env=self.settings.convox_environment())
        if may_be_refused and answer.status and re.search("deploy key|forbidden", answer.err, re.IGNORECASE):
            warn(f"this login may not ask the rack what {self.settings.app} runs: {answer.complaint}")
            return None
        if answer.status:
            raise failure(argv, answer)
        try:
            return str(json.loads(answer.out)["release"] or "")
        except (ValueError, KeyError, TypeError):
            raise DeployError(f"`{' '.join(argv)}` gave no JSON with a release in it.") from None

    # --- what is said, and what is left ---

    def tell(self, text: str) -> None:
        if not self.settings.quiet:
            say(text)

    def changes(self, name: str, text: str) -> str:
        """Returns what a deploy changes in the manifest, as a unified diff."""
        before, after = self.manifest.text.splitlines(), text.splitlines()
        return "\n".join(difflib.unified_diff(before, after, name, f"{name} as uploaded", lineterm=""))

    def summary(self) -> str:
        url_host, host = url_parts(os.environ.get("RACK_URL", "")).host, os.environ.get("CONVOX_HOST")
        rack = self.settings.rack or url_host or host or "of the convox login"
        commit, release = self.commit.describe, self.release_before
        known = {"app": self.settings.app, "rack": rack, "commit": commit, "running now:": release}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value)

    def way_on(self) -> str:
        rack = option("--rack", self.settings.rack)
        program = sys.argv[0] if "/" in sys.argv[0] else f"./{sys.argv[0]}"  # as `python convox_deploy.py` names it
        return shlex.join([program, "--app", self.settings.app, *rack, "--release", self.release_id])

    def state(self, error: DeployError) -> str:
        """Returns in what state the app is left."""
        app, release = self.settings.app, self.release_id
        before = f" {app} ran {self.release_before} when this began." if self.release_before else ""
        if self.settings.dry_run or self.current_step in ("", "preflight"):
            return "Nothing was changed."
        if self.promote_asked:
            return (
                f"The rack was asked to promote {release} and may still be at it: `convox apps info --app {app}` tells,"
                f" `convox apps cancel --app {app}` stops it. To promote it again:\n  {self.way_on()}"
            )
        if release:
            return f"Nothing was promoted.{before} Release {release} is built; go on with\n  {self.way_on()}"
        if self.current_step == "release" and error.exit_status != FAILED:
            return (
                f"Nothing was promoted.{before} The build may still run on the rack, `convox builds --app {app}`"
                " tells; its release goes live only if somebody promotes it."
            )
        return f"Nothing was released or promoted.{before}"

    def report(self, error: DeployError | None) -> None:
        if self.current_step not in ("", "preflight") and not self.settings.dry_run:
            with contextlib.suppress(OSError):
                self.tell(f"\n{self.closing_table()}")
        if error:
            say(f"\n{self.current_step or 'deploy'} failed:", err=True, fg="red", bold=True)
            say(f"{error}\n{self.state(error)}", err=True)
        elif self.settings.dry_run:
            if not self.settings.release:
                say("\nIMAGE_ID and RELEASE_ID stand for what is known once the image and the release are built.")
            say("\nThis was a dry run: nothing was changed.", bold=True)
        elif self.promoted and self.release_after is None:
            say(f"\nRelease {self.release_id} is promoted. Whether it runs, this login may not ask.", fg="yellow")
        elif self.promoted:
            say(f"\n{self.settings.app} runs {self.release_id}.", fg="green", bold=True)
        else:
            say(f"\nRelease {self.release_id} is built and not promoted. Promote it with\n  {self.way_on()}", bold=True)

    def closing_table(self) -> str:
        """Returns the seconds that each step took, if any, and what came of them."""
        rows = {name: seconds for name, seconds in self.seconds.items() if seconds >= 0.05}
        lines = [f"{name:<16}{seconds:8.1f} s" for name, seconds in rows.items()]
        lines += [f"{'total':<16}{sum(self.seconds.values()):8.1f} s", ""]
        for image in self.images:
            for reference, digest in sorted(image.digests.items()):
                lines += [f"image    {reference}", f"digest   {digest}"]
        return "\n".join([*lines, *([f"release  {self.release_id}"] if self.release_id else [])]).rstrip()

    def exit_status(self, error: DeployError | None) -> int:
        if not error:
            return 0
        early = self.current_step in ("", "preflight") and error.exit_status == FAILED
        return UNUSABLE if early else error.exit_status

    def write_result(self, error: DeployError | None) -> None:
        """Writes the result file, whole or not at all."""
        if not self.settings.result or self.settings.dry_run or not can_be_written(self.settings.result):
            return
        result = {
            "status": "failed" if error else "succeeded",
            "exit_status": self.exit_status(error),
            "app": self.settings.app,
            "release": self.release_id or None,
            "promoted": self.promoted,
            "running": self.release_after,
            "tag": (self.images[0].tag if self.images else None) or None,
            "images": [
                {
                    "image": reference,
                    "digest": digest,
                    "platform": image.platform,
                    "services": [service.name for service in image.services],
                }
                for image in self.images
                for reference, digest in sorted(image.digests.items())
            ],
            "steps": [{"step": name, "seconds": round(seconds, 3)} for name, seconds in self.seconds.items()],
            "failed_step": self.current_step if error else None,
            "error": redacted(str(error)) if error else None,
        }
        unfinished = Path(f"{self.settings.result}.{uuid.uuid4().hex}")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(self.settings.result)

    def remove_old_result(self) -> None:
        """An earlier deploy's result must not stand for this one."""
        path = self.settings.result
        if path and not self.settings.dry_run and os.path.exists(path) and can_be_written(path):
            os.unlink(path)

    def remove_local_tags(self) -> None:
        """Removes the names that are ours alone. The pushed images stay in docker: the next build starts from them."""
        tags, self.local_tags = self.local_tags, []
        if tags:
            # Not through `commands`: after a signal they run nothing more.
            how: dict[str, Any] = {"_new_session": True, "_ok_code": range(-64, 256), "_timeout": GRACE_SECONDS}
            with contextlib.suppress(sh.CommandNotFound, sh.TimeoutException, sh.ForkException, OSError):
                sh.Command("docker")("image", "rm", "--no-prune", *tags, _env=environment_without_the_rack(), **how)

    def clean_up(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.remove_local_tags()


def ecr_options(registry: str) -> tuple[str, ...]:
    """Returns the options of `aws ecr` that name a registry of ECR, nothing for any other."""
    match = ECR_REGISTRY.fullmatch(registry)
    return ("--region", match["region"], "--registry-id", match["account"]) if match else ()


def option(name: str, value: str | None) -> tuple[str, ...]:
    return (name, value) if value else ()


def hook_path(name: str) -> Path:
    return Path("deploy", f"{name}.sh")


def hook_problem(path: Path) -> str | None:
    """Returns why the hook at `path` cannot run, None if it can or there is none."""
    if not os.path.lexists(path):
        return None
    if not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there. Correct the link, or remove it."
    if not path.is_file():
        return "is not a file. Make it a script, or remove it."
    if not os.access(path, os.X_OK):
        return f"is not executable. Run: chmod +x {path}"
    with path.open("rb") as script:
        first_line = script.readline(256)
    if first_line.startswith(b"#!") and first_line.endswith(b"\r\n"):
        return "has Windows line ends. Save it with Unix ones (LF)."
    if not first_line.startswith((b"#!", b"\x7fELF")):
        return "does not say what runs it. Make its first line #!/bin/sh"
    interpreter = os.fsdecode(b"".join(first_line[2:].split()[:1]))
    if first_line.startswith(b"#!") and not os.path.exists(interpreter):
        return (
            f"wants to be run by {interpreter or 'nothing'}, which is not there. Correct its first line, or install it."
        )
    return None


def make_temporary_directory() -> str:
    """Returns a new directory that files can be written to. Raises DeployError."""
    directory = ""
    try:
        directory = tempfile.mkdtemp(prefix="convox-deploy-")
        Path(directory, "room").write_bytes(bytes(65536))
        Path(directory, "room").unlink()
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise DeployError(
            f"No temporary file can be made: {error.strerror}. Set TMPDIR to where there is room."
        ) from None
    return directory


def prepare_standard_streams() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened must not take its place
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text in this locale


# --- the command ----------------------------------------------------------------------


def setting(name: str, variable: str | list[str], help: str, **details: Any) -> Callable[[Any], Any]:
    return click.option(name, envvar=variable, show_envvar=True, help=help, **details)


def minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 60 * 24 * 365:
            return float(text)
    raise click.BadParameter(f"{text!r} is no number of minutes.")


def app_by_directory() -> str:
    """Returns the name that the convox CLI itself would take: the directory's in lower case, with dots as dashes."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.basename(os.getcwd()).lower().replace(".", "-")
    return ""  # the directory was removed


def manifest_by_directory() -> str:
    return "convox.yml" if os.path.lexists("convox.yml") else "docker-compose.yml"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@setting("--app", "APP_NAME", "The app.  [default: the directory's name]", default=app_by_directory)
@setting("--rack", ["CONVOX_RACK", "RACK_NAME"], "The rack.  [default: the convox CLI's choice]")
@setting(
    "--file",
    "DOCKER_COMPOSE",
    "The manifest.  [default: convox.yml if there is one, else docker-compose.yml]",
    default=manifest_by_directory,
)
@setting("--tag", "IMAGE_TAG", "The image's tag.  [default: made from the commit and the image's id]")
@setting("--skip-ecr-login", "SKIP_ECR_AUTH", "Take docker as logged in to ECR.", is_flag=True)
@setting(
    "--timeout",
    "DEPLOY_TIMEOUT",
    "Minutes for each step, 0 for no limit.",
    type=minutes,
    default=60,
    show_default=True,
)
@setting("--result", "DEPLOY_RESULT", "A JSON file to write the outcome to.  [default: none]")
@setting("--quiet", "DEPLOY_QUIET", "Show headers and errors, and what a command said only if it fails.", is_flag=True)
@click.option("--dry-run", is_flag=True, help="Show each command and the manifest's changes, and change nothing.")
@click.option("--no-promote", is_flag=True, help="Stop once the release is built.")
@click.option("--release", metavar="R...", help="Go on from a release that is built.")
@click.version_option(__version__)
@click.argument("docker_build_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- DOCKER_BUILD_ARGS...]")
def main(**options: Any) -> None:
    """Build an app's image here, push it to ECR, and have Convox release and promote it.

    CONVOX_HOST and CONVOX_PASSWORD in the environment choose the rack; without them the convox
    CLI's own login does. What follows -- goes to docker build.
    """
    deploy = Deploy(Settings(**options))
    with deploy.running():
        deploy.preflight()
        if not deploy.settings.release:
            deploy.before_build()
            deploy.build()
            deploy.after_build()
            deploy.push()
            deploy.release()
        if not deploy.settings.no_promote:
            deploy.before_release()
            deploy.promote()


if __name__ == "__main__":
    main()
