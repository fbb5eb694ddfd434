"""What is tried again, and what never is."""

from __future__ import annotations

import signal

import pytest
from conftest import World

PASSING = [
    "received unexpected HTTP status: 503 Service Unavailable",
    "received unexpected HTTP status: 500 Internal Server Error",
    "write tcp 10.0.0.1:443: connection reset by peer",
    "unexpected EOF",
    "net/http: TLS handshake timeout",
    "toomanyrequests: Rate exceeded",
]
LASTING = [
    "denied: requested access to the resource is denied",
    "tag invalid: The image tag 'x' already exists and cannot be overwritten because the tag is immutable.",
    "no basic auth credentials",
]


@pytest.mark.parametrize("reason", PASSING)
def test_a_push_is_tried_again_where_the_reason_passes(world: World, reason: str) -> None:
    world.constants["RETRY_PAUSES"] = (0, 5, 15)
    world.rules["docker push"] = {"number": 1, "status": 1, "err": reason}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands("docker push")) == 2
    assert f"warning: `docker push` failed: {reason} Trying again in 0 s." in ran.out


@pytest.mark.parametrize("reason", LASTING)
def test_a_push_is_not_tried_again_where_the_reason_stays(world: World, reason: str) -> None:
    world.rules["docker push"] = {"status": 1, "err": reason}
    ran = world.deploy()
    assert ran.status == 1 and reason in ran.err
    assert len(world.commands("docker push")) == 1


def test_an_expired_login_is_renewed(world: World) -> None:
    expired = "denied: Your authorization token has expired. Reauthenticate and try again."
    world.rules["docker push"] = {"number": 1, "status": 1, "err": expired}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert [line.split()[1] for line in world.commands("docker push", "docker login")] == [
        "login",
        "push",
        "login",
        "push",
    ]


@pytest.mark.parametrize("call", ["get-login-password", "describe-repositories", "create-repository"])
def test_a_throttled_call_of_ecr_is_tried_again(world: World, call: str) -> None:
    throttled = "An error occurred (ThrottlingException) when calling the operation: Rate exceeded"
    world.constants["RETRY_PAUSES"] = (0, 5, 15)
    world.rules[f"aws ecr {call}"] = {"number": 1, "status": 254, "err": throttled}
    assert world.deploy().status == 0
    assert len(world.commands(f"aws ecr {call}")) == 2


def test_the_tries_are_bounded_and_the_pauses_grow(world: World) -> None:
    (world.bin / "sleep").unlink()
    (world.bin / "sleep").symlink_to("/bin/true")
    world.rules["docker push"] = {"status": 1, "err": "connection reset by peer"}
    ran = world.deploy()
    assert ran.status == 1
    pauses = [line.split()[-2] for line in ran.out.splitlines() if "Trying again in" in line]
    assert pauses == ["1", "5", "15"]
    assert len(world.commands("docker push")) == 4


def test_a_signal_ends_a_pause(world: World) -> None:
    (world.bin / "sleep").unlink()
    (world.bin / "sleep").symlink_to(world.bin / "docker")
    world.rules = {"docker push": {"status": 1, "err": "unexpected EOF"}, "sleep": {"hang": True}}
    process = world.start()
    world.await_hanging()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(world.commands("docker push")) == 1


@pytest.mark.parametrize(
    "command",
    ["docker build", "convox build --app", "convox releases promote --app", "before_release", "convox api get"],
)
def test_what_changes_something_is_never_tried_again(world: World, command: str) -> None:
    world.add_hooks()
    world.rules[command] = {"status": 1, "err": "connection reset by peer"}
    assert world.deploy().status != 0
    assert len(world.commands(command)) == 1
