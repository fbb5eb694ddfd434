"""Output on a terminal and in a log: headers, the summary, colors and heartbeats."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess

import pytest
from conftest import STEPS, World

from convox_deploy import HOOKS, LOG_LINES


def headers(text: str) -> list[str]:
    return re.findall(r"^==> (\w+)$", text, re.MULTILINE)


def on_a_terminal(world: World, *args: str, **env: str | None) -> str:
    """Deploy on a pseudo-terminal and return the output."""
    master, terminal = pty.openpty()
    process = world.start(*args, env={"TERM": "xterm", **env}, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:  # Linux's error when the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0, written
    return written.decode()


def test_the_first_lines_name_the_app_the_commit_the_rack_and_the_running_release(
    world: World,
) -> None:
    commit = world.add_git()
    world.describe("ROLDRELEASE", "Sell")
    lines = world.deploy("--skip-ecr-login").out.splitlines()
    assert lines[1:5] == [
        "==> preflight",
        f'Deploying shop (APP_NAME) {commit} "Sell more" on rack.example.com (CONVOX_HOST)',
        "Running now: ROLDRELEASE (Sell)",
        "Manifest: docker-compose.yml",
    ]


NO_RACK = {"CONVOX_HOST": None, "CONVOX_PASSWORD": None}
URL = {**NO_RACK, "RACK_URL": "https://convox:secret@rack.example.com/"}


@pytest.mark.parametrize(
    ("args", "env", "app"),
    [
        ([], {}, "shop (APP_NAME)"),
        ([], {"APP_NAME": None}, "shop (directory name)"),
        ([], {"APP_NAME": None, "CONVOX_APP": "other"}, "other (CONVOX_APP)"),
        ([], {"CONVOX_APP": "other"}, "shop (APP_NAME)"),
        (["--app", "other"], {}, "other (--app)"),
        (["--app", "other"], {"APP_NAME": None}, "other (--app)"),
    ],
)
def test_the_first_line_says_where_the_apps_name_comes_from(
    world: World, args: list[str], env: dict[str, str | None], app: str
) -> None:
    assert f"\nDeploying {app} on " in world.deploy(*args, env=env).out


@pytest.mark.parametrize(
    ("args", "env", "rack"),
    [
        ([], {}, "rack.example.com (CONVOX_HOST)"),
        ([], URL, "rack.example.com (RACK_URL)"),
        (["--rack", "staging"], NO_RACK, "staging (--rack)"),
        ([], {**NO_RACK, "CONVOX_RACK": "staging"}, "staging (CONVOX_RACK)"),
        ([], {**NO_RACK, "RACK_NAME": "staging"}, "staging (RACK_NAME)"),
        (["--rack", "staging"], {}, "staging via rack.example.com (--rack)"),
        ([], {**NO_RACK, "STANDIN_SWITCH": "staging"}, "staging (convox switch)"),
        ([], NO_RACK, "the convox CLI's current rack"),
    ],
)
def test_the_first_line_says_where_the_racks_name_comes_from(
    world: World, args: list[str], env: dict[str, str | None], rack: str
) -> None:
    assert f" on {rack}\n" in world.deploy(*args, env=env).out


def test_the_first_lines_say_that_nothing_is_running(world: World) -> None:
    (world.home / "running").write_text("\n")
    assert "\nRunning now: nothing\n" in world.deploy().out


def test_each_step_has_a_header_and_ends_with_its_time(world: World) -> None:
    world.add_hooks()
    programs = ["docker build", "docker push", "convox build --app", "convox releases promote"]
    world.rules = {start: {"usual": True, "pause": 0.06} for start in [*HOOKS, *programs]}
    ran = world.deploy()
    assert headers(ran.out) == STEPS
    assert re.findall(r"^(\w+): \d+\.\d s$", ran.out, re.MULTILINE)[1:] == [*STEPS[1:], "Total"]


def test_a_good_end_says_what_was_verified(world: World) -> None:
    ran = world.deploy(env={"CONVOX_PASSWORD": "secret"})
    assert re.fullmatch(
        r"\nshop is now running RNEWRELEASE\.\n"
        r"Verified: rack\.example\.com reports RNEWRELEASE running\.\n"
        r"To roll back to ROLDRELEASE, run the same command with --rollback ROLDRELEASE"
        r" \(or DEPLOY_ROLLBACK=ROLDRELEASE\)\.\n"
        r"Total: \d+\.\d s\n",
        ran.out[ran.out.index("\nshop is now") :],
    )


def test_the_error_is_the_last_thing_that_is_printed(world: World) -> None:
    world.rules["docker build"] = {"status": 1}
    ran = world.deploy(stderr=subprocess.STDOUT)
    assert "Total" not in ran.out
    assert ran.out.index("\n$ docker build") < ran.out.index("\nbuild failed:\n")


@pytest.mark.parametrize("args", [[], ["--dry-run"]])
def test_a_step_that_does_nothing_prints_nothing(world: World, args: list[str]) -> None:
    ran = world.deploy(*args)
    assert headers(ran.out) == [step for step in STEPS if step not in HOOKS]
    assert "hook" not in ran.out and "before_release" not in ran.out
    assert ": 0.0 s" not in ran.out and "docker tag" not in ran.out


def test_an_app_as_it_is_is_pushed_in_the_release_step_alone(world: World) -> None:
    """What docker and the CLI say about our one-line Dockerfiles is of interest only if they fail."""
    world.write("convox.yml", "services:\n  web:\n    build: .\n")
    world.write("Dockerfile", "FROM scratch\n")
    world.rules["convox build --external"] = {"usual": True, "err": EXTERNAL_LOG}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    assert headers(ran.out) == ["preflight", "build", "release", "promote"]
    step = ran.out.partition("==> release\n")[2].partition("Built release")[0].splitlines()
    assert step[0] == "Pushing to the rack's registry: web (linux/amd64)"
    assert step[1].startswith("$ convox build --external --app shop")
    assert step[2:] == [line for line in EXTERNAL_LOG.splitlines() if line in SHOWN_LINES]


def test_a_failing_build_of_the_rack_is_quoted(world: World) -> None:
    world.write("convox.yml", "services:\n  web:\n    build: .\n")
    world.write("Dockerfile", "FROM scratch\n")
    world.rules["convox build --external"] = {"status": 1, "err": EXTERNAL_LOG + "ERROR: no\n"}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 1
    quoted = "".join(f"  {line}\n" for line in [*EXTERNAL_LOG.splitlines(), "ERROR: no"])
    assert f"exited with code 1.\n{quoted}" in ran.err
    assert "ERROR: no" not in ran.out


EXTERNAL_LOG = """\
Building: .
#1 [internal] load build definition from Dockerfile
#1 DONE 0.0s
WARNING: the app web has no health check
Running: docker tag 0123 registry/shop:web.BABCDEFGHIJ
Running: docker push registry/shop:web.BABCDEFGHIJ
0123: Pushed
"""
SHOWN_LINES = [
    "WARNING: the app web has no health check",
    "Running: docker push registry/shop:web.BABCDEFGHIJ",
]


@pytest.mark.parametrize("command", ["docker build", "convox build --app", "before_build"])
def test_output_that_was_printed_is_not_printed_again(world: World, command: str) -> None:
    world.add_hooks("before_build")
    name = "deploy/before_build.sh" if command == "before_build" else command[:12]
    world.rules[command] = {"status": 3, "err": "one\nthe cause\n"}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and ran.text.count("the cause") == 1, ran.text
    assert re.search(
        rf"^`{name}`( for web)? exited with code 3. Its output is above.$", ran.err, re.M
    )
    error = json.loads((world.app / "result.json").read_text())["error"]
    assert "exited with code 3.\n  > one\n  > the cause" in error


def test_a_command_that_fails_without_a_word_is_not_said_to_have_printed_something(
    world: World,
) -> None:
    world.rules["docker build"] = {"status": 3}
    assert (
        "`docker build` for web exited with code 3.\n  It printed nothing.\n" in world.deploy().err
    )


# --- colors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "on_terminal", "in_log"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colors_are_for_terminals_unless_no_color_is_set(
    world: World, env: dict[str, str | None], on_terminal: bool, in_log: bool
) -> None:
    assert ("\x1b[" in on_a_terminal(world, **env)) == on_terminal
    assert ("\x1b[" in world.deploy(env=env).out) == in_log


# --- heartbeats -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["convox build --app", "docker push", "aws ecr get-login-password"]
)
def test_a_silent_captured_command_gets_a_heartbeat(world: World, command: str) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.2
    world.rules[command] = {"usual": True, "pause": 1}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    name = " ".join(command.split()[:3]).removesuffix(" --app")
    found = re.findall(rf"^Still running `{name}`( for web)? \(0 min\)$", ran.out, re.MULTILINE)
    assert len(found) >= 2


def test_a_passed_through_command_gets_a_heartbeat_in_logs_but_not_on_a_terminal(
    world: World,
) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.05
    world.rules["docker build"] = {"usual": True, "pause": 1}
    heartbeat = "Still running `docker build` for web (0 min)"
    assert heartbeat in world.deploy().out
    assert heartbeat not in on_a_terminal(world)


def test_a_heartbeat_on_a_terminal_is_a_line_as_in_a_log(world: World) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.2
    world.rules["convox build --app"] = {"usual": True, "pause": 1}
    text = on_a_terminal(world)
    assert text.count("\r\nStill running `convox build` (0 min)\r\n") >= 2
    assert "\x1b[K" not in text


def test_a_command_that_prints_gets_no_heartbeat(world: World) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.5
    world.rules["convox build --app"] = {"usual": True, "ticks": 15}
    ran = world.deploy()
    assert ran.status == 0 and "Still" not in ran.out


def test_output_that_is_not_utf8_is_shown_with_replacement_characters(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "bytes": [71, 114, 246, 10]}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert "\nGr\ufffd\n" in ran.out


# --- long errors ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["docker login", "convox api get /apps/shop"])
def test_of_a_long_error_the_last_lines_are_shown(world: World, command: str) -> None:
    lines = [*(f"log {number}" for number in range(40)), "ERROR: the reason"]
    world.constants["POLL_SECONDS"] = 0
    world.rules[command] = {"status": 1, "err": "\n".join(lines)}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 2
    shown = [line.strip() for line in ran.err.splitlines() if line.startswith("  ")]
    assert shown == lines[-LOG_LINES:]
    written = json.loads((world.app / "result.json").read_text())["error"]
    quoted = [line.strip() for line in written.splitlines() if line.startswith("  ")]
    assert quoted == shown
