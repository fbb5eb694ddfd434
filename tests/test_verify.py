"""The rack's word decides: what it reports after the promote, whatever the exit code of the CLI."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import World
from standin import Rule

ASK = "convox api get /apps/shop"
PROMOTE = "convox releases promote --app"
AGAIN = "run the same command with --release RNEWRELEASE (or DEPLOY_RELEASE=RNEWRELEASE)"
CANCEL = "To cancel it: `convox apps cancel --app shop`."
FAILED_FOR_GOOD = (
    "shop is failed: the rack promotes nothing until a person repairs its CloudFormation stack.\n"
)


def app(release: str, status: str) -> Rule:
    return {"out": json.dumps({"release": release, "status": status})}


def responses(
    *statuses: str | Rule, release: str = "RNEWRELEASE", before: str = "ROLDRELEASE"
) -> Rule:
    """Return a rule for the rack's responses: one status after another, then the last one repeatedly.

    Three responses precede them, to the questions before the promote: twice the app, and its releases.
    """
    settled = app(before, "running")
    rest: list[Rule] = [each if isinstance(each, dict) else app(release, each) for each in statuses]
    none: Rule = {"out": "[]"}
    return {"sequence": [settled, settled, none, *rest]}


def result_of(world: World) -> Any:
    return json.loads((world.app / "result.json").read_text())


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
        [app("ROLDRELEASE", "updating"), "running"],  # as on v2
    ],
)
def test_a_deploy_succeeds_once_the_rack_settles(world: World, statuses: list[Any]) -> None:
    world.rules[ASK] = responses(*statuses)
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert "shop is now running RNEWRELEASE." in ran.out
    assert result_of(world)["verified"] is True


def test_the_rack_is_asked_until_it_reports_running_once(world: World) -> None:
    world.rules[ASK] = responses("updating", "running", "failed")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert len(world.commands(ASK)) == 5  # three of them before the promote


def test_what_it_waits_for_is_said_once(world: World) -> None:
    world.rules[ASK] = responses("updating", "updating", "updating", "running")
    assert world.deploy().out.count("Waiting for shop (status: updating)\n") == 1


# --- the exit code of the CLI ---------------------------------------------------------

ENDS = ["ERROR: timeout", "ERROR: rollback", "ERROR: stream error", "killed"]


@pytest.mark.parametrize("text", ENDS)
@pytest.mark.parametrize(
    "statuses", [["running"], ["updating", "running"], ["rollback", "running"]]
)
def test_a_cli_that_fails_while_the_new_release_runs_in_the_end_is_a_warning(
    world: World, text: str, statuses: list[str]
) -> None:
    """`ERROR: timeout` after 35 minutes is not the word of the rack, which continues."""
    world.rules[PROMOTE] = {"status": 1, "err": f"{text}\n"}
    world.rules[ASK] = responses(*statuses)
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    warning = (
        "\nwarning: The rack reports RNEWRELEASE running, although `convox releases promote` exited"
        " with code 1.\n"
    )
    assert warning in ran.out and ran.err == "" and ran.out.count(text) == 1
    assert "\nshop is now running RNEWRELEASE.\n" in ran.out
    result = result_of(world)
    assert (result["status"], result["verified"], result["error"]) == ("succeeded", True, "")


@pytest.mark.parametrize("text", ["ERROR: rollback", "ERROR: timeout", "ERROR: progress deadline"])
def test_a_rollback_is_awaited_and_said_whatever_the_words_of_the_cli(
    world: World, text: str
) -> None:
    """The CLI ends while the rack is still rolling back, with texts that newer CLIs change."""
    world.rules[PROMOTE] = {"status": 1, "err": f"{text}\n"}
    in_rollback = app("ROLDRELEASE", "rollback")
    world.rules[ASK] = responses("rollback", in_rollback, app("ROLDRELEASE", "running"))
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert ran.err == (
        "\npromote failed:\n"
        "The rack rolled back to ROLDRELEASE: RNEWRELEASE did not become healthy.\n"
        "`convox releases promote` exited with code 1. Its output is above.\n"
        f"shop is running ROLDRELEASE.\nTo try again, {AGAIN}.\n"
    )
    assert ran.out.count(f"\n{text}\n") == 1
    result = result_of(world)
    assert result["error"].endswith(f"`convox releases promote` exited with code 1.\n  > {text}")
    assert (result["verified"], result["running"]) == (False, "ROLDRELEASE")


def test_a_cli_that_ends_well_does_not_hide_a_rollback(world: World) -> None:
    world.rules[ASK] = responses("updating", "rollback", "running", release="ROLDRELEASE")
    ran = world.deploy()
    assert ran.status == 1
    assert ran.err.startswith(
        "\npromote failed:\nThe rack rolled back to ROLDRELEASE: RNEWRELEASE did not become"
        " healthy.\nshop is running ROLDRELEASE.\n"
    )


def test_after_a_first_deploy_that_failed_nothing_runs(world: World) -> None:
    world.rules[PROMOTE] = {"status": 1, "err": "ERROR: rollback\n"}
    world.rules[ASK] = responses("rollback", app("", "running"), before="")
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert "The rack rolled back to nothing: RNEWRELEASE did not become healthy.\n" in ran.err
    assert f"\nshop is running nothing.\nTo try again, {AGAIN}.\n" in ran.err
    assert result_of(world)["running"] == ""


@pytest.mark.parametrize("has_failed", [True, False])
def test_a_release_that_someone_else_promoted_meanwhile_is_named_and_nothing_else_blamed(
    world: World, has_failed: bool
) -> None:
    if has_failed:
        world.rules[PROMOTE] = {"status": 1, "err": "ERROR: rollback\n"}
    world.rules[ASK] = responses("updating", "running", release="ROTHERRELEASE")
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert "promote failed:\nSomeone else promoted ROTHERRELEASE.\n" in ran.err
    assert ran.err.endswith("\nshop is running ROTHERRELEASE.\nDeploy again.\n")
    assert "healthy" not in ran.err
    assert result_of(world)["running"] == "ROTHERRELEASE"


@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_a_promote_that_waited_for_an_update_which_was_rolled_back_was_never_requested(
    world: World, cli: str
) -> None:
    world.rules[PROMOTE] = {
        "status": 1,
        "out": "Waiting for app to be ready... ",
        "err": "ERROR: rollback\n",
    }
    in_rollback = app("ROLDRELEASE", "rollback")
    world.rules[ASK] = responses(in_rollback, app("ROLDRELEASE", "running"))
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 1
    why = "The update that it waited for was rolled back. RNEWRELEASE was never requested."
    assert f"\npromote failed:\n{why}\n" in ran.err and "healthy" not in ran.err
    assert ran.err.endswith(f"\nshop is running ROLDRELEASE.\nTo try again, {AGAIN}.\n")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("app is currently updating", "Another update is in progress. Try again after it."),
        (
            "can not promote an older release, try rollback",
            "Someone else's newer release is running. Deploy again.",
        ),
        (
            "budget cap exceeded for app shop: spent $5 of $4 cap this month",
            "Raise the cap, or wait for the next month.",
        ),
        (
            "you are unauthorized to access this",
            "This login is read-only. Use one that may deploy.",
        ),
    ],
)
def test_a_promote_that_the_rack_refuses_is_no_rollback(
    world: World, text: str, advice: str
) -> None:
    """The error comes on the line that the CLI has begun."""
    world.rules[PROMOTE] = {
        "status": 1,
        "out": "Promoting RNEWRELEASE... ",
        "err": f"ERROR: {text}\n",
    }
    ran = world.deploy()
    assert ran.status == 1
    assert (
        "promote failed:\nThe rack did not promote RNEWRELEASE.\n"
        "`convox releases promote` exited with code 1. Its output is above.\n"
        f"{advice}\n" in ran.err
    )
    assert ran.text.count(f"Promoting RNEWRELEASE... ERROR: {text}\n") == 1
    assert "healthy" not in ran.err and "rolled back" not in ran.err


def test_after_a_command_that_failed_the_first_reading_comes_a_moment_later(world: World) -> None:
    """The rack's status is a second or so behind. After a success, the CLI has waited already."""
    world.constants["POLL_SECONDS"] = 1
    assert world.deploy("--result", "result.json").status == 0
    assert result_of(world)["seconds"]["promote"] < 1
    world.rules[PROMOTE] = {"usual": True, "status": 1, "err": "ERROR: timeout\n"}
    assert world.deploy("--result", "result.json").status == 0
    assert result_of(world)["seconds"]["promote"] > 1


# --- an app that is failed ------------------------------------------------------------


def test_an_app_that_is_failed_is_found_in_preflight(world: World) -> None:
    world.rules[ASK] = app("ROLDRELEASE", "failed")
    ran = world.deploy()
    assert ran.status == 2
    assert ran.err == f"\npreflight failed:\n{FAILED_FOR_GOOD}Nothing has been changed.\n"
    assert world.commands("docker build --tag", "convox build --app") == []


@pytest.mark.parametrize("when", ["before the hook", "after the hook"])
def test_an_app_that_fails_before_the_promote_is_not_promoted(world: World, when: str) -> None:
    world.add_hooks("before_release")
    good, failed = app("ROLDRELEASE", "running"), app("ROLDRELEASE", "failed")
    none: Rule = {"out": "[]"}
    world.rules[ASK] = {"sequence": [good, *([good, none] if "after" in when else []), failed]}
    ran = world.deploy()
    assert ran.status == 1
    assert f"\nbefore_release failed:\n{FAILED_FOR_GOOD}Nothing was promoted." in ran.err
    assert len(world.commands("before_release")) == (when == "after the hook")
    assert world.commands(PROMOTE) == []


@pytest.mark.parametrize("release", ["ROLDRELEASE", "RNEWRELEASE"])
def test_an_app_that_is_failed_after_the_promote_ends_the_deploy_at_once(
    world: World, release: str
) -> None:
    world.rules[ASK] = responses("updating", app(release, "failed"))
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert f"\npromote failed:\n{FAILED_FOR_GOOD}" in ran.err
    assert "is running" not in ran.err
    result = result_of(world)
    assert (result["verified"], result["running"]) == (False, "")


# --- timeouts, and racks that do not respond ------------------------------------------


@pytest.mark.parametrize("status", ["rollback", "something-new"])
def test_a_timeout_reports_the_last_status(world: World, status: str) -> None:
    world.rules[ASK] = responses("updating", status, {"hang": True}, status)
    ran = world.deploy_and_signal(signal.SIGALRM)
    assert ran.status == 124
    assert f"Timed out after 60 minutes while waiting for shop (status: {status})." in ran.err
    assert "The promote was requested and may still be in progress; ROLDRELEASE was" in ran.err


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
    assert "The promote was requested and may still be in progress; ROLDRELEASE was" in ran.err


# --- logins that cannot read the app --------------------------------------------------

REFUSALS = [
    "ERROR: forbidden",
    "ERROR: response status: 403",
    "ERROR: Command not supported for deploy key",
    "ERROR: operation not permitted for deploy keys",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_login_that_cannot_read_the_app_fails_in_preflight(world: World, refusal: str) -> None:
    world.rules[ASK] = {"status": 1, "err": refusal}
    ran = world.deploy()
    assert ran.status == 2
    assert refusal in ran.err and "Rack Read" in ran.err
    assert world.commands("docker build --tag") == []


def test_a_wrong_password_fails_in_preflight(world: World) -> None:
    world.rules[ASK] = {"status": 1, "err": "ERROR: invalid authentication\n"}
    ran = world.deploy()
    assert ran.status == 2
    assert (
        "invalid authentication" in ran.err and "Check CONVOX_HOST and CONVOX_PASSWORD" in ran.err
    )
    assert world.commands("docker build --tag") == []


# --- a promote that was stopped -------------------------------------------------------


def stop_promote(
    world: World, after: Rule, args: tuple[str, ...] = (), before: str = "ROLDRELEASE"
) -> str:
    """Stop the promote and let the rack answer that after it. Return what is printed on stderr."""
    if after.get("hang"):
        world.constants["LAST_WORDS_SECONDS"] = 1
    world.rules[ASK] = responses(after, before=before)
    world.rules[PROMOTE] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM, *args, "--result", "result.json")
    assert ran.status == 128 + signal.SIGTERM
    assert len(world.commands(ASK)) == 4  # once after the signal
    assert (
        "\npromote failed:\nStopped by SIGTERM while running `convox releases promote`.\n"
        in ran.err
    )
    return ran.err


@pytest.mark.parametrize("release", ["RNEWRELEASE", "ROLDRELEASE"])  # as on v3 and on v2
def test_a_stopped_promote_that_the_rack_goes_on_with_can_be_canceled(
    world: World, release: str
) -> None:
    err = stop_promote(world, app(release, "updating"))
    assert err.endswith(
        "\nThe promote is still in progress; ROLDRELEASE was running before it.\n"
        f"{CANCEL} That adds a release that copies the newest one.\n"
    )
    assert result_of(world)["running"] == ""


@pytest.mark.parametrize("release", ["RNEWRELEASE", ""])
def test_a_stopped_first_promote_can_be_canceled_too(world: World, release: str) -> None:
    err = stop_promote(world, app(release, "updating"), before="")
    assert "\nThe promote is still in progress; nothing was running before it.\n" in err
    assert CANCEL in err


@pytest.mark.parametrize(
    "after",
    [
        app("ROLDRELEASE", "running"),  # a second or so behind
        app("ROTHERRELEASE", "updating"),  # someone else's
        app("RNEWRELEASE", "rollback"),
        app("ROLDRELEASE", "rollback"),
        {"out": "<html>"},
        {"out": "[" * 100_000},
        {"out": "null"},
        {"status": 1},
        {"hang": True},
    ],
)
def test_what_is_unknown_after_a_stopped_promote_is_not_said_and_nothing_is_canceled(
    world: World, after: Rule
) -> None:
    err = stop_promote(world, after)
    assert err.endswith(
        "\nThe promote was requested and may still be in progress; ROLDRELEASE was running before"
        f" it.\nTo look: `convox apps info --app shop`. To try again, {AGAIN}.\n"
    )
    assert "cancel" not in err and "Traceback" not in err
    assert result_of(world)["running"] == ""
    assert world.commands("docker image rm") != []


def test_a_promote_that_was_stopped_too_late_has_released(world: World) -> None:
    err = stop_promote(world, app("RNEWRELEASE", "running"))
    assert err.endswith("\nshop is running RNEWRELEASE.\n")
    assert result_of(world)["running"] == "RNEWRELEASE"


def test_another_release_after_a_stopped_promote_is_named(world: World) -> None:
    err = stop_promote(world, app("ROTHERRELEASE", "running"))
    assert err.endswith("\nshop is running ROTHERRELEASE.\nDeploy again.\n")


def test_nothing_is_canceled_where_no_command_was_stopped(world: World) -> None:
    """Only a command of ours that stopped waiting leaves something to cancel."""
    world.rules[PROMOTE] = {"status": 1, "err": "ERROR: rollback\n"}
    for after in ("ROLDRELEASE", "ROTHERRELEASE"):
        world.rules[ASK] = responses("running", release=after)
        assert "cancel" not in world.deploy().err
        (world.home / "calls").unlink()


def test_the_rack_is_not_queried_again_if_the_deploy_fails_before_the_promote(world: World) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    ran = world.deploy()
    assert ran.status == 1
    assert len(world.commands(ASK)) == 1
    assert "Nothing was released or promoted." in ran.err


@pytest.mark.parametrize("answer", ["[" * 100_000, "null"])
def test_a_rack_that_answers_nonsense_after_a_failed_promote_hides_nothing(
    world: World, answer: str
) -> None:
    world.constants["PATIENCE_SECONDS"] = 0.05
    world.rules[PROMOTE] = {"status": 1, "err": "ERROR: rollback\n"}
    world.rules[ASK] = responses({"out": answer})
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1 and "ERROR: rollback" in ran.text
    assert "printed no usable answer" in ran.err
    assert "Traceback" not in ran.text and "is a bug" not in ran.text
    assert (world.app / "result.json").exists()
    assert world.commands("docker image rm") != []


# --- the way back ---------------------------------------------------------------------


def test_a_successful_deploy_shows_how_to_roll_back(world: World) -> None:
    ran = world.deploy("--rack", "staging")
    assert ran.before_total.endswith(
        "\nTo roll back to ROLDRELEASE, run the same command with --rollback ROLDRELEASE"
        " (or DEPLOY_ROLLBACK=ROLDRELEASE).\n"
    )


def test_a_first_deploy_has_nothing_to_roll_back_to(world: World) -> None:
    (world.home / "running").write_text("\n")
    ran = world.deploy()
    assert ran.status == 0
    assert ran.before_total.endswith("\nVerified: rack.example.com reports RNEWRELEASE running.\n")


def test_resuming_the_running_release_does_not_suggest_to_roll_back_to_it(world: World) -> None:
    ran = world.deploy("--release", "ROLDRELEASE")
    assert ran.status == 0 and "shop is now running ROLDRELEASE" in ran.out
    assert "roll back" not in ran.out


# --- the release step -----------------------------------------------------------------

UNCERTAIN = (
    "\nNothing was promoted. shop was last seen running ROLDRELEASE. A release may have been built.\n"
    "To look: `convox releases --app shop`.\n"
)
CERTAIN = "\nNothing was released or promoted. shop was last seen running ROLDRELEASE.\n"


def deploy_with_failing_build(world: World, args: list[str], rule: Rule) -> str:
    """Let `convox build` fail, of images for a registry or, with --external, for the rack's own."""
    world.constants["PUSH_PAUSE"] = 0
    if args == ["--external"]:
        world.write("convox.yml", "services:\n  web:\n    build: .\n")
    world.rules["convox build --external" if args else "convox build --app"] = rule
    env = {"CONVOX_STANDIN_CLI": "v3"}
    ran = (
        world.deploy_and_signal(signal.SIGTERM, env=env)
        if "hang" in rule
        else world.deploy(env=env)
    )
    assert ran.status != 0 and "\nrelease failed:\n" in ran.err
    assert world.commands(PROMOTE) == []
    return ran.err


@pytest.mark.parametrize("args", [[], ["--external"]])
@pytest.mark.parametrize(
    "text",
    [
        "ERROR: build failed",
        "ERROR: required env: KEY",
        "Starting build... ERROR: operation not permitted for deploy keys",
        "app: EOF\nERROR: exit status 1",  # the app's own log
        "denied: requested access to the resource is denied",
    ],
)
def test_a_build_that_the_rack_or_docker_refused_has_released_nothing(
    world: World, args: list[str], text: str
) -> None:
    err = deploy_with_failing_build(world, args, {"status": 1, "err": f"{text}\n"})
    assert err.endswith(CERTAIN) and "may have" not in err


@pytest.mark.parametrize("args", [[], ["--external"]])
@pytest.mark.parametrize(
    "rule",
    [
        {"status": 1, "err": "ERROR: read tcp 10.0.0.1:443: connection reset by peer\n"},
        {"status": 1, "err": "ERROR: unexpected EOF\n"},
        {"status": 1, "err": "ERROR: response status: 504\n"},
        {"out": "no release\n"},
        {"hang": True},
    ],
)
def test_a_build_whose_connection_was_lost_or_that_was_stopped_may_have_released(
    world: World, args: list[str], rule: Rule
) -> None:
    assert deploy_with_failing_build(world, args, rule).endswith(UNCERTAIN)


DROPS = (
    "WARNING: this build will drop env var(s) that are set in your running release ROLDRELEASE: KEY"
)


def test_variables_that_the_release_loses_are_said_again_right_before_the_promote(
    world: World,
) -> None:
    world.add_hooks("before_release")
    world.rules["convox build --app"] = {"err": f"{DROPS}\n", "usual": True}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    lines = ran.out.splitlines()
    [first, second] = [number for number, line in enumerate(lines) if DROPS in line]
    assert first < lines.index("$ deploy/before_release.sh") < second
    assert lines[second + 1].startswith("$ convox releases promote")
