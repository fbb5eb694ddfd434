"""The app's turn: a deploy waits for the one that is under way, and a release that was overtaken is not promoted."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import OLD_RELEASE, REFUSALS, RELEASE, World
from standin import Rule

ASK = "convox api get /apps/shop"
PROMOTE = "convox releases promote --app"
R = "RABCDEFGHIJ"
LATER = "2026-11-03T10:00:00Z"
USUAL: Rule = {"usual": True}
WAY_BACK = (
    "To roll back to {0}, run the same command with --rollback {0} (or DEPLOY_ROLLBACK={0}).\n"
)


def app(release: str, status: str = "running") -> Rule:
    return {"out": json.dumps({"release": release, "status": status})}


def add_release(world: World, release: str, created: str, **details: str) -> None:
    text = json.dumps({**OLD_RELEASE, "id": release, "created": created, **details})
    (world.home / f"release.{release}.json").write_text(text)


def overtaken(release: str, by: str) -> str:
    return (
        f"{release} was created before {by}, which is running. Racks promote no older release."
        f" Deploy again or, to release the older one, run the same command with --rollback {release}"
        f" (or DEPLOY_ROLLBACK={release}).\n"
    )


def result_of(world: World) -> Any:
    return json.loads((world.app / "result.json").read_text())


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {"POLL_SECONDS": 0.01, "PATIENCE_SECONDS": 30, "LAST_WORDS_SECONDS": 20}
    world.add_hooks("before_release")
    add_release(world, "RNEWRELEASE", "2026-11-02T10:00:00.5Z")
    add_release(world, "ROTHERRELEA", LATER)


# --- waiting --------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["updating", "rollback", "creating", "something-new"])
@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_the_hook_runs_only_after_the_update_that_is_under_way(
    world: World, status: str, cli: str
) -> None:
    """Such as someone else's deploy, or an `apps lock`."""
    world.write("convox.yml", f"services:\n  web:\n    image: {IMAGE}\n")
    busy = app("ROLDRELEASE", status)
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE"), busy, busy, app("ROLDRELEASE"), USUAL]}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    lines = world.commands(ASK, "before_release", PROMOTE)
    assert lines[:6] == [ASK] * 4 + [f"{ASK}/releases", "before_release"]
    waiting = f"\n==> before_release\nWaiting for shop (status: {status})\n"
    assert waiting in ran.out and ran.out.count("Waiting for") == 1


IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/shop:TAG"


@pytest.mark.parametrize("args", [["--release", R], ["--rollback", R]])
def test_an_update_under_way_is_awaited_for_a_release_of_old_too(
    world: World, args: list[str]
) -> None:
    busy = app("ROLDRELEASE", "updating")
    world.rules[ASK] = {"sequence": [busy, USUAL, busy, busy, app("ROLDRELEASE"), USUAL]}
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    assert "Waiting for shop (status: updating)\n" in ran.out
    assert "Running now: unknown (status: updating)\n" in ran.out
    assert ran.before_total.endswith(WAY_BACK.format("ROLDRELEASE"))


def test_preflight_does_not_wait(world: World) -> None:
    """The images are built meanwhile."""
    world.rules[ASK] = {"sequence": [app("ROTHERRELEA", "updating"), app("ROLDRELEASE"), USUAL]}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert "Waiting" not in ran.out
    assert result_of(world)["running_before"] == "ROLDRELEASE"


def test_a_turn_that_never_comes_counts_to_the_timeout_of_before_release(world: World) -> None:
    busy = app("ROLDRELEASE", "updating")
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE"), busy, {"hang": True}]}
    ran = world.deploy_and_signal(signal.SIGALRM)
    assert ran.status == 124
    assert (
        "\nbefore_release failed:\n"
        "Timed out after 60 minutes while waiting for shop (status: updating)." in ran.err
    )
    assert "Nothing was promoted. shop was last seen running ROLDRELEASE." in ran.err
    assert "To resume from here, run the same command with --release RNEWRELEASE" in ran.err
    assert world.commands("before_release", PROMOTE) == []


def test_a_rack_that_does_not_answer_for_a_moment_is_asked_again(world: World) -> None:
    fault: Rule = {"status": 1, "err": "ERROR: dial tcp: i/o timeout\n"}
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE"), fault, fault, USUAL]}
    assert world.deploy().status == 0
    assert len(world.commands("before_release")) == 1


# --- overtaken ------------------------------------------------------------------------


def test_a_release_that_was_overtaken_before_the_hook_is_not_migrated_to(world: World) -> None:
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE"), app("ROTHERRELEA"), USUAL]}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 1
    assert ran.err == (
        f"\nbefore_release failed:\n{overtaken('RNEWRELEASE', 'ROTHERRELEA')}"
        "Nothing was promoted. shop was last seen running ROTHERRELEA."
        " Release RNEWRELEASE is built.\n"
    )
    assert world.commands("before_release", PROMOTE) == []
    result = result_of(world)
    assert (result["running"], result["promote_requested"]) == ("ROTHERRELEA", False)


def test_a_release_that_is_overtaken_while_it_waits_is_not_migrated_to(world: World) -> None:
    busy = app("ROTHERRELEA", "updating")
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE"), busy, app("ROTHERRELEA"), USUAL]}
    ran = world.deploy()
    assert ran.status == 1 and overtaken("RNEWRELEASE", "ROTHERRELEA") in ran.err
    assert world.commands("before_release", PROMOTE) == []


def test_a_release_that_is_overtaken_during_the_hook_is_not_promoted(world: World) -> None:
    old = app("ROLDRELEASE")
    world.rules[ASK] = {"sequence": [old, old, USUAL, app("ROTHERRELEA"), USUAL]}
    ran = world.deploy()
    assert ran.status == 1
    assert f"\nbefore_release failed:\n{overtaken('RNEWRELEASE', 'ROTHERRELEA')}" in ran.err
    assert len(world.commands("before_release")) == 1 and world.commands(PROMOTE) == []


def test_an_older_release_that_ran_during_the_hook_is_the_way_back(world: World) -> None:
    """Someone promoted a release that is older than ours, so ours is not overtaken."""
    add_release(world, "ROTHERRELEA", "2026-11-02T09:00:00Z")
    old, other = app("ROLDRELEASE"), app("ROTHERRELEA")
    world.rules[ASK] = {"sequence": [old, old, USUAL, other, USUAL]}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert ran.before_total.endswith(WAY_BACK.format("ROTHERRELEA"))
    assert result_of(world)["running_before"] == "ROTHERRELEA"
    assert f"{ASK}/releases/ROTHERRELEA" in world.commands(ASK)  # compared


def test_the_deploy_that_is_under_way_after_the_hook_is_awaited(world: World) -> None:
    add_release(world, "ROTHERRELEA", "2026-11-02T09:00:00Z")
    old, other = app("ROLDRELEASE"), app("ROTHERRELEA")
    busy = app("ROTHERRELEA", "updating")
    world.rules[ASK] = {"sequence": [old, old, USUAL, busy, busy, other, USUAL]}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert ran.before_total.endswith(WAY_BACK.format("ROTHERRELEA"))
    order = world.commands(ASK, "before_release", PROMOTE)
    after_hook = order[order.index("before_release") + 1 :]
    assert after_hook[:3] == [ASK] * 3 and after_hook[-2].startswith(PROMOTE)


def test_without_a_hook_the_app_is_read_once_before_the_promote(world: World) -> None:
    (world.app / "deploy" / "before_release.sh").unlink()
    assert world.deploy().status == 0
    assert world.commands(ASK) == [ASK, ASK, f"{ASK}/releases", ASK]


@pytest.mark.parametrize(
    ("ours", "running", "is_older"),
    [
        ("2026-11-02T10:00:00Z", "2026-11-02T10:00:00.1Z", True),
        ("2026-11-02T10:00:00.1Z", "2026-11-02T10:00:00.11Z", True),
        ("2026-11-02T10:00:00.099999999Z", "2026-11-02T10:00:00.1Z", True),
        ("2026-11-02T10:00:00.1Z", "2026-11-02T10:00:00Z", False),
        ("2026-11-02T10:00:00.11Z", "2026-11-02T10:00:00.1Z", False),
        ("2026-11-02T10:00:00.1Z", "2026-11-02T10:00:00.099999999Z", False),
        ("2026-11-02T10:00:00.5Z", "2026-11-02T10:00:00.5Z", False),
        ("2026-11-02T09:59:59.9Z", "2026-11-02T10:00:00Z", True),
    ],
)
def test_times_are_compared_although_go_drops_trailing_zeros(
    world: World, ours: str, running: str, is_older: bool
) -> None:
    add_release(world, R, ours)
    add_release(world, "ROLDRELEASE", running)
    ran = world.deploy("--release", R)
    assert ran.status == (2 if is_older else 0), ran.text
    assert (overtaken(R, "ROLDRELEASE") in ran.err) == is_older


# --- --release ------------------------------------------------------------------------


def test_a_release_that_is_older_than_the_running_one_is_found_in_preflight(world: World) -> None:
    add_release(world, R, "2020-01-01T00:00:00Z")
    ran = world.deploy("--release", R)
    assert ran.status == 2
    message = f"\npreflight failed:\n{overtaken(R, 'ROLDRELEASE')}Nothing has been changed.\n"
    assert ran.err == message
    assert world.commands("before_release", PROMOTE) == []


@pytest.mark.parametrize(
    "text",
    [
        f"release not found: {R}",
        f'release.convox.com "{R.lower()}" not found',
        f'releases.convox.com "{R.lower()}" not found',
    ],
)
@pytest.mark.parametrize("running", ["ROLDRELEASE", ""])
def test_a_release_that_does_not_exist_is_found_in_preflight(
    world: World, text: str, running: str
) -> None:
    (world.home / "running").write_text(f"{running}\n")
    world.rules[f"{ASK}/releases/{R}"] = {"status": 1, "err": f"ERROR: {text}\n"}
    ran = world.deploy("--release", R)
    assert ran.status == 2
    assert ran.err == (
        f"\npreflight failed:\nThere is no release {R}. To list them: `convox releases --app shop`.\n"
        "Nothing has been changed.\n"
    )


def test_a_release_is_overtaken_while_it_waits(world: World) -> None:
    """An approval that is overtaken is refused: the last promote does not win."""
    add_release(world, R, "2026-11-02T10:00:00Z")
    busy = app("ROTHERRELEA", "updating")
    old = app("ROLDRELEASE")
    world.rules[ASK] = {"sequence": [old, USUAL, USUAL, busy, app("ROTHERRELEA"), USUAL]}
    ran = world.deploy("--release", R)
    assert ran.status == 1 and overtaken(R, "ROTHERRELEA") in ran.err
    assert world.commands("before_release", PROMOTE) == []
    assert "To resume" not in ran.err and "To try again" not in ran.err


def test_the_first_release_of_an_app_is_compared_with_nothing(world: World) -> None:
    (world.home / "running").write_text("\n")
    add_release(world, R, "2020-01-01T00:00:00Z")
    assert world.deploy("--release", R).status == 0


def test_a_release_that_exists_is_not_taken_for_a_missing_one_because_the_app_is(
    world: World,
) -> None:
    world.rules[f"{ASK}/releases/{R}"] = {"status": 1, "err": "ERROR: rack not found: other\n"}
    assert world.deploy("--release", R).status == 0


# --- logins that may not read releases ------------------------------------------------


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("args", [[], ["--release", R]])
def test_a_login_that_may_not_read_releases_skips_the_comparison_silently(
    world: World, refusal: str, args: list[str]
) -> None:
    add_release(world, R, "2020-01-01T00:00:00Z")
    old, other = app("ROLDRELEASE"), app("ROTHERRELEA")
    world.rules[f"{ASK}/releases"] = {"status": 1, "err": f"{refusal}\n"}
    asked: list[Rule] = [USUAL] if args else []  # for a release, in preflight
    world.rules[ASK] = {"sequence": [old, *asked, other, USUAL, USUAL, other, USUAL]}
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    assert "warning" not in ran.text and refusal not in ran.text
    assert len(world.commands("before_release")) == 1


# --- a newer release that is not running ----------------------------------------------


@pytest.mark.parametrize("args", [[], ["--release", R]])
def test_a_newer_release_that_is_not_running_is_a_warning(world: World, args: list[str]) -> None:
    """It may have variables that ours does not have: ours inherits from what was the newest then."""
    release = (args or ["RNEWRELEASE"])[-1]
    newer = {
        **RELEASE,
        "id": "RNEWERXXXXX",
        "description": "env add:PRICE",
        "env": "PRICE=very-secret",
    }
    (world.home / "releases.json").write_text(json.dumps([newer]))
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    warning = (
        "\nwarning: RNEWERXXXXX (env add:PRICE) is newer."
        f" Its changes, such as variables, are not in {release}.\n"
    )
    assert ran.out.count(warning) == 1 and "revert" not in ran.out
    assert ran.out.index(warning) < ran.out.index("$ deploy/before_release.sh")
    assert "very-secret" not in ran.text


def test_a_rollback_says_nothing_about_newer_releases(world: World) -> None:
    ran = world.deploy("--rollback", R)
    assert ran.status == 0 and "warning" not in ran.text
    assert f"{ASK}/releases" not in world.commands(ASK)


def test_a_dry_run_neither_waits_nor_compares(world: World) -> None:
    world.rules[ASK] = app("ROLDRELEASE", "updating")
    ran = world.deploy("--dry-run")
    assert ran.status == 0, ran.text
    assert world.commands(ASK) == [ASK] and "Waiting" not in ran.out
