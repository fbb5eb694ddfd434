"""What runs side by side, and that the lifecycle's order and its promises stay as they are."""

from __future__ import annotations

import signal

import pytest
from conftest import COMPOSE, ECR, World, is_alive

TWO_SERVICES = COMPOSE + f"  worker:\n    image: {ECR}/worker:TAG\n    build: worker\n"
LOOKUP = "aws ecr describe-repositories"
EXPIRED = "An error occurred (ExpiredTokenException) when calling the DescribeRepositories operation: expired"


@pytest.fixture
def two_services(world: World) -> World:
    world.write("docker-compose.yml", TWO_SERVICES)
    world.write("worker/Dockerfile", "FROM scratch\n")
    return world


def test_the_checks_and_the_login_run_side_by_side(world: World) -> None:
    world.rules = {
        "docker version": {"usual": True, "once": "aws ecr get-login-password"},
        "aws ecr get-login-password": {"usual": True, "once": "convox build --help"},
        "convox build --help": {"usual": True, "once": "docker version"},
    }
    ran = world.deploy()
    assert ran.status == 0, ran.text


def test_repositories_are_looked_up_while_docker_builds_with_one_call_for_all(two_services: World) -> None:
    (two_services.home / "repositories").write_text("123456789012/shop\n123456789012/worker\n")
    two_services.rules[LOOKUP] = {"usual": True, "once": "docker build"}
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    assert [line.split("--repository-names")[1] for line in two_services.commands(LOOKUP)] == [" shop worker"]
    assert two_services.commands("aws ecr create") == []


def test_only_the_repository_that_is_missing_is_made(two_services: World) -> None:
    (two_services.home / "repositories").write_text("123456789012/shop\n")
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    assert [line.split()[-1] for line in two_services.commands("aws ecr create")] == ["worker"]


def test_a_lookup_that_fails_while_docker_builds_stops_the_deploy(world: World) -> None:
    world.rules[LOOKUP] = {"once": "docker build", "status": 254, "err": EXPIRED}
    ran = world.deploy()
    assert ran.status == 1
    assert EXPIRED in ran.err and "Nothing was released or promoted." in ran.err
    assert world.commands("docker push", "convox build --app", "convox releases promote --app") == []


def test_a_lookup_that_still_runs_ends_with_the_deploy(world: World) -> None:
    world.constants["GRACE_SECONDS"] = 0.5
    world.rules = {LOOKUP: {"hang": True}, "docker build": {"status": 1, "once_one_hangs": True}}
    ran = world.deploy()
    assert ran.status == 1 and "`docker build` failed" in ran.err
    assert not is_alive(world.await_hanging())


def test_pushes_run_side_by_side_and_each_line_tells_of_which_service_it_is(two_services: World) -> None:
    for name, other in (("shop", "worker"), ("worker", "shop")):
        two_services.rules[f"docker push {ECR}/{name}"] = {
            "usual": True,
            "once": f"docker push {ECR}/{other}",
            "out": f"a layer of {name}: Pushed\n{name} is pushed",
            "err": f"a warning about {name}\n",
        }
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    lines = ran.out.splitlines()
    for service, name in (("web", "shop"), ("worker", "worker")):
        assert f"{service} | a layer of {name}: Pushed" in lines and f"{service} | {name} is pushed" in lines
        assert f"{service} | a warning about {name}" in ran.err.splitlines()


def test_one_push_goes_straight_to_the_terminal_or_log(world: World) -> None:
    world.rules["docker push"] = {"usual": True, "out": "as docker wrote it\n"}
    assert "\nas docker wrote it\n" in world.deploy().out


def test_a_lookup_that_ignores_a_signal_is_killed_in_the_end(world: World) -> None:
    world.write("deploy/before_build.sh", "#!/bin/sh\n: >began\nexec sleep 600\n", 0o755)
    world.constants["GRACE_SECONDS"] = 0.5
    world.rules[LOOKUP] = {"hang": True, "ignore_term": True}
    process = world.start()
    lookup = world.await_hanging()
    while not (world.app / "began").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not is_alive(lookup)


def test_a_repository_of_two_images_is_made_once(two_services: World) -> None:
    two_services.write("docker-compose.yml", TWO_SERVICES.replace("/worker:TAG", "/shop:TAG"))
    ran = two_services.deploy()
    assert ran.status == 0, ran.text
    assert len(two_services.commands("aws ecr create")) == 1


def test_a_clean_up_that_fails_does_no_harm(world: World) -> None:
    world.write(
        "deploy/before_release.sh",
        '#!/bin/sh\ncd ../bin\nrm docker\necho "#!/no/such/shell" >docker\nchmod +x docker\n',
        0o755,
    )
    ran = world.deploy(env={"PATH": f"{world.env['PATH']}:/usr/bin:/bin"})
    assert ran.status == 0, ran.text
    assert ran.out.endswith("shop runs RNEWRELEASE.\n")


def test_a_push_that_fails_ends_the_others_and_is_the_one_reported(two_services: World) -> None:
    two_services.rules = {
        f"docker push {ECR}/worker": {"hang": True, "child": True},
        f"docker push {ECR}/shop": {"once_one_hangs": True, "status": 1, "err": "denied: no"},
    }
    ran = two_services.deploy()
    assert ran.status == 1
    assert "`docker push` for web failed with exit status 1.\n  denied: no" in ran.err
    assert not is_alive(two_services.await_hanging())
    assert two_services.commands("convox build --app", "convox releases promote --app") == []
    assert two_services.nothing_is_left()
