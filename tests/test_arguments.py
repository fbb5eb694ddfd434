"""The ARGs of a Dockerfile get the values of the app's environment, as they would on the rack."""

from __future__ import annotations

import json

import pytest
from conftest import ECR, World

KEY = "an-api-key-of-the-app"
ENVIRONMENT = f"API_KEY={KEY}\nVERSION=20=x\nnot a variable\nEMPTY="
ASK = "convox env --app shop"


@pytest.fixture(autouse=True)
def environment(world: World) -> None:
    world.env["STANDIN_APP_ENV"] = ENVIRONMENT


def build_args(world: World) -> list[str]:
    argv = world.call("docker build --tag").argv
    return [argv[number + 1] for number, word in enumerate(argv) if word == "--build-arg"]


ARGS = {  # the Dockerfile: what docker gets, and whether the rack is asked
    "ARG API_KEY": (["API_KEY"], True),
    "ARG API_KEY=none": (["API_KEY"], True),
    "  ARG\tAPI_KEY='a value' VERSION=1": (["API_KEY"], True),  # racks read one of each line
    'ARG PKGS="curl VERSION vim"\nARG OTHER=1 \\\n  # the VERSION\n  VERSION=1': ([], True),
    "ARG VERSION=18\nFROM node:$VERSION": (["VERSION"], True),
    "ARG API_KEY\nFROM scratch\nARG API_KEY": (["API_KEY"], True),
    "ARG OTHER=default\nARG ANOTHER\nARG API": ([], True),
    "ARG EMPTY=on": (["EMPTY"], True),  # it is set, to nothing
    "arg API_KEY": (["API_KEY"], True),
    "ENV API_KEY=x\n# ARG API_KEY\nRUN echo ARG API_KEY": ([], False),
    "ARG TARGETPLATFORM\nARG BUILDARCH\nARG BUILDKIT_SBOM_SCAN_STAGE=true": ([], False),
    "ARG BUILD_APP\nARG BUILD_GIT_SHA": (["BUILD_APP", "BUILD_GIT_SHA"], False),
}


@pytest.mark.parametrize("dockerfile", ARGS)
def test_an_arg_gets_the_value_of_the_apps_environment(world: World, dockerfile: str) -> None:
    world.write("Dockerfile", f"FROM scratch\n{dockerfile}\n")
    world.add_git()
    ran = world.deploy()
    assert ran.status == 0, ran.text
    expected, is_asked = ARGS[dockerfile]
    assert build_args(world) == expected
    assert bool(world.commands("convox env")) == is_asked
    values = world.call("docker build --tag").env
    commit = world.call("convox build --app").argv[-3].split()[0]
    known = {"API_KEY": KEY, "VERSION": "20=x", "EMPTY": "", "BUILD_APP": "shop"}
    for name in expected:
        assert values[name].startswith(known.get(name, commit))


def test_a_value_is_only_in_the_environment_of_docker_build(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\n")
    world.add_hooks()
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    with_value = {call.argv[0] for call in world.calls if KEY in call.env.values()}
    assert with_value == {"docker"}
    assert [call.argv[1] for call in world.calls if KEY in call.env.values()] == ["build"]
    assert not any(KEY in call.line for call in world.calls)
    assert KEY not in ran.text + (world.app / "result.json").read_text()


@pytest.mark.parametrize(
    "args",
    [
        ["--", "--build-arg", "API_KEY=mine"],
        ["--", "--build-arg=API_KEY=mine"],
        ["--", "--build-arg", "API_KEY"],
    ],
)
def test_a_build_arg_of_the_user_wins(world: World, args: list[str]) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY=none\n")
    ran = world.deploy(*args, env={"API_KEY": "mine"})
    assert ran.status == 0, ran.text
    assert world.call("docker build --tag").argv[4:-1] == args[1:]
    assert world.call("docker build --tag").env["API_KEY"] == "mine"
    assert world.commands("convox env") == []


@pytest.mark.parametrize("written", ["{API_KEY: mine}", "[API_KEY=mine]"])
def test_an_argument_of_the_manifest_wins(world: World, written: str) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\n")
    build = f"{{context: ., args: {written}}}"
    world.write("docker-compose.yml", f"web: {{image: '{ECR}/shop:TAG', build: {build}}}\n")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert build_args(world) == ["API_KEY=mine"]
    assert "API_KEY" not in world.call("docker build --tag").env
    assert world.commands("convox env") == []


@pytest.mark.parametrize("written", ["[API_KEY]", "{API_KEY: }"])
def test_an_argument_of_the_manifest_without_a_value_gets_the_apps_value(
    world: World, written: str
) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY=http://localhost\n")
    build = f"{{context: ., args: {written}}}"
    world.write("docker-compose.yml", f"web: {{image: '{ECR}/shop:TAG', build: {build}}}\n")
    ran = world.deploy(env={"API_KEY": "of this machine"})
    assert ran.status == 0, ran.text
    assert build_args(world) == ["API_KEY"]
    assert world.call("docker build --tag").env["API_KEY"] == KEY


def test_the_environment_is_read_once_for_all_builds(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\n")
    world.write("worker/Dockerfile", "FROM scratch\nARG VERSION\n")
    image = f"{ECR}/{{}}:TAG"
    world.write(
        "docker-compose.yml",
        f"web: {{image: '{image.format('web')}'}}\n"
        f"worker: {{image: '{image.format('worker')}', build: worker}}\n",
    )
    world.add_hooks("after_build", "before_release")
    assert world.deploy("--rack", "staging").status == 0
    web, worker = world.commands("docker build --tag")
    assert " --build-arg API_KEY ." in web and " --build-arg VERSION worker" in worker
    assert world.commands("convox env") == ["convox env --rack staging --app shop"]


def test_a_dockerfile_that_before_build_writes_gets_its_values(world: World) -> None:
    (world.app / "Dockerfile").unlink()
    script = "#!/bin/sh\nprintf 'FROM scratch\\nARG API_KEY\\n' >Dockerfile\n"
    world.write("deploy/before_build.sh", script, 0o755)
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    assert "\n$ docker build --tag shop:deploy-" in ran.out
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert build_args(world) == ["API_KEY"]


def test_the_dockerfile_of_the_docker_build_arguments_counts(world: World) -> None:
    world.write("Dockerfile.other", "FROM scratch\nARG API_KEY\n")
    assert world.deploy("--", "--file", "Dockerfile.other").status == 0
    assert build_args(world) == ["API_KEY"]


def test_a_dry_run_shows_the_names(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\n")
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    assert " --build-arg API_KEY .\n" in ran.out and KEY not in ran.text


@pytest.mark.parametrize("args", [["--release", "RABCDEFGHIJ"], ["--from", "deploy.json"]])
def test_a_deploy_that_builds_nothing_does_not_ask(world: World, args: list[str]) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\n")
    images = [{"image": f"{ECR}/shop:1", "services": ["web"]}]
    result = {"tool": "convox-deploy", "status": "succeeded", "images": images}
    world.write("deploy.json", json.dumps(result))
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    assert world.commands("convox env") == []


# --- an environment that cannot be read -----------------------------------------------


def test_a_default_makes_do_with_a_warning(world: World) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY=none\nARG VERSION=1\n")
    world.rules[ASK] = {"status": 1, "err": "ERROR: forbidden\n"}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert ran.out.count("\nwarning: ARG API_KEY, VERSION may come from the app's environment") == 1
    assert build_args(world) == []


@pytest.mark.parametrize("how", [{"status": 1, "err": "ERROR: forbidden\n"}, {"signal": 9}])
def test_an_arg_without_a_default_is_an_error_before_the_build(
    world: World, how: dict[str, object]
) -> None:
    world.write("Dockerfile", "FROM scratch\nARG API_KEY\nARG VERSION=1\n")
    world.rules[ASK] = how  # type: ignore[assignment]
    ran = world.deploy()
    assert ran.status == 2
    assert "ARG API_KEY may come from the app's environment, which cannot be read: " in ran.err
    assert "VERSION" not in ran.err
    assert world.commands("docker build --tag") == []
    ran = world.deploy("--", "--build-arg", "API_KEY=mine")
    assert ran.status == 0, ran.text
