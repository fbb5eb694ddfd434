#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Build an app's Docker images off-cluster and deploy them to Convox.

Copy this file into the root of your app and run

    APP_NAME=shop CONVOX_HOST=rack.example.com CONVOX_PASSWORD=... ./convox_deploy.py

A deploy runs deploy/before_build.sh, docker build, deploy/after_build.sh, docker push,
convox build, deploy/before_release.sh and convox releases promote, in this order. It succeeds
once the rack reports the new release as running. --rollback goes back to an older release.

This file reads from the top: the deploy; how it ends; the manifest; docker, ECR, convox, git and
CI, each with what is known about that program; running commands; the command line.
"""

# /// script
# requires-python = ">=3.9"
# dependencies = ["click>=8.1", "sh>=2.2.2,<3", "PyYAML>=6.0"]
# ///

from __future__ import annotations

import sys

if __name__ == "__main__" and not __spec__:
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from signal import SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

BY_UV = "CONVOX_DEPLOY_BY_UV"
try:
    import click
    import sh
    import yaml
except ImportError as error:
    me = sys.argv[0]
    if __name__ == "__main__" and shutil.which("uv") and not os.environ.get(BY_UV):
        os.environ[BY_UV] = "1"  # or it would go on forever
        os.execvp("uv", ["uv", "run", "--script", *sys.argv])
    sys.stderr.write(f"""\
convox_deploy.py cannot import a Python package: {error}. Use one of these:
  uv run {me}
  python3 -m venv .venv && .venv/bin/pip install click sh PyYAML && .venv/bin/python {me}
""")
    sys.exit(2)
os.environ.pop(BY_UV, None)

__version__ = "0.3.0.dev0"

TOOL = "convox-deploy"
HOOKS = "before_build after_build before_release".split()
FAILED_FOR_GOOD = "the rack promotes nothing until a person repairs its CloudFormation stack."
FAILED, NOT_STARTED, TIMED_OUT = 1, 2, 124  # exit codes; 128 + n after signal n
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL; GitHub kills a canceled job after 10
PUSH_PAUSE = 5  # seconds before a push is repeated
POLL_SECONDS = 5  # between polls of a rack that is updating
PATIENCE_SECONDS = 120  # for a rack that does not respond while we wait
LAST_WORDS_SECONDS = 3  # to ask what is running after a promote that was stopped
DEBUG_SECONDS = [15, 30]  # after which the containers of a promote are looked at, and again
DRAIN_SECONDS = 0.2  # for what still comes through a pipe of a hook that has ended
HEARTBEAT_SECONDS = 60  # CI systems kill jobs that print nothing for ten minutes
LOG_LINES = 20  # of a failed command, and of a container
LOG_INDENT = "\n  | "  # of a container's log
PRINTED_INDENT = "\n  > "  # of a failed command's last lines, if they have been printed already
T = TypeVar("T")


# --- the deploy -----------------------------------------------------------------------


class Deploy:
    """One deploy. `run` is the lifecycle, and the methods that follow it are the steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.step_name = settings, "preflight"
        self.result = Result(app=settings.app, release=settings.release or "")
        self.convox = Convox(settings.app, settings.rack)
        self.docker = Docker(settings.docker_build_args)
        self.commit, self.manifest = Commit(), Manifest()
        self.images: list[Image] = []
        self.hooks = [name for name in HOOKS if os.path.lexists(hook_path(name))]
        self.has_before_build = settings.builds_images and "before_build" in self.hooks
        self.running_now = "unknown"
        self.problems: list[str] = []  # despite which a dry run goes on

    def run(self) -> None:
        """Run the lifecycle. A step that fails raises DeployError, and nothing runs after it."""
        self.preflight()
        if self.settings.builds_images:
            self.hook("before_build")
            self.build()
            self.hook("after_build")
            self.push()
        if not self.settings.old_release:
            self.release()
        if not self.settings.no_promote:
            self.before_release()
            self.promote()
        if self.problems:
            self.step_name = "preflight"
            raise DeployError(*self.problems)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Give a step its timeout and, if it prints something, its header and its time."""
        shell.raise_if_stopped()
        self.step_name, started = name, shell.start_timer(shell.minutes * 60)
        shell.next_header = name
        try:
            yield
        finally:
            seconds = self.result.seconds[name] = round(time.monotonic() - started, 3)
            with suppress(OSError):  # a closed output is for the next echo to report
                end_section(name, "" if shell.dry_run or seconds < 0.05 else f"{seconds:.1f} s")

    def preflight(self) -> None:
        """Check everything that can be checked ahead, and log in to the registries."""
        with self.step("preflight"):
            problems = list(self.convox.rack_problems())
            if not self.settings.rollback:
                problems += hook_problems()
            problems += self.read_manifest(is_final=not self.has_before_build)
            if problems:
                raise DeployError(*problems)
            checks = [self.check_convox]
            if not self.settings.rollback:
                checks.append(self.check_git)
            if self.images or self.has_before_build:
                checks = [self.log_in, self.docker.check, *checks]  # the slowest first
            shell.parallel(self.note_problem, checks)
            if not (self.problems or self.settings.old_release):
                self.note_problem(lambda: prepare_builds(self))
            if self.problems and not shell.dry_run:
                raise DeployError(*self.problems)
            for problem in self.problems:
                warn(problem)
            self.introduce()

    def note_problem(self, check: Callable[[], None]) -> None:
        try:
            check()
        except Stopped:
            raise
        except DeployError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def read_manifest(self, is_final: bool) -> Iterator[str]:
        """Read the manifest, unless before_build.sh has yet to create it. Yield its problems."""
        settings = self.settings
        if settings.rollback or (settings.release and os.path.isfile(settings.file)):
            return  # it is only needed to know that this is the app's root, with its hook
        if not (is_final or shell.dry_run or os.path.lexists(settings.file)):
            return
        try:
            self.manifest = Manifest.load(settings.file)
            if settings.images_from:
                self.result.images = images_of_result(settings.images_from)
                yield from self.manifest.use_tags(self.result.images)
            else:
                self.images = self.manifest.images(settings.app)
                if is_final:
                    yield from self.docker.missing_files(self.images)
        except DeployError as error:
            yield from error.args
        yield from self.manifest.conflicts(bool(settings.tag and settings.builds_images))

    def check_git(self) -> None:
        may_have_tags = self.has_before_build or any(self.manifest.repositories)
        try:
            self.commit = read_commit()
        except CommandFailed as failure:
            if self.settings.builds_images and may_have_tags and not self.settings.tag:
                raise
            warn(failure.summary)

    def check_convox(self) -> None:
        self.note_running(self.convox.check())
        if self.settings.old_release:
            self.check_release(self.settings.old_release)

    def note_running(self, app: App) -> None:
        """Remember what is running: the release to go back to. Raise DeployError."""
        if app.status == "failed":
            raise DeployError(f"{self.settings.app} is failed: {FAILED_FOR_GOOD}")
        self.running_now = f"unknown (status: {app.status})"
        if app.status == "running":
            self.result.running_before = self.result.running = app.release
            self.running_now = self.convox.named(app.release)

    def check_release(self, release: str) -> None:
        """Raise DeployError if a release does not exist, or if no rack would promote it now."""
        running, created = self.result.running_before, self.convox.created(release)
        if self.settings.rollback and release == running:
            raise DeployError(f"{release} is running already.")
        if self.settings.rollback or running in ("", release):
            return
        if "" < created < self.convox.created(running):
            why = f"{release} was created before {running}, which is running."
            fix = f"Deploy again or, to release the older one, {same_command('rollback', release)}."
            raise Overtaken(f"{why} Racks promote no older release. {fix}")

    def introduce(self) -> None:
        """Print what is deployed where, and set the variables that hooks get."""
        settings, commit, convox = self.settings, self.commit, self.convox
        doing = "Rolling back" if settings.rollback else "Deploying"
        subject = commit.subject and f'"{commit.subject}"'
        old = settings.old_release
        what = convox.named(old) if old else f"{commit.describe} {subject}"
        app = f"{settings.app} ({settings.app_source}) {what}".rstrip()
        source = f" ({convox.rack_source})" if convox.rack or convox.host else ""
        echo(f"{doing} {app} on {convox.label}{source}", bold=True)
        echo(f"Running now: {self.running_now}")
        if not settings.old_release:
            others, builds = len(services_in(self.manifest.top)), ""
            if not self.manifest.services:
                builds = f" (builds nothing; images from elsewhere: {others})"
            echo(f"Manifest: {settings.file}{builds}")
            warnings = [*self.manifest.warnings(convox.is_v3), *self.docker.warnings(self.images)]
            for warning in warnings:
                warn(warning)
        export(self)

    def log_in(self) -> None:
        """Log docker in to the registries in ECR. The build may need images from there."""
        registries = {Ecr.of(repository) for repository in self.manifest.repositories}
        for registry in sorted(filter(None, registries)):
            if not self.settings.skip_ecr_login:
                registry.log_in()

    def hook(self, name: str) -> None:
        """Run a hook, if there is one, as a step."""
        if self.has_hook(name):
            with self.step(name):
                shell.run(str(hook_path(name)), _in=0)

    def has_hook(self, name: str) -> bool:
        return name in self.hooks or os.path.lexists(hook_path(name))

    def build(self) -> None:
        with self.step("build"):
            if self.has_before_build and not shell.dry_run:
                self.read_changed_manifest()
            if self.settings.cache_from_running:
                self.use_running_images_as_cache()
            can_be_parallel = self.images[1:] and not shell.dry_run and self.docker.has_buildkit
            at_once = self.settings.parallel if can_be_parallel else 1
            shell.parallel(self.docker.build, self.images, at_once)
            if "after_build" in self.hooks and not shell.dry_run:  # the hook may run the images
                for image in self.images:
                    self.docker.inspect(image)
        for image in reversed(self.images):  # the first one's name stays
            os.environ["DOCKER_TAG"] = image.local
            for service in image.services:
                suffix = re.sub("[^A-Z0-9]", "_", service.name.upper())
                os.environ[f"DOCKER_TAG_{suffix}"] = image.local

    def read_changed_manifest(self) -> None:
        """Check and use what before_build.sh may have changed. Raise DeployError."""
        repositories = self.manifest.repositories
        self.check_git()
        export(self)
        if problems := list(self.read_manifest(is_final=True)):
            raise DeployError(*problems)
        if self.manifest.repositories != repositories:
            self.log_in()
        vars(self.convox).pop("environment", None)  # the hook may have changed it
        prepare_builds(self)

    def use_running_images_as_cache(self) -> None:
        """Let builds reuse layers of the running images, and later builds reuse ours."""
        try:
            if not self.docker.has_buildkit:
                raise CommandFailed("this needs BuildKit.")
            for image in self.images:
                image.cache = ["--build-arg", "BUILDKIT_INLINE_CACHE=1"]
            running = self.convox.images_of(self.result.running_before)
            for image in self.images:
                image.cache += option("--cache-from", running.get(image.name))
        except CommandFailed as failure:
            why = failure.output.splitlines()[-1]
            warn(f"Building without the running images as cache: {why}")

    def push(self) -> None:
        with self.step("push"):
            if Manifest.load(self.settings.file) != self.manifest:
                raise DeployError(
                    f"{self.settings.file} has changed. Edit it in deploy/before_build.sh."
                )
            for image in self.images:
                if not shell.dry_run:
                    self.docker.inspect(image)
                for service in image.services:
                    service.tag = self.settings.tag or self.commit.tag(image.id[:12])
            repositories, at_once = self.manifest.repositories, self.settings.parallel
            pushed = shell.parallel(self.push_to, repositories, at_once)
            self.result.images = [record for records in pushed for record in records]

    def push_to(self, repository: str) -> list[dict[str, Any]]:
        """Push a repository's images one at a time: the first may have to create it.

        Images without a repository are left to the release step. Return records for the result.
        """
        records = list[dict[str, Any]]()
        for image in self.images:
            names = [each.name for each in image.services if each.repository == repository]
            if names:
                reference = repository and f"{repository}:{image.services[0].tag}"
                digest = self.docker.push(image, reference, names[0]) if repository else None
                pushed = {"image": reference, "digest": digest, "platform": image.platform}
                seconds = image.build_seconds
                records.append({**pushed, "services": names, "build_seconds": seconds})
        return records

    def release(self) -> None:
        """Build a release. Only the manifest and the names of our images are uploaded."""
        with self.step("release"):
            name = os.path.basename(self.settings.file)
            files = {name: self.manifest.with_tags()}
            if shell.dry_run:
                old, new = self.manifest.text.splitlines(), files[name].splitlines()
                for line in difflib.unified_diff(
                    old, new, name, f"{name} as uploaded", lineterm=""
                ):
                    echo(line)
            own = [each for each in self.images if not all(s.repository for s in each.services)]
            if own:
                echo(f"Pushing to the rack's registry: {', '.join(each.label for each in own)}")
            files.update({image.build.path: f"FROM {image.local}\n" for image in own})
            title = self.commit.title or self.settings.app
            about = self.settings.description or f"{title} {run_url()}".strip()
            with tempfile.TemporaryDirectory(prefix="convox-deploy-") as directory:
                for path, text in files.items():
                    Path(directory, path).parent.mkdir(parents=True, exist_ok=True)
                    Path(directory, path).write_bytes(text.encode())
                release = self.convox.build(directory, name, about, own, self.commit.git_dir)
            if release == self.result.running_before:
                raise DeployError(f"`convox build` returned {release}, which is already running.")
            self.result.release = release
            self.convox.descriptions[release] = self.settings.description or self.commit.title
            if not shell.dry_run:
                echo(f"Built release {release} (not live yet).")

    def before_release(self) -> None:
        """Wait for the app's turn, and run the hook."""
        release = os.environ["RELEASE_ID"] = self.result.release
        with self.step("before_release"):
            self.await_turn()
            if self.settings.rollback:
                return
            if not shell.dry_run and (newer := self.convox.newer_release(release)):
                warn(f"{newer} is newer. Its changes, such as variables, are not in {release}.")
            if self.has_hook("before_release"):
                shell.run(str(hook_path("before_release")), _in=0)
                self.await_turn()  # again: meanwhile, someone else may have deployed

    def await_turn(self) -> None:
        """Wait until nobody else's deploy is under way. What runs then is the way back."""
        if not shell.dry_run:
            before = self.result.running_before
            self.note_running(self.convox.await_settled())
            if self.result.running_before != before:
                self.check_release(self.settings.rollback or self.result.release)

    def promote(self) -> None:
        """Promote, or roll back. What the rack reports then decides, not the CLI's exit code."""
        with self.step("promote"):
            if shell.dry_run:
                return self.request()
            for warning in shell.warnings:
                warn(warning)
            self.result.promote_requested, self.result.running = True, ""
            failure = None
            with self.convox.watch_containers():
                try:
                    self.request()
                except CommandFailed as error:
                    failure = error
                finally:
                    if self.settings.rollback:
                        self.result.release = shell.copy_id or self.result.release
                if failure:
                    shell.pause(POLL_SECONDS, "waiting for what the rack reports")
                app = self.convox.await_settled()
            self.result.running = app.release if app.status == "running" else ""
            if not app.release or app != (self.result.release, "running"):
                raise DeployError(f"{why_not_running(self, app, failure)}\n{failure or ''}".strip())
            self.result.verified = True
            if failure:
                warn(f"The rack reports {app.release} running, although {failure.headline}")

    def request(self) -> None:
        if self.settings.rollback:
            self.result.release = self.convox.roll_back(self.settings.rollback)
        else:
            self.convox.promote(self.result.release)


def export(deploy: Deploy) -> None:
    """Set the variables that hooks get."""
    os.environ.update(
        APP_NAME=deploy.settings.app,
        RACK_NAME=deploy.convox.rack,
        GIT_HASH=deploy.commit.hash,
        GIT_BRANCH=deploy.commit.branch,
        GIT_DESCRIPTION=deploy.commit.title,
    )


def prepare_builds(deploy: Deploy) -> None:
    """Give the Dockerfiles the values that they would have on the rack. Raise DeployError."""
    manifest, docker = deploy.manifest, deploy.docker
    deploy.convox.check_manifest(manifest, deploy.settings)
    known = {"BUILD_APP": deploy.settings.app, "BUILD_GIT_SHA": deploy.commit.hash}
    found = [docker.arguments(image.build) for image in deploy.images]
    unknown = {
        name: has_default
        for arguments in found
        for name, has_default in arguments.items()
        if name not in known
    }
    if unknown or manifest.as_they_are or manifest.required:
        known = {**read_environment(deploy, unknown), **known}
    for image, arguments in zip(deploy.images, found):
        for name in arguments:
            if name in known:
                image.arguments[name] = known[name]
            if name in known and READ_BY_DOCKER.fullmatch(name):
                why = f"ARG {name}: docker itself would follow the app's value."
                raise DeployError(f"{why} Rename it, or add `-- --build-arg {name}=VALUE`.")


def read_environment(deploy: Deploy, arguments: dict[str, bool]) -> dict[str, str]:
    """Return the app's environment. Raise DeployError if it is needed, or lacks a value."""
    try:
        environment = deploy.convox.environment
    except CommandFailed as failure:
        if deploy.manifest.as_they_are:  # `convox build --external` reads it, too
            raise
        required = [name for name in arguments if not arguments[name]]
        if names := required or list(arguments):
            problem = (
                f"ARG {', '.join(names)} may come from the app's environment, which cannot be"
                f" read: {failure.output.splitlines()[-1]}\n"
                f"To give a value, set the variable and add `-- --build-arg {names[0]}`."
            )
            if required:
                raise DeployError(problem) from None
            warn(problem)
        return {}
    if missing := deploy.manifest.required - environment.keys():
        fix = f"Set them: {deploy.convox.to_type('env set NAME=VALUE')}."
        problem = f"The app has no value for {', '.join(sorted(missing))}. {fix}"
        if not (deploy.has_before_build and deploy.step_name == "preflight"):
            raise DeployError(problem)
        warn(problem)  # the hook may set them
    return environment


def hook_path(name: str) -> Path:
    return Path("deploy", f"{name}.sh")


def hook_problems() -> Iterator[str]:
    """Yield hooks that cannot run, and files that look like hooks and never run."""
    for path in filter(os.path.lexists, map(hook_path, HOOKS)):
        if not path.is_file():
            yield f"{path} is not a file. Replace it with a script, or remove it."
        elif not os.access(path, os.X_OK):
            yield f"{path} is not executable. Run: chmod +x {path}"
        elif problem := shebang_problem(path):
            yield f"{path} {problem}"
    for path in Path().glob("[Dd][Ee][Pp][Ll][Oo][Yy]/*"):
        name = path.name.partition(".")[0].lower()
        for hook in difflib.get_close_matches(name, HOOKS, 1, 0.85):
            if not os.path.lexists(hook_path(hook)):
                yield f"{path} is never run. Rename it to {hook_path(hook)}."


def shebang_problem(path: Path) -> str:
    """Return why a script could not start, "" if it can or is a binary."""
    line = path.read_bytes().partition(b"\n")[0].decode(errors="replace")
    if line.endswith("\r"):
        return f"has CRLF line ends. Run: sed -i.bak 's/\\r$//' {path}"
    if match := re.match(r"#!\s*(?:\S+/env\s+(?:(?:-\S+|\w+=\S*)\s+)*)?(\S+)", line):
        return "" if shutil.which(match[1]) else f"needs {match[1]}, which is not installed here."
    return "" if "\0" in line else "must start with a line such as #!/bin/sh."


def names_of(services: Iterable[Service]) -> str:
    return ", ".join(service.name for service in services)


# --- how it ends ----------------------------------------------------------------------


class DeployError(Exception):
    """One or more errors that the user can fix. Each says what is wrong and how to fix it."""

    exit_code = FAILED
    about = ""  # the service or the app that the failed command was about

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join("  - " + str(arg).replace("\n", "\n    ") for arg in self.args)


class Overtaken(DeployError):
    """A release that was created after ours is running."""


@dataclass
class Result:
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

    @property
    def total(self) -> str:
        return f"{sum(self.seconds.values()):.1f} s"


def run_deploy(settings: Settings) -> int:
    """Deploy. Turn the end into messages, a result file and an exit code."""
    shell.dry_run, shell.minutes = settings.dry_run, settings.timeout
    deploy, state = Deploy(settings), ""
    result = deploy.result
    error: DeployError | None = None
    try:
        deploy.run()
        shell.raise_if_stopped()
    except Exception as caught:
        error = as_deploy_error(caught)
        result.status, result.failed_step = "failed", deploy.step_name
        result.exit_status = error.exit_code
        if deploy.step_name == "preflight" and error.exit_code == FAILED:
            result.exit_status = NOT_STARTED
        if deploy.step_name in ("build", "push"):
            result.failed_service = error.about
        errors = [str(error)]
        if isinstance(error, Stopped):
            errors += [*deploy.problems, *deploy.convox.unhealthy.values()]
        result.error = redact("\n".join(errors))
    shell.allow_commands(LAST_WORDS_SECONDS)  # also after a signal
    if error:
        state = state_after(deploy, error)
    unwritten = problem_with(lambda: write_result(settings, result))
    problem_with(lambda: print_end(deploy, state))  # if our output is closed
    if unwritten:
        problem_with(lambda: echo(f"The result was not written: {unwritten}", err=True, fg="red"))
    problem_with(lambda: report_to_github(deploy, state))
    problem_with(deploy.docker.remove_names)
    return result.exit_status or (FAILED if unwritten else 0)


def problem_with(action: Callable[[], None]) -> str:
    """Do one thing of the end. The others must not be lost if it fails."""
    try:
        action()
    except Exception as error:
        return str(as_deploy_error(error))
    return ""


def as_deploy_error(error: Exception) -> DeployError:
    """Return the error, or one that says what to do about it."""
    if isinstance(error, DeployError):
        return error
    if isinstance(error, OSError):
        what = f"{error.filename or 'Cannot write'}: {error.strerror or error}".rstrip(".")
        if isinstance(error, BrokenPipeError):  # nobody reads our output
            return DeployError(f"{what}.")
        return DeployError(f"{what}. Check its permissions and the disk's space, or set TMPDIR.")
    with suppress(OSError):  # stderr is closed
        echo(traceback.format_exc(), err=True)
    return DeployError(
        f"Unexpected {type(error).__name__}: {' '.join(str(error).split())}."
        f" This is a bug in convox_deploy.py {__version__}. Please report it with the traceback."
    )


def why_not_running(deploy: Deploy, app: App, failure: CommandFailed | None) -> str:
    """Return why another release than ours is running after the promote."""
    before, release = deploy.result.running_before, deploy.result.release
    output = failure.output if failure else ""
    if app.status == "failed":
        return f"{deploy.result.app} is failed: {FAILED_FOR_GOOD}"
    if app.release != before and not release:
        return f"The rack reports {app.release}, which may be our copy. Its ID is not known."
    if app.release != before:
        return f"Someone else promoted {app.release or 'nothing'}."
    release = release or "the new release"
    if "Waiting for app to be ready... ERROR" in output:
        return f"The update that it waited for was rolled back. {release} was never requested."
    began = deploy.convox.was_busy or deploy.convox.unhealthy
    if "is currently updating" in output or (failure and not began):
        return f"The rack did not promote {release}."
    why = f"The rack rolled back to {before or 'nothing'}: {release} did not become healthy."
    return "\n".join([why, *deploy.convox.unhealthy.values()])


def state_after(deploy: Deploy, error: DeployError) -> str:
    """Return what a failed deploy leaves behind and, from the second line on, what to do."""
    result = deploy.result
    if shell.dry_run or deploy.step_name == "preflight":
        return "Nothing has been changed."
    if result.promote_requested:
        return state_after_promote(deploy, isinstance(error, Stopped))
    running = result.running and deploy.convox.named(result.running)
    was = f" {result.app} was last seen running {running}." if running else ""
    if result.release:
        resume = "" if isinstance(error, Overtaken) else f"\n{how_to_resume(result.release)}"
        return f"Nothing was promoted.{was} Release {result.release} is built.{resume}"
    # Once `convox build` has printed an error of the rack or of docker, it has made no release.
    is_refused = isinstance(error, CommandFailed) and not (
        error.status == 0 or re.search(UNREACHABLE, error.output)
    )
    if deploy.step_name == "release" and not is_refused:
        look = f"To look: {deploy.convox.to_type('releases')}."
        return f"Nothing was promoted.{was} A release may have been built.\n{look}"
    return f"Nothing was released or promoted.{was}"


def state_after_promote(deploy: Deploy, is_stopped: bool) -> str:
    """Return what is running after a failed promote, and what to do."""
    convox, result, old = deploy.convox, deploy.result, deploy.settings.rollback
    again, copy = f"To try again, {same_command('release', result.release)}.", ""
    if old:
        again = f"To try again, {same_command('rollback', old)}."
    if old and result.release:
        copy = f" {result.release}, a copy of {old}, is now the newest release."
    app = App(result.running, "running")
    if not result.running:
        app = App()
        with suppress(DeployError):
            app = convox.read_app()
    if app.status == "failed":
        return f"{result.app} is failed.{copy}"
    if app.status == "running" and (app.release != result.running_before or not is_stopped):
        result.running = app.release
        if app.release == result.release:
            again = ""
        elif app.release != result.running_before and not old:
            again = "Deploy again."
        return f"{result.app} is running {convox.named(app.release)}.{copy}\n{again}"
    before = f"{convox.named(result.running_before)} was running before it.{copy}"
    ours = (result.release, result.running_before)  # v2 reports the old one
    if app.status == "updating" and app.release in ours:
        cancel = f"{convox.to_type('apps cancel')}. That adds a release that copies the newest one."
        return f"The promote is still in progress; {before}\nTo cancel it: {cancel}"
    look = f"{convox.to_type('apps info')}. {again}"
    return f"The promote was requested and may still be in progress; {before}\nTo look: {look}"


def print_end(deploy: Deploy, state: str) -> None:
    settings, result, convox = deploy.settings, deploy.result, deploy.convox
    if result.status == "failed":
        return print_failure(result, state)
    if settings.dry_run:
        echo("\nIDs in capital letters are known only during a deploy.")
        return echo("Dry run: nothing was changed.", bold=True)
    if settings.no_promote:
        echo(f"\nBuilt release {convox.named(result.release)}, and did not promote it.", bold=True)
        echo(how_to_resume(result.release))
    else:
        if settings.rollback:
            live = f"{result.release}, a copy of {convox.named(settings.rollback)}"
        else:
            live = convox.named(result.release)
        echo(f"\n{result.app} is now running {live}.", fg="green", bold=True)
        echo(f"Verified: {convox.label} reports {result.release} running.")
        if result.running_before not in ("", result.release):
            login = "use a login that is allowed to, and " if convox.is_restricted else ""
            same = same_command("rollback", result.running_before)
            echo(f"To roll back to {convox.named(result.running_before)}, {login}{same}.")
    echo(f"Total: {result.total}", dim=True)


def print_failure(result: Result, state: str) -> None:
    """Print what failed and why, what is live, and what to do."""
    error, to_stderr = result.error, not IN_GITLAB  # whose log has stdout and stderr in any order
    if IN_GITHUB:
        if LOG_INDENT in error:  # which an annotation leaves out
            echo(without_printed(error))
        return annotate(f"error title={result.failed_step} failed", f"{error}\n{state}")
    if not IN_GITLAB:  # which may have folded it
        error = without_printed(error)
    live, _, what_to_do = state.partition("\n")
    echo(f"\n{result.failed_step} failed:", err=to_stderr, fg="red", bold=True)
    echo(error, err=to_stderr)
    echo(live, err=to_stderr, fg="yellow", bold=True)
    if what_to_do:
        echo(what_to_do, err=to_stderr)


def same_command(option: str, release: str) -> str:
    return f"run the same command with --{option} {release} (or DEPLOY_{option.upper()}={release})"


def how_to_resume(release: str) -> str:
    return f"To resume from here, {same_command('release', release)}."


def read_result(path: str) -> Any:
    """Return an earlier result, or None for another file. Raise OSError."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        result = json.loads(Path(path).read_text())
        return result if result["tool"] == TOOL else None


def images_of_result(path: str) -> list[dict[str, Any]]:
    """Return the images of an earlier deploy. Raise DeployError."""
    with suppress(OSError, LookupError, TypeError):
        result: Any = os.path.isfile(path) and read_result(path)  # a pipe might never end
        images = [{**image, "services": list(image["services"])} for image in result["images"]]
        if result["status"] == "succeeded" and images:
            return images
    raise DeployError(f"--from {path} is not the --result of a deploy that succeeded with images.")


def remove_result(path: Path) -> None:
    """Remove an earlier result, so that it is not mistaken for a new one. Raise UsageError."""
    try:
        if not os.path.lexists(path):
            path.touch()  # fails now rather than after the deploy
        is_plain = path.is_file() and not path.is_symlink()  # not /dev/null, as root
        if not is_plain or (path.stat().st_size and not read_result(str(path))):
            raise click.UsageError(f"--result {path} would replace a file that is not a result.")
        path.unlink()
    except OSError as error:
        raise click.UsageError(f"--result {path}: {error.strerror}.") from None


def write_result(settings: Settings, result: Result) -> None:
    """Write the result beside its place and rename it, so that it is never half written."""
    if settings.result and not settings.dry_run:
        part = Path(f"{Path(settings.result)}.{os.getpid()}")
        try:
            part.write_text(json.dumps(asdict(result), indent=2) + "\n")
            part.replace(Path(settings.result))
        finally:
            part.unlink(missing_ok=True)


# --- the manifest ---------------------------------------------------------------------

EXAMPLE_IMAGE = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
ALMOST_TAG = r"(?i)(.+):(\$?TAG|\$\{TAG.*\})\s*"
REPOSITORY = r"""(?x)
    (localhost | [A-Za-z0-9-]+ (\.[A-Za-z0-9-]+)+ | [A-Za-z0-9-]+ (?=:)) (:\d+)?  # registry
    (/ [a-z0-9]+ ((\. | _ | __ | -+) [a-z0-9]+)* )+                               # path
"""
CONVOX_KEYS = {"path": "context", "manifest": "dockerfile", "args": "args"}
COMPOSE_KEYS = {key: key for key in ("context", "dockerfile", "args", "target")}
OTHER_MANIFESTS = "../convox.yml docker-compose.yaml compose.yml compose.yaml convox.yaml".split()
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
        if "://" in self.context:  # docker finds it there
            return self.dockerfile
        return os.path.normpath(os.path.join(self.context, self.dockerfile))


@dataclass
class Service:
    """A service to build. Its image is pushed to its repository or, by convox, to the rack's."""

    name: str
    build: Build
    repository: str = ""  # empty if the manifest names no image
    tag_offset: int = 0  # where TAG is in the manifest's text, if it names an image
    tag: str = field(default="", compare=False)  # that replaces TAG


@dataclass
class Manifest:
    """A docker-compose.yml or convox.yml, and its services to build."""

    text: str = ""
    is_compose: bool = False
    top: dict[str, Any] = field(default_factory=lambda: {"services": {}}, compare=False)
    services: list[Service] = field(default_factory=list)

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Read a manifest. Raise DeployError with all its problems."""
        if not os.path.isfile(path):
            fix = "Run this in the app's root, or set DOCKER_COMPOSE to your manifest."
            for other in filter(os.path.isfile, OTHER_MANIFESTS):
                fix = f"Do you mean {other}? Add: -m {other}"
                if other.startswith("../"):
                    fix = f"{other} is there. Run this in the parent directory."
            raise DeployError(f"{path} is not a file. {fix}")
        is_compose = "compose" in os.path.basename(path)
        try:
            text = Path(path).read_bytes().decode()  # keep CRLF line endings
            top = mapping(yaml.load(text, Loader if is_compose else ConvoxLoader))
            check_environment({} if is_compose else top)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise DeployError(f"{path}: not valid YAML: {error}") from None
        manifest, problems = cls(text, is_compose, top), list[str]()
        for name, keys in services_in(top).items():
            try:
                if service := read_service(name, keys, text, is_compose):
                    manifest.services.append(service)
            except ValueError as error:
                problems.append(f"{path}: service {name}: {error}")
        found = [f"{name} ({keys.get('image')})" for name, keys in services_in(top).items()]
        is_empty = not found or os.path.exists("Dockerfile")
        if is_empty and not (manifest.services or problems):
            fix = f"`build: .` (Convox v3), or an image with the tag TAG: {EXAMPLE_IMAGE}"
            what = ", ".join(found) or "no services"
            problems.append(f"{path}: there is nothing to build: {what}. Add {fix}")
        if problems:
            raise DeployError(*problems)
        return manifest

    def warnings(self, is_v3: bool) -> Iterator[str]:
        """Yield where Convox will not see what docker compose does."""
        top = self.top
        if is_v3 and self.is_compose:  # which v3 reads as it reads a convox.yml
            top = mapping(yaml.load(self.text, ConvoxLoader))
        for name, keys in services_in(top).items():
            for part in [keys, *keys.values()]:
                if lost := merged(part) - mapping(part).keys():
                    names = ", ".join(sorted(lost))
                    yield f"service {name}: Convox ignores merge keys (<<): {names}"

    @property
    def required(self) -> set[str]:
        """The variables in a convox.yml's lists `environment:` that have no default."""
        lists = [keys.get("environment") for keys in [self.top, *services_in(self.top).values()]]
        if self.is_compose:
            return set()
        entries = [entry for each in lists if isinstance(each, list) for entry in each]
        # Convox flattens a list in it, such as an alias, and ignores what is not a string.
        flat = [name for each in entries for name in (each if isinstance(each, list) else [each])]
        names = {str(name) for name in flat if isinstance(name, str)}
        return {name for name in names if "=" not in name and name != "*"}

    @property
    def as_they_are(self) -> list[Service]:
        """The services whose images convox pushes to the rack's registry."""
        return [service for service in self.services if not service.repository]

    @property
    def repositories(self) -> list[str]:
        """The repositories of all services, with "" for the rack's own."""
        return sorted({service.repository for service in self.services})

    def images(self, app: str) -> list[Image]:
        """Return the images to build: services with equal builds share one."""
        images = dict[Build, Image]()
        for service in self.services:
            local = f"{app}:deploy-{os.urandom(4).hex()}"
            image = images.setdefault(service.build, Image(service.build, [], local))
            image.services.append(service)
        return list(images.values())

    def with_tags(self) -> str:
        """Return the text with TAG replaced in each image, and nothing else changed."""
        tags = {each.tag_offset: each.tag for each in self.services if each.repository}
        text = self.text
        for offset, tag in sorted(tags.items(), reverse=True):
            text = text[:offset] + tag + text[offset + len("TAG") :]
        return text

    def use_tags(self, images: list[dict[str, Any]]) -> Iterator[str]:
        """Take the tags of an earlier deploy's images. Yield services that have none."""
        for service in self.services:
            for image in images:
                repository, _, tag = str(image.get("image")).rpartition(":")
                if service.name in image["services"] and repository == service.repository:
                    service.tag = tag
            if not service.repository:
                yield (
                    f"service {service.name}: its image went to a rack's own registry, and is in no"
                    " other. Deploy here without --from. The build cache makes it fast."
                )
            elif not service.tag:
                yield f"service {service.name}: --from has no image for {service.repository}."

    def conflicts(self, has_custom_tag: bool) -> Iterator[str]:
        """Yield services that would get the image of another build."""
        builds: dict[Any, Build] = {}
        for service in self.services:
            path = service.build.path
            key: Any = service.repository if has_custom_tag else service.tag_offset
            if not service.repository:
                key = path  # by which alone `convox build` tells builds apart
                if path.startswith(("..", "/")) or "://" in service.build.context:
                    yield f"service {service.name}: {path} is outside the project. Move it inside."
            if builds.setdefault(key, service.build) != service.build:
                fix = "Give it its own `image:`."
                yield f"service {service.name} would get the image of another build. {fix}"


def merged(keys: Any) -> set[str]:
    """Return the keys that a merge key (<<) brings."""
    value = mapping(keys).get("<<")
    return {
        str(key)
        for part in (value if isinstance(value, list) else [value])
        for key in mapping(part)
    }


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


class ConvoxLoader(Loader):
    """Loads merge keys (<<) as ordinary keys: in a convox.yml, Convox ignores them."""

    def flatten_mapping(self, node: Any) -> None:
        pass


ConvoxLoader.add_constructor("tag:yaml.org,2002:merge", Loader.scalar)


def services_in(top: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys of each service."""
    at_top = {name: keys for name, keys in top.items() if str(name)[:2] != "x-"}  # compose v1
    services = mapping(top.get("services", at_top))
    return {str(name): mapping(keys) for name, keys in services.items()}


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_service(name: str, keys: dict[str, Any], text: str, is_compose: bool) -> Service | None:
    """Return a service, or None if its image is third-party. Raise ValueError."""
    image = keys.get("image")
    if name == "<<" or {"build", "image"} & merged(keys) - keys.keys():
        raise ValueError("Convox ignores merge keys (<<). Write out what they bring.")
    if not is_compose and not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise ValueError("Convox allows only lowercase letters, digits and dashes in its name.")
    if not is_compose:
        check_environment(keys)
    if image is None and is_compose:
        raise ValueError(
            f"a Compose file needs an image here. Add this line: image: {EXAMPLE_IMAGE}"
        )
    if image is None:
        return Service(name, read_build(keys, is_compose))
    match = re.fullmatch(ALMOST_TAG, str(image))
    if not match:
        if not keys.get("build"):
            return None
        raise ValueError(f"{image} is not built. Change its tag to TAG, or remove `build:`.")
    if not image.endswith(":TAG"):
        raise ValueError(f"only a literal :TAG is replaced. Set image: {match[1]}:TAG")
    offset = text.rfind(":TAG", image.start, image.end)
    if offset < 0 or not re.fullmatch(REPOSITORY, match[1]):
        problem = f"image {image} must name a registry and repository, in lowercase."
        fix = f"Write it as {EXAMPLE_IMAGE} or docker.io/<user>/<repository>:TAG"
        raise ValueError(f"{problem} {fix}")
    return Service(name, read_build(keys, is_compose), match[1], offset + 1)


def check_environment(keys: dict[str, Any]) -> None:
    if not isinstance(keys.get("environment") or [], list):
        raise ValueError("environment must be a list, with lines such as `- NAME=value`.")


def read_build(keys: dict[str, Any], is_compose: bool) -> Build:
    """Return how a service is built. Raise ValueError."""
    build = keys.get("build")
    names = COMPOSE_KEYS if is_compose else CONVOX_KEYS
    given = dict[str, Any](platform=keys.get("platform"))
    if is_compose:
        given["dockerfile"] = keys.get("dockerfile")  # in Compose v1, it is a key of the service
    if not isinstance(build, dict):
        build = {next(iter(names)): build}
    for key in build.keys() - names:
        if not is_compose:
            raise ValueError(f"Convox ignores build.{key}. Use path, manifest and args.")
        if key not in IGNORED_KEYS:
            fix = "Use a docker build option after `--`."
            raise ValueError(f"build.{key} is not supported. {fix}")
    given.update({names[key]: value for key, value in build.items() if key in names})
    args = read_args(given.pop("args", None) or [], is_compose)
    given = {name: word for name, word in given.items() if word}
    for word in [*given.values(), *args]:
        if not isinstance(word, str) or "$" in word:
            fix = "Write a string without variables, or use a docker build option after `--`."
            raise ValueError(f"`build:` contains {word!r}. {fix}")
    for name in given.keys() & {"context", "dockerfile"}:  # `.` and `./` are the same build
        if "://" not in given[name]:
            given[name] = os.path.normpath(given[name])
    return Build(args=tuple(args), **given)


def read_args(args: Any, is_compose: bool) -> list[Any]:
    """Return build arguments as NAME=VALUE or NAME. Raise ValueError."""
    if is_compose and isinstance(args, dict):
        pairs = args.items()
        return [f"{name}={word}" if isinstance(word, str) else word or name for name, word in pairs]
    if not isinstance(args, list):
        raise ValueError("build.args must be a list, with lines such as `- NAME=value`.")
    return args


# --- docker ---------------------------------------------------------------------------

# What docker, its credential helpers or the loader read from their environment.
READ_BY_DOCKER = re.compile(
    "(?i)PATH|HOME|TMPDIR|(LD|DYLD|DOCKER|BUILDX|BUILDKIT|SSL_CERT)_.*|.*_PROXY"
    "|AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|PROFILE|.*_FILE)"
)
MACHINE = os.uname().machine
BUILDKIT_ARG = "(TARGET|BUILD)(PLATFORM|OS|ARCH|VARIANT)|BUILDKIT_.*"  # which it sets itself
BUILDKIT_NOISE = r"\s*$|#\d+ (sha256:|\[internal\]|transferring|resolve|DONE 0\.0s)"
IMMUTABLE = "is immutable"
NO_REPOSITORY = r"repository .* does not exist|name unknown|name not known"
# The first pattern that is found in a failed command or its output decides.
DOCKER_ADVICE = rf"""
permission denied while trying
    Your user is not allowed to use Docker.
    Run `sudo usermod -aG docker $USER`.
    Then log in again or, in CI, restart the agent.
client version \S+ is too
    The docker client does not fit the engine.
    Unset DOCKER_API_VERSION, or install a newer client.
^`docker version.*(tcp|HTTPS server|ca.pem)
    DOCKER_HOST's engine cannot be reached.
    Correct DOCKER_HOST and DOCKER_CERT_PATH or, in GitLab, add the service docker:dind.
^`docker version.* connect
    Start Docker Desktop, or run `sudo systemctl start docker`.
credentials - err: (exec|docker-cred)
    docker's credential helper is missing.
    Install it, or remove "credsStore" and "credHelpers" from ~/.docker/config.json.
out: `not implemented
    A credential helper logs docker in to this registry: set SKIP_ECR_AUTH=1.
credentials - err
    docker cannot use its store of credentials.
    Unlock it, or remove "credsStore" from ~/.docker/config.json.
(/v2/|oauth token)[^\n]*x509:
    Docker does not trust the registry's certificate.
    Put its CA into /etc/docker/certs.d/<registry>/ca.crt.
^`docker login.*daemon
    Check that docker can reach the registry, and this machine's clock.
^`docker build.*(pull access denied|failed to resolve source|no basic auth)
    To pull a base image, log docker in to its registry in deploy/before_build.sh.
# What is below is about pushes: here, the search ends without advice.
^`docker (build|login)
^`docker image inspect
    If the builder does not load images into docker, add `-- --load`.
maximum allowed number
    ECR's limit is reached. Delete old images or tags, or give the repository a lifecycle policy.
{IMMUTABLE}
    This tag already exists and the repository's tags are immutable.
    Unset IMAGE_TAG or choose a new tag.
(?i)token has expired
    Log in again.
    If docker has just done so, an older login is used: run `docker logout https://<registry>`.
(?i)(?<!/)\b(no basic auth|unauthorized)
    docker is not logged in to this registry.
    Run `docker login <registry>`, or unset SKIP_ECR_AUTH.
(?i)(?<!/)\b(forbidden|denied|not authorized|HTTP 403)\b(?!-)
    You are not allowed to push to this repository, or docker's login has expired.
    For ECR, see IAM policies in docs/ci.md of convox-deploy.
"""


@dataclass
class Image:
    """One docker build, and what is known about its image."""

    build: Build
    services: list[Service]
    local: str  # its name in docker, unique per deploy
    id: str = "IMAGE_ID"  # without sha256:
    platform: str = ""  # such as linux/amd64
    cache: list[str] = field(default_factory=list)  # options of docker build
    arguments: dict[str, str] = field(default_factory=dict)  # values for the Dockerfile's ARGs
    build_seconds: float = 0

    @property
    def name(self) -> str:
        return self.services[0].name

    @property
    def label(self) -> str:
        return names_of(self.services) + (self.platform and f" ({self.platform})")


class Docker:
    """The docker CLI, since 20.10."""

    def __init__(self, build_args: tuple[str, ...]) -> None:
        self.build_args = build_args  # the user's
        self.names: set[str] = set()  # of images, to be removed in the end

    def check(self) -> None:
        shell.capture("docker version --format {{.Server.Version}}", _err_to_out=True)

    def warnings(self, images: list[Image]) -> Iterator[str]:
        """Yield what may surprise about the images, before they are built."""
        platforms = [self.given("--platform"), env("DOCKER_DEFAULT_PLATFORM")]
        platforms += [image.build.platform for image in images]
        if images and MACHINE in ("arm64", "aarch64") and not any(platforms):
            fix = "If the rack runs on Intel or AMD, add `-- --platform linux/amd64`."
            yield f"builds linux/arm64. {fix}"
        config = ""  # names the registries that docker is logged in to
        with suppress(OSError, RuntimeError, ValueError):  # no home, not UTF-8
            directory = env("DOCKER_CONFIG") or Path.home() / ".docker"
            config = Path(directory, "config.json").read_text()
        repositories = [each.repository for image in images for each in image.services]
        registries = {repository.partition("/")[0] for repository in repositories}
        for registry in sorted(registries - {""}):
            if not (Ecr.of(registry) or registry in config or "credsStore" in config):
                fix = f"If it needs one: docker login {registry}"
                yield f"docker has no login to {registry}. {fix}"

    def given(self, option: str) -> str:
        """Return the value of an option that is given after `--`. The last one counts."""
        # As --name=value, or as two words, which \0 separates.
        found = re.findall(rf"\0(?:{option})[\0=]?([^\0]+)", "\0" + "\0".join(self.build_args))
        return found[-1] if found else ""

    def dockerfile(self, build: Build) -> Path:
        return Path(self.given("-f|--file") or build.path)

    def missing_files(self, images: Iterable[Image]) -> Iterator[str]:
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
        # A name without a value in `args:` gets the app's value.
        options = [f"--build-arg={arg}" for arg in build.args if "=" in arg] + [*self.build_args]
        given = re.findall(r"--build-arg[ =](\w+)", " ".join(options))
        found = dict[str, bool]()
        # As racks do, which read one ARG per line.
        for name, default in re.findall(r"(?im)^[ \t]*ARG[ \t]+(\w+)(=?)", text):
            if not re.fullmatch(BUILDKIT_ARG, name) and name not in given:
                found[name] = found.get(name, False) or bool(default)
        return found

    @cached_property
    def has_buildkit(self) -> bool:
        return "--secret" in shell.capture("docker build --help")

    def build(self, image: Image) -> None:
        build, started, options = image.build, time.monotonic(), list(image.cache)
        self.names.add(image.local)
        if build.dockerfile != "Dockerfile":
            options += ["--file", build.path]
        for arg in dict.fromkeys([*build.args, *image.arguments]):
            options += ["--build-arg", arg]
        options += option("--target", build.target) + option("--platform", build.platform)
        options += [arg.replace("{service}", image.name) for arg in self.build_args]
        options.append(build.context)
        # By default, the attestations of buildx give each build a new image ID.
        variables = {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1", **without_rack(), **image.arguments}
        words = ["docker build --tag", image.local, *options]
        shell.run(*words, hide=BUILDKIT_NOISE, about=image.name, _env=variables)
        image.build_seconds = round(time.monotonic() - started, 3)

    def inspect(self, image: Image) -> None:
        """Record the image's ID and platform. Raise CommandFailed if docker does not know it."""
        words, fields = "docker image inspect --format", "{{.Id}} {{.Os}}/{{.Architecture}}"
        answer = shell.capture(words, fields, image.local, about=image.name)
        algorithm_and_digits, _, image.platform = answer.strip().partition(" ")
        image.id = algorithm_and_digits.rpartition(":")[2]  # podman prints the digits alone
        if len(image.id) != 64:
            raise CommandFailed("It printed no image ID.", "`docker image inspect`", 0)
        image.platform = self.given("--platform") or image.platform  # docker names one of several

    def push(self, image: Image, reference: str, service: str) -> str | None:
        """Tag and push an image. Return the digest, if known. A push that fails is repeated once.

        In between, ECR is asked to create the repository: docker's messages about a missing one
        differ between versions. Not before, because an account may create repositories on push.
        """
        self.names.add(reference)
        if not shell.dry_run:
            shell.capture("docker tag", image.local, reference, about=service)
        registry, has_failed = Ecr.of(reference), False
        while True:
            try:
                return self.push_once(reference, service)
            except CommandFailed as failure:
                if IMMUTABLE in failure.output and reference.endswith(image.id[:12]):
                    echo(f"{reference} is already in the registry.")
                    return None
                if failure.status is None:
                    raise
                if registry and registry.create_missing(reference, failure):
                    registry = None
                    continue
                if has_failed or failure.advice:
                    raise
                warn(f"{failure.headline} Trying once more in {PUSH_PAUSE} s.")
            has_failed = True
            shell.pause(PUSH_PAUSE)

    def push_once(self, reference: str, service: str) -> str | None:
        how: dict[str, Any] = {}
        if sys.stdout.isatty() and not shell.is_parallel:
            how.update(only="err", _out=1)  # with docker's own progress bars
        output = shell.stream("docker push", reference, about=service, **how)
        self.names.discard(reference)
        digest = re.search("digest: (sha256:[0-9a-f]{64}) size: ", output)
        return digest and digest[1]

    def remove_names(self) -> None:
        """Remove image names. The layers stay, as cache for the next build."""
        if self.names and not shell.dry_run:
            shell.allow_commands(GRACE_SECONDS)
            try:
                shell.capture("docker image rm --no-prune", *self.names)
            except Stopped:
                echo(f"Left in docker: {', '.join(sorted(self.names))}", err=True)
                raise


# --- ECR ------------------------------------------------------------------------------

ECR_HOST = r"(?P<account>\d{12})\.dkr[.-]ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.[a-z.-]+"
AWS_ADVICE = r"""
AssumeRole
    AWS does not let this login assume the role.
    Check the role's trust policy.
AccessDenied
    This AWS user or role lacks a permission.
    See IAM policies in docs/ci.md of convox-deploy, or attach AmazonEC2ContainerRegistryPowerUser.
Signature (expired|not yet current)
    This machine's clock is wrong.
    Correct it.
MFA
    Nobody can enter an MFA code here.
    Use credentials that need none, or run `aws sso login` beforehand.
(?i)sso|expired
    Your AWS credentials have expired.
    Renew them, or run `aws sso login`.
(?i)\bconnect|CERTIFICATE
    This machine cannot reach ECR in this region.
    Check the region in the image's name, and the network or proxy.
get-login-password|locate credentials
    Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`.
    If docker logs in by itself, set SKIP_ECR_AUTH=1.
"""


class Ecr(NamedTuple):
    """A registry in ECR. For another kind, write a class like this, for Deploy.log_in."""

    host: str
    account: str
    region: str

    @classmethod
    def of(cls, repository: str) -> Ecr | None:
        """Return the registry of a repository, or None if it is not ECR."""
        host = repository.partition("/")[0]
        match = re.fullmatch(ECR_HOST, host)
        return match and cls(host, match["account"], match["region"])

    def log_in(self) -> None:
        """Log docker in, for 12 hours. A dry run only gets the password."""
        get_password = f"aws ecr get-login-password --region {self.region}"
        login = f"docker login --username AWS --password-stdin {self.host}"
        shell.show(f"{get_password} | {login}")
        password = shell.capture(get_password).strip()
        if not re.fullmatch("[!-~]+", password):
            what = "more than a password. Run it without a terminal" if password else "no password"
            raise DeployError(f"`{get_password}` printed {what}.")
        learn_secrets({"password": password})
        if not shell.dry_run:
            shell.capture(login, _in=password)

    def create_missing(self, reference: str, failure: CommandFailed) -> bool:
        """Create a repository that a failed push may have missed. Return whether it is new."""
        name = reference.partition("/")[2].rpartition(":")[0]
        where = f"--region {self.region} --registry-id {self.account} --repository-name {name}"
        shell.show(f"aws ecr create-repository {where}")
        try:
            shell.capture(f"aws ecr create-repository {where}")
            return True
        except CommandFailed as refusal:
            exists = "RepositoryAlreadyExists" in refusal.output
            if not exists and re.search(rf"\bEOF\b|{NO_REPOSITORY}", failure.output):
                why = f"The repository may not exist, and was not created. {refusal}"
                raise CommandFailed(f"{failure}\n{why}", about=failure.about) from None
            return False


# --- convox ---------------------------------------------------------------------------

RELEASE_ID = "R[A-Z]{9,10}"
TRANSIENT = r"\bEOF\b|broken pipe|connection re|timeout|use of closed network|: 50\d|Too Many"
UNLESS_PUSHED = "(?!.*WARNING|Running: docker push )"  # of the lines of `convox build --external`
REFUSED = "(?i)forbidden|: 403|deploy key|not authorized|unauthorized|not permitted"
# Only in the last line: an app's own log may contain them, too.
UNREACHABLE = (  # docker's own push says `unexpected EOF` alone
    r"(dial tcp|no such host|connection re|i/o timeout|x509|tls: |(?<!\nunexpected )EOF|: 50\d)"
    r"[^\n]*\Z"
)
CONVOX_ADVICE = rf"""
# Builds come before the rest: their logs may contain it.
not published for
    The rack has nodes of two architectures.
    Build the image for both:
    `-- --platform linux/amd64,linux/arm64`.
exec format error|no matching manifest|no match for platform
    The image is not for the rack's architecture.
    Build it with `-- --platform linux/amd64`.
# What is above them may be the app's own log: here, the search ends without advice.
ERROR: (rollback|timeout)\Z
ERROR: this build will drop
    Set the variables: `convox env set NAME=VALUE --app <name>`, or unset CONVOX_ENV_DROP_GUARD.
ERROR: [^\n]*required env:
    Set them: `convox env set NAME=VALUE --app <name>`.
not authorized to perform: ecr:
    The rack is not allowed to read this repository.
    Name it <rack>/your-app, or run `convox rack params set ecr_full_access=true`.
ERROR: [^\n]*build failed
    If the rack cannot pull the image, add the registry's credentials with `convox registries add`.
# From docker on this machine, with --external.
Error response from daemon
    Check docker's logins, and that it can reach the registry.
ERROR: [^\n]*invalid authentication
    Check CONVOX_HOST and CONVOX_PASSWORD (in CI, whether the job gets the secret), or run `convox
    login`.
ERROR: [^\n]*(no racks found|no current rack)
    Run `convox switch <rack>`, or set CONVOX_HOST and CONVOX_PASSWORD (sudo drops them).
ERROR: [^\n]*could not find rack
    Check --rack or CONVOX_RACK.
    `convox racks` lists them.
ERROR: [^\n]*app not found
    Check APP_NAME and the rack.
    To create the app, run `convox apps create <name>`.
ERROR: [^\n]*older release
    Someone else's newer release is running.
    Deploy again.
ERROR: [^\n]*is currently updating
    Another update is in progress.
    Try again after it.
ERROR: [^\n]*budget cap
    Raise the cap, or wait for the next month.
ERROR: [^\n]*unauthorized to access
    This login is read-only.
    Use one that may deploy.
ERROR: [^\n]*deploy key
    A deploy key without a role can neither push images to the rack's registry nor read the
    environment nor roll back.
    Give it the roles Rack Read and App Write, use a login, or push the images to a registry of your
    own (`image:` with the tag TAG).
^`convox api get.*(forbidden|: 403|not authorized)
    This login is not allowed to read the app.
    Give it the role Rack Read.
{UNREACHABLE}
    Check CONVOX_HOST, and that this machine can reach the rack.
"""


class App(NamedTuple):
    """The state of the app according to the rack."""

    release: str = ""
    status: str = "unknown"


class Convox:
    """The convox CLI, v2 or v3, and its rack. Without a rack and a host, the CLI chooses one."""

    is_v3 = has_external = was_busy = False
    is_restricted = False  # this login is not allowed to read releases

    def __init__(self, app: str, rack: str | None) -> None:
        self.app, self.rack, self.url = app, rack or "", env("RACK_URL")
        self.host = re.sub("[/?#].*", "", self.url.rpartition("@")[2]) or env("CONVOX_HOST")
        variables = "CONVOX_RACK RACK_NAME" if rack else "RACK_URL CONVOX_HOST"
        self.rack_source = source_of(rack or self.url or self.host, "--rack", *variables.split())
        self.unhealthy: dict[str, str] = {}  # states and logs of containers, by service
        self.descriptions: dict[str, str] = {}  # of releases

    @property
    def label(self) -> str:
        # CLIs of v2 follow the host, whatever the name.
        return " via ".join(filter(None, [self.rack, self.host])) or "the convox CLI's current rack"

    def rack_problems(self) -> Iterator[str]:
        """Yield where the variables that name the rack are incomplete or contradictory."""
        host, password = env("CONVOX_HOST"), env("CONVOX_PASSWORD")
        is_console = self.host.lower().removesuffix(":443") == "console.convox.com"
        if is_console and (self.url or not self.rack):
            yield f"{self.host} is the Convox Console, not a rack. Set --rack or CONVOX_RACK."
        is_other = host and host.lower() != self.host.lower()
        if self.url.strip() and (self.rack or is_other):
            yield "RACK_URL and CONVOX_HOST or CONVOX_RACK name different racks. Unset one of them."
        if not re.fullmatch(r"([A-Za-z0-9.-]+(:\d+)?)?", host):
            shown = host.rpartition("@")[2]
            yield f"CONVOX_HOST must be a host name like rack.example.com, not {shown!r}."
        if password != password.strip():
            yield "CONVOX_PASSWORD starts or ends with whitespace or a newline. Remove it."
        if re.fullmatch("([\"']).*\\1", password):
            yield "CONVOX_PASSWORD is in quotes that are part of it. Remove them."
        if bool(host) != bool(password) and not (self.rack or self.url):
            missing = "CONVOX_PASSWORD" if host else "CONVOX_HOST"
            why = f"{missing} is not set, so convox would use the rack it is logged in to."
            yield f"{why} Set both CONVOX_HOST and CONVOX_PASSWORD, or set CONVOX_RACK."

    @property
    def target(self) -> list[str]:
        return ["--app", self.app, *option("--rack", self.rack)]

    @property
    def wait(self) -> list[str]:
        return [] if self.is_v3 else ["--wait"]  # v3 always waits

    def to_type(self, command: str) -> str:
        """Return a command for the user to type."""
        return f"`convox {command} {shlex.join(self.target)}`"

    def check(self) -> App:
        """Return what is running. Raise DeployError."""
        build_help = shell.capture("convox build --help", _err_to_out=True)
        promote_help = shell.capture("convox releases promote --help")
        is_new = "--id" in build_help and "--manifest" in build_help
        if not is_new or "--app" not in promote_help:
            fix = "Install the current v2 CLI, which reaches older racks, too, or v3."
            raise DeployError(f"`convox` is not the Convox CLI, or too old. {fix}")
        self.has_external = "--external" in build_help
        self.is_v3 = "--wait" not in promote_help
        self.settle_on_rack()
        return self.read_app()

    def settle_on_rack(self) -> None:
        """Set what makes convox and the hooks reach one rack, whatever changes meanwhile."""
        if not (self.rack or self.host):
            with suppress(CommandFailed):
                name = shell.capture("convox switch").strip().rpartition("\n")[2]
                if re.fullmatch(r"[\w./-]+", name):
                    self.rack, self.rack_source = name, "convox switch"
        if self.rack:
            os.environ["CONVOX_RACK"] = self.rack
        elif self.host and not self.url:
            password = quote(env("CONVOX_PASSWORD"), safe="")
            os.environ["RACK_URL"] = f"https://convox:{password}@{self.host}"

    def check_manifest(self, manifest: Manifest, settings: Settings) -> None:
        """Raise DeployError if this CLI cannot deploy the manifest as it is meant."""
        problem, is_default = "", settings.has_default_file and settings.file != "convox.yml"
        if manifest.as_they_are and not self.has_external:
            problem = (
                f"This convox CLI cannot push the images of {names_of(manifest.as_they_are)}."
                f" Set image: {EXAMPLE_IMAGE}, or use a CLI and a rack of Convox v3."
            )
        elif self.is_v3 and "services" not in manifest.top:
            why = "Convox v3 ignores services at the top level, and would remove what runs."
            problem = f"{why} Move them under `services:`."
        elif self.is_v3 and is_default and not manifest.services:
            fix = f"If you mean it, add: -m {settings.file}"
            problem = f"It builds nothing, and Convox v3 reads convox.yml. {fix}"
        if problem:
            raise DeployError(f"{settings.file}: {problem}")

    def ask(self, command: str, *arguments: str) -> str:
        """Return a command's output. It may contain secrets, so no error shows it."""
        rack, about = option("--rack", self.rack), f"{self.app} on {self.label}"
        return shell.capture(command, *rack, *arguments, about=about)

    def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Return what `read` finds in a response of the rack's API. Raise CommandFailed."""
        answer = self.ask("convox api get", f"/apps/{self.app}{path}")
        with suppress(Exception):
            return read(read_json(answer))
        why = f"`convox api get` for {self.app} on {self.label} printed no usable answer."
        raise CommandFailed(f"{why} Check that this is a Convox rack.")

    def read_app(self) -> App:
        return self.get("", lambda app: App(str(app["release"] or ""), str(app["status"])))

    def created(self, release: str) -> str:
        """Return when a release was created, "" if this login may not know. Raise DeployError.

        The times sort as text: RFC 3339 in UTC, of which Go drops trailing zeros.
        """
        try:
            return self.read_release(release)
        except CommandFailed as failure:
            if re.search(f"(?i){release}.* not found|not found: {release}", failure.output):
                fix = f"To list them: {self.to_type('releases')}."
                raise DeployError(f"There is no release {release}. {fix}") from None
            return ""

    def read_release(self, release: str) -> str:
        """Return when a release was created, and remember its description. Raise CommandFailed."""
        created, self.descriptions[release] = self.get(
            f"/releases/{release}",
            lambda found: (str(found["created"]).rstrip("Z"), str(found.get("description") or "")),
        )
        return created

    def named(self, release: str) -> str:
        """Return a release's ID and how its description begins, if this login may read it."""
        if release and release not in self.descriptions:
            self.descriptions[release] = ""
            with suppress(DeployError):
                self.read_release(release)
        first_line = clean(self.descriptions.get(release, "").strip().partition("\n")[0])
        about = re.sub(r"\s*https?://\S+$", "", first_line)  # without the URL of the CI run
        if len(about) > 50:
            about = f"{about[:47].rstrip()}..."
        return f"{release} ({about})" if about else release or "nothing"

    @cached_property
    def environment(self) -> dict[str, str]:
        """The app's environment in its newest release. Raise CommandFailed."""
        lines = self.ask("convox env", "--app", self.app).split("\n")
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        learn_secrets(variables)
        return variables

    def images_of(self, release: str) -> dict[str, str]:
        """Return the images of the services in a release. Raise CommandFailed."""
        if not release:
            raise CommandFailed("no running release is known.")
        services = self.get(
            f"/releases/{release}",
            lambda answer: services_in(mapping(yaml.load(answer["manifest"], Loader))),
        )
        return {name: str(keys["image"]) for name, keys in services.items() if "image" in keys}

    def newer_release(self, release: str) -> str:
        """Return the newest release if it is a different one and this login can list releases."""
        try:
            newest = self.get("/releases", lambda releases: dict(releases[0]))
            if newest.get("id") not in (None, release):
                return clean(f"{newest['id']} ({newest.get('description') or 'no description'})")
        except CommandFailed as failure:
            self.is_restricted = bool(re.search(REFUSED, failure.output))
        return ""

    def build(
        self, directory: str, manifest: str, about: str, own_images: list[Image], git_dir: str
    ) -> str:
        """Build a release from the manifest in a directory. Return its ID.

        convox pushes `own_images`, which the manifest does not name, to the rack's registry.
        """
        build, variables = ["convox build"], {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1", **os.environ}
        options: dict[str, Any] = {"only": "err", "_env": variables}
        if own_images:
            build.append("--external")
            options.update(hide=UNLESS_PUSHED, is_printed=False)
            variables.pop("BUILDX_BUILDER", None)  # other builders do not find our images
            # What is not ours must fit the rack, too.
            variables["DOCKER_DEFAULT_PLATFORM"] = own_images[0].platform
        if git_dir:
            variables["GIT_DIR"] = git_dir  # from which convox sets BUILD_GIT_SHA
        build += [*self.target, "--manifest", manifest, "--description", about, "--id", directory]
        try:
            output = shell.stream(*build, **options)
        except CommandFailed as failure:
            if not re.search(f"(?s)The push refers to repository.*({TRANSIENT})", failure.output):
                raise
            warn(f"{failure}\nTrying once more in {PUSH_PAUSE} s.")
            shell.pause(PUSH_PAUSE)
            output = shell.stream(*build, **options)
        return release_id(output, "`convox build`")

    def promote(self, release: str) -> None:
        shell.stream("convox releases promote", *self.target, *self.wait, release)

    def roll_back(self, release: str) -> str:
        """Promote a copy of an older release, because racks refuse itself. Return its ID."""
        options = [*self.target, *self.wait, "--id", release]
        output = shell.stream("convox releases rollback", *options, only="err")
        return release_id(output, "`convox releases rollback`")

    def await_settled(self) -> App:
        """Wait until no update is under way, and return what is running. Raise CommandFailed."""
        app, answered, self.was_busy = App(), time.monotonic(), False
        while True:
            try:
                app, answered = self.read_app(), time.monotonic()
            except CommandFailed:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            if app.status in ("running", "failed"):
                return app
            doing = f"waiting for {self.app} (status: {app.status})"
            if shell.doing != doing:
                echo(doing.capitalize())
            self.was_busy = app != App()  # else, the rack has not answered
            shell.pause(POLL_SECONDS, doing)

    @contextmanager
    def watch_containers(self) -> Iterator[None]:
        """Meanwhile, print what is wrong with new containers. After a rollback, they are gone."""
        ended = threading.Event()
        watcher = threading.Thread(target=self.print_unhealthy, args=[ended], daemon=True)
        if self.is_v3:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            while watcher.is_alive():  # TERM would stop the deploy
                shell.signal_all(SIGKILL)  # what it runs; nothing else does now
                watcher.join(0.05)

    def print_unhealthy(self, ended: threading.Event) -> None:
        """Look at the containers now and then, unless the CLI, the rack or the login cannot."""
        started, (pause, next_pause) = time.monotonic(), DEBUG_SECONDS
        options = ["--lines", str(LOG_LINES), "--no-events", "--app", self.app]
        with suppress(Exception):
            while not ended.wait(pause):
                age = time.monotonic() - started  # before it asks: logs take their time
                answer = read_json(self.ask("convox deploy-debug --output json", *options))
                pods = {
                    pod["service"]: pod
                    for pod in answer.get("pods") or []
                    if pod["classification"] == "unhealthy" and pod["ageSeconds"] < age
                }
                for pod in pods.values():  # one for each service
                    self.note_unhealthy(pod)
                pause = next_pause

    def note_unhealthy(self, pod: dict[str, Any]) -> None:
        """Print a container's state if it is new. Keep its log, which may contain secrets."""
        with suppress(CommandFailed):
            learn_secrets(self.environment)
        service, hint = pod["service"], pod.get("hint")  # what is empty is left out
        state = f"{service}: {pod.get('stateDetail') or pod.get('phase')}"
        if not self.unhealthy.get(service, "").startswith(state):
            warn(state)
        state = f"{state.rstrip('.')}. {hint}" if hint else state
        log = str(pod.get("previousLogs") or pod.get("logs") or "").splitlines()[-LOG_LINES:]
        _, *old_log = self.unhealthy.get(service, "").split(LOG_INDENT)
        # Just after a restart, the log is empty.
        self.unhealthy[service] = LOG_INDENT.join([state, *(log or old_log)])


def read_json(answer: str) -> Any:
    """Return what a convox command printed, after errors of other racks. Raise ValueError."""
    return json.loads(re.split(r"(?m)^(?=[{\[])", answer, maxsplit=1)[-1])


def release_id(output: str, name: str) -> str:
    """Return the release ID in the last line of an output. Raise CommandFailed."""
    if shell.dry_run:
        return "RELEASE_ID"
    line = output.strip().rpartition("\n")[2]  # after errors of other racks
    if not re.fullmatch(RELEASE_ID, line):
        raise CommandFailed(redact(f"It printed no release ID.\n{output}"), name, 0)
    return line


# --- git and CI -----------------------------------------------------------------------

IN_GITHUB = os.environ.get("GITHUB_ACTIONS") == "true"
IN_GITLAB = os.environ.get("GITLAB_CI") == "true"
GIT_ADVICE = r"""
^`git
    The image tag names the commit.
    Fix this, or set IMAGE_TAG.
"""
BRANCHES = """
    BRANCH_NAME GIT_BRANCH GITHUB_HEAD_REF GITHUB_REF_NAME CI_COMMIT_BRANCH BUILDKITE_BRANCH
    CIRCLE_BRANCH TRAVIS_BRANCH DRONE_BRANCH BITBUCKET_BRANCH
    CI_COMMIT_REF_NAME CIRCLE_TAG BITBUCKET_TAG TAG_NAME
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

    def tag(self, image_id: str) -> str:
        """Return a tag that is unique per content and shows the commit."""
        describe = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.describe).lstrip(".-")[:100]
        return f"{describe}-{image_id}".lstrip("-")


def read_commit() -> Commit:
    """Return the checked-out commit. Raise CommandFailed."""

    def git(words: str) -> str:
        return clean(shell.capture(f"git {words}"))

    if not any(Path(parent, ".git").exists() for parent in Path(".git").absolute().parents):
        return Commit()
    sha, _, subject = git("log -1 --no-show-signature --format=%H%x20%s").partition(" ")
    branch = git("branch --show-current")  # none where it is detached, as in CI
    if not branch:
        branch = next(filter(None, map(env, BRANCHES)), "").removeprefix("origin/")
    if os.path.exists(".gitmodules") and "\n-" in "\n" + shell.capture("git submodule status"):
        warn("A submodule is not checked out. Run: git submodule update --init")
    if sys.stdout.isatty() and git("status --porcelain"):
        warn("Uncommitted or untracked files are deployed, too.")
    describe, git_dir = git("describe --always --dirty"), git("rev-parse --absolute-git-dir")
    return Commit(sha, branch, describe, subject, git_dir)


def run_url() -> str:
    """Return the URL of the CI run, "" outside CI."""
    if run := env("GITHUB_RUN_ID"):
        return f"{env('GITHUB_SERVER_URL')}/{env('GITHUB_REPOSITORY')}/actions/runs/{run}"
    return next(filter(None, map(env, RUN_URLS)), "")


def begin_section() -> None:
    """Print a step's header before its first line. GitHub and GitLab fold what follows."""
    step, shell.next_header = shell.next_header, ""
    if step and IN_GITHUB:  # which reads only lines that start with ::
        click.echo(f"::group::==> {step}")
    elif step:
        fold = f"\x1b[0Ksection_start:{time.time():.0f}:{step}\r\x1b[0K" if IN_GITLAB else "\n"
        echo(f"{fold}==> {step}", fg="cyan", bold=True)


def end_section(step: str, how_long: str) -> None:
    is_empty, shell.next_header = shell.next_header, ""
    if is_empty:
        return
    if IN_GITHUB:
        click.echo("::endgroup::")
    elif IN_GITLAB:
        echo(f"\x1b[0Ksection_end:{time.time():.0f}:{step}\r\x1b[0K")
    if how_long:
        echo(f"{step}: {how_long}", dim=True)


def annotate(kind: str, text: str) -> None:
    """Print a message that GitHub also shows on the page of the run, but not an app's own log."""
    begin_section()
    text = without_logs(redact(text)).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    click.echo(f"::{kind}::{text}")


def report_to_github(deploy: Deploy, state: str) -> None:
    """Give a deploy's result to its workflow, as outputs and as a summary for people."""
    result = deploy.result
    if not IN_GITHUB or shell.dry_run:
        return
    keys = ("status", "release", "running", "running_before")
    outputs = {key: getattr(result, key) for key in keys}
    outputs["images"] = json.dumps(result.images)
    table = {
        "App": result.app,
        "Rack": deploy.convox.label,
        "Release": result.release,
        "Commit": deploy.commit.title,
        "Running": deploy.convox.named(result.running) if result.running else "",
        "Time": result.total,
    }
    summary = [f"### {result.app}: deploy {result.status}\n", "| | |", "|---|---|"]
    for name, value in table.items():
        summary.append(f"| {name} | " + re.sub(r"([!-/:-@[-`{-~])", r"\\\1", value) + " |")
    if cause := without_logs(result.error):
        summary += ["", *(f"    {line}" for line in f"{cause}\n{state}".splitlines())]
    files = {
        "GITHUB_OUTPUT": [f"{name}={value}" for name, value in outputs.items()],
        "GITHUB_STEP_SUMMARY": summary,
    }
    for variable, lines in files.items():
        with suppress(OSError), open(env(variable), "a") as file:
            file.writelines(f"{redact(line)}\n" for line in lines)


# --- running commands -----------------------------------------------------------------

SECRETS: set[str] = set()
STOP_SIGNALS = [SIGINT, SIGTERM, SIGHUP, SIGQUIT]
ADVICE = {"docker": DOCKER_ADVICE, "aws": AWS_ADVICE, "convox": CONVOX_ADVICE, "git": GIT_ADVICE}


def env(name: str) -> str:
    return os.environ.get(name, "")


def option(name: str, value: str | None) -> list[str]:
    return [name, value] if value else []


def learn_secrets(variables: Mapping[str, str]) -> None:
    """Redact the values of variables with such names, except short ones: they occur in words."""
    for name, value in variables.items():
        if re.search("(?i)PASSWORD|SECRET|TOKEN", name):
            for line in map(str.strip, value.splitlines()):
                if len(line) >= 6:
                    SECRETS.update([line, quote(line, safe="")])


def learn_secrets_of(docker_build_args: Iterable[str]) -> None:
    for argument in docker_build_args:
        name, _, value = argument.removeprefix("--build-arg=").partition("=")
        learn_secrets({name: value})


def learn_url_password() -> None:
    """Redact what is before the last @, and each part of it, but not the usual user."""
    login = env("RACK_URL").rpartition("@")[0].removeprefix("https://")
    parts = re.split("[:/?#]", login) + re.split("[:/?#@]", login)
    for part in {login, *parts} - {"convox"}:
        learn_secrets({"PASSWORD": f"{part}\n{unquote(part)}"})


def without_rack() -> dict[str, str]:
    """Return the environment of programs that need not reach the rack."""
    return {name: os.environ[name] for name in os.environ.keys() - {"CONVOX_PASSWORD", "RACK_URL"}}


def clean(text: str) -> str:
    """Return text from elsewhere in one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def without_printed(text: str) -> str:
    return re.sub(f"({PRINTED_INDENT}.*)+", " Its output is above.", text)


def without_logs(text: str) -> str:
    """Return text without the lines of an app's containers."""
    return re.sub(re.escape(LOG_INDENT) + ".*", "", text)


def redact(text: str) -> str:
    for secret in sorted(SECRETS, key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"(//[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)  # passwords in URLs


def echo(text: str, err: bool = False, **style: Any) -> None:
    """Print a line, redacted."""
    is_colored = bool(env("FORCE_COLOR") or IN_GITHUB or IN_GITLAB)
    color = not env("NO_COLOR") and (is_colored or None)  # None: on terminals
    begin_section()
    text = redact(text)
    if IN_GITHUB:  # which would run text from elsewhere as commands
        text = re.sub(r"(?<![^\r\n])(\s*)::", r"\1: :", text).replace("##[", "## [")
    click.secho(text, err=err, color=color, reset=bool(style), **style)
    shell.heard = time.monotonic()


def warn(text: str) -> None:
    if IN_GITHUB:
        annotate("warning", text)
    else:
        echo(f"warning: {text}", fg="yellow")


class CommandFailed(DeployError):
    """A command that failed, did not start (status None), or printed nothing usable (status 0)."""

    is_printed = False  # its output has been printed as it came

    def __init__(
        self, output: str, name: str = "", status: int | None = None, about: str = ""
    ) -> None:
        super().__init__(output)
        self.output, self.name, self.status, self.about = output, name, status, about
        self.advice, text = "", f"{name}\n{output}"
        table = ADVICE.get(name.strip("`").partition(" ")[0], "")
        for pattern, sentences in re.findall(r"(?m)^([^\s#].*)\n((?: .*\n)*)", table):
            if re.search(pattern, text, re.M | re.S):
                self.advice = " ".join(sentences.split())
                break

    @property
    def summary(self) -> str:
        last = self.output.splitlines()[-1]
        return f"{self.name} failed: {last}" if self.name else last

    @property
    def headline(self) -> str:
        if self.status is not None and self.status < 0:
            name = signal.strsignal(-self.status)
            return f"{self.name} was ended by signal {-self.status} ({name})."
        return f"{self.name} exited with code {self.status}."

    def __str__(self) -> str:
        if self.status is None:
            return self.output
        indent = PRINTED_INDENT if self.is_printed else "\n  "
        shown = "".join(indent + line for line in self.output.splitlines()[-LOG_LINES:])
        return f"{self.headline}{shown}\n{self.advice}".rstrip()


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


class Shell:
    """Runs commands through sh, each in its own process group.

    A signal or a timeout ends all process groups: with SIGTERM and, after GRACE_SECONDS, with
    SIGKILL. Once they have ended, the deploy goes on with raising Stopped.
    """

    dry_run = False
    minutes = 0.0  # timeout of a step
    started = heard = 0.0  # when the step started, and when it last printed something
    deadline = float("inf")
    doing = ""  # for messages, while it waits
    is_parallel = False  # several commands run at once: their lines are labeled
    copy_id = ""  # of the release that a rollback has made
    passes_through = False  # a command writes to our output itself
    stopped: Stopped | None = None
    next_header = ""  # of a step that has not printed anything yet

    def __init__(self) -> None:
        self.running: dict[int, str] = {}  # names of commands by process group
        self.starting: list[str] = []  # names of commands that have no process group yet
        self.warnings: list[str] = []  # of convox, about variables that the release loses

    def run(self, *command: str, hide: str = "", **options: Any) -> None:
        """Show a command and run it with our stdout and stderr. A dry run only shows it."""
        if self.is_parallel or self.dry_run:
            self.stream(*command, hide=hide, **options)
            return
        self.show(*command)
        if sys.stdout.isatty():
            options.update(_out=1, _err=2, nothing="Its output, if any, is above.")
        else:
            read_end, pipe = os.pipe()
            options.update(_out=pipe, _err=pipe, read=lambda each: self.copy(each, read_end, pipe))
        self.capture(*command, is_printed=True, **options)

    def copy(self, process: Any, read_end: int, pipe: int) -> str:
        """Copy to our stdout what a command writes to a pipe, and return its end."""
        os.close(pipe)
        end = bytearray()
        pump = threading.Thread(target=self.pump, args=[read_end, end], daemon=True)
        pump.start()
        _ = process.exit_code  # waits
        pump.join(DRAIN_SECONDS)  # for `exec > >(tee log)`. A daemon may keep writing
        if end and not end.endswith(b"\n"):
            click.echo()  # or ::endgroup:: would not be seen
        return end.decode(errors="replace")

    def pump(self, read_end: int, end: bytearray) -> None:
        """Copy until the last writer, perhaps a daemon, has closed the pipe."""
        with suppress(OSError), open(read_end, "rb", buffering=0) as source:  # our output is closed
            while chunk := source.read(1 << 16):  # all that a pipe holds
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                end += chunk
                del end[: -(1 << 14)]
                self.heard = time.monotonic()

    def stream(self, *command: str, only: str = "", hide: str = "", **options: Any) -> str:
        """Show a command, run it, print its output and return it.

        With only="err", print only its stderr and return only its stdout. Lines that match `hide`
        are not printed.
        """
        self.show(*command)
        if self.dry_run:
            return ""
        # Of a long log, only the last lines are kept.
        options.update(_iter=only or True, _err_to_out=not only, _internal_bufsize=1000)
        label = f"{options.get('about')} | " if self.is_parallel else ""
        options["read"] = lambda command: self.print_lines(command, label, hide)
        options.setdefault("is_printed", True)
        return self.capture(*command, **options)

    def capture(
        self,
        *command: str,
        about: str = "",
        is_printed: bool = False,
        nothing: str = "It printed nothing.",
        **options: Any,
    ) -> str:
        """Run a command silently, even in a dry run, and return its stdout, which no error shows.

        A command is its first words and further arguments, which may contain spaces. Errors name
        what it is about. Raise CommandFailed or Stopped.
        """
        self.raise_if_stopped()
        name = f"`{command[0].partition(' -')[0]}`{about and ' for '}{about}"
        self.passes_through, read = "_out" in options, options.pop("read", str)
        process = self.launch(name, command[0].split() + list(command[1:]), options)
        try:
            output: str = read(process)
        finally:
            self.await_end(process)
        self.raise_if_stopped()
        if process.exit_code:
            errors = process.stderr.decode(errors="replace")
            if read is not str or "_err_to_out" in options:
                errors = output + errors
            errors = redact(errors.strip())
            failure = CommandFailed(errors or nothing, name, process.exit_code, about)
            has_kept_stdout = options.get("_iter") == "err" and bool(output.strip())
            failure.is_printed = is_printed and bool(errors) and not has_kept_stdout
            raise failure
        return output

    def launch(self, name: str, argv: list[str], options: dict[str, Any]) -> Any:
        """Start a command. If the deploy is stopped meanwhile, stop it, too."""
        self.starting.append(name)
        try:
            process = start(argv, options)
            self.running[process.pgid] = name
        finally:
            self.starting.remove(name)
        if self.stopped:
            kill_group(process.pgid, SIGTERM)
        return process

    def print_lines(self, command: Any, label: str, hide: str) -> str:
        # This ends the iteration even if a daemon keeps the output open.
        threading.Thread(target=command.wait, daemon=True).start()
        for line in command:
            is_beside_failure = self.is_parallel and self.stopped
            if not (is_beside_failure or (hide and re.match(hide, line))):
                echo(label + line.rstrip("\n"))
            if copy := re.search(rf"OK, ({RELEASE_ID})", line):
                self.copy_id = copy[1]  # of a rollback, printed before it is promoted
            if "will drop env var" in line:
                self.warnings.append(line.strip())
        return str(command)

    def await_end(self, command: Any) -> None:
        """Wait until a command and, if it was stopped, its children have ended."""
        status = command.exit_code  # waits
        if -status in STOP_SIGNALS:  # which is about to reach us, too
            self.stop(-status)
        while self.stopped and time.monotonic() < self.deadline and kill_group(command.pgid, 0):
            time.sleep(0.05)
        if self.stopped:
            kill_group(command.pgid, SIGKILL)
        del self.running[command.pgid]

    def parallel(
        self, function: Callable[[Any], T], values: list[Any], at_once: int = 4
    ) -> list[T]:
        """Call a function for each value at once. The first failure stops the others."""
        at_once = 1 if self.dry_run else at_once
        self.is_parallel = min(at_once, len(values)) > 1
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(function, value) for value in values]
            done = wait(futures, None, FIRST_EXCEPTION).done
            failed = [future for future in done if future.exception()]
            if failed:
                self.stop(SIGTERM)
        self.is_parallel = False
        return [future.result() for future in failed or futures]

    def show(self, *command: str) -> None:
        """Show a command as it could be typed."""
        echo(f"$ {command[0]} {shlex.join(command[1:])}".rstrip(), dim=not self.dry_run)

    def pause(self, seconds: float, doing: str = "") -> None:
        self.doing, end = doing, time.monotonic() + seconds
        while time.monotonic() < end:
            self.raise_if_stopped()
            time.sleep(0.05)

    def start_timer(self, seconds: float) -> float:
        self.doing = ""
        self.started = self.heard = time.monotonic()
        self.deadline = self.started + (seconds or float("inf"))
        return self.started

    def allow_commands(self, seconds: float) -> None:
        """Allow commands again after a stop, for a limited time."""
        self.stopped = None
        self.start_timer(seconds)

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise self.stopped

    def watch(self, work: Callable[[], T]) -> T:
        """Call a function in a second thread. Meanwhile, handle signals and keep the time."""
        signal.signal(SIGCHLD, signal.SIG_DFL)  # or exit codes would be lost
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for signum in [SIGALRM, *STOP_SIGNALS]:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
                signal.signal(signum, self.stop)
        ending = ThreadPoolExecutor(1).submit(work)
        while wait([ending], 0.1).not_done:
            self.keep_time()
        return ending.result()

    def keep_time(self) -> None:
        """Stop what takes too long, kill what does not stop, and print signs of life."""
        now = time.monotonic()
        if now > self.deadline and self.stopped:
            self.signal_all(SIGKILL)
        elif now > self.deadline:
            self.stop(SIGALRM)
        is_heard = self.passes_through and sys.stdout.isatty()
        if now > self.heard + HEARTBEAT_SECONDS and not is_heard:
            with suppress(OSError):  # a closed output is for the next echo to report
                echo(f"Still {self.what_is_running()} ({(now - self.started) / 60:.0f} min)")

    def stop(self, signum: int, _frame: Any = None) -> None:
        """Stop all commands and start no others. As a signal handler, it raises nothing.

        Commands raise Stopped once they have ended.
        """
        if not self.stopped:
            self.stopped = Stopped(signum, self.what_is_running())
            self.deadline = time.monotonic() + GRACE_SECONDS
            self.signal_all(SIGTERM)

    def signal_all(self, signum: int) -> None:
        for group in list(self.running):
            kill_group(group, signum)

    def what_is_running(self) -> str:
        names = ", ".join([*self.running.values(), *self.starting])
        return self.doing or (names and f"running {names}") or "between two commands"


shell = Shell()


def start(argv: list[str], options: dict[str, Any]) -> Any:
    """Start a command in a process group of its own. Raise CommandFailed."""
    program = argv[0]
    options.setdefault("_in", "")
    if program != "convox" and "/" not in program:  # a hook has a path
        options.setdefault("_env", without_rack())
    if "_out" not in options:
        options["_tty_out"] = False  # keeps programs from drawing progress bars
    try:
        return sh.Command(program)(
            *argv[1:], _bg=True, _new_session=True, _ok_code=list(range(-64, 256)),
            _encoding="utf-8", _decode_errors="replace", **options,
        )  # fmt: skip
    except sh.CommandNotFound:
        why = "it is not installed, not on the PATH, or not executable."
        raise CommandFailed(f"Cannot run {program}: {why}") from None
    except (sh.ForkException, OSError, RuntimeError) as error:  # the latter for want of threads
        kill_half_started(error)
        why = re.sub(r".*\[Errno \d+\] |: b?'.*", "", str(error).strip().rpartition("\n")[2])
        if why in ("Exec format error", "No such file or directory"):
            why += ". Its first line must be #! and an installed interpreter, and end in LF"
        raise CommandFailed(f"Cannot run {program}: {why}.") from None


def kill_half_started(error: Exception) -> None:
    """Kill what sh has started before it failed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        pid = getattr(frame.f_locals.get("self"), "pid", None)
        if isinstance(pid, int):  # not what sh.Command makes of any name
            kill_group(pid, SIGKILL)


def kill_group(group: int, signum: int) -> bool:
    """Send a signal to a process group. Return whether it exists."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)
        return True
    return False


# --- the command line -----------------------------------------------------------------

PATTERNS = {
    "app": ("[a-z][a-z0-9-]*", "an app name: lowercase letters, digits and dashes"),
    "tag": (r"\w[\w.-]{0,127}", "an image tag: up to 128 letters, digits, dots, dashes"),
    "release": (RELEASE_ID, "a release ID. `convox releases` lists them"),
    "rollback": (RELEASE_ID, "a release ID. `convox releases` lists them"),
}
OURS = re.compile(
    "--(app|rack|skip-ecr-login|timeout|result|from|description|cache-from-running|parallel|dry-run"
    "|no-promote|release|rollback)(=.*)?"
)
EVERYDAY = 7  # options, from the top of the help
OUTPUTS = re.compile("--push(=true)?|(--output|-o).*")  # other than into docker


@dataclass
class Settings:
    """The values of `main`'s options and variables. Contains no secrets."""

    app: str
    rack: str | None
    file: str
    has_default_file: bool
    tag: str | None
    skip_ecr_login: bool
    timeout: float  # of a step, in minutes; 0 means none
    result: str | None
    images_from: str | None
    description: str | None
    cache_from_running: bool
    parallel: int
    dry_run: bool
    no_promote: bool
    release: str | None
    rollback: str | None
    docker_build_args: tuple[str, ...]

    def __post_init__(self) -> None:
        """Let --rollback win over --release, and both over what is about building."""
        if self.rollback:
            self.release = None
        if self.old_release:
            self.tag = self.images_from = None
            self.cache_from_running = self.no_promote = False

    @property
    def app_source(self) -> str:
        source, default = default_app()
        otherwise = source if self.app == default else "--app"
        return source_of(self.app, otherwise, "APP_NAME", "CONVOX_APP")

    @property
    def old_release(self) -> str | None:
        return self.rollback or self.release

    @property
    def builds_images(self) -> bool:
        return not (self.old_release or self.images_from)

    def problems(self) -> Iterator[str]:
        """Yield values that cannot be used, or not together."""
        for name, value in vars(self).items():
            pattern, what = PATTERNS.get(name, ("(?s).+", "a value. Leave the option out instead"))
            if isinstance(value, str) and not re.fullmatch(pattern, value, re.ASCII):
                yield f"--{name.rpartition('_')[2]}: {value!r} is not {what}."
        if not self.timeout >= 0:  # or nan
            yield f"--timeout: {self.timeout:g} is not a number of minutes, such as 30 or 1.5."
        args = self.docker_build_args
        if args and not args[0].startswith("-"):
            yield (
                f"Unexpected argument {args[0]!r}. Deploying takes no arguments."
                " Put docker build arguments after `--`."
            )
        for ours in filter(OURS.fullmatch, args):
            yield f"Put {ours} before --."
        for output in filter(OUTPUTS.fullmatch, args if self.builds_images else []):
            yield f"Remove {output} after --. The next steps need the image in docker."
        old, new = self.images_from, self.result
        if old and new and os.path.realpath(old) == os.path.realpath(new):
            yield "--from and --result name the same file. Use two files."


def source_of(value: str | None, otherwise: str, *variables: str) -> str:
    """Return which variable gives a setting."""
    return next((name for name in variables if env(name) == value), otherwise)


def default_app() -> tuple[str, str]:
    """Return where the convox CLI would find the app's name, and the name."""
    for path in (".convox/app", ".convox2/app"):  # of v3 and v2
        with suppress(OSError):
            if name := Path(path).read_text(errors="replace").strip():
                return path, name
    try:
        return "directory name", Path.cwd().name.lower().replace(".", "-")
    except FileNotFoundError:
        raise click.UsageError("The working directory no longer exists.") from None


def setting(
    name: str, value: str, variables: str, about: str, *names: str, **details: Any
) -> Callable[[Any], Any]:
    """Return an option. `value` is what the help calls its value, "" for a switch."""
    details.update(metavar=value, envvar=variables.split(), show_envvar=True, help=about)
    return click.option(name, *names, is_flag=not value, **details)


DOCKER_OPTIONS = """
    --add-host --allow --attest --build-arg --build-context --builder --cache-from --cache-to --call
    --cpu-quota --label --load --memory --metadata-file --network --no-cache --no-cache-filter -o
    --output --platform --progress --provenance --pull --push --quiet -q --sbom --secret --shm-size
    --squash --ssh --target --ulimit -t -f
""".split()


class Command(click.Command):
    """Shows the options of every day first, and says where options of docker build belong."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        options = [each for each in self.get_params(context) if isinstance(each, click.Option)]
        records = [each.get_help_record(context) or ("", "") for each in options]
        rows = [(name, re.sub(r"  \[env var: DEPLOY_\w+\]", "", about)) for name, about in records]
        with formatter.section("Options"):
            formatter.write_dl(rows[:EVERYDAY])
        with formatter.section("Rare, or for CI"):
            formatter.write_dl(rows[EVERYDAY:])

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            if error.option_name not in DOCKER_OPTIONS:
                raise  # with similar options
            raise click.UsageError(f"Put {error.option_name} after `--`.", context) from None


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@setting(
    "--app",
    "NAME",
    "APP_NAME CONVOX_APP",
    "Deploy this app.  [default: .convox/app or the directory name]",
    "-a",
    default=lambda: default_app()[1],
)
@setting(
    "--rack",
    "NAME",
    "CONVOX_RACK RACK_NAME",
    "Deploy to this rack.  [default: the convox CLI's rack]",
    "-r",
)
@setting(
    "--file",
    "FILE",
    "DOCKER_COMPOSE",
    "Use this manifest.  [default: convox.yml or docker-compose.yml]",
    "-m",
)
@setting("--dry-run", "", "DEPLOY_DRY_RUN", "Show commands and changes, and change nothing.")
@setting("--no-promote", "", "DEPLOY_NO_PROMOTE", "Build a release, and do not promote it.")
@setting("--release", "R...", "DEPLOY_RELEASE", "Promote a release that is already built.")
@setting("--rollback", "R...", "DEPLOY_ROLLBACK", "Go back to an older release.")
@setting(
    "--timeout",
    "MINUTES",
    "DEPLOY_TIMEOUT",
    "Stop a step that takes longer.  [default: 60]",
    default=60.0,
)
@setting("--result", "FILE", "DEPLOY_RESULT", "Write the result to this JSON file.")
@setting(
    "--from", "FILE", "DEPLOY_FROM", "Deploy the images of this earlier result.", "images_from"
)
@setting(
    "--description", "TEXT", "DEPLOY_DESCRIPTION", "Describe the release.  [default: the commit]"
)
@setting("--tag", "TAG", "IMAGE_TAG", "Tag the images so.  [default: <commit>-<image ID>]")
@setting("--skip-ecr-login", "", "SKIP_ECR_AUTH", "Use docker's login to ECR.")
@setting(
    "--cache-from-running", "", "DEPLOY_CACHE_FROM_RUNNING", "Reuse the running image's layers."
)
@setting(
    "--parallel",
    "NUMBER",
    "DEPLOY_PARALLEL",
    "Build and push up to this many images at once.  [default: 4]",
    type=click.IntRange(1, 64),
    default=4,
)
@click.version_option(__version__)
@click.argument(
    "docker_build_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- DOCKER_BUILD_ARGS...]"
)
def main(**options: Any) -> None:
    """Build an app's Docker images on this machine and deploy them to Convox.

    \b
    Examples:
      ./convox_deploy.py --dry-run
      ./convox_deploy.py --app shop --rack production -- --platform linux/amd64
      ./convox_deploy.py --rollback RABCDEFGHIJ

    CONVOX_HOST and CONVOX_PASSWORD choose a rack by its host. Each option has a variable, too:
    DEPLOY_ and its name, such as DEPLOY_DRY_RUN, if no other is shown.
    """
    is_default = options["file"] is None
    if is_default:
        options["file"] = "convox.yml" if os.path.lexists("convox.yml") else "docker-compose.yml"
    settings = Settings(**options, has_default_file=is_default)
    if problems := list(settings.problems()):
        raise click.UsageError("\n".join(problems))
    prepare_process()
    if settings.result and not settings.dry_run:
        remove_result(Path(settings.result))
    learn_secrets_of(settings.docker_build_args)
    code = shell.watch(lambda: run_deploy(settings))
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # unlike sys.exit, not changed by a signal or by closed output


def prepare_process() -> None:
    """Make standard streams and environment what a deploy expects, and learn secrets."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit("stdout or stderr is closed. Redirect it, for example to /dev/null.")
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # as set in a git hook
        os.environ.pop(variable, None)
    learn_secrets(os.environ)
    learn_url_password()
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        stream.reconfigure(encoding="utf-8", errors="replace")
        os.set_blocking(stream.fileno(), True)  # a full pipe must not be an error


if __name__ == "__main__":
    main()
