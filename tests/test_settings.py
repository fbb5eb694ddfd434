"""Settings from variables and options, and errors for invalid ones."""

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
        "DEPLOY_QUIET",
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
    ("text", "minutes"),
    [("30", 30), ("30m", 30), ("1h", 60), ("1.5h", 90), ("90s", 1.5), ("0", 0), ("0.5", 0.5)],
)
def test_a_timeout_can_have_a_unit(text: str, minutes: float) -> None:
    import convox_deploy

    assert convox_deploy.minutes(text) == minutes


MISTAKES: dict[str, tuple[list[str], dict[str, str | None], str]] = {
    "an app with a space": ([], {"APP_NAME": "my shop"}, "Invalid app name 'my shop'"),
    "an app with a newline": ([], {"APP_NAME": "shop\n"}, r"Invalid app name 'shop\n'"),
    "an app with a leading dash": ([], {"APP_NAME": "-shop"}, "Invalid app name '-shop'"),
    "an app with quotes": ([], {"APP_NAME": "'\""}, "Invalid app name"),
    "an app in Unicode": ([], {"APP_NAME": "büro"}, "Invalid app name 'büro'"),
    "a tag with a leading dash": (["--tag=-x"], {}, "Invalid image tag '-x'"),
    "a tag with a newline": ([], {"IMAGE_TAG": "v1\n"}, r"Invalid image tag 'v1\n'"),
    "a tag that is too long": ([], {"IMAGE_TAG": "x" * 129}, "Invalid image tag 'xxx"),
    "a release with a newline": (["--release", "RABCDEFGHIJ\n"], {}, "is not a release ID"),
    "a negative timeout": (["--timeout", "-1"], {}, "'-1' is not a number of minutes"),
    "a timeout that is not a number": (
        ["--timeout", "nan"],
        {},
        "'nan' is not a number of minutes",
    ),
    "a timeout that is too long": (["--timeout", "1" * 8], {}, "is not a number of minutes"),
    "a timeout of a day": (["--timeout", "1d"], {}, "'1d' is not a number of minutes"),
    "an empty rack": (
        ["--rack", ""],
        {},
        "Invalid value for '--rack' (env var: 'CONVOX_RACK', 'RACK_NAME'): it is empty.",
    ),
    "an empty tag": (
        ["--tag="],
        {},
        "Invalid value for '--tag' (env var: 'IMAGE_TAG'): it is empty.",
    ),
    "a switch that is not a boolean": (
        [],
        {"SKIP_ECR_AUTH": "perhaps"},
        "'perhaps' is not a valid boolean",
    ),
    "an unknown option": (["--bogus"], {}, "No such option"),
    "a directory instead of a manifest": ([], {"DOCKER_COMPOSE": "."}, ".: Is a directory."),
    "an invalid URL": (
        [],
        {"RACK_URL": "https://[", "CONVOX_HOST": None},
        "RACK_URL must be",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_before_any_command_runs(world: World, mistake: str) -> None:
    args, env, message = MISTAKES[mistake]
    ran = world.deploy(*args, env=env)
    assert ran.status == 2
    assert message in ran.err
    assert "Traceback" not in ran.text
    assert world.calls == []
    assert world.nothing_is_left()


def test_problems_with_settings_hooks_and_manifest_are_reported_together_before_any_command_runs(
    world: World,
) -> None:
    world.write("deploy/before_build.sh", "#!/bin/sh\n")
    world.write("docker-compose.yml", "web:\n  build: .\n")
    ran = world.deploy(env={"IMAGE_TAG": "a/b"})
    assert ran.status == 2
    for problem in (
        "Invalid image tag 'a/b'",
        "deploy/before_build.sh is not",
        "docker-compose.yml: service web: ",
    ):
        assert f"\n  - {problem}" in ran.err
    assert "preflight failed (3 problems):" in ran.err
    assert world.calls == []


def test_a_custom_tag_cannot_name_two_images_in_one_repository(world: World) -> None:
    world.write("a/Dockerfile", "FROM scratch\n")
    world.write(
        "docker-compose.yml",
        f"web:\n  image: {ECR}/shop:TAG\na:\n  image: {ECR}/shop:TAG\n  build: a\n",
    )
    ran = world.deploy(env={"IMAGE_TAG": "v1"})
    assert ran.status == 2
    assert "service a would get the same image and tag as a service with different" in ran.err
    assert world.deploy().status == 0


@pytest.mark.parametrize(
    "name", ["My Shop", "it's", 'a"b', "-dash", "büro ☕", "new\nline", "$(x) `y` ;", "ALL"]
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
        assert ran.status == 2 and "Write a string without variables" in ran.err
    else:
        assert ran.status == 0, ran.text
        assert world.call("docker build").argv[-1] == name


@pytest.mark.parametrize(
    "option", ["-f", "--file", "--file=Dockerfile.other", "-fDockerfile.other"]
)
def test_the_dockerfile_can_be_set_in_the_docker_build_arguments(world: World, option: str) -> None:
    (world.app / "Dockerfile").unlink()
    args = ["--", option] if "other" in option else ["--", option, "Dockerfile.other"]
    assert world.deploy(*args).status == 0


def test_a_remote_build_context_is_not_checked_locally(world: World) -> None:
    world.write(
        "docker-compose.yml",
        f"web:\n  image: {ECR}/shop:TAG\n  build: https://example.com/app.git#main\n",
    )
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert world.call("docker build").argv[-1] == "https://example.com/app.git#main"
