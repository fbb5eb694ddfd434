"""What becomes of a running command, its children and the app when a deploy is ended from outside."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest
from conftest import World, ended, is_alive

import convox_deploy

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
HANGING = {
    "docker version": "Nothing was changed.",
    "before_build": "Nothing was released or promoted.",
    "docker build": "Nothing was released or promoted.",
    "docker push": "Nothing was released or promoted.",
    "convox build --app": "The build may still run on the rack, `convox builds --app shop` tells",
    "before_release": "Release RNEWRELEASE is built; go on with",
    "convox releases promote --app": "`convox apps cancel --app shop` stops it.",
}


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("command", HANGING)
def test_a_signal_ends_the_running_command_and_tells_what_goes_on(world: World, command: str, signum: Any) -> None:
    world.add_hooks()
    world.rules[command] = {"hang": True, "child": True}
    process = world.start("--result", "result.json")
    pid = world.await_hanging()
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert f"Stopped by {signum.name} during `" in err
    assert HANGING[command] in err and "Traceback" not in err
    assert not is_alive(pid) and not is_alive(int((world.home / "child").read_text()))
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


def test_a_second_ctrl_c_kills_without_waiting_for_the_grace_period(world: World) -> None:
    world.rules["docker build"] = {"hang": True, "ignore_term": True}
    world.constants["GRACE_SECONDS"] = 10**6
    process = world.start()
    pid = world.await_hanging()
    process.send_signal(signal.SIGINT)
    world.await_term()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not is_alive(pid)


def test_a_time_out_ends_the_command_and_its_children(world: World) -> None:
    world.rules["convox build --app"] = {"hang": True, "child": True, "out": "Starting build...\n"}
    ran = world.deploy("--timeout", "0.1")
    assert ran.status == 124
    assert "The time was up during `convox build`. DEPLOY_TIMEOUT sets the minutes for a step." in ran.err
    assert "shop ran ROLDRELEASE when this began. The build may still run on the rack" in ran.err
    assert not is_alive(int((world.home / "child").read_text()))


def test_the_grace_period_is_that_of_docker_stop() -> None:
    assert convox_deploy.GRACE_SECONDS == 10


def test_without_a_limit_nothing_is_timed_out(world: World) -> None:
    world.add_hooks("before_build")
    assert world.deploy("--timeout", "0").status == 0


@pytest.mark.parametrize("command", ["convox build --help", "convox build --app"])
def test_a_daemon_that_a_command_leaves_behind_does_not_hold_the_deploy_up(world: World, command: str) -> None:
    """It has the command's output open still, and is not in its process group."""
    world.rules[command] = {"usual": True, "daemon": True}
    if command == "convox build --help":  # which the stand-in hands on to another program
        world.rules[command] = {"daemon": True, "out": "--manifest --app --description --id"}
    ran = world.deploy()
    os.kill(int((world.home / "daemon").read_text()), signal.SIGKILL)
    assert ran.status == 0, ran.text


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_the_caller_ignores_stays_ignored(world: World, signum: Any) -> None:
    """As under nohup, and in Jenkins pipelines."""
    world.rules["docker build"] = {"hang": True}
    process = world.start(preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN))
    world.await_hanging()
    process.send_signal(signum)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, err


def test_a_command_that_an_abort_reaches_first_counts_as_aborted(world: World) -> None:
    """Jenkins ends children before parents."""
    world.rules["docker push"] = {"hang": True}
    process = world.start()
    os.kill(world.await_hanging(), signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "`docker push` was ended by SIGTERM." in err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_nothing_but_what_is_seen(world: World, closed: str) -> None:
    world.add_hooks()
    process = world.start()
    process.communicate(timeout=60)
    command = f'exec "$0" "$1" --result result.json {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command, *[str(word) for word in process.args]],  # type: ignore[union-attr]
        cwd=world.app,
        env=world.env,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"status": "succeeded"' in (world.app / "result.json").read_text()


def test_a_log_that_breaks_stops_the_deploy_without_a_promote(world: World) -> None:
    world.add_hooks("before_build")
    world.rules["before_build"] = {"hang": True, "child": True}
    read_end, write_end = os.pipe()
    process = world.start("--result", "result.json", stdout=write_end, stderr=write_end)
    os.close(write_end)
    pid = world.await_hanging()
    os.close(read_end)
    os.kill(pid, signal.SIGKILL)
    os.kill(int((world.home / "child").read_text()), signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert world.commands("convox releases promote --app") == []
    assert world.nothing_is_left()
    assert '"status": "failed"' in (world.app / "result.json").read_text()
