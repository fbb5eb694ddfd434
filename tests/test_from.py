"""Built once, deployed again: the images of an earlier result, to another app or rack."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import COMPOSE, ECR, World

SKIPPED = ["before_build", "build", "after_build", "push"]


def first_deploy(world: World, manifest: str = COMPOSE) -> list[dict[str, Any]]:
    """Deploy with a result, make docker and aws unavailable, and return the images."""
    world.write("docker-compose.yml", manifest)
    world.add_git()
    ran = world.deploy("--result", "deploy.json")
    assert ran.status == 0, ran.text
    for program in ("docker", "aws"):
        (world.bin / program).unlink()
    (world.home / "calls").unlink()
    images: list[dict[str, Any]] = json.loads((world.app / "deploy.json").read_text())["images"]
    return images


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_images_of_a_result_are_deployed_to_another_app(world: World, how: str) -> None:
    [image] = first_deploy(world)
    world.add_hooks()
    args, env = (
        (["--from", "deploy.json"], {}) if how == "option" else ([], {"DEPLOY_FROM": "deploy.json"})
    )
    ran = world.deploy("--app", "production", "--result", "second.json", *args, env=env)
    assert ran.status == 0, ran.text
    assert not any(f"==> {name}" in ran.out for name in SKIPPED)
    build = world.call("convox build --app production")
    assert build.upload["docker-compose.yml"] == COMPOSE.replace(f"{ECR}/shop:TAG", image["image"])
    assert world.commands("before_build", "after_build") == []
    assert world.call("before_release").env["RELEASE_ID"] == "RNEWRELEASX"
    assert world.running == "RNEWRELEASX"
    result = json.loads((world.app / "second.json").read_text())
    assert (result["app"], result["images"]) == ("production", [image])


def test_its_result_can_be_deployed_again(world: World) -> None:
    images = first_deploy(world)
    assert world.deploy("--from", "deploy.json", "--result", "second.json").status == 0
    assert world.deploy("--from", "second.json", "--result", "third.json").status == 0
    assert json.loads((world.app / "third.json").read_text())["images"] == images


def test_each_service_gets_its_own_image(world: World) -> None:
    manifest = (
        f"web: {{image: '{ECR}/shop:TAG'}}\njob: {{image: '{ECR}/shop:TAG'}}\n"
        f"api: {{image: '{ECR}/api:TAG', build: {{context: ., target: api}}}}\nredis: {{image: redis}}\n"
    )
    world.write("deploy.json", "")
    images = first_deploy(world, manifest)
    ran = world.deploy("--from", "deploy.json")
    assert ran.status == 0, ran.text
    web, api = sorted((image["image"] for image in images), key=lambda name: "api" in name)
    upload = world.call("convox build --app").upload["docker-compose.yml"]
    assert upload == manifest.replace(f"{ECR}/shop:TAG", web).replace(f"{ECR}/api:TAG", api)


def test_the_dockerfile_may_be_missing(world: World) -> None:
    first_deploy(world)
    (world.app / "Dockerfile").unlink()
    assert world.deploy("--from", "deploy.json").status == 0


def test_a_dry_run_shows_what_is_deployed(world: World) -> None:
    [image] = first_deploy(world)
    ran = world.deploy("--from", "deploy.json", "--dry-run")
    assert ran.status == 0, ran.text
    assert f"\n+    image: {image['image']}\n" in ran.out
    assert world.commands("convox build --app", "convox releases promote --app") == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        "{}",
        "",
        "[",
        '{"tool": "convox-deploy"}',
        '{"tool": "convox-deploy", "images": 5}',
    ]
    + [
        f'{{"tool": "convox-deploy", "status": "succeeded", "images": [{image}]}}'
        for image in ("5", "{}", '{"image": "r.io/shop:1"}')
    ],
)
def test_what_is_no_result_is_an_error(world: World, text: str) -> None:
    world.write("deploy.json", text)
    ran = world.deploy("--from", "deploy.json")
    problem = "--from deploy.json is not the --result of a deploy that succeeded with images."
    assert ran.status == 2 and problem in ran.err
    assert "Traceback" not in ran.err and world.calls == []


def test_the_result_of_a_failed_deploy_is_an_error(world: World) -> None:
    images = [{"image": f"{ECR}/shop:1", "services": ["web"]}]
    result = {"tool": "convox-deploy", "status": "failed", "images": images}
    world.write("deploy.json", json.dumps(result))
    ran = world.deploy("--from", "deploy.json")
    assert ran.status == 2 and "not the --result of a deploy that succeeded" in ran.err
    assert world.calls == []


def test_it_cannot_be_combined_with_its_own_result(world: World) -> None:
    ran = world.deploy("--from", "deploy.json", "--result", "deploy.json")
    assert ran.status == 2 and "Error: --from and --result name the same file." in ran.err
    assert world.calls == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_release_wins_over_it(world: World, how: str) -> None:
    """The result is not even read, and may be the one that is written."""
    args, env = (
        (["--from", "deploy.json"], {}) if how == "option" else ([], {"DEPLOY_FROM": "deploy.json"})
    )
    ran = world.deploy("--release", "RABCDEFGHIJ", "--result", "deploy.json", *args, env=env)
    assert ran.status == 0, ran.text
    assert world.running == "RABCDEFGHIJ"
    assert world.commands("convox build", "docker") == ["convox build --help"]
    assert json.loads((world.app / "deploy.json").read_text())["images"] == []


# --- the description ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cli", "how"),
    [("v2", "option"), ("v3", "option"), ("v3", "variable")],
)
def test_the_release_can_have_a_description(world: World, how: str, cli: str) -> None:
    world.add_git()
    text = "Approved by Ada: it's $5 & more"
    args, env = (
        (["--description", text], {}) if how == "option" else ([], {"DEPLOY_DESCRIPTION": text})
    )
    ran = world.deploy(*args, env={**env, "CONVOX_STANDIN_CLI": cli, "BUILD_URL": "https://ci/7"})
    assert ran.status == 0, ran.text
    argv = world.call("convox build --app").argv
    assert argv[argv.index("--description") + 1] == text


@pytest.mark.parametrize("other", ["./deploy.json", "{app}/deploy.json", "link.json"])
def test_a_result_is_not_lost_by_naming_it_in_other_words(world: World, other: str) -> None:
    images = first_deploy(world)
    (world.app / "link.json").symlink_to("deploy.json")
    other = other.format(app=world.app)
    paths = [other, "deploy.json"] if other == "link.json" else ["deploy.json", other]
    ran = world.deploy("--from", paths[0], "--result", paths[1])
    assert ran.status == 2 and "--from and --result name the same file" in ran.err
    assert json.loads((world.app / "deploy.json").read_text())["images"] == images


def test_a_tag_for_new_images_does_not_matter(world: World) -> None:
    build = "{{image: '{}/shop:TAG', build: {{context: ., target: {}}}}}"
    services = ", ".join(f"{name}: {build.format(ECR, name)}" for name in ("web", "api"))
    first_deploy(world, f"services: {{{services}}}\n")
    ran = world.deploy("--from", "deploy.json", env={"IMAGE_TAG": "v2"})
    assert ran.status == 0, ran.text
