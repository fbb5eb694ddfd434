"""Resuming: the printed command works from any directory and never skips the before_release hook."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import COMPOSE, TOOL, Ran, World


def resume_command(ran: Ran) -> str:
    """Return the last resume command that was printed."""
    return re.findall(r"^ +(?:Retry: +)?(cd .* --release R\w+)$", ran.text, re.MULTILINE)[-1]  # type: ignore[no-any-return]


def run_in_a_shell(world: World, command: str, **env: str) -> subprocess.CompletedProcess[str]:
    world.ready_standins()
    (world.home / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=world.home / "elsewhere",
        env={**world.env, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_resume_command_is_printed_as_soon_as_the_release_is_built_and_works(
    world: World,
) -> None:
    world.add_hooks()
    world.rules["before_release"] = {"status": 3}
    ran = world.deploy()
    assert ran.status == 1
    assert ran.out.index("--release RNEWRELEASE") < ran.out.index("==> [7/8] before_release")
    world.rules.clear()
    (world.home / "calls").unlink()
    done = run_in_a_shell(world, resume_command(ran))
    assert done.returncode == 0, done.stderr
    assert [line for line in world.commands() if not line.startswith("git")] == [
        "convox build --help",
        "convox releases promote --help",
        "convox api get /apps/shop",
        "before_release",
        "convox api get /apps/shop/releases",
        "convox releases promote --app shop --wait RNEWRELEASE",
        "convox api get /apps/shop",
    ]
    hook = world.call("before_release")
    assert hook.env["RELEASE_ID"] == "RNEWRELEASE" and hook.cwd == str(world.app)


@pytest.mark.parametrize("name", ["DEPLOY_NO_PROMOTE", "DEPLOY_FROM"])
def test_the_resume_command_works_where_the_variable_is_still_set(world: World, name: str) -> None:
    assert world.deploy("--result", "first.json").status == 0
    variables = {name: "1" if name == "DEPLOY_NO_PROMOTE" else str(world.app / "first.json")}
    ran = world.deploy("--no-promote", env=variables)
    assert ran.status == 0, ran.text
    (world.home / "calls").unlink()
    done = run_in_a_shell(world, resume_command(ran), **variables)
    assert done.returncode == 0, done.stderr
    assert world.commands("convox releases promote --app") != []


def test_the_resume_command_includes_settings_that_are_not_defaults(world: World) -> None:
    world.write("deploy/my compose.yml", COMPOSE)
    args = ["--file", "deploy/my compose.yml", "--rack", "org/production", "--no-verify"]
    ran = world.deploy("--no-promote", *args, env={"CONVOX_HOST": None, "CONVOX_PASSWORD": None})
    command = resume_command(ran)
    assert command.startswith(
        f"cd {world.app} && {sys.executable} {TOOL} --app shop --rack org/production"
    )
    assert command.endswith(" --file 'deploy/my compose.yml' --no-verify --release RNEWRELEASE")
    done = run_in_a_shell(world, command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["My Shop", "it's $(x) `y` ;"])
def test_the_resume_command_is_quoted(world: World, name: str) -> None:
    world.app = world.app.rename(world.home / name)
    ran = world.deploy("--no-promote")
    done = run_in_a_shell(world, resume_command(ran))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [[], ["--file", "other.yml"]])
def test_resuming_outside_the_project_root_is_refused(world: World, args: list[str]) -> None:
    """The before_release hook would not be found there, so it would be skipped."""
    (world.app / "docker-compose.yml").unlink()
    ran = world.deploy("--release", "RABCDEFGHIJ", *args)
    assert ran.status == 2
    assert f"{(args or ['', 'docker-compose.yml'])[1]} is not a file." in ran.err
    assert world.calls == []


def test_resuming_needs_neither_docker_nor_aws(world: World) -> None:
    for program in ("docker", "aws"):
        (world.bin / program).unlink()
    ran = world.deploy("--release", "RABCDEFGHIJ")
    assert ran.status == 0, ran.text
    assert "shop is now running RABCDEFGHIJ." in ran.out
    assert "Deploying shop RABCDEFGHIJ to rack.example.com (running: ROLDRELEASE)" in ran.out


NEWER = '[{"id": "RNEWERXXXXX", "description": "env add:PRICE", "env": "PRICE=very-secret"}]'


@pytest.mark.parametrize("args", [[], ["--release", "RABCDEFGHIJ"]])
def test_a_release_that_is_not_the_newest_is_promoted_with_a_warning(
    world: World, args: list[str]
) -> None:
    (world.home / "releases.json").write_text(NEWER)
    ran = world.deploy(*args)
    assert ran.status == 0
    assert "warning: RNEWERXXXXX (env add:PRICE) is newer than R" in ran.out
    assert ran.out.index("warning: RNEWERXXXXX") < ran.out.index("$ convox releases promote")
    assert "very-secret" not in ran.text


@pytest.mark.parametrize("text", ["[]", "{}", '["x"]', '[{"id": null}]', "<html>"])
def test_an_unreadable_list_of_releases_does_not_fail_the_deploy(world: World, text: str) -> None:
    (world.home / "releases.json").write_text(text)
    assert world.deploy().status == 0


def test_credentials_that_cannot_list_releases_can_promote(world: World) -> None:
    world.rules["convox api get /apps/shop/releases"] = {"status": 1, "err": "ERROR: forbidden"}
    ran = world.deploy()
    assert ran.status == 0 and "warning" not in ran.text


# --- commands as they are printed -----------------------------------------------------

RACKS: dict[str, dict[str, str | None]] = {
    "a host and a simple password": {"CONVOX_PASSWORD": "secret"},
    "a host and a password to encode": {"CONVOX_PASSWORD": "a/b c'd\"$e`f"},
    "a host with a port": {"CONVOX_HOST": "rack.example.com:8443", "CONVOX_PASSWORD": "secret"},
    "a URL": {
        "CONVOX_HOST": None,
        "CONVOX_PASSWORD": None,
        "RACK_URL": "https://convox:a%2Fb@gateway.example.com/racks/staging",
    },
    "a name": {"CONVOX_HOST": None, "CONVOX_PASSWORD": None, "CONVOX_RACK": "org/staging"},
}


def printed_commands(text: str) -> list[str]:
    """Return the commands that a user is told to type."""
    pattern = r"^(?:To roll back:|  Check: |  Cancel:| (?= RACK_URL=| CONVOX_HOST=| convox )) *(.*convox .*)$"
    return re.findall(pattern, text, re.MULTILINE)


@pytest.mark.parametrize(
    ("rack", "cli", "end"),
    [
        *((rack, "v3", "succeeds") for rack in RACKS),
        *((rack, "2016", "succeeds") for rack in RACKS if rack != "a URL"),  # which it ignores
        *(
            (rack, cli, end)
            for rack, cli in [
                ("a host and a password to encode", "2016"),
                ("a URL", "v3"),
                ("a name", "v3"),
            ]
            for end in ("promote is stopped", "release is stopped")
        ),
    ],
)
def test_printed_commands_reach_the_rack_of_this_deploy(
    world: World, end: str, rack: str, cli: str
) -> None:
    env = {**RACKS[rack], "CONVOX_STANDIN_CLI": cli}
    start = "convox build --app" if "release" in end else "convox releases promote --app"
    if end == "succeeds":
        ran = world.deploy(env=env)
    else:
        world.rules[start] = {"hang": True}
        ran = world.deploy_and_signal(signal.SIGTERM, env=env)
        world.rules.clear()
    deployed = world.call(start)
    commands = printed_commands(ran.text)
    expected = {"succeeds": 1, "promote is stopped": 2, "release is stopped": 1}
    assert len(commands) == expected[end], ran.text
    password = (env["CONVOX_PASSWORD"] or "a%2Fb") if "CONVOX_PASSWORD" in env else "-"
    assert password not in ran.text
    for command in commands:
        (world.home / "calls").unlink()
        variables = {name: value for name, value in {**world.env, **env}.items() if value}
        variables["PATH"] += f":{os.path.dirname(sys.executable)}"
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        [call] = world.calls
        assert call.argv[0] == "convox"
        assert call.env.get("CONVOX_RACK") == deployed.env.get("CONVOX_RACK")
        if cli in ("v2", "v3"):
            assert call.env.get("RACK_URL") == deployed.env.get("RACK_URL")
        else:
            assert call.env.get("CONVOX_HOST") == deployed.env.get("CONVOX_HOST")
        if deployed.argv.count("--rack"):
            assert call.argv[call.argv.index("--rack") + 1] == "org/staging"


@pytest.mark.parametrize("how", ["uv run", "python"])
def test_the_resume_command_names_what_started_the_deploy(world: World, how: str) -> None:
    env = {"UV_RUN_RECURSION_DEPTH": "1"} if how == "uv run" else {}
    ran = world.deploy("--no-promote", env=env)
    start = " uv run " if how == "uv run" else f" {sys.executable} "
    assert f"{start}{TOOL} --app shop" in resume_command(ran)


def test_in_ci_the_resume_command_is_for_a_job(world: World) -> None:
    for env in ({"CI": "true"}, {"JENKINS_URL": "https://jenkins.example.com/"}):
        ran = world.deploy("--no-promote", env=env)
        assert "To resume from here, in a job:\n" in ran.out
        assert not re.search(r"\bcd /", ran.out)  # a random image name may end in cd
        assert "CONVOX_PASSWORD" not in ran.out
