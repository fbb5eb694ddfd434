"""What happens to a running command, its children and the app when a deploy is stopped."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TOOL, World, ended, heed_signals, is_alive

import convox_deploy

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
HANGING = {
    "docker version": "Nothing has been changed.",
    "before_build": "Nothing was released or promoted.",
    "docker build": "Nothing was released or promoted.",
    "docker push": "Nothing was released or promoted.",
    "convox build --app": "The build may still be running on the rack (check `convox builds --app shop`).",
    "before_release": "Release RNEWRELEASE is built. To resume from here:",
    "convox releases promote --app": "  Cancel: convox apps cancel --app shop\n",
}


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("command", HANGING)
def test_a_signal_ends_the_running_command_and_reports_the_state_of_the_deploy(
    world: World, command: str, signum: Any
) -> None:
    has_child = signum == signal.SIGTERM  # for which the tool waits
    world.add_hooks()
    world.rules[command] = {"hang": True, "child": has_child}
    process = world.start("--result", "result.json")
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


def test_a_second_ctrl_c_kills_without_waiting_for_the_grace_period(world: World) -> None:
    world.constants["GRACE_SECONDS"] = 10**6
    world.rules["docker build"] = {"hang": True, "ignore_term": True}
    process = world.start()
    pid = world.await_hanging()
    process.send_signal(signal.SIGINT)
    world.await_term()
    process.send_signal(signal.SIGINT)
    assert ended(process).status == 128 + signal.SIGINT
    assert not is_alive(pid)


def test_the_grace_period_is_the_same_as_for_docker_stop() -> None:
    assert convox_deploy.GRACE_SECONDS == 10


@pytest.mark.parametrize("command", ["before_build", "convox build --app"])
def test_a_timeout_ends_the_command_and_its_children(world: World, command: str) -> None:
    """This is the only test with a real timeout: of a command that is passed through, and of one that is captured."""
    world.add_hooks("before_build")
    world.rules[command] = {"hang": True, "child": True, "out": "Starting...\n"}
    ran = world.deploy("--timeout", "1.5s")
    assert ran.status == 124
    name = "convox build" if command.startswith("convox") else "deploy/before_build.sh"
    message = (
        f"Timed out after 0.025 minutes while running `{name}`. Raise --timeout or DEPLOY_TIMEOUT."
    )
    assert message in ran.err
    assert not is_alive(int((world.home / "child").read_text()))


@pytest.mark.parametrize("timeout", ["0", "0.0", "0s"])
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
    ran = ended(world.start("--timeout", "0.3s", preexec_fn=disturb))
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
    assert "Stopped by SIGTERM while running `docker push`." in ran.err


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


# --- processes that cannot be ended ---------------------------------------------------

ROOTS = "$< = 0; $> = 0; $| = 1; print qq(began\\n); sleep 600"


@pytest.fixture
def as_root(world: World) -> Path:
    """A setuid perl that runs as root for any user, like a command under sudo."""
    if os.geteuid() != 0 or not Path("/usr/bin/perl").exists():
        pytest.skip("requires root and perl")
    program = world.home / "as-root"
    shutil.copy("/usr/bin/perl", program)
    program.chmod(0o4755)
    return program


def deploy_as_nobody(world: World, *args: str, **how: Any) -> subprocess.Popen[str]:
    """Start a deploy as an unprivileged user, who cannot signal root's processes."""
    for directory in (world.home, world.app, world.tmp, *world.home.parents[:3]):
        os.chmod(directory, 0o777)
    for path in [
        *world.home.rglob("*"),
        *Path(world.env["STANDIN_RESPONSES"]).parent.glob("responses*/**"),
    ]:
        if not path.is_symlink() and path.name != "as-root" and path.exists():
            os.chmod(path, 0o777)

    def become_nobody() -> None:
        heed_signals()
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    world.ready_standins()
    for name in ("calls", "rules", "rules.json"):
        os.chmod(world.home / name, 0o666)
    how = {"preexec_fn": become_nobody, "python": python_for_all(world), **how}
    return world.start(*args, **how)


def python_for_all(world: World) -> str:
    """Return a Python that an unprivileged user can run, with our packages."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no Python that an unprivileged user can run")
    packages = world.home / "packages"
    for package in ("click", "sh", "yaml"):
        module = __import__(package)
        assert module.__file__
        shutil.copytree(Path(module.__file__).parent, packages / package)
    world.env["PYTHONPATH"] = f"{packages}:{TOOL.parent}"
    return python


@pytest.mark.parametrize("how", ["timeout", "TERM", "three Ctrl-C"])
def test_another_users_process_is_reported_and_not_waited_for(
    world: World, as_root: Path, how: str
) -> None:
    world.write("deploy/before_build.sh", f"#!/bin/sh\nexec {as_root} -e '{ROOTS}'\n", 0o755)
    world.constants["GRACE_SECONDS"] = 0.3
    limit = "1s" if how == "timeout" else "0"
    with open(world.home / "log", "wb") as log:
        process = deploy_as_nobody(world, "--timeout", limit, stderr=log)
    assert process.stdout and "began\n" in process.stdout
    for _ in range({"timeout": 0, "TERM": 1}.get(how, 3)):
        process.send_signal(signal.SIGINT if "Ctrl-C" in how else signal.SIGTERM)
    try:
        status = process.wait(timeout=40)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(as_root)], check=False)
    text = (world.home / "log").read_text()
    assert status == {"timeout": 124, "TERM": 143}.get(how, 130), text
    assert "which another user runs and we cannot end (process group " in text


@pytest.mark.parametrize(
    "command", ["convox build --help", "convox build --app", "docker push", "before_build"]
)
@pytest.mark.parametrize("what", ["is silent", "keeps writing"])
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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_reported(world: World, closed: str) -> None:
    world.ready_standins()
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" "$1" --result result.json {closed}', sys.executable, TOOL],
        cwd=world.app,
        env=world.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert world.calls == []
    message = "Standard input, output or error is closed. Use /dev/null instead."
    assert message in (world.app / "result.json").read_text()
    assert "2>&-" in closed or message in done.stderr


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


def test_a_pipe_closed_before_the_promote_stops_the_deploy_quietly(world: World) -> None:
    world.add_hooks()
    ran = pipe_to(world, "head -3", "--result", "result.json")
    assert ran.stderr == "exit code 141\n"
    assert world.commands("convox releases promote --app") == []
    assert world.nothing_is_left()
    assert '"exit_status": 141' in (world.app / "result.json").read_text()


@pytest.mark.parametrize("hook", ["yes | head -c 1000000", "while echo more; do :; done"])
def test_a_pipe_closed_while_a_hook_prints_stops_the_deploy(world: World, hook: str) -> None:
    world.write("deploy/before_build.sh", f"#!/bin/sh\n{hook}\n", 0o755)
    ran = pipe_to(world, "head -20 >/dev/null")
    assert ran.stderr.splitlines()[-1] in ("exit code 141", "exit code 1")
    assert "Traceback" not in ran.stderr
    assert world.commands("docker build", "convox releases promote --app") == []


def test_a_pipe_closed_after_the_promote_does_not_fail_the_deploy(world: World) -> None:
    reader = "while read -r line; do case $line in 'OK') break ;; esac; done"
    ran = pipe_to(world, reader)
    assert ran.stderr == "exit code 0\n"
    assert world.running == "RNEWRELEASE"


def test_a_heartbeat_into_a_closed_pipe_does_not_stop_the_promote(world: World) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.2
    world.rules["convox releases promote --app"] = {"usual": True, "pause": 1}
    process = world.start("--quiet", "--result", "result.json")
    assert process.stdout and process.stderr
    assert any("[8/8] promote" in line for line in process.stdout)
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
    assert world.commands("docker build") == []


def test_a_log_file_that_becomes_too_large_does_not_hide_the_error(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "err": "x" * 5000 + "\n"}

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    with (world.home / "log").open("w") as log:
        ran = ended(world.start(stdout=log, preexec_fn=limit_file_size))
    assert ran.status == 1
    assert "release failed:" in ran.err and "Nothing was released" in ran.err


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
