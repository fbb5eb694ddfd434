"""Resuming: the printed command works from any directory and never skips the before_release hook."""

from __future__ import annotations

import re
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
        "convox api get /apps/shop",
    ]
    hook = world.call("before_release")
    assert hook.env["RELEASE_ID"] == "RNEWRELEASE" and hook.cwd == str(world.app)


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


@pytest.mark.parametrize("name", ["My Shop", "it's", "$(x) `y` ;"])
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
    assert (
        f"{(args or ['', 'docker-compose.yml'])[1]}: No such file or directory. Run this from"
        in ran.err
    )
    assert world.calls == []


def test_resuming_in_a_subdirectory_suggests_the_project_root(world: World) -> None:
    root, world.app = world.app, world.app / "lib"
    world.app.mkdir()
    ran = world.deploy("--release", "RABCDEFGHIJ")
    assert ran.status == 2
    assert f"Run this in {root}." in ran.err


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


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '["x"]', '[{"id": null}]', "<html>"])
def test_an_unreadable_list_of_releases_does_not_fail_the_deploy(world: World, text: str) -> None:
    (world.home / "releases.json").write_text(text)
    assert world.deploy().status == 0


def test_credentials_that_cannot_list_releases_can_promote(world: World) -> None:
    world.rules["convox api get /apps/shop/releases"] = {"status": 1, "err": "ERROR: forbidden"}
    ran = world.deploy()
    assert ran.status == 0 and "warning" not in ran.text
