"""What the rack must report before a deploy succeeds."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import World

ASK = "convox api get /apps/shop"
SETTLED = {"status": "running"}


def responses(*statuses: str | dict[str, Any], release: str = "RNEWRELEASE") -> dict[str, Any]:
    """Return a rule for the rack's responses: one status after another, then the last one repeatedly.

    Two responses precede them, for the queries before the promote: the app and its releases.
    """
    first = [{"out": json.dumps({"release": "ROLDRELEASE", "status": "running"})}, {"out": "[]"}]
    rest = [
        status
        if isinstance(status, dict)
        else {"out": json.dumps({"release": release, "status": status})}
        for status in statuses
    ]
    return {"sequence": [*first, *rest]}


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {"POLL_SECONDS": 0.01, "PATIENCE_SECONDS": 0.5, "LAST_WORDS_SECONDS": 2}


FAULT = {"status": 1, "err": "ERROR: connection reset by peer\n"}


@pytest.mark.parametrize(
    "statuses",
    [
        ["running"],
        ["updating", "running"],
        ["creating", "updating", "updating", "running"],
        ["running", "updating", "running"],
        ["something-new", "running"],
        [FAULT, "running"],
        ["updating", FAULT, FAULT, "running"],
        ["running", FAULT, "running"],
        [{"out": "<html>"}, "running"],
        [{"out": "{}"}, "running"],
    ],
)
def test_a_deploy_succeeds_once_the_rack_settles(world: World, statuses: list[Any]) -> None:
    world.rules[ASK] = responses(*statuses)
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert "shop is now running RNEWRELEASE." in ran.out
    assert json.loads((world.app / "result.json").read_text())["verified"] is True


def test_the_rack_must_report_the_release_twice_in_a_row(world: World) -> None:
    world.rules[ASK] = responses("running", "rollback", "failed")
    assert world.deploy().status == 1


def test_a_failed_status_fails_the_deploy_immediately(world: World) -> None:
    world.rules[ASK] = responses("updating", "failed")
    ran = world.deploy()
    assert ran.status == 1
    assert "The status of shop is failed. See `convox logs`." in ran.err
    assert "shop is failed (release RNEWRELEASE)." in ran.err


def test_another_running_release_is_reported(world: World) -> None:
    world.rules[ASK] = responses("updating", "running", release="ROLDRELEASE")
    ran = world.deploy()
    assert ran.status == 1
    assert (
        "The rack accepted the promote, but shop is running ROLDRELEASE, not RNEWRELEASE."
        in ran.err
    )
    assert "shop is still running ROLDRELEASE." in ran.err


@pytest.mark.parametrize("status", ["updating", "rollback", "something-new"])
def test_a_timeout_reports_the_last_status(world: World, status: str) -> None:
    world.rules[ASK] = responses("updating", status, {"hang": True}, status)
    ran = world.deploy_and_signal(signal.SIGALRM)
    assert ran.status == 124
    assert f"Timed out after 60 minutes while waiting for shop (status: {status})." in ran.err
    assert f"shop is {status} (release RNEWRELEASE)." in ran.err


def test_a_waiting_deploy_without_a_timeout_prints_heartbeats(world: World) -> None:
    world.constants.update(HEARTBEAT_SECONDS=0.05, POLL_SECONDS=0.25)
    world.rules[ASK] = responses(*["updating"] * 4, "running")
    ran = world.deploy("--timeout", "0")
    assert ran.status == 0
    assert ran.out.count("Still waiting for shop (status: updating) (0 min)\n") > 1


def test_a_rack_that_stops_responding_fails_the_deploy(world: World) -> None:
    world.constants["PATIENCE_SECONDS"] = 0.05
    world.rules[ASK] = responses("updating", FAULT)
    ran = world.deploy()
    assert ran.status == 1
    assert (
        "promote failed:\n`convox api get` exited with code 1.\n  ERROR: connection reset by peer\n"
        in ran.err
    )
    assert "Could not find out what shop is running." in ran.err


# --- credentials that cannot read the app ---------------------------------------------

REFUSALS = [
    "ERROR: forbidden",
    "ERROR: response status: 403",
    "ERROR: Command not supported for deploy key",
    "no",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_credentials_that_cannot_read_the_app_fail_in_preflight(world: World, refusal: str) -> None:
    world.rules[ASK] = {"status": 1, "err": refusal}
    ran = world.deploy()
    assert ran.status == 2
    assert "A deploy key that is not allowed to read the app needs --no-verify" in ran.err
    assert world.commands("docker build") == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_credentials_that_cannot_read_the_app_can_deploy_with_no_verify(
    world: World, how: str
) -> None:
    world.rules[ASK] = {"status": 1, "err": "ERROR: forbidden"}
    args, env = (["--no-verify"], {}) if how == "option" else ([], {"DEPLOY_NO_VERIFY": "1"})
    ran = world.deploy(*args, "--result", "result.json", env=env)
    assert ran.status == 0, ran.text
    assert "Promoted RNEWRELEASE. What is running was not verified (--no-verify)." in ran.out
    assert "now running" not in ran.out and "To roll back" not in ran.out
    result = json.loads((world.app / "result.json").read_text())
    assert (result["status"], result["verified"], result["running"]) == ("succeeded", False, "")
    assert result["promote_requested"] is True


def test_no_verify_still_checks_the_credentials(world: World) -> None:
    world.rules["convox rack"] = {"status": 1, "err": "ERROR: Unable to authenticate.\n"}
    ran = world.deploy("--no-verify")
    assert ran.status == 2
    assert (
        "Unable to authenticate" in ran.err and "Check CONVOX_HOST and CONVOX_PASSWORD" in ran.err
    )
    assert world.commands("docker build") == []


# --- what is live after a failed promote ----------------------------------------------


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            {"out": '{"release": "ROLDRELEASE", "status": "running"}'},
            "shop is still running ROLDRELEASE.",
        ),
        (
            {"out": '{"release": "RNEWRELEASE", "status": "running"}'},
            "shop is now running RNEWRELEASE.",
        ),
        (
            {"out": '{"release": "RNEWRELEASE", "status": "updating"}'},
            "shop is updating (release RNEWRELEASE).",
        ),
        ({"out": "<html>"}, "Could not find out what shop is running."),
        ({"status": 1}, "Could not find out what shop is running."),
        ({"hang": True}, "Could not find out what shop is running."),
    ],
)
@pytest.mark.parametrize("how", ["failed", "stopped"])
def test_the_live_release_is_reported_after_a_failed_promote(
    world: World, how: str, after: dict[str, Any], message: str
) -> None:
    world.constants["LAST_WORDS_SECONDS"] = 0.5
    world.rules[ASK] = {"sequence": [*responses()["sequence"], after]}
    promote = "convox releases promote --app"
    if how == "failed":
        world.rules[promote] = {"status": 1, "err": "ERROR: rollback\n"}
        ran = world.deploy()
        assert ran.status == 1
    else:
        world.rules = {promote: {"hang": True}, **world.rules}
        ran = world.deploy_and_signal(signal.SIGTERM)
        assert ran.status == 143
    assert (
        f"\n{message}\nThe promote of RNEWRELEASE was requested and may still be in progress.\n"
        in ran.err
    )


def test_the_rack_is_not_queried_after_a_second_signal(world: World) -> None:
    world.rules["convox releases promote --app"] = {"hang": True, "ignore_term": True}
    process = world.start()
    world.await_hanging()
    process.send_signal(signal.SIGINT)
    world.await_term()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(world.commands(ASK)) == 2  # both before the promote
    assert "The promote of RNEWRELEASE was requested" in err


def test_the_rack_is_not_queried_again_if_the_deploy_fails_before_the_promote(world: World) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    ran = world.deploy()
    assert ran.status == 1
    assert len(world.commands(ASK)) == 1
    assert (
        "Nothing was released or promoted. shop was running ROLDRELEASE when this deploy started."
        in ran.err
    )


def test_a_successful_deploy_shows_how_to_roll_back(world: World) -> None:
    ran = world.deploy()
    assert ran.out.endswith(
        "\nTo roll back: convox releases promote --app shop --wait ROLDRELEASE\n"
    )


def test_a_first_deploy_has_nothing_to_roll_back_to(world: World) -> None:
    (world.home / "running").write_text("\n")
    ran = world.deploy()
    assert ran.status == 0
    assert ran.out.endswith("\nshop is now running RNEWRELEASE.\n")


@pytest.mark.parametrize("signum", [signal.SIGALRM, signal.SIGTERM, signal.SIGINT])
def test_the_rack_is_queried_after_a_promote_that_ignores_sigterm(
    world: World, signum: int
) -> None:
    world.constants = {"GRACE_SECONDS": 0.2}
    world.rules["convox releases promote --app"] = {"hang": True, "ignore_term": True}
    ran = world.deploy_and_signal(signum)
    assert "\nshop is still running ROLDRELEASE.\n" in ran.err


@pytest.mark.parametrize("answer", ["[" * 100_000, '{"release": 5, "status": []}', "null"])
def test_a_rack_that_answers_nonsense_after_a_failed_promote_hides_nothing(
    world: World, answer: str
) -> None:
    world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    world.rules[ASK] = {"since": 3, "out": answer}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and "ERROR: rollback" in ran.err
    assert "Traceback" not in ran.text and "bug" not in ran.text
    assert (world.app / "result.json").exists()
    assert world.commands("docker image rm") != []


def test_resuming_the_running_release_does_not_suggest_to_roll_back_to_it(world: World) -> None:
    ran = world.deploy("--release", "ROLDRELEASE")
    assert ran.status == 0 and "shop is now running ROLDRELEASE" in ran.out
    assert "roll back" not in ran.out
