"""Every command of the lifecycle in every failure mode: never exit 0, and never a promote after a failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ECR, ROOT, STANDIN, Ran, World, ended
from standin import Rule

PREFLIGHT, FAILED, TIMED_OUT, TERMINATED = 2, 1, 124, 143


READ_RELEASE = "convox api get /apps/shop/releases/"
TURN = ("before_release", "convox api get")
OLD = "ROLDERRELEA"  # what a rollback goes back to
[COPY] = re.findall("copy=(R[A-Z]{10})\n", STANDIN.read_text())  # that then runs
DEPLOY, RESUME, ROLL_BACK = (), ("--release", "RNEWRELEASE"), ("--rollback", OLD)


@dataclass(frozen=True)
class Command:
    """A command of the lifecycle. Its command line starts with `start`, and messages call it `name`."""

    start: str
    step: str
    name: str
    needs_output: bool = False  # the deploy depends on its output
    needs_effect: bool = False  # the deploy depends on its effect
    is_optional: bool = False  # the deploy does not even depend on its success
    number: int | None = None  # only the nth call
    since: int = 0  # only the calls from the nth on
    args: tuple[str, ...] = DEPLOY
    arrange: Callable[[World], object] = lambda world: None  # so that it is run


def with_an_arg(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG LICENSE_KEY\n")
    world.env["STANDIN_APP_ENV"] = "LICENSE_KEY=x"


def with_two_images(world: World) -> None:
    text = f"web: {{image: '{ECR}/shop:TAG'}}\na: {{image: '{ECR}/a:TAG', build: {{target: a}}}}\n"
    world.write("docker-compose.yml", text)


def without_a_rack(world: World) -> None:
    for name in ("CONVOX_HOST", "CONVOX_PASSWORD"):
        del world.env[name]
    world.env["STANDIN_SWITCH"] = "staging"


COMMANDS = [
    Command("git rev-parse", "preflight", "git"),
    Command("git log", "preflight", "git"),
    Command("git describe", "preflight", "git"),
    Command("git branch", "preflight", "git"),
    Command("docker version", "preflight", "docker"),
    Command("aws ecr get-login-password", "preflight", "aws", needs_output=True),
    Command("docker login", "preflight", "docker login", needs_effect=True),
    Command("convox build --help", "preflight", "convox", needs_output=True),
    Command("convox releases promote --help", "preflight", "convox", needs_output=True),
    Command("convox api get", "preflight", "convox api get", needs_output=True, number=1),
    Command("convox env", "preflight", "LICENSE_KEY", arrange=with_an_arg),
    Command("before_build", "before_build", "deploy/before_build.sh"),
    Command("docker build --help", "build", "docker build", arrange=with_two_images),
    Command("docker build", "build", "docker build", needs_effect=True),
    Command("after_build", "after_build", "deploy/after_build.sh"),
    Command("docker image inspect", "build", "docker image inspect", needs_output=True),
    Command("aws ecr create-repository", "push", "aws ecr", needs_effect=True),
    Command("docker tag", "push", "docker tag", needs_effect=True),
    Command("docker push", "push", "docker push"),
    Command("convox build --app", "release", "convox build", needs_output=True),
    # the app's turn: the app, the list of releases, the hook, the app
    Command("convox api get /apps/shop", *TURN, needs_output=True, since=2),
    Command("before_release", "before_release", "deploy/before_release.sh"),
    Command("convox api get /apps/shop", *TURN, needs_output=True, since=4),
    Command(
        "convox releases promote --app", "promote", "convox releases promote", needs_effect=True
    ),
    Command("convox api get /apps/shop", "promote", "convox api get", needs_output=True, since=5),
    # a release that was built before
    Command("convox api get", "preflight", "convox api get", True, number=1, args=RESUME),
    Command(
        "convox releases promote --app", "promote", "convox releases promote", False, True,
        args=RESUME,
    ),
    # a rollback
    Command("convox api get", "preflight", "convox api get", True, number=1, args=ROLL_BACK),
    Command("convox api get /apps/shop", *TURN, needs_output=True, since=3, args=ROLL_BACK),
    Command(
        "convox releases rollback --app", "promote", "convox releases rollback", True, True,
        args=ROLL_BACK,
    ),
    Command(
        "convox api get /apps/shop", "promote", "convox api get", True, since=4, args=ROLL_BACK
    ),
    # what is only to be told, or compared if this login may read it
    Command("convox switch", "preflight", "convox switch", is_optional=True, arrange=without_a_rack),
    Command("convox api get /apps/shop/releases", *TURN, is_optional=True, number=1),
    Command(f"{READ_RELEASE}RNEW", "preflight", "convox api get", is_optional=True, args=RESUME),
    Command(f"{READ_RELEASE}{OLD}", "preflight", "convox api get", is_optional=True, args=ROLL_BACK),
]  # fmt: skip
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
    if command.is_optional:
        return way in (TERM, HANGS)
    if "garbage" in way and command.start.startswith("git"):
        return False
    is_silent, does_nothing = "normal output" not in way, "nothing" in way
    return (is_silent and command.needs_output) or (does_nothing and command.needs_effect)


def cases(harmful: bool) -> list[Any]:
    """Return every command with the faults its own code must detect, and one of each kind with those that share code."""
    found = []
    for command in COMMANDS:
        for way in WAYS:
            if command.is_optional:
                wanted = is_harmful(command, way) == harmful
            elif way.startswith("succeeds"):
                is_sampled = harmful or "garbage" in way or command.start in OF_EACH_KIND
                wanted = is_harmful(command, way) == harmful and is_sampled
            else:
                wanted = harmful and (way in ALWAYS or command.start in OF_EACH_KIND)
            if wanted:
                name = " ".join([command.start, *command.args])
                found.append(pytest.param(command, way, id=f"{name} [{command.step}] {way}"))
    return found


IMPATIENT = {
    "PATIENCE_SECONDS": 0,
    "POLL_SECONDS": 0.01,
    "LAST_WORDS_SECONDS": 0.1,
    "PUSH_PAUSE": 0,
    "DEBUG_SECONDS": [0.01, 0.01],
}


def deploy_with_fault(world: World, command: Command, way: str) -> Ran:
    command.arrange(world)
    world.add_git()
    world.add_hooks()
    turns: Rule = {"number": command.number} if command.number else {"since": command.since}
    world.constants = {**IMPATIENT}
    world.rules[command.start] = {**WAYS[way], **turns}
    if way == HANGS:
        return world.deploy_and_signal(signal.SIGALRM, *command.args)
    return world.deploy(*command.args)


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
    option = command.args or RESUME
    is_built = command.step in ("before_release", "promote")
    can_go_on = is_built and not (option == ROLL_BACK and command.step == "before_release")
    again = f"run the same command with {' '.join(option)} (or DEPLOY_{option[0][2:].upper()}="
    assert (again in ran.err) == can_go_on, ran.err
    assert world.nothing_is_left()
    is_requested = command.step == "promote"
    requests = ["promote", "rollback"] if option == ROLL_BACK else ["rollback", "promote"]
    assert len(world.commands(f"convox releases {requests[0]} --app")) == 0
    assert len(world.commands(f"convox releases {requests[1]} --app")) == int(is_requested)


@pytest.mark.parametrize(("command", "way"), cases(harmful=False))
def test_a_harmless_fault_does_not_stop_the_deploy(
    world: World, command: Command, way: str
) -> None:
    ran = deploy_with_fault(world, command, way)
    assert ran.status == 0, ran.text
    assert world.running == (COPY if command.args == ROLL_BACK else "RNEWRELEASE")


# --- a promote: what the rack then reports decides -------------------------------------


REQUESTS = [
    (RESUME, "convox releases promote --app", "RNEWRELEASE"),
    (ROLL_BACK, "convox releases rollback --app", COPY),
]


@pytest.mark.parametrize("way", ["exits with 1", "exits with 127", "is killed"])
@pytest.mark.parametrize(("args", "request_", "release"), REQUESTS)
def test_a_promote_that_fails_although_the_rack_runs_the_release_is_a_success_with_a_warning(
    world: World, args: list[str], request_: str, release: str, way: str
) -> None:
    world.constants = {**IMPATIENT}
    world.rules[request_] = {"usual": True, **WAYS[way]}
    ran = world.deploy(*args, "--result", "result.json")
    assert ran.status == 0, ran.text
    name = request_.removesuffix(" --app")
    assert f"\nwarning: The rack reports {release} running, although `{name}` " in ran.out
    result = json.loads((world.app / "result.json").read_text())
    assert (result["verified"], result["release"], result["running"]) == (True, release, release)


@pytest.mark.parametrize(("way", "status"), [(TERM, TERMINATED), (HANGS, TIMED_OUT)])
@pytest.mark.parametrize(("args", "request_", "release"), REQUESTS)
def test_a_promote_that_is_stopped_is_no_success_even_if_the_rack_runs_the_release(
    world: World, args: list[str], request_: str, release: str, way: str, status: int
) -> None:
    world.constants = {**IMPATIENT, "LAST_WORDS_SECONDS": 10}
    world.rules[request_] = {"usual": True, **WAYS[way]}
    stopped = world.deploy_and_signal if way == HANGS else lambda _, *given: world.deploy(*given)
    ran = stopped(signal.SIGALRM, *args)
    assert ran.status == status, ran.text
    assert f"\nshop is running {release}." in ran.err


@pytest.mark.parametrize("state", ["ROLDRELEASE running", "RTHEIRXXXXX running", " running"])
@pytest.mark.parametrize("way", ["exits with 1", "is killed", "succeeds silently"])
@pytest.mark.parametrize(("args", "request_", "release"), REQUESTS)
def test_a_promote_fails_whenever_the_rack_runs_another_release(
    world: World, args: list[str], request_: str, release: str, way: str, state: str
) -> None:
    world.constants = {**IMPATIENT, "LAST_WORDS_SECONDS": 10}
    world.rules[request_] = {"usual": True, **WAYS[way]}
    running, status = state.split(" ")
    app = json.dumps({"release": running, "status": status})
    world.rules["convox api get /apps/shop"] = {"since": 4, "out": app}
    ran = world.deploy(*args)
    assert ran.status == FAILED, ran.text
    assert "\npromote failed:\n" in ran.err
    assert f"\nshop is running {running or 'nothing'}." in ran.err


@pytest.mark.parametrize("status", ["updating", "rollback", "something-new"])
@pytest.mark.parametrize(("args", "request_", "release"), REQUESTS)
def test_a_promote_that_does_not_settle_is_no_success(
    world: World, args: list[str], request_: str, release: str, status: str
) -> None:
    world.constants = {**IMPATIENT}
    app = json.dumps({"release": release, "status": status})
    world.rules["convox api get /apps/shop"] = {"since": 4, "out": app}
    ran = world.deploy(*args, "--timeout", "0.03")
    assert ran.status == TIMED_OUT, ran.text
    assert "is now running" not in ran.out


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_in_what_only_explains_a_promote_changes_nothing(world: World, way: str) -> None:
    world.constants = {**IMPATIENT}
    world.rules["convox deploy-debug"] = {**WAYS[way]}
    ends: Rule = {"hang": True} if way == TERM else {"usual": True}  # TERM stops the deploy
    world.rules["convox releases promote --app"] = {"once": "convox deploy-debug", **ends}
    ran = world.deploy("-m", "docker-compose.yml", env={"CONVOX_STANDIN_CLI": "v3"})
    if way == TERM:  # as if everything was
        assert ran.status == TERMINATED, ran.text
    else:
        assert ran.status == 0, ran.text
        assert world.running == "RNEWRELEASE"
    assert "Traceback" not in ran.text


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
        ("before_release", "convox", "before_release"),
    ],
)
def test_a_program_that_disappears_is_reported(
    world: World, hook: str, program: str, step: str
) -> None:
    world.constants = {**IMPATIENT}
    world.write(f"deploy/{hook}.sh", f"#!/bin/sh\n/bin/rm {world.bin / program}\n", 0o755)
    ran = world.deploy()
    assert ran.status == FAILED
    assert f"{step} failed:\n" in ran.err and program in ran.err
    assert world.commands("convox releases promote --app") == []


def test_a_failed_cleanup_does_not_fail_the_deploy(world: World) -> None:
    world.rules["docker image rm"] = {"status": 1, "err": "in use"}
    ran = world.deploy()
    assert ran.status == 0 and "in use" not in ran.text


NO_RELEASE_IDS = [
    "BNEWBUILDXX",  # is a build ID
    "",
    "RNEWRELEASE\nA new CLI is out: RUNUPGRADES",
    "RNEWRELEASE and more",
    "Release: RNEWRELEASE",
    "A new CLI is out: RUNUPGRADES",
    "latest release is RLATERXXXXX",
    "rnewrelease",
]


@pytest.mark.parametrize("cli", ["v2", "v3"])
@pytest.mark.parametrize("output", ["ROLDRELEASE", *NO_RELEASE_IDS])  # the first is running
def test_nothing_is_promoted_unless_the_build_prints_a_new_release_id(
    world: World, cli: str, output: str
) -> None:
    world.rules["convox build --app"] = {"out": output}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == FAILED, ran.text
    assert "release failed:" in ran.err
    assert world.commands("convox releases promote --app") == []


@pytest.mark.parametrize("cli", ["v2", "v3"])
@pytest.mark.parametrize("output", ["ROLDRELEASE", OLD, *NO_RELEASE_IDS])
def test_a_rollback_succeeds_only_if_the_release_that_it_names_is_running(
    world: World, cli: str, output: str
) -> None:
    world.constants = {**IMPATIENT}
    (world.home / "running").write_text("RLATERXXXXX\n")
    world.rules["convox releases rollback --app"] = {"usual": "silent", "out": output}
    ran = world.deploy(*ROLL_BACK, env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == FAILED, ran.text
    assert "promote failed:" in ran.err


# --- races ----------------------------------------------------------------------------


def test_the_release_that_was_built_is_promoted_not_the_latest(world: World) -> None:
    log = "log: latest release is RLATERXXXXX\n"
    world.rules["convox build --app"] = {"out": "ROURSXXXXXX", "err": log}
    ran = world.deploy()
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
