"""What is seen: headers, the closing table, colours, --quiet, and the image's platform."""

from __future__ import annotations

import json
import os
import pty
import re
import signal

import pytest
from conftest import ECR, TOOL, World

HEADERS = ["preflight", "before_build", "build", "after_build", "push", "release", "before_release", "promote"]
SHORT_ID = "3cbf733dcc19"


def headers(text: str) -> list[str]:
    return re.findall(r"^==> \[\d/7\] (\w+)$", text, re.MULTILINE)


def on_a_terminal(world: World, *args: str, **env: str) -> str:
    """Deploys on a pseudo-terminal, and returns all that is written to it."""
    master, terminal = pty.openpty()
    process = world.start(*args, env={**env, "TERM": "xterm"}, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    try:
        while chunk := os.read(master, 65536):
            said += chunk
    except OSError:  # Linux's way to say that nobody has the terminal open any more
        pass
    os.close(master)
    assert process.wait() == 0
    return said.decode()


def test_the_steps_have_numbered_headers_and_the_end_says_what_came_of_it(world: World) -> None:
    ran = world.deploy()
    assert headers(ran.out) == HEADERS
    closing = ran.out[ran.out.index("total ") :]
    assert f"\nimage    {ECR}/shop:{SHORT_ID}\ndigest   sha256:{'d' * 64}\nrelease  RNEWRELEASE\n" in closing
    assert closing.endswith("\nshop runs RNEWRELEASE.\n")
    assert "The image of web is for linux/amd64." in ran.out


def test_colours_are_for_terminals_and_no_color_turns_them_off(world: World) -> None:
    assert "\x1b[" not in world.deploy().out
    assert "\x1b[" in on_a_terminal(world)
    assert "\x1b[" not in on_a_terminal(world, NO_COLOR="1")


def test_quiet_shows_headers_and_the_end(world: World) -> None:
    world.add_hooks()
    ran = world.deploy("--quiet")
    assert ran.status == 0
    assert ran.err == ""
    assert re.sub(r"==> \[\d/7\] \w+\n", "", ran.out) == (
        "\nRelease RNEWRELEASE is built, and not live yet. To go on from here:\n"
        f"  {TOOL} --app shop --release RNEWRELEASE\n\nshop runs RNEWRELEASE.\n"
    )
    assert headers(ran.out) == HEADERS


def test_quiet_keeps_warnings(world: World) -> None:
    world.rules["aws ecr describe"] = {"status": 254, "err": "An error occurred (AccessDeniedException) when ..."}
    (world.home / "repositories").write_text("123456789012/shop")
    assert "warning: aws may not look up shop" in world.deploy(env={"DEPLOY_QUIET": "1"}).out


@pytest.mark.parametrize("command", ["before_build", "docker build", "docker push", "convox build --app"])
def test_quiet_shows_a_command_that_fails_and_all_that_it_said(world: World, command: str) -> None:
    world.add_hooks("before_build")
    said = [f"line {number}" for number in range(50_000)]
    world.rules[command] = {"status": 3, "out": "\n".join(said) + "\n", "err": "and an error\n"}
    ran = world.deploy("--quiet")
    assert ran.status == 1
    shown = ran.text.splitlines()
    kept = said if not command.startswith("convox build") else []  # its standard output is the release alone
    assert [line for line in shown if line.startswith("line ")] == kept
    assert "and an error" in shown
    start = {"before_build": "deploy/before_build.sh"}.get(command, command)
    assert any(line.startswith("$ ") and start in line for line in shown)


def test_quiet_shows_no_secret(world: World) -> None:
    world.rules["convox build --app"] = {"status": 1, "err": f"ERROR: {world.env['CONVOX_PASSWORD']}\n"}
    ran = world.deploy("--quiet")
    assert "ERROR: ***" in ran.err and world.env["CONVOX_PASSWORD"] not in ran.text


ASKED = {
    "linux/amd64": True,
    "amd64": True,
    "linux/x86_64": True,
    "linux/amd64,linux/arm64": True,  # docker says itself whether it can
    "local": True,
    "linux/arm64": False,
    "linux/arm64/v8": False,
    "aarch64": False,
    "linux/armhf": False,
}


@pytest.mark.parametrize("how", ["variable", "option", "option in one word"])
@pytest.mark.parametrize("platform", ASKED)
def test_an_image_for_another_platform_than_asked_for_is_not_pushed(world: World, platform: str, how: str) -> None:
    args = {"option": ["--", "--platform", platform], "option in one word": ["--", f"--platform={platform}"]}
    ran = world.deploy(*args.get(how, []), env={"DOCKER_DEFAULT_PLATFORM": platform if how == "variable" else None})
    assert (ran.status == 0) == ASKED[platform], ran.text
    assert bool(world.commands("docker push")) == ASKED[platform]


def test_the_option_for_the_platform_wins_over_the_variable(world: World) -> None:
    assert world.deploy("--", "--platform", "linux/amd64", env={"DOCKER_DEFAULT_PLATFORM": "linux/arm64"}).status == 0


@pytest.mark.parametrize("command", ["docker build", "convox releases promote --app"])
def test_the_result_file_tells_of_an_interruption(world: World, command: str) -> None:
    world.rules[command] = {"hang": True}
    process = world.start("--result", "result.json")
    world.await_hanging()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    result = json.loads((world.app / "result.json").read_text())
    assert (result["status"], result["exit_status"], process.returncode) == ("failed", 143, 143)
    assert result["failed_step"] == ("build" if command == "docker build" else "promote")
    assert result["release"] == (None if command == "docker build" else "RNEWRELEASE")
    assert (result["promoted"], result["running"]) == (False, None)
    assert "Stopped by SIGTERM during" in result["error"]
