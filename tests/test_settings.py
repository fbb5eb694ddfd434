"""Settings by variable and option, and what is said of those that cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPOSE, ECR, ROOT, TOOL, World

SETTINGS = {
    "--app": "APP_NAME",
    "--rack": "CONVOX_RACK, RACK_NAME",
    "--file": "DOCKER_COMPOSE",
    "--tag": "IMAGE_TAG",
    "--skip-ecr-login": "SKIP_ECR_AUTH",
    "--timeout": "DEPLOY_TIMEOUT",
    "--result": "DEPLOY_RESULT",
    "--quiet": "DEPLOY_QUIET",
}


def test_the_help_shows_each_setting_its_variable_and_its_default(world: World) -> None:
    said = " ".join(world.deploy("--help").out.split())
    for option, variable in SETTINGS.items():
        assert re.search(rf"{option} (?:(?! --).)*?\[env var: {variable}[;\]]", said), option
    for default in ("the directory's name", "convox.yml if there is one, else docker-compose.yml", "60"):
        assert default in said
    for option in ("--dry-run", "--no-promote", "--release R...", "[-- DOCKER_BUILD_ARGS...]", "--version"):
        assert option in said


def pushed_and_app(world: World) -> tuple[str, str]:
    app = world.call("convox build --app").argv
    return world.call("docker push").argv[-1], app[app.index("--app") + 1]


def test_options_win_over_variables(world: World) -> None:
    world.write("other.yml", COMPOSE.replace("/shop:", "/other:"))
    ran = world.deploy(
        *("--app", "other-app", "--file", "other.yml", "--tag", "mine", "--result", "mine.json"),
        env={"DOCKER_COMPOSE": "nowhere.yml", "IMAGE_TAG": "theirs", "DEPLOY_RESULT": "theirs.json"},
    )
    assert ran.status == 0, ran.text
    assert pushed_and_app(world) == (f"{ECR}/other:mine", "other-app")
    assert (world.app / "mine.json").exists() and not (world.app / "theirs.json").exists()


def test_empty_variables_are_as_good_as_none(world: World) -> None:
    names = ["APP_NAME", "CONVOX_RACK", "RACK_NAME", "DOCKER_COMPOSE", "IMAGE_TAG", "SKIP_ECR_AUTH", "DEPLOY_RESULT"]
    ran = world.deploy(env=dict.fromkeys([*names, "DEPLOY_TIMEOUT", "CONVOX_HOST", "CONVOX_PASSWORD"], ""))
    assert ran.status == 0, ran.text
    assert pushed_and_app(world)[1] == "shop"
    assert world.commands("docker login")


def test_convox_yml_comes_before_docker_compose_yml(world: World) -> None:
    world.write("convox.yml", COMPOSE.replace("/shop:", "/from-convox-yml:"))
    assert world.deploy().status == 0
    assert "/from-convox-yml:" in pushed_and_app(world)[0]


@pytest.mark.parametrize(("directory", "app"), [("My.App", "my-app"), ("shop2", "shop2")])
def test_a_directory_names_the_app_as_the_convox_cli_would(world: World, directory: str, app: str) -> None:
    world.app = world.app.rename(world.home / directory)
    assert world.deploy(env={"APP_NAME": None}).status == 0
    assert pushed_and_app(world)[1] == app


MISTAKES: dict[str, tuple[list[str], dict[str, str], str]] = {
    "an app with a space": ([], {"APP_NAME": "my shop"}, "'my shop' is no name of a Convox app"),
    "an app with a newline": ([], {"APP_NAME": "shop\n"}, r"'shop\n' is no name of a Convox app"),
    "an app with a dash first": ([], {"APP_NAME": "-shop"}, "'-shop' is no name of a Convox app"),
    "an app with quotes": ([], {"APP_NAME": "'\""}, "is no name of a Convox app"),
    "an app in Unicode": ([], {"APP_NAME": "büro"}, "'büro' is no name of a Convox app"),
    "a tag with a dash first": (["--tag=-x"], {}, "IMAGE_TAG '-x' is no docker tag."),
    "a tag that is too long": ([], {"IMAGE_TAG": "x" * 129}, "is no docker tag. Use at most 128"),
    "a result that is a directory": (["--result", "."], {}, "--result .: no file can be written there."),
    "a negative time-out": (["--timeout", "-1"], {}, "'-1' is no number of minutes."),
    "a time-out that is no number": (["--timeout", "nan"], {}, "'nan' is no number of minutes."),
    "an empty rack": (["--rack", ""], {}, "--rack is empty. Give it a value, or leave it out."),
    "a password without a host": ([], {"CONVOX_HOST": ""}, "CONVOX_HOST and CONVOX_PASSWORD go together"),
    "a switch in words": ([], {"SKIP_ECR_AUTH": "perhaps"}, "'perhaps' is not a valid boolean"),
    "an unknown option": (["--bogus"], {}, "No such option"),
    "a directory for a manifest": ([], {"DOCKER_COMPOSE": "."}, ". is no file."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_changed(world: World, mistake: str) -> None:
    args, env, message = MISTAKES[mistake]
    ran = world.deploy(*args, env={**env})
    assert ran.status == 2
    assert message in " ".join(ran.err.replace("\n", " ").split()) or message in ran.err
    assert "Traceback" not in ran.text
    assert world.commands("docker build", "convox build --app", "convox releases promote --app") == []
    assert world.nothing_is_left()


def test_a_result_replaces_no_device_and_no_link(world: World) -> None:
    """As `--result /dev/stdout` would, run by root."""
    os.mkfifo(world.app / "pipe")
    (world.app / "link").symlink_to("elsewhere")
    for name in ("pipe", "link"):
        ran = world.deploy("--result", name)
        assert ran.status == 2
        assert f"--result {name}: no file can be written there." in ran.err
    assert (world.app / "pipe").is_fifo() and (world.app / "link").is_symlink()


def test_all_problems_are_told_at_once(world: World) -> None:
    world.write("deploy/before_build.sh", "#!/bin/sh\n")
    world.write("docker-compose.yml", "web:\n  build: .\n")
    world.rules = {
        "docker version": {"status": 1, "err": "Cannot connect to the Docker daemon"},
        "convox api get": {"status": 1, "err": "ERROR: no such app: shop"},
    }
    ran = world.deploy(env={"IMAGE_TAG": "a/b"})
    assert ran.status == 2
    for problem in (
        "IMAGE_TAG 'a/b' is no docker tag.",
        "deploy/before_build.sh is not executable. Run: chmod +x deploy/before_build.sh",
        "docker-compose.yml service web: has a build: and no image",
        "No docker engine answers; start Docker and try again. docker says: Cannot connect to the Docker daemon",
        "The rack has no app shop. Create it with `convox apps create shop`, or correct APP_NAME.",
    ):
        assert problem in ran.err


def test_a_fixed_tag_cannot_name_two_images_of_one_repository(world: World) -> None:
    world.write("a/Dockerfile", "FROM scratch\n")
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\na:\n  image: {ECR}/shop:TAG\n  build: a\n")
    ran = world.deploy(env={"IMAGE_TAG": "v1"})
    assert ran.status == 2
    assert "IMAGE_TAG would give different images in one repository the same tag. Unset it." in ran.err
    assert world.deploy().status == 0


@pytest.mark.parametrize("name", ["My Shop", "it's", 'a"b', "-dash", "büro ☕", "new\nline", "$(x) `y` ;", "ALL"])
def test_a_directory_may_have_any_name_where_the_app_is_named(world: World, name: str) -> None:
    world.app = world.app.rename(world.home / name)
    world.add_hooks()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert {call.cwd for call in world.calls if call.argv[0] == "before_build"} == {str(world.app)}


@pytest.mark.parametrize("name", ["two words", "it's", "-dash", "büro", "$dollar"])
def test_a_build_context_may_have_any_name_but_a_variable(world: World, name: str) -> None:
    world.write(f"{name}/Dockerfile", "FROM scratch\n")
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\n  build: {json.dumps(name)}\n")
    ran = world.deploy()
    if "$" in name:
        assert ran.status == 2 and "has a variable in it" in ran.err
    else:
        assert ran.status == 0, ran.text
        assert os.path.normpath(world.call("docker build").argv[-1]) == name


def test_a_missing_dockerfile_or_context_is_told(world: World) -> None:
    (world.app / "Dockerfile").unlink()
    assert "There is no Dockerfile to build." in world.deploy().err
    world.write("docker-compose.yml", f"web:\n  image: {ECR}/shop:TAG\n  build: nowhere\n")
    assert "The build context nowhere is no directory." in world.deploy().err


def test_a_dockerfile_may_be_named_to_docker_or_made_by_a_hook(world: World) -> None:
    (world.app / "Dockerfile").unlink()
    assert world.deploy("--", "-f", "Dockerfile.other").status == 0
    world.add_hooks("before_build")
    assert world.deploy().status == 0


def test_a_hook_that_another_hook_makes_is_looked_at_too(world: World) -> None:
    world.write("deploy/before_build.sh", "#!/bin/sh\n: > deploy/after_build.sh\n", 0o755)
    ran = world.deploy()
    assert ran.status == 1
    assert "deploy/after_build.sh is not executable. Run: chmod +x deploy/after_build.sh" in ran.err


# --- the file itself ------------------------------------------------------------------


def test_without_its_packages_the_tool_says_how_to_get_them(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-S", TOOL], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "No module named 'click'. Get what it needs with `python3 -m pip install click sh PyYAML`" in line
    assert "`uv run convox_deploy.py`" in line


def test_the_file_and_the_package_name_the_same_dependencies() -> None:
    inline = re.search(r"^# dependencies = (\[.*\])$", TOOL.read_text(), re.MULTILINE)
    package = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert inline and package and json.loads(inline[1]) == json.loads(package[1])


@pytest.mark.parametrize("how", ["itself", "python", "uv", "console script"])
def test_it_runs_in_every_way_that_the_readme_names(how: str) -> None:
    commands = {
        "itself": [str(TOOL)],
        "python": [sys.executable, str(TOOL)],
        "uv": ["uv", "run", "--quiet", "--no-project", str(TOOL)],
        "console script": ["convox-deploy"],
    }
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    program = shutil.which(commands[how][0], path=path)
    assert program, f"{commands[how][0]} is not installed"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(
        [program, *commands[how][1:], "--version"], capture_output=True, text=True, check=False, env=env
    )
    assert re.search(r"version \d+\.\d+\.\d+$", done.stdout.strip()), done.stderr
