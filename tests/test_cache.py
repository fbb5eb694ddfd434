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
    assert f"$ docker pull --quiet {RUNNING}\n" in ran.out


def test_without_the_option_no_cache_is_used(world: World) -> None:
    assert world.deploy().status == 0
    assert "CACHE" not in build_of(world) and "--cache-from" not in build_of(world)
    assert world.commands(READ_RELEASE, "docker build --help") == []


def test_a_dry_run_shows_the_cache(world: World) -> None:
    ran = world.deploy("--dry-run", OPTION)
    assert f"{INLINE} --cache-from {RUNNING} ." in ran.out


def test_each_build_gets_the_cache_of_its_own_service(world: World) -> None:
    write_manifest(world, "web", "api", "new")
    world.rules[READ_RELEASE] = release_with(web=f"{ECR}/web:1", api=f"{ECR}/api:2")
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert len(world.commands(READ_RELEASE)) == 1
    targets = {line.split()[-2]: line for line in world.commands("docker build --tag")}
    web, api, new = (targets[name] for name in ("web", "api", "new"))
    assert f"--cache-from {ECR}/web:1 --target web" in web
    assert f"--cache-from {ECR}/api:2 --target api" in api
    assert "--cache-from" not in new and INLINE in new
    reason = "ROLDRELEASE has no image for it."
    assert f"\nwarning: Building new without the running image as cache: {reason}\n" in ran.out


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (release_with(worker=RUNNING), "ROLDRELEASE has no image for it."),
        (
            {"out": '{"manifest": "services:\\n  web:\\n    build: .\\n"}'},
            "ROLDRELEASE has no image",
        ),
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
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert f"\nwarning: Building web without the running image as cache: {reason}" in ran.out
    assert INLINE in build_of(world) and "--cache-from" not in build_of(world)


@pytest.mark.parametrize("how", ["first deploy", "deploy key"])
def test_an_unknown_release_is_not_requested(world: World, how: str) -> None:
    if how == "first deploy":
        (world.home / "running").write_text("\n")
    ran = world.deploy(OPTION, *(["--no-verify"] if how == "deploy key" else []))
    assert ran.status == 0, ran.text
    assert (
        "\nwarning: Building web without the running image as cache: no running release is known.\n"
        in ran.out
    )
    assert INLINE in build_of(world) and world.commands(READ_RELEASE) == []


def test_the_legacy_builder_gets_no_cache_options(world: World) -> None:
    world.rules["docker build --help"] = {"out": "      --cache-from strings\n"}
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert (
        "\nwarning: Building web without the running image as cache: this needs BuildKit.\n"
        in ran.out
    )
    assert "CACHE" not in build_of(world) and "--cache-from" not in build_of(world)


def test_an_image_that_cannot_be_pulled_is_reported(world: World) -> None:
    world.rules["docker pull"] = {"status": 1, "err": "Error: manifest unknown\n"}
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    reason = "Error: manifest unknown"
    assert f"\nwarning: Building web without the running image as cache: {reason}\n" in ran.out


@pytest.mark.parametrize("rule", [{}, {"status": 1}, {"signal": 9}])
def test_the_environment_of_the_running_release_is_never_shown(world: World, rule: Rule) -> None:
    world.rules[READ_RELEASE] = {**release_with(web=RUNNING), **rule}
    world.rules["docker build --tag"] = {"status": 1}
    ran = world.deploy(OPTION, "--result", "result.json", env={"DEPLOY_DEBUG": "1"})
    assert world.commands(READ_RELEASE) != []
    assert ran.status == 1
    assert SECRET not in ran.text + (world.app / "result.json").read_text()
    assert SECRET not in build_of(world)


def test_a_dry_run_without_docker_is_shown_to_the_end(world: World) -> None:
    (world.bin / "docker").unlink()
    ran = world.deploy("--dry-run", OPTION)
    assert ran.status == 2 and "$ convox releases promote" in ran.out


def test_a_new_service_does_not_get_the_reason_of_another(world: World) -> None:
    write_manifest(world, "web", "new")
    world.rules["docker pull"] = {"status": 1, "err": "Error: manifest unknown\n"}
    ran = world.deploy(OPTION)
    assert "Building web without the running image as cache: Error: manifest unknown\n" in ran.out
    assert "Building new without the running image as cache: ROLDRELEASE has no image" in ran.out


@pytest.mark.parametrize(
    ("version", "pulls"),
    [("19.03.15", 1), ("20.10.24", 1), ("22.06.0-beta.0", 1), ("dev", 1), ("", 1)]
    + [(version, 0) for version in ("23.0.0", "28.2.2", "29.1.3", "29.0.0-rc.1")],
)
def test_the_image_is_pulled_only_for_engines_that_need_it(
    world: World, version: str, pulls: int
) -> None:
    """Since 23, the pull makes every second deploy cold with the classic image store."""
    warning = "WARNING: Error loading config file\n"
    world.rules["docker version"] = {"out": f"{version}\n", "bytes": [*warning.encode()]}
    ran = world.deploy(OPTION)
    assert ran.status == 0, ran.text
    assert len(world.commands("docker pull")) == pulls
    assert f"--cache-from {RUNNING} ." in build_of(world)
