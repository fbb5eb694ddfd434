"""What the rack must report before a deploy succeeds."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import World
from standin import Rule

ASK = "convox api get /apps/shop"
SETTLED = {"status": "running"}


def responses(*statuses: str | Rule, release: str = "RNEWRELEASE") -> Rule:
    """Return a rule for the rack's responses: one status after another, then the last one repeatedly.

    Two responses precede them, for the queries before the promote: the app and its releases.
    """
    first: list[Rule] = [
        {"out": json.dumps({"release": "ROLDRELEASE", "status": "running"})},
        {"out": "[]"},
    ]
    rest: list[Rule] = [
        status
        if isinstance(status, dict)
        else {"out": json.dumps({"release": release, "status": status})}
        for status in statuses
    ]
    return {"sequence": [*first, *rest]}


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {"POLL_SECONDS": 0.01, "PATIENCE_SECONDS": 30, "LAST_WORDS_SECONDS": 20}


FAULT: Rule = {"status": 1, "err": "ERROR: connection reset by peer\n"}


@pytest.mark.parametrize(
    "statuses",
    [
        ["creating", "updating", "updating", "running"],
        ["something-new", "running"],
        ["updating", FAULT, FAULT, "running"],
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


def test_the_rack_is_asked_until_it_reports_running_once(world: World) -> None:
    world.rules[ASK] = responses("updating", "running", "failed")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands(ASK)) == 4  # two of them before the promote


def test_a_failed_status_fails_the_deploy_immediately(world: World) -> None:
    world.rules[ASK] = responses("updating", "failed")
    ran = world.deploy()
    assert ran.status == 1
    assert "The status of shop is failed. See `convox logs`." in ran.err


def test_a_promote_of_another_release_at_the_same_time_is_reported(world: World) -> None:
    world.rules[ASK] = responses("updating", "running", release="ROTHERRELEASE")
    ran = world.deploy()
    assert ran.status == 1
    assert "shop is running ROTHERRELEASE, not RNEWRELEASE." in ran.err


@pytest.mark.parametrize("status", ["rollback", "something-new"])
def test_a_timeout_reports_the_last_status(world: World, status: str) -> None:
    world.rules[ASK] = responses("updating", status, {"hang": True}, status)
    ran = world.deploy_and_signal(signal.SIGALRM)
    assert ran.status == 124
    assert f"Timed out after 60 minutes while waiting for shop (status: {status})." in ran.err
    assert "The promote of RNEWRELEASE was requested and may still be in progress." in ran.err


def test_a_waiting_deploy_without_a_timeout_prints_heartbeats(world: World) -> None:
    world.constants.update(HEARTBEAT_SECONDS=0.05, POLL_SECONDS=0.25)
    world.rules[ASK] = responses(*["updating"] * 8, "running")
    ran = world.deploy("--timeout", "0")
    assert ran.status == 0, ran.text
    assert ran.out.count("Still waiting for shop (status: updating) (0 min)\n") > 1


def test_a_rack_that_stops_responding_fails_the_deploy(world: World) -> None:
    world.constants["PATIENCE_SECONDS"] = 0.05
    world.rules[ASK] = responses("updating", FAULT)
    ran = world.deploy()
    assert ran.status == 1
    assert (
        "promote failed:\n`convox api get` for shop on rack.example.com exited with code 1.\n"
        "  ERROR: connection reset by peer\n" in ran.err
    )
    assert "The promote of RNEWRELEASE was requested and may still be in progress." in ran.err


# --- credentials that cannot read the app ---------------------------------------------

REFUSALS = [
    "ERROR: forbidden",
    "ERROR: response status: 403",
    "ERROR: Command not supported for deploy key",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_credentials_that_cannot_read_the_app_fail_in_preflight(world: World, refusal: str) -> None:
    world.rules[ASK] = {"status": 1, "err": refusal}
    ran = world.deploy()
    assert ran.status == 2
    assert "needs --no-verify" in ran.err
    assert world.commands("docker build --tag") == []


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
    assert world.commands("docker build --tag") == []


# --- what is live after a failed promote ----------------------------------------------


def app(release: str, status: str) -> Rule:
    return {"out": json.dumps({"release": release, "status": status})}


UNKNOWN = "The promote of RNEWRELEASE was requested and may still be in progress."
KNOWN: list[tuple[Rule, str]] = [
    (
        app("ROLDRELEASE", "running"),
        "shop is running ROLDRELEASE again. Fix the cause and deploy again.",
    ),
    (app("RNEWRELEASE", "running"), "shop is running RNEWRELEASE after all."),
    (
        app("ROTHERRELEASE", "running"),
        "shop is running ROTHERRELEASE, which someone else has promoted.",
    ),
    (
        app("ROTHERRELEASE", "updating"),
        "shop is updating: someone else is promoting ROTHERRELEASE.",
    ),
    (app("", "running"), "shop is running no release. Fix the cause and deploy again."),
]


def deploy_with_failing_promote(world: World, after: Rule) -> str:
    """Let the promote fail and the rack answer that after it. Return what is printed on stderr."""
    if after.get("hang"):
        world.constants["LAST_WORDS_SECONDS"] = 1
    world.rules[ASK] = {"sequence": [*responses()["sequence"], after]}
    world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    return ran.err


@pytest.mark.parametrize(("after", "message"), KNOWN)
def test_what_is_known_after_a_failed_promote_is_all_that_is_said(
    world: World, after: Rule, message: str
) -> None:
    assert deploy_with_failing_promote(world, after).endswith(f"\n{message}\n")
    answer = json.loads(after["out"])
    running = json.loads((world.app / "result.json").read_text())["running"]
    assert running == (answer["release"] if answer["status"] == "running" else "")


def test_without_the_release_before_no_one_else_is_blamed(world: World) -> None:
    """With --no-verify, preflight does not ask what is running."""
    world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    err = world.deploy("--no-verify").err
    assert err.endswith("shop is running ROLDRELEASE again. Fix the cause and deploy again.\n")


@pytest.mark.parametrize(
    "after",
    [
        app("RNEWRELEASE", "updating"),
        app("ROLDRELEASE", "updating"),
        {"out": "<html>"},
        {"status": 1},
        {"hang": True},
    ],
)
def test_what_is_unknown_after_a_failed_promote_gets_commands_to_go_on(
    world: World, after: Rule
) -> None:
    err = deploy_with_failing_promote(world, after)
    check, cancel = (f" convox apps {word} --app shop\n" for word in ("info", "cancel"))
    assert err.index(UNKNOWN) < err.index(check) < err.index(cancel) < err.index("To resume from")
    assert json.loads((world.app / "result.json").read_text())["running"] == ""


def test_the_rack_is_not_queried_after_a_signal(world: World) -> None:
    """The user or CI system that stops a deploy is waiting, and may send SIGKILL next."""
    world.rules["convox releases promote --app"] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM)
    assert ran.status == 128 + signal.SIGTERM
    assert len(world.commands(ASK)) == 2  # both before the promote
    assert "The promote of RNEWRELEASE was requested" in ran.err


def test_the_rack_is_not_queried_again_if_the_deploy_fails_before_the_promote(world: World) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    ran = world.deploy()
    assert ran.status == 1
    assert len(world.commands(ASK)) == 1
    assert "Nothing was released or promoted." in ran.err


def test_a_successful_deploy_shows_how_to_roll_back(world: World) -> None:
    ran = world.deploy("--rack", "staging")
    assert ran.out.endswith(
        "\nTo roll back:\n  convox releases promote --app shop --rack staging --wait ROLDRELEASE\n"
    )


def test_a_first_deploy_has_nothing_to_roll_back_to(world: World) -> None:
    (world.home / "running").write_text("\n")
    ran = world.deploy()
    assert ran.status == 0
    assert ran.out.endswith("\nVerified: rack.example.com reports RNEWRELEASE running.\n")


@pytest.mark.parametrize("answer", ["[" * 100_000, "null"])
def test_a_rack_that_answers_nonsense_after_a_failed_promote_hides_nothing(
    world: World, answer: str
) -> None:
    world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    world.rules[ASK] = {"since": 3, "out": answer}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and "ERROR: rollback" in ran.err
    assert "Traceback" not in ran.text and "is a bug" not in ran.text
    assert (world.app / "result.json").exists()
    assert world.commands("docker image rm") != []


def test_resuming_the_running_release_does_not_suggest_to_roll_back_to_it(world: World) -> None:
    ran = world.deploy("--release", "ROLDRELEASE")
    assert ran.status == 0 and "shop is now running ROLDRELEASE" in ran.out
    assert "roll back" not in ran.out


@pytest.mark.parametrize(
    ("cli", "what"), [("v3", "wait for that."), ("v2", "fail until that is over.")]
)
def test_an_app_that_is_updating_gets_a_warning_in_preflight(
    world: World, cli: str, what: str
) -> None:
    world.rules[ASK] = {"number": 1, **app("ROLDRELEASE", "updating")}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    warning = f"\nwarning: shop is updating. A promote will {what}\n"
    assert ran.out.index(warning) < ran.out.index("\npreflight: ")
