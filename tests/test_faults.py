"""Every command of the lifecycle, failing in every way: never a green exit, never a promote after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, World

PREFLIGHT, FAILED, TIMED_OUT = 2, 1, 124
MARKER = "secret-of-the-environment"


@dataclass(frozen=True)
class Command:
    """A command of the lifecycle: `start` is how its command line begins, `name` how messages name it."""

    start: str
    step: str
    name: str
    says: bool = False  # its output is needed
    does: bool = False  # what it does is needed
    number: int | None = None  # which of several calls


COMMANDS = [
    Command("git rev-parse", "preflight", "git rev-parse", says=True),
    Command("git log", "preflight", "git log", says=True),
    Command("git describe", "preflight", "git describe", says=True),
    Command("docker version", "preflight", "docker", says=True),
    Command("aws ecr get-login-password", "preflight", "aws", says=True),
    Command("docker login", "preflight", "docker login", does=True),
    Command("convox build --help", "preflight", "convox", says=True),
    Command("convox releases promote --help", "preflight", "convox", says=True),
    Command("convox api get", "preflight", "convox api get", says=True, number=1),
    Command("before_build", "before_build", "deploy/before_build.sh"),
    Command("docker build", "build", "docker build", does=True),
    Command("after_build", "after_build", "deploy/after_build.sh"),
    Command("docker image inspect --format {{.Id}}", "push", "docker image inspect", says=True),
    Command("aws ecr describe-repositories", "push", "aws ecr describe-repositories", says=True),
    Command("aws ecr create-repository", "push", "aws ecr create-repository", does=True),
    Command("docker tag", "push", "docker tag", does=True),
    Command("docker push", "push", "docker push", does=True),
    Command("docker image inspect --format {{json", "push", "docker image inspect", says=True),
    Command("convox build --app", "release", "convox build", says=True),
    Command("before_release", "before_release", "deploy/before_release.sh"),
    Command("convox releases promote --app", "promote", "convox releases promote", does=True),
    Command("convox api get", "promote", "convox api get", says=True, number=2),
]

WAYS: dict[str, dict[str, Any]] = {
    "exit 1": {"status": 1, "err": "it went wrong"},
    "exit 127": {"status": 127},
    "killed": {"signal": int(signal.SIGKILL)},
    "terminated": {"signal": int(signal.SIGTERM)},
    "never ending": {"hang": True},
    "dying after partial output": {"out": '{"release": "RPART', "signal": int(signal.SIGSEGV)},
    "success: garbage said, nothing done": {"out": "gar\x00bage \ud83d\ude00 {[<\n" * 3},
    "success: nothing said, nothing done": {},
    "success: nothing said, all done": {"usual": "unheard"},
    "success: all said, nothing done": {"usual": "idle"},
}


def does_harm(command: Command, way: str) -> bool:
    """Says whether a success that is none matters: git's words are cleaned for the tag, and hooks need do nothing."""
    if way.startswith("success: garbage") and command.start.startswith(("git", "docker version")):
        return False
    nothing_said, nothing_done = "all said" not in way, "all done" not in way
    return not way.startswith("success") or (nothing_said and command.says) or (nothing_done and command.does)


def matrix(harmful: bool) -> list[Any]:
    return [
        pytest.param(command, way, id=f"{command.start} [{command.step}] {way}")
        for command in COMMANDS
        for way in WAYS
        if does_harm(command, way) == harmful
    ]


@pytest.mark.parametrize(("command", "way"), matrix(harmful=True))
def test_a_fault_is_never_green(world: World, command: Command, way: str) -> None:
    world.add_git()
    world.add_hooks()
    world.rules[command.start] = {**WAYS[way], "number": command.number}
    ran = world.deploy(env={"DEPLOY_TIMEOUT": "0.1" if way == "never ending" else None})
    assert ran.status == expected_status(command, way), ran.text
    assert is_named(command, way, ran.err), ran.err
    assert "Traceback" not in ran.text
    assert "the/rack's secret" not in ran.text and "token-of-ecr" not in ran.text
    assert world.nothing_is_left()
    promotes = world.commands("convox releases promote --app")
    assert len(promotes) == (1 if command.step == "promote" else 0)
    assert state_is_true(command, way, ran.err), ran.err


def expected_status(command: Command, way: str) -> int:
    if way == "never ending":
        return TIMED_OUT
    if way == "terminated" and command.step != "preflight" and command.name != "docker image inspect":
        return 128 + signal.SIGTERM
    return PREFLIGHT if step_of_failure(command, way) == "preflight" else FAILED


def step_of_failure(command: Command, way: str) -> str:
    """Returns the step in which the fault is seen: of a login that was none, the push."""
    return "push" if command.name == "docker login" and way.startswith("success") else command.step


def is_named(command: Command, way: str, said: str) -> bool:
    """Says whether the message names the step, and the command or what it left undone."""
    names = [command.name]
    if way.startswith("success") and step_of_failure(command, way) == "push":
        names += ["`docker push` failed", "it was not pushed", "docker has no image"]
    elif command.name == "docker image inspect" and way != "never ending":
        names = ["docker has no image", "it was not pushed"]
    elif way.startswith("success") and command.start == "convox releases promote --app":
        names = ["shop runs ROLDRELEASE, not RNEWRELEASE"]
    return f"{step_of_failure(command, way)} failed:" in said and any(name in said for name in names)


def state_is_true(command: Command, way: str, said: str) -> bool:
    if step_of_failure(command, way) == "preflight":
        return "Nothing was changed." in said
    if command.step == "promote":
        return "was asked to promote RNEWRELEASE" in said
    if command.step == "before_release":
        return (
            "Nothing was promoted. shop ran ROLDRELEASE when this began. Release RNEWRELEASE is built; go on with"
            in said
        )
    if command.step == "release" and way in ("never ending", "terminated"):
        return "Nothing was promoted. shop ran ROLDRELEASE when this began. The build may still run on the rack" in said
    return "Nothing was released or promoted." in said


@pytest.mark.parametrize(("command", "way"), matrix(harmful=False))
def test_a_fault_that_does_no_harm_stops_nothing(world: World, command: Command, way: str) -> None:
    world.add_git()
    world.add_hooks()
    world.rules[command.start] = {**WAYS[way], "number": command.number}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert (world.home / "running").read_text() == "RNEWRELEASE"


@pytest.mark.parametrize("program", ["docker", "aws", "convox", "git"])
def test_a_program_that_is_missing_is_named(world: World, program: str) -> None:
    world.add_git()
    (world.bin / program).unlink()
    ran = world.deploy()
    assert ran.status == PREFLIGHT
    assert f"{program} is not installed, or not on the PATH." in ran.err
    assert world.commands("docker build") == []


@pytest.mark.parametrize(
    ("hook", "program", "step"),
    [
        ("before_build", "docker", "build"),
        ("after_build", "docker", "push"),
        ("after_build", "aws", "push"),
        ("after_build", "convox", "release"),
        ("before_release", "convox", "promote"),
    ],
)
def test_a_program_that_goes_missing_on_the_way_is_named(world: World, hook: str, program: str, step: str) -> None:
    world.write(f"deploy/{hook}.sh", f"#!/bin/sh\nrm {world.bin / program}\n", 0o755)
    (world.bin / "rm").symlink_to("/bin/rm")
    ran = world.deploy()
    assert ran.status == FAILED
    assert f"{step} failed:\n{program} is not installed, or not on the PATH." in ran.err
    assert world.commands("convox releases promote --app") == []


def test_clean_up_that_fails_changes_no_outcome(world: World) -> None:
    world.rules["docker image rm"] = {"status": 1, "err": "in use"}
    ran = world.deploy()
    assert ran.status == 0 and "in use" not in ran.text


def test_a_release_that_runs_already_is_no_new_release(world: World) -> None:
    world.rules["convox build --app"] = {"out": "ROLDRELEASE"}
    ran = world.deploy()
    assert ran.status == FAILED
    assert "named no new release: it ends in 'ROLDRELEASE'" in ran.err
    assert world.commands("convox releases promote --app") == []


def test_a_build_id_is_no_release(world: World) -> None:
    world.rules["convox build --app"] = {"out": "BNEWBUILDXX"}
    assert world.deploy().status == FAILED


# --- races ----------------------------------------------------------------------------


def test_a_release_that_somebody_else_promotes_meanwhile_is_told(world: World) -> None:
    world.rules["convox api get"] = {"number": 2, "out": '{"release": "ROTHERRELEASE"}'}
    ran = world.deploy()
    assert ran.status == FAILED
    assert "The rack took the promote, but shop runs ROTHERRELEASE, not RNEWRELEASE." in ran.err


def test_the_release_of_our_build_is_promoted_and_not_the_latest(world: World) -> None:
    world.rules["convox build --app"] = {"out": "log: latest release is RLATERXXXXX\nROURSXXXXXX"}
    assert world.deploy().status == 0
    assert world.commands("convox releases promote --app") == ["convox releases promote --app shop --wait ROURSXXXXXX"]


def test_two_deploys_in_one_workspace_do_not_meet(world: World) -> None:
    first, second = world.start("--no-promote"), world.start("--no-promote")
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
    builds = [call for call in world.calls if call["argv"][:2] == ["docker", "build"]]
    assert len({call["argv"][-2] for call in builds}) == 2  # local tags
    assert len({call["argv"][3] for call in builds}) == 2  # files for the image id
    assert len({call["cwd"] for call in world.calls if call["argv"][:3] == ["convox", "build", "--app"]}) == 2
    assert world.nothing_is_left()


# --- the machine ----------------------------------------------------------------------


# The last place that tempfile looks in is the current directory, and before it /tmp: here there is TMPDIR alone.
WITH_ONE_TEMPORARY_DIRECTORY = """
import os, tempfile
tempfile._candidate_tempdir_list = lambda: [os.environ["TMPDIR"]]
import convox_deploy
convox_deploy.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
@pytest.mark.parametrize("options", ["size=4k", "size=8k", "ro"])
def test_a_temporary_directory_that_is_full_or_read_only_is_told(world: World, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", world.tmp], check=True)
    try:
        if options == "size=4k":
            (world.tmp / "something").write_bytes(b"x" * 4096)
        (world.home / "calls.jsonl").touch()
        done = subprocess.run(
            [sys.executable, "-c", WITH_ONE_TEMPORARY_DIRECTORY],
            cwd=world.app,
            env={**world.env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert [path.name for path in world.tmp.iterdir()] == ["something"][: options == "size=4k"]
    finally:
        subprocess.run(["umount", world.tmp], check=True)
    assert done.returncode == PREFLIGHT
    assert "No temporary file can be made: " in done.stderr and "Set TMPDIR to where there is room." in done.stderr
    assert "Traceback" not in done.stderr
    assert world.calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from Linux")
def test_a_hook_that_prints_a_gigabyte_passes_through_whole_and_in_constant_memory(world: World) -> None:
    lines = 2_000_000  # of 512 bytes
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
            if seen % 100_000 == 0:
                peak = max(peak, resident_kilobytes(process.pid))
    assert process.wait(60) == 0
    assert seen == lines
    assert 0 < peak < 60_000


def resident_kilobytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0
