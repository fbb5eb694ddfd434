"""Settings from variables and options."""

from __future__ import annotations

import json

import pytest
from conftest import COMPOSE, ECR, World


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
        "DEPLOY_NO_VERIFY",
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


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("CONVOX_RAK", "CONVOX_RACK"),
        ("RACKNAME", "RACK_NAME"),
        ("RACK_URI", "RACK_URL"),
        ("APPNAME", "APP_NAME"),
        ("CONVOX_PASSWRD", "CONVOX_PASSWORD"),
        ("CONVOX_HSOT", "CONVOX_HOST"),
        ("CONVOX_AP", "CONVOX_APP"),
        ("IMAGE_TGA", "IMAGE_TAG"),
        ("DOCKER_COMPOSR", "DOCKER_COMPOSE"),
        ("SKIP_ECR_AUHT", "SKIP_ECR_AUTH"),
        ("DEPLOY_DRYRUN", "DEPLOY_DRY_RUN"),
        ("DEPLOY_NO_PROMOTTE", "DEPLOY_NO_PROMOTE"),
        ("DEPLOY_RELAESE", "DEPLOY_RELEASE"),
        ("DEPLOY_TIMEOUTS", "DEPLOY_TIMEOUT"),
        ("DEPLOY_FORM", "DEPLOY_FROM"),
    ],
)
def test_a_misspelled_variable_is_an_error(world: World, typed: str, meant: str) -> None:
    """The one that is meant may have another name, such as CONVOX_APP for APP_NAME."""
    ran = world.deploy(env={meant: None, typed: "x"})
    assert ran.status == 2
    assert f"{typed} looks like a misspelling of {meant}. Rename or unset it." in ran.err
    assert world.calls == []


def test_unrelated_variables_are_no_misspellings(world: World) -> None:
    names = "RACK_ENV DEPLOY_ENV APP_ENV DEPLOY_TIME DEPLOY_USER DEPLOY_KEY DEPLOY_TOKEN APP_HOME"
    names += (
        " DEPLOY_TAG IMAGE_NAME IMAGE_ID RACK_ATTACK APP_HOST APP_URL APP_SECRET RACK DEPLOY APP"
    )
    names += " CONVOX CONVOX_RACK_URL CONVOX_ORG DOCKER_HOST COMPOSE_FILE CONVOX_ENV_DROP_GUARD"
    names += " BACK_URL TRACK_URL DEPLOY_RELEASE_ID DEPLOY_BRANCH ECR_AUTH HOST PASSWORD URL"
    ran = world.deploy(env=dict.fromkeys(names.split(), "something"))
    assert ran.status == 0, ran.text


def test_a_variable_that_is_there_too_is_not_the_misspelled_one(world: World) -> None:
    """Both are someone's own: only a variable that is missing can have been misspelled."""
    env = {"APP_NAMES": "shop office", "CONVOX_HOSTS": "a b"}
    assert world.deploy(env=env).status == 0


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
