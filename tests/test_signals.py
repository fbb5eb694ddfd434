"""What happens to a running command, its children and the app when a deploy is stopped."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TOOL, World, ended, has_ended, heed_signals, is_alive

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
HANGING = {
    "docker version": "Nothing has been changed.",
    "before_build": "Nothing was released or promoted.",
    "docker build": "Nothing was released or promoted.",
    "docker push": "Nothing was released or promoted.",
    "convox build --app": " A release may have been built.\nTo look: `convox releases --app shop`.\n",
    "before_release": "Release RNEWRELEASE is built.\nTo resume from here, run the same command with",
    "convox releases promote --app": "may still be in progress; ROLDRELEASE was running before it.\nTo look: `convox apps info --app shop`. To try again, run the same command with",
}


@pytest.mark.parametrize(
    ("command", "signum"),
    [
        *((command, signal.SIGTERM) for command in HANGING),
        *itertools.product(
            ["docker version", "before_build", "convox build --app"],  # each is run in another way
            [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT],
        ),
    ],
)
def test_a_signal_ends_the_running_command_and_reports_the_state_of_the_deploy(
    world: World, command: str, signum: Any
) -> None:
    has_child = signum == signal.SIGTERM  # for which the tool waits
    world.add_hooks()
    world.rules[command] = {"hang": True, "child": has_child}
    process = world.start("--result", "result.json", real=True)
    pid = world.await_hanging()
    process.send_signal(signum)
    ran = ended(process)
    assert ran.status == 128 + signum
    assert f"Stopped by {signum.name} while running `" in ran.err
    assert HANGING[command] in ran.err and "Traceback" not in ran.err
    assert not is_alive(pid)
    assert not has_child or not is_alive(int((world.home / "child").read_text()))
    assert world.nothing_is_left()
    assert '"status": "failed"' in (world.app / "result.json").read_text()
    if command != "convox releases promote --app":
        assert world.commands("convox releases promote --app") == []


def test_a_command_that_ignores_term_is_killed_after_the_grace_period(world: World) -> None:
    world.constants["GRACE_SECONDS"] = 0.5
    world.rules["docker build"] = {"hang": True, "child": True, "ignore_term": True}
    process = world.start()
    pid = world.await_hanging()
    process.send_signal(signal.SIGTERM)
    assert ended(process).status == 128 + signal.SIGTERM
    assert not is_alive(pid)
    assert world.nothing_is_left()


def test_a_signal_that_arrives_twice_counts_once(world: World) -> None:
    """`uv run` passes on SIGTERM although a job's cancellation has sent it to the tool, too."""
    clean_up = """#!/bin/sh
trap 'echo cleaned up; exit 1' TERM
sleep 600 &
echo $$ >"$STANDIN/hanging"
wait
"""
    world.write("deploy/before_build.sh", clean_up, 0o755)
    world.env["PATH"] += ":/usr/bin:/bin"
    process = world.start()
    world.await_hanging()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.status == 128 + signal.SIGTERM
    assert "\ncleaned up\n" in ran.out


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        ("before_build", signal.SIGINT, signal.SIGTERM),
        ("docker build --tag", signal.SIGINT, signal.SIGTERM),
        ("docker push", signal.SIGINT, signal.SIGTERM),
        ("docker push", signal.SIGINT, signal.SIGINT),
        ("before_build", signal.SIGTERM, signal.SIGTERM),
        ("docker build --tag", signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_changes_nothing_and_kill_follows_after_the_grace_period(
    world: World, command: str, first: Any, second: Any
) -> None:
    """GitHub sends SIGINT, SIGTERM after 7.5 s, and SIGKILL after 10 s."""
    world.constants["GRACE_SECONDS"] = 1
    world.add_hooks("before_build")
    world.rules[command] = {"hang": True, "ignore_term": True, "child": "ignores TERM"}
    process = world.start("--result", "result.json")
    pid = world.await_hanging()
    started = time.monotonic()
    process.send_signal(first)
    world.await_term()
    time.sleep(0.4)
    process.send_signal(second)
    time.sleep(0.2)
    assert is_alive(pid) or time.monotonic() > started + 1  # on a machine that is busy
    ran = ended(process)
    assert time.monotonic() - started >= 1
    assert ran.status == 128 + first
    assert f"Stopped by {first.name} while running" in ran.err
    assert '"status": "failed"' in (world.app / "result.json").read_text()
    assert not is_alive(pid) and world.nothing_is_left()


def test_a_second_signal_does_not_extend_the_grace_period(world: World) -> None:
    world.constants["GRACE_SECONDS"] = 1
    world.rules["docker build --tag"] = {"hang": True, "ignore_term": True}
    process = world.start()
    world.await_hanging()
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert ended(process).status == 128 + signal.SIGTERM


def test_a_child_that_ignores_term_is_killed_after_the_grace_period(world: World) -> None:
    world.constants["GRACE_SECONDS"] = 0.5
    world.add_hooks("before_build")
    world.rules["before_build"] = {"hang": True, "child": "ignores TERM"}
    ran = world.deploy_and_signal(signal.SIGINT)
    assert ran.status == 128 + signal.SIGINT
    assert has_ended(int((world.home / "child").read_text()))


def test_zombies_delay_an_abort_no_longer_than_the_grace_period(world: World) -> None:
    """In a container the tool may be process 1, which inherits the children of its commands."""

    def become_reaper() -> None:
        heed_signals()
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER

    world.constants["GRACE_SECONDS"] = 0.5
    world.rules["docker build --tag"] = {"hang": True, "child": True}
    process = world.start("--result", "result.json", preexec_fn=become_reaper)
    world.await_hanging()
    process.send_signal(signal.SIGTERM)
    assert ended(process).status == 128 + signal.SIGTERM
    assert has_ended(int((world.home / "child").read_text()))
    assert '"status": "failed"' in (world.app / "result.json").read_text()


def test_a_signal_counts_although_another_thread_has_received_it(world: World) -> None:
    """sh starts threads, and the kernel may choose any of them."""
    world.rules["docker build --tag"] = {"hang": True}
    process = world.start(real=True)
    pid = world.await_hanging()
    threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
    other = max(thread for thread in threads if thread != process.pid)
    assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
    assert ended(process).status == 128 + signal.SIGTERM
    assert not is_alive(pid)


@pytest.mark.parametrize("command", ["before_build", "convox build --app"])
def test_a_timeout_ends_the_command_and_its_children(world: World, command: str) -> None:
    """This is the only test with a real timeout: of a command that is passed through, and of one that is captured."""
    world.add_hooks("before_build")
    world.rules[command] = {"hang": True, "child": True, "out": "Starting...\n"}
    ran = world.deploy("--timeout", "0.025")
    assert ran.status == 124
    name = "convox build" if command.startswith("convox") else "deploy/before_build.sh"
    message = (
        f"Timed out after 0.025 minutes while running `{name}`. Raise --timeout or DEPLOY_TIMEOUT."
    )
    assert message in ran.err
    assert not is_alive(int((world.home / "child").read_text()))


@pytest.mark.parametrize("timeout", ["0", "0.0"])
def test_a_timeout_of_zero_is_no_timeout(world: World, timeout: str) -> None:
    world.add_hooks("before_build")
    assert world.deploy("--timeout", timeout).status == 0


# --- signal settings of the parent ----------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_ignored_by_the_parent_stays_ignored(world: World, signum: Any) -> None:
    """As under nohup, and in Jenkins pipelines."""
    world.rules["docker build"] = {"hang": True}
    process = world.start(preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN))
    world.await_hanging()
    process.send_signal(signum)
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.status == 128 + signal.SIGTERM, ran.err


@pytest.mark.parametrize("how", ["blocked", "ignored"])
@pytest.mark.parametrize("signum", [signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD])
def test_timeouts_work_even_if_the_parent_blocks_or_ignores_signals(
    world: World, signum: Any, how: str
) -> None:
    def disturb() -> None:
        if how == "blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signum])
        else:
            signal.signal(signum, signal.SIG_IGN)

    world.constants["GRACE_SECONDS"] = 0.3
    world.rules["docker build"] = {"hang": True}
    ran = ended(world.start("--timeout", "0.005", preexec_fn=disturb))
    assert ran.status == 124, ran.text


def test_a_signal_blocked_by_the_parent_still_stops_a_deploy(world: World) -> None:
    world.rules["docker build"] = {"hang": True}
    process = world.start(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))
    world.await_hanging()
    process.send_signal(signal.SIGTERM)
    assert ended(process).status == 143


@pytest.mark.parametrize(
    "command", ["docker build", "docker push", "convox build --app", "git log"]
)
def test_exit_codes_count_even_if_the_parent_ignores_sigchld(world: World, command: str) -> None:
    world.add_git()
    world.constants["PUSH_PAUSE"] = 0
    world.rules[command] = {"status": 1, "err": "it went wrong"}
    ran = ended(world.start(preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)))
    assert ran.status in (1, 2), ran.text
    assert world.commands("convox releases promote --app") == []


def test_a_command_that_an_abort_reaches_before_the_tool_counts_as_aborted(world: World) -> None:
    """Jenkins terminates children before their parents."""
    world.rules["docker push"] = {"hang": True}
    process = world.start()
    os.kill(world.await_hanging(), signal.SIGTERM)
    ran = ended(process)
    assert ran.status == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM while running `docker push` for web." in ran.err


def test_a_command_with_an_alarm_of_its_own_has_failed_not_timed_out(world: World) -> None:
    world.rules["docker build"] = {"signal": signal.SIGALRM}
    ran = world.deploy()
    assert ran.status == 1 and "Timed out" not in ran.err


def test_an_abort_that_reaches_the_list_of_releases_first_prevents_the_promote(
    world: World,
) -> None:
    world.rules["convox api get /apps/shop/releases"] = {"signal": signal.SIGTERM}
    ran = world.deploy()
    assert ran.status == 128 + signal.SIGTERM
    assert world.commands("convox releases promote --app") == []


# --- processes that a command leaves behind -------------------------------------------


WITHOUT_THREADS = """
import os, threading, time, convox_deploy
push, start_usually, of_push = convox_deploy.Docker.push_once, threading.Thread.start, []
def start(thread):
    if " for pid " in thread.name:
        of_push.append(thread)
    if len(of_push) == {number}:
        threading.Thread.start = start_usually
        while not os.path.exists(os.environ["STANDIN"] + "/hanging.noted"):
            time.sleep(0.01)
        raise RuntimeError("can't start new thread")
    start_usually(thread)
def push_without_threads(*args):
    threading.Thread.start = start
    return push(*args)
convox_deploy.Docker.push_once = push_without_threads
convox_deploy.main()
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_command_for_which_there_is_no_thread_is_killed_and_said_in_the_systems_words(
    world: World, number: int
) -> None:
    """It has started already: sh needs a thread to await its end, and one to read its output."""
    world.rules["docker push"] = {"hang": True, "child": "ignores TERM"}
    program = WITHOUT_THREADS.format(number=number)
    env = {"PYTHONPATH": str(TOOL.parent)}
    ran = world.deploy("--result", "result.json", program=["-c", program], env=env)
    assert ran.status == 1
    assert "\npush failed:\nCannot run docker: can't start new thread.\n" in ran.err
    assert "Traceback" not in ran.err and "bug" not in ran.err
    assert has_ended(world.await_hanging())
    assert has_ended(int((world.home / "child").read_text()))
    assert len(world.commands("docker image rm")) == 1 and world.nothing_is_left()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("convox build --help", "keeps writing"),
        ("convox build --app", "keeps writing"),
        ("docker push", "keeps writing"),
        ("before_build", "keeps writing"),
        ("convox build --app", "is silent"),
        ("before_build", "is silent"),
    ],
)
def test_a_daemon_left_behind_by_a_command_does_not_delay_the_deploy(
    world: World, command: str, what: str
) -> None:
    """The daemon keeps the command's output open and is not in its process group."""
    world.add_hooks("before_build")
    world.rules[command] = {"usual": True, "daemon": what}
    # Not pipes, because a hook's daemon would keep those open.
    ran = world.deploy(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ran.status == 0, ran.text


# --- standard input and output --------------------------------------------------------


def pipe_to(world: World, reader: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Pipe a deploy into `reader`. The exit code is the last line on stderr."""
    world.ready_standins()
    command = f'{{ "$@"; echo "exit code $?" >&2; }} | {reader}'
    return subprocess.run(
        ["/bin/sh", "-c", command, "sh", sys.executable, str(TOOL), *args],
        cwd=world.app,
        env={**world.env, "PATH": f"{world.bin}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_pipe_closed_before_the_promote_stops_the_deploy(world: World) -> None:
    world.add_hooks()
    reader = "while read -r line; do case $line in *'=> push') break ;; esac; done"
    ran = pipe_to(world, reader, "--result", "result.json")
    assert ran.stderr.endswith("exit code 1\n") and "Traceback" not in ran.stderr
    assert world.commands("convox releases promote --app") == []
    assert world.nothing_is_left()
    assert '"exit_status": 1,' in (world.app / "result.json").read_text()


@pytest.mark.parametrize("hook", ["yes | head -c 1000000", "while echo more; do :; done"])
def test_a_pipe_closed_while_a_hook_prints_stops_the_deploy(world: World, hook: str) -> None:
    world.write("deploy/before_build.sh", f"#!/bin/sh\n{hook}\n", 0o755)
    ran = pipe_to(world, "head -20 >/dev/null")
    assert ran.stderr.endswith("exit code 1\n")
    assert "Traceback" not in ran.stderr
    assert world.commands("docker build --tag", "convox releases promote --app") == []


def test_a_pipe_closed_after_the_promote_does_not_fail_the_deploy(world: World) -> None:
    reader = "while read -r line; do case $line in 'OK') break ;; esac; done"
    ran = pipe_to(world, reader)
    assert ran.stderr == "exit code 0\n"
    assert world.running == "RNEWRELEASE"


def test_a_heartbeat_into_a_closed_pipe_does_not_stop_the_promote(world: World) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.2
    world.rules["convox releases promote --app"] = {"usual": "silent", "pause": 1}
    process = world.start("--result", "result.json")
    assert process.stdout and process.stderr
    assert any(line.startswith("$ convox releases promote") for line in process.stdout)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
    assert '"verified": true' in (world.app / "result.json").read_text()


def test_a_closed_stderr_does_not_change_the_exit_code(world: World) -> None:
    world.rules["docker build --tag"] = {"status": 1}
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as stderr:
        process = world.start(stderr=stderr)
        process.communicate(timeout=60)
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="requires /dev/full")
def test_a_full_disk_under_stdout_is_reported(world: World) -> None:
    with open("/dev/full", "w") as full:
        process = world.start("--result", "result.json", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Cannot write: No space left on device." in err and "Traceback" not in err
    assert world.commands("docker build --tag") == []


def test_a_log_file_that_becomes_too_large_does_not_hide_the_error(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "err": "x" * 5000 + "\n"}

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    with (world.home / "log").open("w") as log:
        ran = ended(world.start(stdout=log, preexec_fn=limit_file_size))
    assert ran.status == 1
    assert "release failed:\nCannot write: File too large." in ran.err
    # `convox build` has ended, and our output was closed before its release was known.
    assert "Nothing was promoted." in ran.err and "A release may have been built." in ran.err


def test_a_slow_reader_of_a_nonblocking_pipe_does_not_fail_the_deploy(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "err": "x" * 300_000 + "\n"}
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    process = world.start(stdout=write_end)
    os.close(write_end)
    with open(read_end) as reader:
        text = reader.read()
    assert ended(process).status == 0
    assert "shop is now running RNEWRELEASE." in text


def has_not_ended(world: World, command: str) -> bool:
    pids = [int(call.pid) for call in world.calls if call.line.startswith(command)]
    return not pids or is_alive(pids[0])


@pytest.mark.parametrize("command", ["docker push", "convox build --app"])
def test_a_slow_reader_loses_no_line(world: World, command: str) -> None:
    """The command has ended, and the tool is still blocked by its output, which nobody reads."""
    lines = [f"line {number}" for number in range(30_000)]
    (world.home / "repositories").write_text("123456789012/shop\n")  # or docker pushes twice
    world.rules[command] = {"usual": True, "err": "".join(f"{line}\n" for line in lines)}
    process = world.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and has_not_ended(world, command):
        time.sleep(0.05)
    time.sleep(2.5)  # sh stops reading 2 s after the end of a command
    ran = ended(process)
    assert ran.status == 0, ran.err
    assert [line for line in ran.out.splitlines() if line.startswith("line ")] == lines
