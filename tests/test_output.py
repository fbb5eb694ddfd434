"""Output on a terminal and in a log: headers, the summary, colors, --quiet, heartbeats and raw bytes."""

from __future__ import annotations

import os
import pty
import re

import pytest
from conftest import ECR, World

HEADERS = [
    "preflight",
    "before_build",
    "build",
    "after_build",
    "push",
    "release",
    "before_release",
    "promote",
]
SHORT_ID = "3cbf733dcc19"


def headers(text: str) -> list[str]:
    return re.findall(r"^==> \[\d/8\] (\w+)", text, re.MULTILINE)


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


def test_the_first_line_names_the_app_the_commit_the_rack_and_the_running_release(
    world: World,
) -> None:
    commit = world.add_git()
    lines = world.deploy().out.splitlines()
    assert lines[1:4] == [
        "==> [1/8] preflight",
        f'Deploying shop {commit} "Sell more" to rack.example.com (running: ROLDRELEASE)',
        "Manifest: docker-compose.yml",
    ]


def test_an_unused_manifest_is_mentioned(world: World) -> None:
    world.write("convox.yml", (world.app / "docker-compose.yml").read_text())
    assert "\nManifest: convox.yml, not docker-compose.yml\n" in world.deploy().out


@pytest.mark.parametrize("path", ["./docker-compose.yml", "{app}/docker-compose.yml"])
def test_the_manifest_itself_is_not_mentioned_as_unused(world: World, path: str) -> None:
    path = path.format(app=world.app)
    assert f"\nManifest: {path}\n" in world.deploy("--file", path).out


def test_the_steps_have_numbered_headers_and_a_summary_follows(world: World) -> None:
    world.add_hooks()
    ran = world.deploy()
    assert headers(ran.out) == HEADERS
    closing = ran.out[ran.out.index("\npreflight  ") :]
    times = r"".join(rf"{step} +\d+\.\d s\n" for step in [*HEADERS, "total"])
    assert re.fullmatch(
        rf"\n{times}image   {ECR}/shop:{SHORT_ID}\ndigest  sha256:d{{64}}\n\nshop is now running RNEWRELEASE\.\n"
        r"To roll back: convox releases promote --app shop --wait ROLDRELEASE\n",
        closing,
    )
    assert "\nImage for web: linux/amd64\n" in ran.out


def test_a_step_for_a_missing_hook_takes_one_line(world: World) -> None:
    ran = world.deploy()
    for number, hook in ((2, "before_build"), (4, "after_build"), (7, "before_release")):
        assert f"\n\n==> [{number}/8] {hook}: skipped, no deploy/{hook}.sh\n\n==>" in ran.out


def test_the_summary_fits_in_80_columns_except_for_the_image(world: World) -> None:
    closing = world.deploy().out.partition("\npreflight  ")[2]
    assert [
        line for line in closing.splitlines() if len(line) > 80 and not line.startswith("image ")
    ] == []


# --- colors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "on_terminal", "in_log"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colors_are_for_terminals_unless_a_variable_overrides_it(
    world: World, env: dict[str, str | None], on_terminal: bool, in_log: bool
) -> None:
    assert ("\x1b[" in on_a_terminal(world, **env)) == on_terminal
    assert ("\x1b[" in world.deploy(env=env).out) == in_log


# --- quiet ----------------------------------------------------------------------------


def test_quiet_shows_only_headers_and_the_outcome(world: World) -> None:
    world.add_hooks()
    ran = world.deploy("--quiet")
    assert ran.status == 0
    assert ran.err == ""
    assert headers(ran.out) == HEADERS
    rest = [line for line in ran.out.splitlines() if line and not line.startswith("==>")]
    assert rest[0] == "Deploying shop to rack.example.com (running: ROLDRELEASE)"
    assert rest[1] == "Manifest: docker-compose.yml"
    assert rest[2] == "Built release RNEWRELEASE (not live yet). To resume from here:"
    assert rest[3].startswith("  cd ")
    assert rest[4] == "shop is now running RNEWRELEASE." and rest[5].startswith("To roll back: ")


def test_quiet_still_shows_warnings(world: World) -> None:
    (world.home / "releases.json").write_text('[{"id": "RNEWERXXXXX"}]')
    assert (
        "warning: RNEWERXXXXX (no description) is newer"
        in world.deploy(env={"DEPLOY_QUIET": "1"}).out
    )


@pytest.mark.parametrize(
    "command", ["before_build", "docker build", "docker push", "convox build --app"]
)
def test_quiet_shows_a_failed_command_with_all_its_output(world: World, command: str) -> None:
    world.add_hooks("before_build")
    if command == "docker push":
        world.rules["aws ecr create-repository"] = {
            "status": 254,
            "err": "RepositoryAlreadyExistsException",
        }
    lines = [f"line {number}" for number in range(50_000)]
    world.rules[command] = {"status": 3, "out": "\n".join(lines) + "\n", "err": "and an error\n"}
    ran = world.deploy("--quiet")
    assert ran.status == 1
    shown = ran.err.splitlines()
    kept = (
        lines if not command.startswith("convox build") else []
    )  # its stdout is only the release ID
    assert [line for line in shown if line.startswith("line ")] == kept
    assert "and an error" in shown
    start = {"before_build": "deploy/before_build.sh"}.get(command, command)
    assert any(line.startswith(f"$ {start}") for line in shown)


def test_quiet_redacts_secrets(world: World) -> None:
    world.rules["docker build"] = {"status": 1, "err": f"ERROR: {world.env['CONVOX_PASSWORD']}\n"}
    ran = world.deploy("--quiet")
    assert "ERROR: ***" in ran.err and str(world.env["CONVOX_PASSWORD"]) not in ran.text


def test_a_dry_run_is_never_quiet(world: World) -> None:
    assert "$ docker build" in world.deploy("--dry-run", env={"DEPLOY_QUIET": "1"}).out


# --- heartbeats -----------------------------------------------------------------------


def test_the_heartbeat_interval_is_one_minute() -> None:
    import convox_deploy

    assert (
        convox_deploy.HEARTBEAT_SECONDS == 60
    )  # five times that for output that is passed through


@pytest.mark.parametrize(
    "command", ["convox build --app", "docker push", "aws ecr get-login-password"]
)
@pytest.mark.parametrize("args", [[], ["--quiet"]])
def test_a_silent_captured_command_gets_a_heartbeat(
    world: World, command: str, args: list[str]
) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.2
    world.rules[command] = {"usual": True, "pause": 1}
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    name = " ".join(command.split()[:3]).removesuffix(" --app")
    assert ran.out.count(f"\nStill running `{name}` (0 min)\n") >= 2


def test_a_passed_through_command_gets_a_heartbeat_in_logs_but_not_on_a_terminal(
    world: World,
) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.05
    world.rules["docker build"] = {"usual": True, "pause": 1}
    heartbeat = "Still running `docker build` (0 min)"
    assert heartbeat in world.deploy().out
    assert heartbeat not in on_a_terminal(world)


def test_a_command_that_prints_gets_no_heartbeat(world: World) -> None:
    world.constants["HEARTBEAT_SECONDS"] = 0.5
    world.rules["convox build --app"] = {"usual": True, "ticks": 15}
    ran = world.deploy()
    assert ran.status == 0 and "Still" not in ran.out


# --- raw bytes ------------------------------------------------------------------------

LATIN = "Gr\udcf6\udcdfe"  # two bytes that are not UTF-8


@pytest.mark.parametrize(
    "locale",
    [
        {},
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
)
def test_arguments_and_paths_that_are_not_utf8_are_passed_on_unchanged(
    world: World, locale: dict[str, str | None]
) -> None:
    world.app = world.app.rename(world.home / LATIN)
    world.add_git("Größe 世界")
    world.add_hooks()
    args = ["--", "--build-arg", f"SIZE={LATIN}"]
    ran = world.deploy(*args, env={**locale, "BUILD_URL": f"https://ci/{LATIN}"}, text=False)
    assert ran.status == 0, ran
    out: bytes = ran.out  # type: ignore[assignment]
    assert f"SIZE={LATIN}".encode("utf-8", "surrogateescape") in out
    assert world.call("docker build").argv[5] == f"SIZE={LATIN}"
    argv = world.call("convox build --app").argv
    description = argv[argv.index("--description") + 1]
    assert description.endswith(f"Größe 世界 https://ci/{LATIN}")
    assert world.call("before_build").env["GIT_DESCRIPTION"].endswith("Größe 世界")


def test_output_that_is_not_utf8_is_passed_on_unchanged(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "bytes": [246, 223, 10]}
    ran = world.deploy(text=False)
    assert b"\n\xf6\xdf\n" in ran.out  # type: ignore[operator]
