"""Every command of the lifecycle in every failure mode: never exit 0, and never a promote after a failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ran, World, ended
from standin import Rule

PREFLIGHT, FAILED, TIMED_OUT, TERMINATED = 2, 1, 124, 143


@dataclass(frozen=True)
class Command:
    """A command of the lifecycle. Its command line starts with `start`, and messages call it `name`."""

    start: str
    step: str
    name: str
    needs_output: bool = False  # the deploy depends on its output
    needs_effect: bool = False  # the deploy depends on its effect
    number: int | None = None  # only the nth call
    since: int = 0  # only the calls from the nth on


COMMANDS = [
    Command("git rev-parse", "preflight", "git"),
    Command("git log", "preflight", "git"),
    Command("git describe", "preflight", "git"),
    Command("docker version", "preflight", "docker"),
    Command("aws ecr get-login-password", "preflight", "aws", needs_output=True),
    Command("docker login", "preflight", "docker login", needs_effect=True),
    Command("convox build --help", "preflight", "convox", needs_output=True),
    Command("convox releases promote --help", "preflight", "convox", needs_output=True),
    Command("convox api get", "preflight", "convox api get", needs_output=True, number=1),
    Command("before_build", "before_build", "deploy/before_build.sh"),
    Command("docker build", "build", "docker build", needs_effect=True),
    Command("after_build", "after_build", "deploy/after_build.sh"),
    Command("docker image inspect", "build", "docker image inspect", needs_output=True),
    Command("aws ecr create-repository", "push", "aws ecr", needs_effect=True),
    Command("docker tag", "push", "docker tag", needs_effect=True),
    Command("docker push", "push", "docker push"),
    Command("convox build --app", "release", "convox build", needs_output=True),
    Command("before_release", "before_release", "deploy/before_release.sh"),
    Command(
        "convox releases promote --app", "promote", "convox releases promote", needs_effect=True
    ),
    Command("convox api get /apps/shop", "promote", "convox api get", needs_output=True, since=3),
]
# A command of each way to run one: captured, streamed, passed through, and both of the first.
OF_EACH_KIND = ["git log", "docker build", "after_build", "convox build --app"]

HANGS = "hangs until the timeout"
TERM = "is terminated"
WAYS: dict[str, Rule] = {
    "exits with 1": {"status": 1, "err": "it went wrong"},
    "exits with 127": {"status": 127},
    "is killed": {"signal": int(signal.SIGKILL)},
    TERM: {"signal": int(signal.SIGTERM)},
    HANGS: {"hang": True},
    "dies after partial output": {"out": '{"release": "RPART', "signal": int(signal.SIGSEGV)},
    "succeeds with garbage and does nothing": {"out": "gar\x00bage \ud83d\ude00 {[<\n" * 3},
    "succeeds silently": {"usual": "silent"},
    "succeeds with normal output and does nothing": {"usual": "idle"},
}
ALWAYS = ["exits with 1", HANGS]


def is_harmful(command: Command, way: str) -> bool:
    """Return True if a false success matters. Tags work without git's output, and hooks need not do anything."""
    if "garbage" in way and command.start.startswith("git"):
        return False
    is_silent, does_nothing = "normal output" not in way, "nothing" in way
    return (is_silent and command.needs_output) or (does_nothing and command.needs_effect)


def cases(harmful: bool) -> list[Any]:
    """Return every command with the faults its own code must detect, and one of each kind with those that share code."""
    found = []
    for command in COMMANDS:
        for way in WAYS:
            if way.startswith("succeeds"):
                is_sampled = harmful or "garbage" in way or command.start in OF_EACH_KIND
                wanted = is_harmful(command, way) == harmful and is_sampled
            else:
                wanted = harmful and (way in ALWAYS or command.start in OF_EACH_KIND)
            if wanted:
                found.append(
                    pytest.param(command, way, id=f"{command.start} [{command.step}] {way}")
                )
    return found


def deploy_with_fault(world: World, command: Command, way: str) -> Ran:
    world.add_git()
    world.add_hooks()
    turns: Rule = {"number": command.number} if command.number else {"since": command.since}
    world.constants = {
        "PATIENCE_SECONDS": 0,
        "POLL_SECONDS": 0,
        "LAST_WORDS_SECONDS": 0.1,
        "PUSH_PAUSES": [0],
    }
    world.rules[command.start] = {**WAYS[way], **turns}
    return world.deploy_and_signal(signal.SIGALRM) if way == HANGS else world.deploy()


@pytest.mark.parametrize(("command", "way"), cases(harmful=True))
def test_a_harmful_fault_always_fails_the_deploy(world: World, command: Command, way: str) -> None:
    ran = deploy_with_fault(world, command, way)
    early = command.step == "preflight" and not (
        command.name == "docker login" and way.startswith("succeeds")
    )
    is_one_of_several = (
        early and way == HANGS
    )  # the message may name any command that runs in parallel
    expected = {HANGS: [TIMED_OUT], TERM: [TERMINATED, PREFLIGHT if early else FAILED]}
    assert ran.status in expected.get(way, [PREFLIGHT if early else FAILED]), ran.text
    step = command.step if early or command.step != "preflight" else "push"
    assert re.search(rf"^{step} failed:$", ran.err, re.MULTILINE), ran.err
    assert command.name in ran.err or way.startswith("succeeds") or is_one_of_several, ran.err
    assert "Traceback" not in ran.text
    assert "the/rack's secret" not in ran.text and "token-of-ecr" not in ran.text
    is_rolled_back = "shop is running ROLDRELEASE again. Fix the cause and deploy again." in ran.err
    assert ("--release RNEWRELEASE" in ran.err) == (
        command.step in ("before_release", "promote") and not is_rolled_back
    )
    assert world.nothing_is_left()
    assert len(world.commands("convox releases promote --app")) == (
        1 if command.step == "promote" else 0
    )


@pytest.mark.parametrize(("command", "way"), cases(harmful=False))
def test_a_harmless_fault_does_not_stop_the_deploy(
    world: World, command: Command, way: str
) -> None:
    ran = deploy_with_fault(world, command, way)
    assert ran.status == 0, ran.text
    assert world.running == "RNEWRELEASE"


@pytest.mark.parametrize("program", ["docker", "aws", "convox", "git"])
def test_a_missing_program_is_reported(world: World, program: str) -> None:
    world.add_git()
    (world.bin / program).unlink()
    ran = world.deploy()
    assert ran.status == PREFLIGHT
    assert "preflight failed:\n" in ran.err and program in ran.err
    assert world.commands("docker build --tag") == []


@pytest.mark.parametrize(
    ("hook", "program", "step"),
    [
        ("before_build", "docker", "build"),
        ("after_build", "docker", "push"),
        ("after_build", "convox", "release"),
        ("before_release", "convox", "promote"),
    ],
)
def test_a_program_that_disappears_is_reported(
    world: World, hook: str, program: str, step: str
) -> None:
    world.write(f"deploy/{hook}.sh", f"#!/bin/sh\n/bin/rm {world.bin / program}\n", 0o755)
    ran = world.deploy()
    assert ran.status == FAILED
    assert f"{step} failed:\n" in ran.err and program in ran.err
    assert world.commands("convox releases promote --app") == []


def test_a_failed_cleanup_does_not_fail_the_deploy(world: World) -> None:
    world.rules["docker image rm"] = {"status": 1, "err": "in use"}
    ran = world.deploy()
    assert ran.status == 0 and "in use" not in ran.text


@pytest.mark.parametrize(
    ("cli", "output"),
    [
        ("v2", "ROLDRELEASE"),  # is already running
        ("v2", "BNEWBUILDXX"),  # is a build ID
        ("v2", ""),
        ("v2", "RNEWRELEASE\nA new CLI is out: RUNUPGRADES"),
        ("v2", "Release: RNEWRELEASE and more"),
        ("2016", "Release: ROLDRELEASE"),
        ("2016", "Release: BNEWBUILDXX"),
        ("2016", "Release: "),  # printed by a rack whose build failed to start
        ("2016", "A new CLI is out: RUNUPGRADES"),
        ("2016", "latest release is RLATERXXXXX"),
        ("2016", "Release: RNEWRELEASE and more"),
    ],
)
def test_nothing_is_promoted_unless_the_build_prints_a_new_release_id(
    world: World, cli: str, output: str
) -> None:
    world.rules["convox build --app"] = {"out": output}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == FAILED, ran.text
    assert "release failed:" in ran.err
    assert world.commands("convox releases promote --app") == []


# --- races ----------------------------------------------------------------------------


def test_the_release_that_was_built_is_promoted_not_the_latest(world: World) -> None:
    world.rules["convox build --app"] = {
        "out": "log: latest release is RLATERXXXXX\nRelease: ROURSXXXXXX\n"
    }
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "2016"})
    assert ran.status == 0, ran.text
    assert world.commands("convox releases promote --app") == [
        "convox releases promote --app shop --wait ROURSXXXXXX"
    ]


def test_concurrent_deploys_in_one_workspace_do_not_interfere(world: World) -> None:
    processes = [world.start("--no-promote"), world.start("--no-promote")]
    for ran in map(ended, processes):
        assert ran.status == 0, ran.text
    builds = [call for call in world.calls if call.line.startswith("docker build --tag")]
    uploads = [call for call in world.calls if call.line.startswith("convox build --app")]
    assert len({call.argv[3] for call in builds}) == 2  # local names
    assert len({call.argv[-1] for call in uploads}) == 2  # directories
    assert world.nothing_is_left()


# --- the machine ----------------------------------------------------------------------


# tempfile falls back to /tmp and the current directory. Here it has only TMPDIR.
WITH_ONE_TEMPORARY_DIRECTORY = """
import os, tempfile
tempfile._candidate_tempdir_list = lambda: [os.environ["TMPDIR"]]
import convox_deploy
convox_deploy.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system requires root")
@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_a_full_or_read_only_temporary_directory_is_reported(world: World, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", world.tmp], check=True)
    try:
        if options == "size=4k":
            (world.tmp / "something").write_bytes(b"x" * 4096)
        program = ["-c", WITH_ONE_TEMPORARY_DIRECTORY]
        ran = world.deploy(program=program, env={"PYTHONPATH": str(ROOT)})
        assert [path.name for path in world.tmp.iterdir()] == ["something"][: options == "size=4k"]
    finally:
        subprocess.run(["umount", world.tmp], check=True)
    assert ran.status == FAILED
    assert str(world.tmp) in ran.err and "or set TMPDIR." in ran.err
    assert "Traceback" not in ran.err
    assert world.commands("convox build --app") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory usage from /proc")
def test_a_hundred_megabytes_of_hook_output_pass_through_complete_and_in_constant_memory(
    world: World,
) -> None:
    lines = 200_000  # of 512 bytes, more than the memory that a deploy may use
    line = "x" * 500 + " {number:010d}"
    world.write(
        "deploy/before_build.sh",
        f"#!{sys.executable}\nimport sys\nw = sys.stdout.write\n"
        f"for n in range({lines}):\n    w({line[:500]!r} + f' {{n:010d}}\\n')\n",
        0o755,
    )
    process = world.start("--no-promote", text=False)
    log: Any = process.stdout
    peak = seen = 0
    for log_line in log:
        if log_line.startswith(b"x" * 500):
            assert int(log_line[501:]) == seen
            seen += 1
            if seen % 50_000 == 0:
                peak = max(peak, resident_kilobytes(process.pid))
    assert process.wait(60) == 0
    assert seen == lines
    assert 0 < peak < 60_000


def resident_kilobytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def test_a_command_that_is_terminated_by_a_realtime_signal_is_reported(world: World) -> None:
    world.rules["docker build --tag"] = {"signal": int(signal.SIGRTMIN) + 5}
    ran = world.deploy()
    assert ran.status == FAILED and "`docker build` for web was ended by signal " in ran.err
    assert "Traceback" not in ran.text and "bug" not in ran.text
