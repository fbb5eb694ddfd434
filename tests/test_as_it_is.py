"""Services without `image:`: built here, and pushed by `convox build --external` to the rack's registry."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ECR, World

EXTERNAL = "convox build --external"
SHAPES: dict[str, tuple[str, dict[str, str], list[str]]] = {
    # the manifest's services: the service whose image each uploaded Dockerfile names, and docker's arguments
    "no build key": ("{web: {port: 80}}", {"Dockerfile": "WEB"}, ["."]),
    "no keys": ("{web: }", {"Dockerfile": "WEB"}, ["."]),
    "a directory": ("{web: {build: .}}", {"Dockerfile": "WEB"}, ["."]),
    "a subdirectory": ("{web: {build: ./api/}}", {"api/Dockerfile": "WEB"}, ["api"]),
    "a Dockerfile": (
        "{web: {build: {manifest: Dockerfile.prod}}}",
        {"Dockerfile.prod": "WEB"},
        ["--file Dockerfile.prod ."],
    ),
    "a directory and a Dockerfile": (
        "{web: {build: {path: api, manifest: docker/Dockerfile.prod}}}",
        {"api/docker/Dockerfile.prod": "WEB"},
        ["--file api/docker/Dockerfile.prod api"],
    ),
    "arguments": (
        "{web: {build: {path: ., args: [A=1, B]}}}",
        {"Dockerfile": "WEB"},
        ["--build-arg A=1 --build-arg B ."],
    ),
    "two builds": (
        "{web: {build: .}, api: {build: api}}",
        {"Dockerfile": "WEB", "api/Dockerfile": "API"},
        [".", "api"],
    ),
    "four builds": (
        "{web: {}, api: {build: api}, a: {build: {manifest: A}}, b: {build: {path: api, manifest: B}}}",
        {"Dockerfile": "WEB", "api/Dockerfile": "API", "A": "A", "api/B": "B"},
        [".", "api", "--file A .", "--file api/B api"],
    ),
    "a shared build": ("{web: {build: .}, job: {}}", {"Dockerfile": "JOB"}, ["."]),
    "a dockerfile that Convox does not read": (
        "{web: {dockerfile: Dockerfile.prod}}",
        {"Dockerfile": "WEB"},
        ["."],
    ),
    "a third-party image": (
        "{web: {build: .}, db: {image: 'postgres:16'}}",
        {"Dockerfile": "WEB"},
        ["."],
    ),
}


@pytest.fixture(autouse=True)
def v3(world: World) -> None:
    world.env["CONVOX_STANDIN_CLI"] = "v3"
    (world.app / "docker-compose.yml").unlink()
    paths = ["Dockerfile.prod", "A", "api/Dockerfile", "api/B", "api/docker/Dockerfile.prod"]
    for path in paths:
        world.write(path, "FROM scratch\n")


def write(world: World, services: str) -> str:
    text = f"# the app\r\nservices: {services}\n"
    world.write("convox.yml", text)
    return text


@pytest.mark.parametrize("shape", SHAPES)
def test_the_manifest_is_uploaded_as_it_is_with_one_line_for_each_dockerfile(
    world: World, shape: str
) -> None:
    services, dockerfiles, builds = SHAPES[shape]
    text = write(world, services)
    world.add_hooks("after_build")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    names = world.call("after_build").env
    assert world.call(EXTERNAL).upload == {
        "convox.yml": text,
        **{path: f"FROM {names[f'DOCKER_TAG_{name}']}\n" for path, name in dockerfiles.items()},
    }
    calls = [call for call in world.calls if call.line.startswith("docker build --tag")]
    assert [" ".join(call.argv[4:]) for call in calls] == builds
    assert world.running == "RNEWRELEASE"


def test_the_release_step_builds_externally(world: World) -> None:
    write(world, "{web: {build: .}}")
    commit = world.add_git()
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    build = world.call(EXTERNAL)
    options = "--external --app shop --manifest convox.yml --description"
    assert build.line == f"convox build {options} {commit} Sell more --id {build.argv[-1]}"
    assert f"\n$ convox build {options} '{commit} Sell more' --id " in ran.out
    [image] = json.loads((world.app / "result.json").read_text())["images"]
    assert (image["image"], image["digest"], image["services"]) == ("", None, ["web"])
    assert world.commands("docker tag", "docker push", "docker login", "aws") == []


def test_it_needs_no_aws(world: World) -> None:
    write(world, "{web: {build: .}}")
    (world.bin / "aws").unlink()
    assert world.deploy().status == 0


def test_only_that_call_gets_no_builder(world: World) -> None:
    """The CLI builds `FROM` a local image, which only docker's own builder of the current context has."""
    write(world, "{web: {build: .}}")
    world.add_hooks()
    ran = world.deploy(env={"BUILDX_BUILDER": "farm"})
    assert ran.status == 0, ran.text
    builders = {call.line: call.env.get("BUILDX_BUILDER") for call in world.calls}
    assert [line for line in builders if builders[line] != "farm"] == [world.call(EXTERNAL).line]
    assert builders[world.call(EXTERNAL).line] is None


def test_no_builder_is_set_where_none_was(world: World) -> None:
    write(world, "{web: {build: .}}")
    assert world.deploy().status == 0
    assert not any("BUILDX_BUILDER" in call.env for call in world.calls)


@pytest.mark.parametrize("value", [None, "1", "0"])
def test_the_rack_gets_the_image_without_new_attestations(world: World, value: str | None) -> None:
    """They would give the rack another digest than the one that was built."""
    write(world, "{web: {build: .}}")
    assert world.deploy(env={"BUILDX_NO_DEFAULT_ATTESTATIONS": value}).status == 0
    assert world.call(EXTERNAL).env["BUILDX_NO_DEFAULT_ATTESTATIONS"] == (value or "1")


def test_both_ways_to_the_rack_can_stand_in_one_manifest(world: World) -> None:
    text = write(world, f"{{web: {{build: .}}, api: {{image: '{ECR}/api:TAG', build: api}}}}")
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert {line.split()[-1].partition(":")[0] for line in world.commands("docker push")} == {
        f"{ECR}/api"
    }
    [pushed] = {line.split()[-1] for line in world.commands("docker push")}
    local = world.commands("docker build --tag")[0].split()[3]
    assert world.call(EXTERNAL).upload == {
        "convox.yml": text.replace(f"{ECR}/api:TAG", pushed),
        "Dockerfile": f"FROM {local}\n",
    }
    assert world.call(EXTERNAL).argv[2] == "--external"
    images = json.loads((world.app / "result.json").read_text())["images"]
    assert sorted(image["image"] for image in images) == ["", pushed]


def test_images_of_a_registry_need_no_external_build(world: World) -> None:
    write(world, f"{{web: {{image: '{ECR}/web:TAG'}}}}")
    assert world.deploy().status == 0
    build = world.call("convox build --app")
    assert "--external" not in build.argv and "BUILDX_BUILDER" not in build.env


def test_a_cli_without_external_is_an_error_that_names_the_services(world: World) -> None:
    write(world, "{web: {build: .}, job: {}, db: {image: 'postgres:16'}}")
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v2"})
    assert ran.status == 2
    assert "convox.yml: This convox CLI cannot push the images of web, job. Set image: " in ran.err
    assert ":TAG, or use a CLI and a rack of Convox v3.\nNothing has been changed.\n" in ran.err
    assert world.commands("docker build --tag", EXTERNAL) == []


def test_a_cli_without_external_is_found_again_after_before_build(world: World) -> None:
    """The hook writes a manifest whose images this CLI cannot push."""
    write(world, f"{{web: {{image: '{ECR}/web:TAG'}}}}")
    script = "#!/bin/sh\necho 'services: {web: {build: .}}' >convox.yml\n"
    world.write("deploy/before_build.sh", script, 0o755)
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v2"})
    assert ran.status == 1
    assert "build failed:\nconvox.yml: This convox CLI cannot push the images of web." in ran.err
    assert world.commands("docker build --tag", EXTERNAL) == []


@pytest.mark.parametrize(
    ("services", "problem"),
    [
        ("{web: {build: ..}}", "service web: ../Dockerfile is outside the project."),
        ("{web: {build: /tmp}}", "service web: /tmp/Dockerfile is outside the project."),
        ("{web: {build: {manifest: ../D}}}", "service web: ../D is outside the project."),
        (
            "{a: {build: {path: ., args: [A=1]}}, b: {build: ./}}",
            "service b would get the image of another build.",
        ),
        ("{web: {build: {path: ., dockerfile: D}}}", "Convox ignores build.dockerfile"),
        ("{web: {build: {context: .}}}", "Convox ignores build.context"),
        ("{web: {build: {path: ., cache_from: [x]}}}", "Convox ignores build.cache_from"),
    ],
)
def test_what_the_rack_would_build_otherwise_is_an_error(
    world: World, services: str, problem: str
) -> None:
    write(world, services)
    ran = world.deploy()
    assert ran.status == 2 and problem in ran.err
    assert world.calls == []


@pytest.mark.parametrize(
    "build",
    [".", "{context: api}", "{path: api}", "{dockerfile: Dockerfile.prod}", "{target: run}"],
)
@pytest.mark.parametrize("name", ["docker-compose.yml", "compose.yml"])
def test_a_compose_file_without_image_is_an_error_with_the_line_to_add(
    world: World, build: str, name: str
) -> None:
    """Convox v3 would build `.` for most of these."""
    world.write(name, f"services:\n  web:\n    build: {build}\n")
    ran = world.deploy("--file", name)
    line = "image: <account>.dkr.ecr.<region>.amazonaws.com/<repository>:TAG"
    problem = f"service web: a Compose file needs an image here. Add this line: {line}"
    assert ran.status == 2 and f"preflight failed:\n{name}: {problem}\n" in ran.err
    assert world.calls == []


def test_services_that_convox_v3_ignores_are_an_error(world: World) -> None:
    world.write("convox.yml", "# Our services\nweb:\n  build: .\n")
    ran = world.deploy()
    assert ran.status == 2
    problem = "Convox v3 ignores services at the top level, and would remove what runs."
    assert f"\nconvox.yml: {problem} Move them under `services:`.\n" in ran.err
    assert world.commands("docker build --tag", EXTERNAL) == []


def test_services_at_the_top_level_of_a_compose_file_need_an_image_too(world: World) -> None:
    world.write("docker-compose.yml", "# Our services\nweb:\n  build: .\n")
    ran = world.deploy()
    assert ran.status == 2
    assert "service web: a Compose file needs an image here. Add this line: image: " in ran.err
    assert world.calls == []


def test_the_same_build_in_other_words_is_one_build(world: World) -> None:
    write(world, "{a: {build: ./}, b: {build: {path: ., manifest: ./Dockerfile}}, c: }")
    assert world.deploy().status == 0
    assert len(world.commands("docker build --tag")) == 1


def test_a_dry_run_shows_the_external_build(world: World) -> None:
    write(world, "{web: {build: .}}")
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    assert "\n$ convox build --external --app shop --manifest convox.yml " in ran.out
    assert "as uploaded" not in ran.out  # no line of the manifest changes
    assert world.commands("docker build --tag", EXTERNAL) == []


def test_what_a_hook_makes_of_an_image_is_released(world: World) -> None:
    """after_build.sh changes what DOCKER_TAG names, such as with `docker commit`."""
    write(world, "{web: {build: .}}")
    commit = '#!/bin/sh\nset -e\ndocker commit container "$DOCKER_TAG_WEB"\n'
    world.write("deploy/after_build.sh", commit, 0o755)
    assert world.deploy().status == 0
    changed = world.call("docker commit").argv[-1]
    assert world.call(EXTERNAL).upload["Dockerfile"] == f"FROM {changed}\n"


def test_no_image_name_is_left_in_docker(world: World) -> None:
    write(world, "{web: {build: .}, api: {build: api}}")
    assert world.deploy().status == 0
    names: Any = {line.split()[3] for line in world.commands("docker build --tag")}
    assert set(world.call("docker image rm").argv[4:]) == names
