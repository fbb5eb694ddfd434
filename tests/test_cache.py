"""Using the running image as a build cache: what docker gets, and why a build continues without it."""

from __future__ import annotations

import json

import pytest
from conftest import ECR, World
from standin import Rule

OPTION = "--cache-from-running"
READ_RELEASE = "convox api get /apps/shop/releases/ROLDRELEASE"
RUNNING = f"{ECR}/shop:5c55d44-3cbf733dcc19"
INLINE = "--build-arg BUILDKIT_INLINE_CACHE=1"
SECRET = "the-database's-password"
WARNING = "warning: Building without the running images as cache: "


def release_with(**images: str) -> Rule:
    """Return a rule for the rack's response to a request for the running release."""
    services = {name: {"image": image} for name, image in images.items()}
    manifest = json.dumps({"services": services})  # JSON is valid YAML
    answer = {"id": "ROLDRELEASE", "manifest": manifest, "env": f"DATABASE_PASSWORD={SECRET}"}
    return {"out": json.dumps(answer)}


@pytest.fixture(autouse=True)
def buildkit(world: World) -> None:
    world.rules["docker build --help"] = {"out": "      --secret stringArray   Secret file\n"}
    world.rules[READ_RELEASE] = release_with(web=RUNNING, redis="redis:7")


def write_manifest(world: World, *names: str) -> None:
    """Write a manifest of services with a separate build for each."""
    services = "".join(
        f"  {name}:\n    image: {ECR}/{name}:TAG\n    build: {{context: ., target: {name}}}\n"
        for name in names
    )
    world.write("docker-compose.yml", f"services:\n{services}")


def build_of(world: World) -> str:
    [build] = world.commands("docker build --tag")
    return build


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_running_image_is_the_cache(world: World, how: str) -> None:
    args, env = ([OPTION], {}) if how == "option" else ([], {"DEPLOY_CACHE_FROM_RUNNING": "1"})
    ran = world.deploy(*args, env=env)
    assert ran.status == 0, ran.text
    assert f" {INLINE} --cache-from {RUNNING} ." in build_of(world)
    assert f"--cache-from {RUNNING}" in ran.out and "warning" not in ran.out
    assert world.commands("docker pull") == []


def test_without_the_option_no_cache_is_used(world: World) -> None:
    assert world.deploy().status == 0
    assert "CACHE" not in build_of(world) and "--cache-from" not in build_of(world)
    assert world.commands(READ_RELEASE) == [READ_RELEASE]  # for its description
    assert world.commands("docker build --help") == []


def test_a_dry_run_shows_the_cache(world: World) -> None:
    ran = world.deploy("--dry-run", OPTION)
    assert f"{INLINE} --cache-from {RUNNING} ." in ran.out


def test_each_build_gets_the_cache_of_its_own_service(world: World) -> None:
    write_manifest(world, "web", "api", "new")
    world.rules[READ_RELEASE] = release_with(web=f"{ECR}/web:1", api=f"{ECR}/api:2")
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert len(world.commands(READ_RELEASE)) == 2  # one is for its description
    targets = {line.split()[-2]: line for line in world.commands("docker build --tag")}
    web, api, new = (targets[name] for name in ("web", "api", "new"))
    assert f"--cache-from {ECR}/web:1 --target web" in web
    assert f"--cache-from {ECR}/api:2 --target api" in api
    assert "--cache-from" not in new and INLINE in new
    assert "warning" not in ran.out


@pytest.mark.parametrize(
    "rule",
    [release_with(worker=RUNNING), {"out": '{"manifest": "services:\\n  web:\\n    build: .\\n"}'}],
)
def test_a_service_that_is_not_running_yet_is_built_without_a_cache(
    world: World, rule: Rule
) -> None:
    world.rules[READ_RELEASE] = rule
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert INLINE in build_of(world) and "--cache-from" not in build_of(world)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (
            {"out": '{"env": "A=b"}'},
            "`convox api get` for shop on rack.example.com printed no usable answer.",
        ),
        (
            {"out": '{"manifest": "a: [b"}'},
            "`convox api get` for shop on rack.example.com printed no usable answer.",
        ),
        (
            {"out": "<html>"},
            "`convox api get` for shop on rack.example.com printed no usable answer.",
        ),
        ({"status": 1, "err": "ERROR: forbidden\n"}, "ERROR: forbidden"),
    ],
)
def test_a_build_continues_without_a_cache_and_one_line_shows_why(
    world: World, rule: Rule, reason: str
) -> None:
    world.rules[READ_RELEASE] = rule
    write_manifest(world, "web", "api")
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert f"\n{WARNING}{reason}" in ran.out and ran.out.count("warning") == 1
    for build in world.commands("docker build --tag"):
        assert INLINE in build and "--cache-from" not in build


def test_an_unknown_release_is_not_requested(world: World) -> None:
    (world.home / "running").write_text("\n")
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert f"\n{WARNING}no running release is known.\n" in ran.out
    assert INLINE in build_of(world) and world.commands(READ_RELEASE) == []


def test_the_legacy_builder_gets_no_cache_options(world: World) -> None:
    world.rules["docker build --help"] = {"out": "      --cache-from strings\n"}
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert f"\n{WARNING}this needs BuildKit.\n" in ran.out
    assert "CACHE" not in build_of(world) and "--cache-from" not in build_of(world)


@pytest.mark.parametrize("rule", [{}, {"status": 1}, {"signal": 9}])
def test_the_environment_of_the_running_release_is_never_shown(world: World, rule: Rule) -> None:
    world.rules[READ_RELEASE] = {**release_with(web=RUNNING), **rule}
    world.rules["docker build --tag"] = {"status": 1}
    ran = world.deploy(OPTION, "--result", "result.json")
    assert world.commands(READ_RELEASE) != []
    assert ran.status == 1
    assert SECRET not in ran.text + (world.app / "result.json").read_text()
    assert SECRET not in build_of(world)


def test_a_dry_run_without_docker_is_shown_to_the_end(world: World) -> None:
    (world.bin / "docker").unlink()
    ran = world.deploy("--dry-run", OPTION)
    assert ran.status == 2 and "$ convox releases promote" in ran.out
