"""Several images at once: labels, the first failure, signals and the limit."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import ECR, World, ended, is_alive
from standin import Rule

NAMES = ["web", "api", "job"]


@pytest.fixture(autouse=True)
def three_images(world: World) -> None:
    world.env["STANDIN_BUILDKIT"] = "1"
    services = "".join(
        f"  {name}: {{image: '{ECR}/{name}:TAG', build: {{context: ., target: {name}}}}}\n"
        for name in NAMES
    )
    world.write("docker-compose.yml", f"services:\n{services}")


def build_rules(world: World, *, others: Rule, **rules: Rule) -> None:
    """Set the rule for the build of each service, whose name is its target."""
    rule: Rule = {**others, "words": rules}
    world.rules["docker build --tag"] = rule


def result_of(world: World) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((world.app / "result.json").read_text())
    return result


TOGETHER: Rule = {"usual": True, "once": "docker build --tag", "times": 3}


def test_builds_run_at_the_same_time_and_each_line_names_its_service(world: World) -> None:
    lines: dict[str, Rule] = {
        name: {**TOGETHER, "out": f"{name} out\n\n \n", "err": f"{name} err\n"} for name in NAMES
    }
    build_rules(world, others={}, **lines)
    ran = world.deploy()
    assert ran.status == 0, ran.text
    printed = ran.out.splitlines()
    for name in NAMES:
        assert f"{name} | {name} out" in printed and f"{name} | {name} err" in printed
    assert not any(line.endswith(" |") for line in map(str.rstrip, printed))
    builds = [line for line in printed if line.startswith("$ docker build --tag")]
    assert {line.split()[-2] for line in builds} == {*NAMES}


def test_the_result_has_the_seconds_of_each_build(world: World) -> None:
    build_rules(world, others={"usual": True}, api={"usual": True, "pause": 1})
    assert world.deploy("--result", "result.json").status == 0
    seconds = {each["services"][0]: each["build_seconds"] for each in result_of(world)["images"]}
    assert seconds.keys() == {*NAMES} and min(seconds.values()) > 0
    assert (
        max(seconds["web"], seconds["job"])
        < 1
        <= seconds["api"]
        <= result_of(world)["seconds"]["build"]
    )


@pytest.mark.parametrize("how", ["--parallel 1", "DEPLOY_PARALLEL", "legacy builder"])
def test_builds_can_run_one_after_another(world: World, how: str) -> None:
    build_rules(world, others={"usual": True, "lock": "building", "out": "as docker wrote it\n"})
    args = how.split() if "--" in how else []
    env = {"DEPLOY_PARALLEL": "1"} if how == "DEPLOY_PARALLEL" else {}
    ran = world.deploy(*args, env={**env, **({"STANDIN_BUILDKIT": ""} if "legacy" in how else {})})
    assert ran.status == 0, ran.text
    assert ran.out.count("\nas docker wrote it\n") == 3


def test_pushes_can_run_one_after_another(world: World) -> None:
    world.rules["docker push"] = {"usual": True, "lock": "pushing"}
    ran = world.deploy("--parallel", "1")
    assert ran.status == 0, ran.text


def test_no_more_builds_than_allowed_run_at_the_same_time(world: World) -> None:
    build_rules(world, others={"hang": True})
    process = world.start("--parallel", "2")
    for _ in range(2):
        world.await_hanging()
    process.send_signal(signal.SIGTERM)
    assert ended(process).status == 143
    assert len(world.commands("docker build --tag")) == 2


@pytest.mark.parametrize("value", ["0", "-1", "65", "many", "1.5"])
def test_a_limit_that_is_no_number_is_an_error(world: World, value: str) -> None:
    ran = world.deploy(env={"DEPLOY_PARALLEL": value})
    assert ran.status == 2 and "'--parallel'" in ran.err and value in ran.err


def test_the_first_failure_ends_the_others_and_its_service_is_named(world: World) -> None:
    failure: Rule = {"once_one_hangs": True, "status": 1, "err": "the cause\n"}
    build_rules(world, others={"hang": True, "child": True}, api=failure)
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert "build failed:\n`docker build` for api exited with code 1. Its output is" in ran.err
    assert ran.out.count("api | the cause\n") == 1
    assert "for web" not in ran.err and "for job" not in ran.err
    assert not is_alive(world.await_hanging())
    result = result_of(world)
    assert (result["failed_step"], result["failed_service"]) == ("build", "api")
    assert world.commands("docker push", "convox build --app") == []


def test_what_buildkit_says_of_itself_is_left_out(world: World) -> None:
    noise = [
        "#1 [internal] load build definition from Dockerfile",
        "#1 transferring dockerfile: 235B done",
        "#1 sha256:66f87c57da54ddbc86d9d952c5d0dfb295b141807a89767c779147a995b2ea8f",
        "#4 resolve docker.io/library/base:latest 0.0s done",
        "#1 DONE 0.0s",
        "",
    ]
    log = ["#5 [2/2] RUN make", "#5 0.1 [internal] of the app", "#5 DONE 2.3s", "#6 ERROR: no"]
    build_rules(world, others={"usual": True, "out": "\n".join([*noise, *log]) + "\n"})
    ran = world.deploy()
    assert ran.status == 0, ran.text
    for name in NAMES:
        lines = [line for line in ran.out.splitlines() if line.startswith(f"{name} | #")]
        assert lines == [f"{name} | {line}" for line in log]


def test_once_a_build_has_failed_the_others_are_silent(world: World) -> None:
    """Their last words would stand between the cause and the end."""
    failure: Rule = {"once_one_hangs": True, "status": 1, "err": "the cause\n"}
    build_rules(world, others={"hang": True, "ignore_term": "canceled"}, api=failure)
    world.constants["GRACE_SECONDS"] = 0.3
    ran = world.deploy()
    assert ran.status == 1
    world.await_term()
    assert "api | the cause\n" in ran.out and "canceled" not in ran.text


def test_the_service_of_a_failed_push_is_in_the_result(world: World) -> None:
    world.rules[f"docker push {ECR}/job"] = {"status": 1, "err": "denied"}
    assert world.deploy("--result", "result.json").status == 1
    result = result_of(world)
    assert (result["failed_step"], result["failed_service"]) == ("push", "job")


def test_of_services_that_share_an_image_the_one_whose_push_failed_is_named(world: World) -> None:
    services = [f"{name}: {{image: '{ECR}/{name}:TAG', build: .}}" for name in ("web", "worker")]
    world.write("docker-compose.yml", f"services: {{{', '.join(services)}}}\n")
    world.rules[f"docker push {ECR}/worker"] = {"status": 1, "err": "denied"}
    ran = world.deploy("--result", "result.json")
    assert "`docker push` for worker exited with code 1. Its output is above.\n" in ran.err
    assert result_of(world)["failed_service"] == "worker"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_everything_that_was_stopped_is_named(world: World, signum: int) -> None:
    build_rules(world, others={"hang": True})
    process = world.start("--result", "result.json")
    pids = [world.await_hanging() for _ in NAMES]
    process.send_signal(signum)
    ran = ended(process)
    assert ran.status == (124 if signum == signal.SIGALRM else 128 + signum)
    [line] = [line for line in ran.err.splitlines() if " while running " in line]
    assert all(f"`docker build` for {name}" in line for name in NAMES)
    assert not any(map(is_alive, pids))
    assert result_of(world)["failed_service"] == ""


def test_a_dry_run_shows_the_builds_in_order(world: World) -> None:
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    shown = [line for line in ran.out.splitlines() if "docker build" in line]
    assert [line.split()[-2] for line in shown] == NAMES
    assert not any(" | " in line for line in shown)
