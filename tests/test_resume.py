"""Resuming: the same command with --release never skips the before_release hook, and needs no image."""

from __future__ import annotations

import re

import pytest
from conftest import COMPOSE, Ran, World

R = "RABCDEFGHIJ"
CALLS = [
    "convox build --help",
    "convox releases promote --help",
    "convox api get /apps/shop",
    "convox api get /apps/shop/releases/RNEWRELEASE",
    "convox api get /apps/shop/releases/ROLDRELEASE",
    "convox api get /apps/shop",
    "convox api get /apps/shop/releases",
    "before_release",
    "convox api get /apps/shop",
    "convox releases promote --app shop --wait RNEWRELEASE",
    "convox api get /apps/shop",
]


def advised(ran: Ran) -> tuple[list[str], dict[str, str]]:
    """Return the option and the variable that the last advice names."""
    pattern = r"run the same command with (--\w+ R\w+) \(or (DEPLOY_\w+)=(R\w+)\)\."
    option, name, value = re.findall(pattern, ran.text)[-1]
    return option.split(), {name: value}


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_same_command_with_the_release_goes_on_from_there(world: World, how: str) -> None:
    world.add_hooks()
    world.rules["before_release"] = {"status": 3}
    ran = world.deploy()
    assert ran.status == 1
    assert ran.err.endswith(
        "\nNothing was promoted. shop was last seen running ROLDRELEASE."
        " Release RNEWRELEASE is built.\n"
        "To resume from here, run the same command with --release RNEWRELEASE"
        " (or DEPLOY_RELEASE=RNEWRELEASE).\n"
    )
    world.rules.clear()
    (world.home / "calls").unlink()
    option, variable = advised(ran)
    ran = world.deploy(*option) if how == "option" else world.deploy(env=variable)
    assert ran.status == 0, ran.text
    assert [line for line in world.commands() if not line.startswith("git")] == CALLS
    hook = world.call("before_release")
    assert hook.env["RELEASE_ID"] == "RNEWRELEASE" and hook.cwd == str(world.app)


def test_the_end_names_the_release_and_the_way_back_by_their_descriptions(world: World) -> None:
    """Without the URLs of the CI's runs, which only the rack gets."""
    world.describe("ROLDRELEASE", "8f2e1a0 Add search https://ci.example.com/runs/12")
    commit = world.add_git("Sell more\n\nMuch more.")
    ran = world.deploy(env={"CI_JOB_URL": "https://ci.example.com/runs/13"})
    assert ran.status == 0, ran.text
    build = world.call("convox build --app").argv
    about = build[build.index("--description") + 1]
    assert about == f"{commit} Sell more https://ci.example.com/runs/13"
    assert ran.before_total.endswith(
        f"\n\nshop is now running RNEWRELEASE ({commit} Sell more).\n"
        "Verified: rack.example.com reports RNEWRELEASE running.\n"
        "To roll back to ROLDRELEASE (8f2e1a0 Add search), run the same command with"
        " --rollback ROLDRELEASE (or DEPLOY_ROLLBACK=ROLDRELEASE).\n"
    )


def test_a_description_of_the_user_is_shown_at_the_end(world: World) -> None:
    ran = world.deploy("--description", "Winter sale")
    assert ran.status == 0 and "\nshop is now running RNEWRELEASE (Winter sale).\n" in ran.out
    assert world.commands("convox api get /apps/shop/releases/RNEWRELEASE") == []  # it is known


def test_a_release_that_is_resumed_is_named_by_its_description(world: World) -> None:
    world.describe("RABCDEFGHIJ", "5c55d44 Sell more")
    ran = world.deploy("--release", "RABCDEFGHIJ")
    assert ran.status == 0
    assert "\nshop is now running RABCDEFGHIJ (5c55d44 Sell more).\n" in ran.out


@pytest.mark.parametrize("name", ["DEPLOY_NO_PROMOTE", "DEPLOY_FROM"])
def test_the_same_command_works_where_the_variable_is_still_set(world: World, name: str) -> None:
    assert world.deploy("--result", "first.json").status == 0
    variables = {name: "1" if name == "DEPLOY_NO_PROMOTE" else str(world.app / "first.json")}
    ran = world.deploy("--no-promote", env=variables)
    assert ran.status == 0, ran.text
    assert ran.before_total.splitlines()[-2:] == [
        "Built release RNEWRELEASX, and did not promote it.",
        "To resume from here, run the same command with --release RNEWRELEASX"
        " (or DEPLOY_RELEASE=RNEWRELEASX).",
    ]
    (world.home / "calls").unlink()
    ran = world.deploy("--no-promote", *advised(ran)[0], env=variables)
    assert ran.status == 0, ran.text
    assert world.commands("convox releases promote --app") != []


def test_the_way_back_works_as_it_is_printed(world: World) -> None:
    ran = world.deploy()
    assert ran.status == 0 and advised(ran)[0] == ["--rollback", "ROLDRELEASE"]
    ran = world.deploy(*advised(ran)[0])
    assert ran.status == 0, ran.text
    assert world.commands("convox releases rollback")[0].endswith(" ROLDRELEASE")
    assert advised(ran)[1] == {"DEPLOY_ROLLBACK": "RNEWRELEASE"}


def test_the_same_command_with_other_settings_reaches_the_same_rack(world: World) -> None:
    world.write("deploy/my compose.yml", COMPOSE)
    args = ["--file", "deploy/my compose.yml", "--rack", "org/production"]
    env = {"CONVOX_HOST": None, "CONVOX_PASSWORD": None}
    ran = world.deploy("--no-promote", *args, env=env)
    assert world.deploy("--no-promote", *args, *advised(ran)[0], env=env).status == 0
    promote = world.call("convox releases promote --app")
    assert promote.argv[promote.argv.index("--rack") + 1] == "org/production"


@pytest.mark.parametrize("args", [[], ["--file", "other.yml"]])
def test_resuming_outside_the_project_root_is_refused(world: World, args: list[str]) -> None:
    """The before_release hook would not be found there, so it would be skipped."""
    (world.app / "docker-compose.yml").unlink()
    ran = world.deploy("--release", R, *args)
    assert ran.status == 2
    assert f"{(args or ['', 'docker-compose.yml'])[1]} is not a file." in ran.err
    assert world.calls == []


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_resuming_needs_neither_docker_nor_aws(world: World, cli: str) -> None:
    """Nor does it read the manifest, which v3 would not read by itself here."""
    for program in ("docker", "aws"):
        (world.bin / program).unlink()
    ran = world.deploy("--release", R, env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    assert f"shop is now running {R}." in ran.out
    assert f"Deploying shop (APP_NAME) {R} on rack.example.com (CONVOX_HOST)\n" in ran.out
    assert "Running now: ROLDRELEASE\n" in ran.out


@pytest.mark.parametrize("text", ["[]", "{}", '["x"]', '[{"id": null}]', "<html>"])
def test_an_unreadable_list_of_releases_does_not_fail_the_deploy(world: World, text: str) -> None:
    (world.home / "releases.json").write_text(text)
    assert world.deploy().status == 0


def test_credentials_that_cannot_list_releases_can_promote(world: World) -> None:
    world.rules["convox api get /apps/shop/releases"] = {"status": 1, "err": "ERROR: forbidden"}
    ran = world.deploy()
    assert ran.status == 0 and "warning" not in ran.text


@pytest.mark.parametrize("end", ["succeeds", "fails", "is resumed"])
def test_no_advice_holds_a_password_or_a_path(world: World, end: str) -> None:
    """It is true in every shell, launcher and CI, and can be shown to everybody."""
    env = {"CONVOX_PASSWORD": "a/b c'd\"$e`f"}
    if end == "fails":
        world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    ran = world.deploy(*(["--release", R] if end == "is resumed" else []), env=env)
    assert ran.status == (end == "fails")
    [advice] = [line for line in ran.text.splitlines() if "the same command" in line]
    assert not re.search(r"RACK_URL|CONVOX_|cd |python|/shop|rack.example.com", advice)
