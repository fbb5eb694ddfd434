"""--rollback: a copy of an older release is promoted, because racks refuse the older release itself."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import OLD_RELEASE, REFUSALS, World, paired
from standin import Rule

ASK = "convox api get /apps/shop"
ROLL_BACK = "convox releases rollback"
R = "RABCDEFGHIJ"
AGAIN = f"To try again, run the same command with --rollback {R} (or DEPLOY_ROLLBACK={R}).\n"
COPY = f"RCOPYRELEAS, a copy of {R}, is now the newest release."
REFUSED: Rule = {
    "status": 1,
    "err": f"Rolling back to {R}... OK, RCOPYRELEAS\nPromoting RCOPYRELEAS... ERROR: app is currently updating\n",
}


def app(release: str, status: str) -> Rule:
    return {"out": json.dumps({"release": release, "status": status})}


def responses(*rest: Rule, before: str = "ROLDRELEASE") -> Rule:
    """Return a rule for the rack's responses. Three precede `rest`: the app, the release, the app."""
    settled = app(before, "running")
    return {"sequence": [settled, {"usual": True}, settled, *rest]}


def result_of(world: World) -> Any:
    return json.loads((world.app / "result.json").read_text())


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {"POLL_SECONDS": 0.01, "LAST_WORDS_SECONDS": 20}


@pytest.mark.parametrize("how", ["option", "variable"])
@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_a_rollback_promotes_a_copy_and_needs_nothing_but_convox(
    world: World, cli: str, how: str
) -> None:
    world.add_hooks()
    world.add_git()
    for program in ("docker", "aws", "git"):
        (world.bin / program).unlink()
    args, env = (["--rollback", R], {}) if how == "option" else ([], {"DEPLOY_ROLLBACK": R})
    ran = world.deploy(*args, "--result", "result.json", env={**env, "CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    wait = "--wait " if cli == "v2" else ""
    assert world.commands() == [
        "convox build --help",
        "convox releases promote --help",
        ASK,
        f"{ASK}/releases/{R}",
        ASK,
        f"convox releases rollback --app shop {wait}--id {R}",
        ASK,
    ]
    assert world.running == "RCOPYRELEAS"
    assert ran.before_total.endswith(
        f"\nshop is now running RCOPYRELEAS, a copy of {R}.\n"
        "Verified: rack.example.com reports RCOPYRELEAS running.\n"
        "To roll back to ROLDRELEASE, run the same command with --rollback ROLDRELEASE"
        " (or DEPLOY_ROLLBACK=ROLDRELEASE).\n"
    )
    result = result_of(world)
    assert list(result.pop("seconds")) == ["preflight", "before_release", "promote"]
    assert result == {
        "tool": "convox-deploy",
        "status": "succeeded",
        "exit_status": 0,
        "app": "shop",
        "release": "RCOPYRELEAS",
        "running_before": "ROLDRELEASE",
        "promote_requested": True,
        "verified": True,
        "running": "RCOPYRELEAS",
        "images": [],
        "failed_step": "",
        "failed_service": "",
        "error": "",
    }


def test_the_first_lines_say_what_is_rolled_back_to(world: World) -> None:
    out = world.deploy("--rollback", R).out
    assert f"Rolling back shop (APP_NAME) {R} on rack.example.com (CONVOX_HOST)\n" in out
    assert "Running now: ROLDRELEASE\n" in out and "Manifest" not in out
    assert f"Rolling back to {R}... OK, RCOPYRELEAS\n" in out  # in the CLI's own words


def test_a_rollback_works_without_a_manifest_and_with_hooks_that_cannot_run(world: World) -> None:
    """As in a job that has checked out nothing."""
    (world.app / "docker-compose.yml").unlink()
    world.write("deploy/before_release.sh", "no script", 0o644)
    ran = world.deploy("--rollback", R)
    assert ran.status == 0, ran.text


def test_a_rollback_can_be_rolled_back(world: World) -> None:
    assert world.deploy("--rollback", R).status == 0
    ran = world.deploy("--rollback", "ROLDRELEASE")
    assert ran.status == 0, ran.text
    assert world.commands(ROLL_BACK)[-1].endswith(" ROLDRELEASE")


# --- preflight ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"release not found: {R}",
        f'release.convox.com "{R.lower()}" not found',
        f'releases.convox.com "{R.lower()}" not found',
    ],
)
def test_a_release_that_does_not_exist_is_found_in_preflight(world: World, text: str) -> None:
    world.rules[f"{ASK}/releases/"] = {"status": 1, "err": f"ERROR: {text}\n"}
    ran = world.deploy("--rollback", R)
    assert ran.status == 2
    assert ran.err == (
        f"\npreflight failed:\nThere is no release {R}. To list them: `convox releases --app shop`.\n"
        "Nothing has been changed.\n"
    )
    assert world.commands(ROLL_BACK) == []


def test_the_release_that_is_running_is_a_usage_error(world: World) -> None:
    ran = world.deploy("--rollback", "ROLDRELEASE", "--result", "result.json")
    assert ran.status == 2
    assert "\npreflight failed:\nROLDRELEASE is running already.\n" in ran.err
    assert world.commands(ROLL_BACK) == []
    assert result_of(world)["exit_status"] == 2


@pytest.mark.parametrize("value", ["BABCDEFGHIJ", "rabcdefghij", "R1", "latest"])
def test_what_is_no_release_is_a_usage_error(world: World, value: str) -> None:
    ran = world.deploy("--rollback", value)
    assert ran.status == 2 and f"--rollback: '{value}' is not a release ID." in ran.err
    assert world.calls == []


def test_an_app_that_is_failed_is_not_rolled_back(world: World) -> None:
    world.rules[ASK] = app("ROLDRELEASE", "failed")
    ran = world.deploy("--rollback", R)
    assert ran.status == 2 and "shop is failed: the rack promotes nothing" in ran.err
    assert world.commands(ROLL_BACK) == []


# --- what it wins over ----------------------------------------------------------------

WON_OVER: list[tuple[list[str], dict[str, str]]] = [
    (["--release", "RBBBBBBBBBB"], {}),
    ([], {"DEPLOY_RELEASE": "RBBBBBBBBBB"}),
    (["--no-promote"], {}),
    ([], {"DEPLOY_NO_PROMOTE": "1"}),
    (["--from", "missing.json"], {}),
    ([], {"DEPLOY_FROM": "missing.json"}),
    (["--tag", "v1"], {}),
    ([], {"IMAGE_TAG": "v1"}),
    (["--cache-from-running"], {}),
    (["--description", "Sell more"], {}),
    ([], {"DEPLOY_CACHE_FROM_RUNNING": "1"}),
    (["--", "--build-arg", "KEY=value"], {}),
]


@pytest.mark.parametrize(("given", "is_option"), paired(WON_OVER, [True, False]))
def test_rollback_wins_over_release_and_what_is_about_building_or_stopping(
    world: World, given: tuple[list[str], dict[str, str]], is_option: bool
) -> None:
    """So "the same command" works in every job."""
    args, env = given
    args, env = (
        (["--rollback", R, *args], env) if is_option else (args, {**env, "DEPLOY_ROLLBACK": R})
    )
    ran = world.deploy(*args, env=env)
    assert ran.status == 0, ran.text
    assert [line for line in world.commands() if "--help" not in line] == [
        ASK,
        f"{ASK}/releases/{R}",
        ASK,
        f"convox releases rollback --app shop --wait --id {R}",
        ASK,
    ]


@pytest.mark.parametrize("env", [{}, {"DEPLOY_DRY_RUN": "1"}])
@pytest.mark.parametrize("cli", ["v2", "v3"])
def test_a_dry_run_shows_the_rollback(world: World, env: dict[str, str], cli: str) -> None:
    args = [] if env else ["--dry-run"]
    ran = world.deploy("--rollback", R, *args, env={**env, "CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0 and ran.out.endswith("\nDry run: nothing was changed.\n"), ran.text
    wait = "--wait " if cli == "v2" else ""
    assert f"\n$ convox releases rollback --app shop {wait}--id {R}\n" in ran.out
    assert "deploy/" not in ran.out and "releases promote" not in ran.out
    assert world.commands(ROLL_BACK) == [] and world.running == "ROLDRELEASE"


# --- the app's turn -------------------------------------------------------------------


def test_a_rollback_waits_for_the_deploy_that_is_under_way(world: World) -> None:
    """`convox releases rollback` does not: it would make a copy, and fail."""
    updating = app("ROTHERRELEASE", "updating")
    other = app("ROTHERRELEASE", "running")
    usual: Rule = {"usual": True}
    world.rules[ASK] = {"sequence": [updating, usual, updating, updating, other, usual]}
    ran = world.deploy("--rollback", R, "--result", "result.json")
    assert ran.status == 0, ran.text
    assert "Waiting for shop (status: updating)\n" in ran.out
    assert (
        "To roll back to ROTHERRELEASE, run the same command with --rollback ROTHERRELEASE (or"
        in ran.out
    )
    assert result_of(world)["running_before"] == "ROTHERRELEASE"


def test_the_way_back_is_what_ran_just_before_the_promote(world: World) -> None:
    good = app("ROTHERRELEASE", "running")
    usual: Rule = {"usual": True}
    world.rules[ASK] = {"sequence": [app("ROLDRELEASE", "running"), usual, good, usual]}
    ran = world.deploy("--rollback", R)
    assert ran.status == 0, ran.text
    assert "--rollback ROTHERRELEASE (or DEPLOY_ROLLBACK=ROTHERRELEASE).\n" in ran.out
    assert "--rollback ROLDRELEASE" not in ran.out


def test_an_older_release_is_never_refused(world: World) -> None:
    (world.home / f"release.{R}.json").write_text(
        json.dumps({**OLD_RELEASE, "id": R, "created": "2020-01-01T00:00:00Z"})
    )
    assert world.deploy("--rollback", R).status == 0


def test_a_release_that_someone_else_promoted_meanwhile_is_not_rolled_back_to(
    world: World,
) -> None:
    world.rules[ASK] = {
        "sequence": [app("ROLDRELEASE", "running"), {"usual": True}, app(R, "running")]
    }
    ran = world.deploy("--rollback", R)
    assert ran.status == 1 and f"{R} is running already.\n" in ran.err
    assert world.commands(ROLL_BACK) == []


# --- descriptions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "shown"),
    [
        ("8f2e1a0 Add search", "ROLDRELEASE (8f2e1a0 Add search)"),
        ("8f2e1a0 Add search https://ci.example.com/run/7", "ROLDRELEASE (8f2e1a0 Add search)"),
        ("https://ci.example.com/run/7", "ROLDRELEASE"),
        ("Add search\n\nIn all languages", "ROLDRELEASE (Add search)"),
        ("a\x1b[2J\x07b", "ROLDRELEASE (a [2J b)"),
        ("word " * 20, f"ROLDRELEASE ({('word ' * 20)[:47]}...)"),
        ("日本" * 25, f"ROLDRELEASE ({'日本' * 25})"),
        ("日本" * 26, f"ROLDRELEASE ({('日本' * 26)[:47]}...)"),
        ("the/rack's secret", "ROLDRELEASE (***)"),
        ("", "ROLDRELEASE"),
    ],
)
def test_a_release_is_named_with_its_description(
    world: World, description: str, shown: str
) -> None:
    world.describe("ROLDRELEASE", description)
    commit = world.add_git("Sell more")
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert f"\nRunning now: {shown}\n" in ran.out
    assert f"\nshop is now running RNEWRELEASE ({commit} Sell more).\n" in ran.out
    assert f"\nTo roll back to {shown}, run the same command with --rollback ROLD" in ran.out


def test_a_failure_says_what_is_live_by_its_description(world: World) -> None:
    world.describe("ROLDRELEASE", "Add search")
    world.rules["docker build"] = {"status": 1}
    assert " shop was last seen running ROLDRELEASE (Add search).\n" in world.deploy().err


def test_a_rollback_says_what_the_copy_is_of(world: World) -> None:
    world.describe(R, "Add search")
    ran = world.deploy("--rollback", R)
    assert f"\nRolling back shop (APP_NAME) {R} (Add search) on rack.example.com" in ran.out
    assert f"\nshop is now running RCOPYRELEAS, a copy of {R} (Add search).\n" in ran.out


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_login_that_may_not_read_releases_gets_their_ids(world: World, refusal: str) -> None:
    world.rules[f"{ASK}/releases/R"] = {"status": 1, "err": f"{refusal}\n"}
    ran = world.deploy()
    assert ran.status == 0, ran.text
    assert "\nRunning now: ROLDRELEASE\n" in ran.out and refusal not in ran.text


# --- rollbacks that fail --------------------------------------------------------------


def test_a_copy_that_the_rack_refused_is_named(world: World) -> None:
    """It is the newest release now, from which the next build inherits."""
    world.rules[ROLL_BACK] = REFUSED
    ran = world.deploy("--rollback", R, "--result", "result.json")
    assert ran.status == 1
    assert "\npromote failed:\nThe rack did not promote RCOPYRELEAS.\n" in ran.err
    assert ran.text.count("ERROR: app is currently updating\n") == 1
    assert ran.err.endswith(f"\nshop is running ROLDRELEASE. {COPY}\n{AGAIN}")
    result = result_of(world)
    assert (result["release"], result["running"]) == ("RCOPYRELEAS", "ROLDRELEASE")


def test_a_rollback_that_was_refused_before_the_copy_names_none(world: World) -> None:
    world.rules[ROLL_BACK] = {
        "status": 1,
        "err": "ERROR: operation not permitted for deploy keys\n",
    }
    ran = world.deploy("--rollback", R, "--result", "result.json")
    assert ran.status == 1
    assert "The rack did not promote the new release.\n" in ran.err and "use a login" in ran.err
    assert ran.err.endswith(f"\nshop is running ROLDRELEASE.\n{AGAIN}")
    assert "copy" not in ran.err
    assert result_of(world)["release"] == ""


@pytest.mark.parametrize("err", ["ERROR: invalid authentication\n", REFUSED["err"]])
def test_a_rollback_that_fails_where_nothing_runs_is_no_success(world: World, err: str) -> None:
    world.rules[ROLL_BACK] = {"status": 1, "err": err}
    world.rules[ASK] = responses(app("", "running"), before="")
    ran = world.deploy("--rollback", R, "--result", "result.json")
    assert ran.status == 1, ran.text
    assert "shop is running nothing." in ran.err
    assert result_of(world)["verified"] is False


def test_a_rollback_that_does_not_become_healthy_is_rolled_back_itself(world: World) -> None:
    end: Rule = {
        **REFUSED,
        "err": f"Rolling back to {R}... OK, RCOPYRELEAS\nPromoting RCOPYRELEAS... \nERROR: rollback\n",
    }
    world.rules[ROLL_BACK] = end
    world.rules[ASK] = responses(app("RCOPYRELEAS", "rollback"), app("ROLDRELEASE", "running"))
    ran = world.deploy("--rollback", R)
    assert ran.status == 1
    why = "The rack rolled back to ROLDRELEASE: RCOPYRELEAS did not become healthy."
    assert f"\npromote failed:\n{why}\n" in ran.err
    assert ran.err.endswith(f"\nshop is running ROLDRELEASE. {COPY}\n{AGAIN}")


def test_a_cli_that_fails_although_the_copy_runs_is_a_warning(world: World) -> None:
    world.rules[ROLL_BACK] = {
        **REFUSED,
        "err": f"Rolling back to {R}... OK, RCOPYRELEAS\nERROR: timeout\n",
    }
    world.rules[ASK] = responses(app("RCOPYRELEAS", "updating"), app("RCOPYRELEAS", "running"))
    ran = world.deploy("--rollback", R)
    assert ran.status == 0, ran.text
    assert "\nwarning: The rack reports RCOPYRELEAS running, although" in ran.out


def test_someone_elses_release_after_a_rollback_is_named(world: World) -> None:
    world.rules[ASK] = responses(app("ROTHERRELEASE", "running"))
    ran = world.deploy("--rollback", R)
    assert ran.status == 1
    assert "\npromote failed:\nSomeone else promoted ROTHERRELEASE.\n" in ran.err
    assert ran.err.endswith(f"\nshop is running ROTHERRELEASE. {COPY}\n{AGAIN}")


def test_a_cli_that_prints_no_release_is_no_success(world: World) -> None:
    world.rules[ROLL_BACK] = {"out": "no release\n"}
    ran = world.deploy("--rollback", R)
    assert ran.status == 1 and "It printed no release ID.\n" in ran.err
    assert "shop is running ROLDRELEASE." in ran.err


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGALRM, 124)])
def test_a_rollback_that_is_stopped_can_be_looked_at_and_canceled(
    world: World, signum: Any, status: int
) -> None:
    world.rules[ROLL_BACK] = {"err": f"Rolling back to {R}... OK, RCOPYRELEAS\n", "hang": True}
    world.rules[ASK] = responses(app("RCOPYRELEAS", "updating"))
    ran = world.deploy_and_signal(signum, "--rollback", R)
    assert ran.status == status
    before = "ROLDRELEASE was running before it."
    assert f"The promote is still in progress; {before} {COPY}\n" in ran.err
    assert "To cancel it: `convox apps cancel --app shop`." in ran.err


def test_what_someone_else_does_after_a_stop_is_not_offered_to_be_canceled(world: World) -> None:
    world.rules[ROLL_BACK] = {"err": f"Rolling back to {R}... OK, RCOPYRELEAS\n", "hang": True}
    world.rules[ASK] = responses(app("ROTHERRELEASE", "updating"))
    ran = world.deploy_and_signal(signal.SIGTERM, "--rollback", R)
    assert "apps cancel" not in ran.err and COPY in ran.err


def test_the_copy_is_known_however_much_is_printed_after_it(world: World) -> None:
    log = f"Rolling back to {R}... OK, RCOPYRELEAS\n" + "web-1 web pending\n" * 1500
    world.rules[ROLL_BACK] = {"err": f"{log}ERROR: timeout\n", "status": 1}
    world.rules[ASK] = responses(app("RCOPYRELEAS", "running"))
    ran = world.deploy("--rollback", R)
    assert ran.status == 0 and "\nshop is now running RCOPYRELEAS, a copy of" in ran.out


def test_someone_elses_update_is_not_offered_to_be_canceled(world: World) -> None:
    """The rack refused the copy, because someone else's update had just begun."""
    world.rules[ROLL_BACK] = REFUSED
    world.rules[ASK] = responses(
        app("ROTHERRELEASE", "updating"), {"hang": True}, app("ROTHERRELEASE", "updating")
    )
    ran = world.deploy_and_signal(signal.SIGTERM, "--rollback", R)
    assert ran.status == 143 and "cancel" not in ran.err
    assert COPY in ran.err and AGAIN in ran.err


# --- deploy keys ----------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--release", R]])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_login_that_may_not_list_releases_is_told_to_use_another_one(
    world: World, refusal: str, args: list[str]
) -> None:
    world.rules[f"{ASK}/releases"] = {"status": 1, "err": f"{refusal}\n"}
    ran = world.deploy(*args)
    assert ran.status == 0, ran.text
    assert ran.before_total.endswith(
        "\nTo roll back to ROLDRELEASE, use a login that is allowed to, and run the same command with"
        " --rollback ROLDRELEASE (or DEPLOY_ROLLBACK=ROLDRELEASE).\n"
    )


def test_a_rack_that_fails_to_list_releases_says_nothing_about_the_login(world: World) -> None:
    world.rules[f"{ASK}/releases"] = {"status": 1, "err": "ERROR: response status: 500\n"}
    ran = world.deploy()
    assert ran.status == 0 and "\nTo roll back to ROLDRELEASE, run the same command with" in ran.out
