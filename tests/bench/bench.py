#!/usr/bin/env python3
"""Compare deploys in the sandbox with the same deploys as plain commands, and print a table. Takes some minutes.

Each row compares two ways of doing the same thing, run alternately, and shows the ratio of their medians. The JSON
file contains all measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Callable
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "sandbox"))

from bootstrap import ROOT, use_environment  # noqa: E402

if TYPE_CHECKING:
    from sandbox import Sandbox

TOOL = str(ROOT / "convox_deploy.py")
DOCKERFILE = (
    'FROM convox-sandbox-base\nCOPY content /www\nCMD ["httpd", "-f", "-p", "8080", "-h", "/www"]\n'
)
THREE = ("web", "worker", "clock")
CACHE = "--cache-from-running"
# Each build has a step that waits and one that computes. The first differs between builds and rounds.
SLOW_DOCKERFILE = """FROM convox-sandbox-base
RUN : {unique}; sleep 3
RUN head -c 200000000 /dev/zero | sha256sum
"""
GIGABYTE = 10**9
HOOK = f"""#!/bin/sh
yes 'a line in a log that is about as long as lines in logs usually are, some 80 chars' | head -c {GIGABYTE}
grep VmHWM "/proc/$PPID/status" >peak-memory 2>/dev/null || :
"""
FIRST_CHILD = """#!/bin/sh
date +%s.%N >>"$STARTED"
exit 1
"""

Run = Callable[[], float]  # returns seconds


@dataclass
class Row:
    """Two ways of doing the same thing. Each does its setup untimed and returns the timed part."""

    name: str
    ours: Callable[[], Run]
    against: str
    other: Callable[[], Run]
    goal: float | None = None  # the maximum ratio
    goal_over: float | None = None  # the maximum number of extra seconds
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "other": []})

    def measure(self, rounds: int) -> None:
        for number in range(rounds + 1):
            ways = [("ours", self.ours), ("other", self.other)]
            for name, set_up in ways if number % 2 else reversed(ways):
                seconds = set_up()()
                if number:  # the first round warms up
                    self.seconds[name].append(seconds)

    def result(self) -> dict[str, object]:
        ours, other = (statistics.median(self.seconds[way]) for way in ("ours", "other"))
        goals = {"ratio": self.goal, "extra seconds": self.goal_over}
        met = (self.goal is None or ours / other <= self.goal) and (
            self.goal_over is None or ours - other <= self.goal_over
        )
        return {
            "row": self.name,
            "against": self.against,
            "ratio": round(ours / other, 3),
            "seconds": self.seconds,
            "goal": {name: goal for name, goal in goals.items() if goal is not None},
            "met": met,
        }

    def __str__(self) -> str:
        result = self.result()
        ours, other = (
            f"{statistics.median(times):7.3f} ({min(times):.3f} - {max(times):.3f})"
            for times in self.seconds.values()
        )
        goal = " and ".join(f"<= {most:.4g} {name}" for name, most in result["goal"].items())  # type: ignore[attr-defined]
        verdict = f"{goal}: {'met' if result['met'] else 'MISSED'}" if goal else ""
        return f"{self.name:<38} {ours:<26} {self.against:<22} {other:<26} {result['ratio']:6.2f}  {verdict}".rstrip()


class Bench:
    """The apps to deploy, and the ways to deploy them."""

    def __init__(self, sandbox: Sandbox, home: Path) -> None:
        self.sandbox, self.home = sandbox, home
        self.apps = 0
        self.peaks: list[float] = []
        self.log = open(home / "log", "wb")

    def rows(self) -> list[Row]:
        small, large, chatty = (
            self.small_app("small"),
            self.small_app("large"),
            self.small_app("chatty"),
        )
        (large / "unneeded").mkdir()
        for number in range(3000):
            (large / "unneeded" / str(number)).write_bytes(os.urandom(100_000))
        (chatty / "deploy").mkdir()
        (chatty / "deploy" / "before_build.sh").write_text(HOOK)
        (chatty / "deploy" / "before_build.sh").chmod(0o755)
        three, buildkit = self.large_app("three"), self.sandbox.buildkit_env
        slow = self.small_app("slow")
        (slow / "Dockerfile").write_text(DOCKERFILE.replace("COPY", "RUN sleep 10\nCOPY"))
        parallel, external = self.slow_app(), self.external_app()
        v3 = {"CONVOX_STANDIN_CLI": "v3"}
        return [
            Row("one image, cached", lambda: self.tool(small), "floor", lambda: self.floor(small), 1.00),
            Row("one image, one changed layer", lambda: self.tool(self.changed(small)), "floor",
                lambda: self.floor(self.changed(small))),
            Row("three 50 MB images, first push", lambda: self.tool(self.large_app()), "floor",
                lambda: self.floor(self.large_app()), 0.75),
            Row("three 50 MB images, unchanged", lambda: self.tool(three), "floor", lambda: self.floor(three)),
            Row("300 MB of ignored files", lambda: self.tool(large), "tool, small app", lambda: self.tool(small), 1.02),
            Row("--help", lambda: self.tool(small, "--help"), "import click, sh, yaml", self.imports, 1.25),
            Row("--dry-run", lambda: self.tool(small, "--dry-run"), "import click, sh, yaml", self.imports),
            Row("startup, to the first child", lambda: self.start_up(small), "import click, sh, yaml",
                self.imports, goal_over=0.25),
            Row("1 GB from a hook", lambda: self.hook_in_a_deploy(chatty), "the hook alone",
                lambda: self.hook(chatty), 1 / 0.97),
            Row("one image, cached, BuildKit", lambda: self.tool(small, env=buildkit), "floor",
                lambda: self.floor(small, buildkit)),
            Row("same, with the running image", lambda: self.tool(small, CACHE, env=buildkit), "floor",
                lambda: self.floor(small, buildkit)),
            Row("three slow builds, build step", lambda: self.build_step(parallel), "in parallel by hand",
                lambda: self.builds_by_hand(parallel, "&"), 1.05),
            Row("three slow builds, build step", lambda: self.build_step(parallel), "one after another",
                lambda: self.builds_by_hand(parallel, ";")),
            Row("by --external, warm", lambda: self.tool(external, env=v3), "convox build --external",
                lambda: self.external_by_hand(external, v3), 1.05),
            *map(self.growth, (1, 2, 4, 8)),
            Row("empty engine, a step of 10 s", lambda: self.empty_engine(slow, CACHE), "without the option",
                lambda: self.empty_engine(slow, "--", "--build-arg", "BUILDKIT_INLINE_CACHE=1"), 0.1),
        ]  # fmt: skip

    def growth(self, count: int) -> Row:
        """Return a row for an app with this number of images, all cached."""
        app, env = self.app_with(count), self.sandbox.buildkit_env
        name = f"{count} cached images, BuildKit"
        return Row(name, lambda: self.tool(app, env=env), "floor", lambda: self.floor(app, env))

    # --- the apps ---

    def small_app(self, name: str) -> Path:
        app = self.home / name
        (app / "content").mkdir(parents=True)
        (app / "Dockerfile").write_text(DOCKERFILE)
        (app / ".dockerignore").write_text("unneeded\n.git\n")
        return self.set_up(app, {"web": "."})

    def large_app(self, name: str = "") -> Path:
        """Create an app with three different images, each with 50 MB of incompressible data."""
        self.apps += 1
        app = self.home / (name or f"large-{self.apps}")
        for service in THREE:
            (app / service / "content").mkdir(parents=True)
            (app / service / "content" / "data").write_bytes(os.urandom(50_000_000))
            (app / service / "Dockerfile").write_text(DOCKERFILE)
        return self.set_up(app, {service: service for service in THREE})

    def slow_app(self) -> Path:
        """Create an app with three images that take some seconds to build."""
        app = self.home / "parallel"
        for service in THREE:
            (app / service).mkdir(parents=True)
        return self.set_up(app, {service: service for service in THREE})

    def external_app(self) -> Path:
        """Create a v3 app whose manifest names no image."""
        app = self.small_app("external")
        (app / "docker-compose.yml").unlink()
        (app / "convox.yml").write_text("services:\n  web:\n    build: .\n")
        return app

    def app_with(self, count: int) -> Path:
        """Create an app with this number of small, different images."""
        app = self.home / f"images-{count}"
        services = [f"s{number}" for number in range(count)]
        for service in services:
            (app / service / "content").mkdir(parents=True)
            (app / service / "content" / "name").write_text(service)
            (app / service / "Dockerfile").write_text(DOCKERFILE)
        return self.set_up(app, dict(zip(services, services)))

    def set_up(self, app: Path, contexts: dict[str, str]) -> Path:
        manifest = "services:\n"
        for service, context in contexts.items():
            image = f"{self.sandbox.registry_host}/{app.name}-{service}:TAG"
            manifest += f"  {service}:\n    build: {context}\n    image: {image}\n"
        (app / "docker-compose.yml").write_text(manifest)
        git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        for words in (
            ["init", "--quiet"],
            ["add", "docker-compose.yml"],
            ["commit", "--quiet", "--message", "bench"],
        ):
            subprocess.run([*git, *words], cwd=app, check=True)
        self.sandbox.check("convox", "apps", "create", app.name)
        return app

    def changed(self, app: Path) -> Path:
        (app / "content" / "index.html").write_text(f"{time.time()}\n")
        return app

    # --- the ways ---

    def run(
        self,
        command: list[str],
        app: Path,
        env: Mapping[str, str] | None = None,
        fails: bool = False,
        read: bool = False,
    ) -> float:
        """Run a command in an app's directory and return the seconds it took.

        Its output goes to a file, or with `read` to a pipe.
        """
        environment = {**self.sandbox.env, "APP_NAME": app.name, **(env or {})}
        self.log.truncate(0)
        if read:
            command = ["sh", "-c", '{ "$@" || echo failed >&2; } | cat >/dev/null', "sh", *command]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=app,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            check=False,
        )
        seconds = time.perf_counter() - started
        if bool(done.returncode) != fails:
            log = Path(self.log.name).read_text(errors="replace")
            sys.exit(f"{log[-4000:]}\n`{' '.join(command)}` exited with code {done.returncode}")
        return seconds

    def tool(self, app: Path, *args: str, env: Mapping[str, str] | None = None) -> Run:
        return lambda: self.run([sys.executable, TOOL, *args], app, env)

    def step(
        self,
        name: str,
        app: Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        read: bool = False,
    ) -> float:
        """Deploy an app and return the seconds that one step took."""
        self.run([sys.executable, TOOL, "--result", "result.json", *args], app, env, read=read)
        return float(json.loads((app / "result.json").read_text())["seconds"][name])

    def build_step(self, app: Path) -> Run:
        """Return the build step of a deploy whose builds are not cached."""
        self.make_unique(app)
        return lambda: self.step("build", app, "--no-promote", env=self.sandbox.buildkit_env)

    def builds_by_hand(self, app: Path, separator: str) -> Run:
        """Return the same builds, as a shell runs them with `&` or `;` between them."""
        self.make_unique(app)
        builds = "".join(f"docker build {service} {separator} " for service in THREE) + "wait"
        return lambda: self.run(["sh", "-c", builds], app, self.sandbox.buildkit_env)

    def make_unique(self, app: Path) -> None:
        for service in THREE:
            text = SLOW_DOCKERFILE.format(unique=f"{service} {time.time()}")
            (app / service / "Dockerfile").write_text(text)

    def external_by_hand(self, app: Path, env: Mapping[str, str]) -> Run:
        url = f"https://convox:{quote(self.sandbox.env['CONVOX_PASSWORD'], safe='')}@"
        env = {**env, "RACK_URL": url + self.sandbox.env["CONVOX_HOST"]}
        build = f"convox build --external --app {app.name} --id ."
        promote = f'convox releases promote --app {app.name} "$({build})"'
        return lambda: self.run(["sh", "-c", promote], app, env)

    def empty_engine(self, app: Path, *args: str) -> Run:
        """Return the build step of a deploy on a new machine, after a change to one file."""
        self.sandbox.wipe_engine()
        self.changed(app)

        return lambda: self.step("build", app, *args, env=self.sandbox.buildkit_env)

    def floor(self, app: Path, env: Mapping[str, str] | None = None) -> Run:
        contexts = {path.parent.name: path.parent.name for path in app.glob("*/Dockerfile")} or {
            "web": "."
        }
        services = " ".join("=".join(item) for item in contexts.items())
        where = {"REGISTRY": self.sandbox.registry_host, "REGION": "us-east-1", **(env or {})}
        return lambda: self.run(
            ["sh", str(HERE / "floor.sh")], app, env={**where, "SERVICES": services}
        )

    def imports(self) -> Run:
        return lambda: self.run([sys.executable, "-c", "import click, sh, yaml"], self.home)

    def start_up(self, app: Path) -> Run:
        """Measure the time until the first child process starts. Whichever it is, it records the time and fails."""
        programs, started = self.home / "first-child", self.home / "started"
        programs.mkdir(exist_ok=True)
        for name in ("git", "docker", "aws", "convox"):
            (programs / name).write_text(FIRST_CHILD)
            (programs / name).chmod(0o755)
        started.unlink(missing_ok=True)

        def until_first_child() -> float:
            begun = time.time()
            path = f"{programs}:{self.sandbox.env['PATH']}"
            self.run(
                [sys.executable, TOOL], app, {"PATH": path, "STARTED": str(started)}, fails=True
            )
            return min(map(float, started.read_text().split())) - begun

        return until_first_child

    def hook(self, app: Path) -> Run:
        return lambda: self.run(["deploy/before_build.sh"], app, read=True)

    def hook_in_a_deploy(self, app: Path) -> Run:
        def hook() -> float:
            seconds = self.step("before_build", app, read=True)
            self.peaks.append(int((app / "peak-memory").read_text().split()[1]) / 1024)
            return seconds

        return hook


def main() -> None:
    use_environment(HERE.parent / "requirements.txt")
    from sandbox import Sandbox

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements per row [default: 5]")
    parser.add_argument(
        "--json", type=Path, default=ROOT / ".sandbox" / "bench.json", help="[default: %(default)s]"
    )
    parser.add_argument(
        "words", nargs="*", help="measure only the rows whose names contain one of these words"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with Sandbox() as sandbox, tempfile.TemporaryDirectory(prefix="convox-bench-") as home:
        bench = Bench(sandbox, Path(home))
        rows = [
            row
            for row in bench.rows()
            if not options.words or any(word in row.name for word in options.words)
        ]
        print(
            f"{'':<38} {'tool: median s (min - max)':<26} {'baseline':<22} {'median s (min - max)':<26}  ratio"
        )
        for row in rows:
            row.measure(options.rounds)
            print(row, flush=True)
    peak = max(bench.peaks, default=None)
    if peak is not None:
        throughput = [
            GIGABYTE / 1e6 / statistics.median(times)
            for row in rows
            if "1 GB" in row.name
            for times in row.seconds.values()
        ]
        print(
            f"1 GB: {throughput[0]:.0f} MB/s, the hook alone {throughput[1]:.0f} MB/s; the tool's peak memory {peak:.0f} MB"
        )
    options.json.write_text(
        json.dumps({"rows": [row.result() for row in rows], "peak_memory_mb": peak}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
