"""Settings from variables and options."""

from __future__ import annotations

import json

import pytest
from conftest import COMPOSE, ECR, World, paired

from convox_deploy import main


def pushed_and_app(world: World) -> tuple[str, str]:
    app = world.call("convox build --app").argv
    return world.call("docker tag").argv[-1], app[app.index("--app") + 1]


def test_options_override_variables(world: World) -> None:
    world.write("other.yml", COMPOSE.replace("/shop:", "/other:"))
    ran = world.deploy(
        *("--app", "other-app", "--file", "other.yml", "--tag", "mine", "--result", "mine.json"),
        env={
            "DOCKER_COMPOSE": "nowhere.yml",
            "IMAGE_TAG": "theirs",
            "DEPLOY_RESULT": "theirs.json",
        },
    )
    assert ran.status == 0, ran.text
    assert pushed_and_app(world) == (f"{ECR}/other:mine", "other-app")
    assert (world.app / "mine.json").exists() and not (world.app / "theirs.json").exists()


def test_empty_variables_count_as_unset(world: World) -> None:
    names = [
        "APP_NAME",
        "CONVOX_RACK",
        "RACK_NAME",
        "RACK_URL",
        "DOCKER_COMPOSE",
        "IMAGE_TAG",
        "SKIP_ECR_AUTH",
    ]
    names += [
        "DEPLOY_RESULT",
        "DEPLOY_TIMEOUT",
        "DEPLOY_FROM",
        "DEPLOY_DESCRIPTION",
        "DEPLOY_PARALLEL",
        "DEPLOY_NO_PROMOTE",
        "DEPLOY_RELEASE",
        "CONVOX_HOST",
        "CONVOX_PASSWORD",
    ]
    ran = world.deploy(env=dict.fromkeys(names, ""))
    assert ran.status == 0, ran.text
    assert pushed_and_app(world)[1] == "shop"
    assert world.commands("docker login")


def test_convox_yml_takes_precedence_over_docker_compose_yml(world: World) -> None:
    world.write("convox.yml", COMPOSE.replace("/shop:", "/from-convox-yml:"))
    assert world.deploy().status == 0
    assert "/from-convox-yml:" in pushed_and_app(world)[0]


@pytest.mark.parametrize(("directory", "app"), [("My.App", "my-app"), ("shop2", "shop2")])
def test_the_app_is_named_after_the_directory_like_in_the_convox_cli(
    world: World, directory: str, app: str
) -> None:
    world.app = world.app.rename(world.home / directory)
    assert world.deploy(env={"APP_NAME": None}).status == 0
    assert pushed_and_app(world)[1] == app


@pytest.mark.parametrize(
    "name", ['it\'s My "Shop" $(x) `y` ;', "-dash", "büro ☕", "new\nline", "ALL"]
)
def test_the_directory_can_have_any_name_if_the_app_name_is_set(world: World, name: str) -> None:
    world.app = world.app.rename(world.home / name)
    world.add_hooks()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.call("before_build").cwd == str(world.app)


@pytest.mark.parametrize("name", ["two words", "it's", "büro", "$dollar"])
def test_a_build_context_can_have_any_name_without_variables(world: World, name: str) -> None:
    world.write(f"{name}/Dockerfile", "FROM scratch\n")
    world.write(
        "docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\n  build: {json.dumps(name)}\n"
    )
    ran = world.deploy()
    if "$" in name:
        assert ran.status == 2 and "contains '$dollar'" in ran.err
    else:
        assert ran.status == 0, ran.text
        assert world.call("docker build --tag").argv[-1] == name


@pytest.mark.parametrize(
    "option", ["-f", "--file", "--file=Dockerfile.other", "-fDockerfile.other"]
)
def test_the_dockerfile_can_be_set_in_the_docker_build_arguments(world: World, option: str) -> None:
    dockerfile = (world.app / "Dockerfile").rename(world.app / "Dockerfile.other")
    args = ["--", option] if "other" in option else ["--", option, "Dockerfile.other"]
    assert world.deploy(*args).status == 0
    dockerfile.unlink()
    ran = world.deploy(*args)
    assert ran.status == 2 and "Dockerfile.other not found." in ran.err


def test_a_remote_build_context_is_not_checked_locally(world: World) -> None:
    world.write(
        "docker-compose.yml",
        f"web:\n  image: {ECR}/shop:TAG\n  build: https://example.com/app.git#main\n",
    )
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.call("docker build --tag").argv[-1] == "https://example.com/app.git#main"


# --- variables ------------------------------------------------------------------------


@pytest.mark.parametrize(("app", "other"), [("other", None), ("shop", "other")])
def test_convox_app_counts_as_app_name(world: World, app: str, other: str | None) -> None:
    env = {"CONVOX_APP": app, "APP_NAME": other}
    assert world.deploy(env=env).status == 0
    assert pushed_and_app(world)[1] == "other"


@pytest.mark.parametrize(
    ("variable", "value", "unchanged"),
    [
        ("DEPLOY_DRY_RUN", "1", "docker build --tag"),
        ("DEPLOY_DRY_RUN", "true", "docker build --tag"),
        ("DEPLOY_NO_PROMOTE", "1", "convox releases promote --app"),
        ("DEPLOY_RELEASE", "RABCDEFGHIJ", "convox build --app"),
    ],
)
def test_options_that_change_nothing_have_variables(
    world: World, variable: str, value: str, unchanged: str
) -> None:
    ran = world.deploy(env={variable: value})
    assert ran.status == 0, ran.text
    assert world.commands(unchanged) == []


@pytest.mark.parametrize("variable", ["DEPLOY_DRY_RUN", "DEPLOY_NO_PROMOTE", "SKIP_ECR_AUTH"])
def test_a_switch_that_is_neither_on_nor_off_is_an_error(world: World, variable: str) -> None:
    ran = world.deploy(env={variable: "maybe"})
    assert ran.status == 2 and variable in ran.err and "'maybe'" in ran.err
    assert world.calls == []


@pytest.mark.parametrize("value", ["0", "off", ""])
def test_a_switch_can_be_off(world: World, value: str) -> None:
    ran = world.deploy(env={"DEPLOY_DRY_RUN": value})
    assert ran.status == 0 and world.running == "RNEWRELEASE"


# --- the same command with --release --------------------------------------------------

BUILDING = [  # what is about building or stopping
    (["--no-promote"], {}),
    ([], {"DEPLOY_NO_PROMOTE": "1"}),
    (["--from", "result.json"], {}),
    ([], {"DEPLOY_FROM": "result.json"}),
    (["--tag", "v1"], {}),
    ([], {"IMAGE_TAG": "v1"}),
    (["--cache-from-running"], {}),
    ([], {"DEPLOY_CACHE_FROM_RUNNING": "1"}),
    (["--", "--build-arg", "KEY=value"], {}),
]


@pytest.mark.parametrize(("given", "is_option"), paired(BUILDING, [True, False]))
def test_release_wins_over_what_is_about_building_or_stopping(
    world: World, given: tuple[list[str], dict[str, str]], is_option: bool
) -> None:
    """So the same command can be run with --release after a failure."""
    args, env = given
    release = "RABCDEFGHIJ"
    if is_option:
        args = ["--release", release, *args]
    else:
        env = {**env, "DEPLOY_RELEASE": release}
    assert world.deploy("--release", release).status == 0
    usual = world.commands()
    (world.home / "running").write_text("ROLDRELEASE\n")
    ran = world.deploy(*args, env=env)
    assert ran.status == 0, ran.text
    again = world.commands()[len(usual) :]
    assert {*again} == {*usual}  # preflight's run at the same time
    assert world.commands("convox releases promote --app")[1].endswith(f" {release}")
    assert world.commands("docker") == [] == world.commands("convox build --app")
    verified = f"\nVerified: rack.example.com reports {release} running.\n"
    assert ran.out.partition(verified)[2].startswith(
        "To roll back to ROLDRELEASE, run the same command with "
    )


@pytest.mark.parametrize("env", [{}, {"DEPLOY_DRY_RUN": "1"}])
def test_release_does_not_win_over_a_dry_run(world: World, env: dict[str, str]) -> None:
    args = [] if env else ["--dry-run"]
    ran = world.deploy("--release", "RABCDEFGHIJ", "--no-promote", *args, env=env)
    assert ran.status == 0 and ran.out.endswith("\nDry run: nothing was changed.\n")
    assert "$ convox releases promote --app shop " in ran.out
    assert world.commands("convox releases promote --app") == []
    assert world.running == "ROLDRELEASE"


OPTIONS = [name for parameter in main.params for name in parameter.opts if name.startswith("--")]
OF_DOCKER = ["--file", "--tag", "--version"]  # docker has options of these names, too


@pytest.mark.parametrize(("option", "value"), paired(sorted({*OPTIONS} - {*OF_DOCKER}), ["", "=x"]))
def test_an_option_of_ours_after_the_dashes_is_an_error(
    world: World, option: str, value: str
) -> None:
    """As when --release is added at the end of the same command."""
    ran = world.deploy("--", "--no-cache", f"{option}{value}", "RABCDEFGHIJ")
    assert ran.status == 2
    assert ran.err.endswith(f"Error: Put {option}{value} before --.\n")
    assert world.calls == []


def test_it_is_an_error_with_a_release_too(world: World) -> None:
    """There, what is after the dashes counts for nothing: this would not be a dry run."""
    ran = world.deploy("--", "--dry-run", env={"DEPLOY_RELEASE": "RNEWRELEASE"})
    assert ran.status == 2 and ran.err.endswith("Error: Put --dry-run before --.\n")


def test_options_that_docker_has_too_are_allowed_after_the_dashes(world: World) -> None:
    ran = world.deploy("--", "--tag", "another", "--file", "Dockerfile", "--label", "release")
    assert ran.status == 0, ran.text
    assert " --tag another --file Dockerfile --label release ." in world.call("docker build").line
