"""Why a rollout failed: the containers of a promote are looked at while it waits, because a rollback removes them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from conftest import ECR, Ran, World, paired
from standin import Rule

ASK = "convox api get /apps/shop"
PROMOTE = "convox releases promote --app"
DEBUG = "convox deploy-debug"
HINT = "The program exits right after it has started."
LOG = [f"line {number}" for number in range(30)]
STATE = f"web: CrashLoopBackOff. {HINT}"
WHY = "The rack rolled back to ROLDRELEASE: RNEWRELEASE did not become healthy."
POD = {
    "name": "web-1",
    "service": "web",
    "phase": "Running",
    "ready": "0/1",
    "ageSeconds": 0,
    "restarts": 3,
    "classification": "unhealthy",
    "stateDetail": "CrashLoopBackOff",
    "hint": HINT,
    "logs": "starting again",
    "previousLogs": "\n".join(LOG),
}


def app(release: str, status: str) -> Rule:
    return {"out": json.dumps({"release": release, "status": status})}


def report(*pods: dict[str, Any]) -> Rule:
    """Return a response of deploy-debug. As the rack does, it leaves out what is empty."""
    found = [{name: value for name, value in pod.items() if value != ""} for pod in pods]
    answer: dict[str, Any] = {"overview": {"services": None}, "summary": {}}
    return {"out": json.dumps({**answer, "pods": found} if pods else answer)}


def result_of(world: World) -> Any:
    return json.loads((world.app / "result.json").read_text())


def deploy(world: World, *answers: Rule, status: int = 1, end: str = "rollback", **env: str) -> Ran:
    """Deploy on v3. The promote ends once deploy-debug has been asked for each answer."""
    if answers:
        world.rules[DEBUG] = {"sequence": list(answers)}
    if end == "rollback":
        how: Rule = {"status": 1, "err": "ERROR: rollback\n"}
        old = app("ROLDRELEASE", "running")
        rest = [app("RNEWRELEASE", "rollback"), old]
        world.rules[ASK] = {"sequence": [old, old, {"usual": True}, *rest]}
    else:
        how = {"usual": True}
    # It takes a while to read the last answer.
    world.rules[PROMOTE] = {**how, "once": DEBUG, "times": len(answers) + 1}
    world.rules[DEBUG]["sequence"].append({"out": "no more"})
    ran = world.deploy("--result", "result.json", env={"CONVOX_STANDIN_CLI": "v3", **env})
    assert ran.status == status, ran.text
    return ran


@pytest.fixture(autouse=True)
def impatient(world: World) -> None:
    world.constants = {
        "POLL_SECONDS": 0.01,
        "DEBUG_SECONDS": [0.05, 0.05],
        "LAST_WORDS_SECONDS": 20,
    }
    world.write("convox.yml", f"services:\n  web:\n    image: {ECR}/shop:TAG\n")


def test_a_crash_loop_is_told_while_it_happens_and_its_log_at_the_end(world: World) -> None:
    ran = deploy(world, report(POD), report(POD))
    assert ran.out.count("\nwarning: web: CrashLoopBackOff\n") == 1
    assert ran.out.index("warning: web") > ran.out.index("$ convox releases promote")
    assert "line 29" not in ran.out
    log = "".join(f"\n  | {line}" for line in LOG[-20:])
    assert ran.err == (
        f"\npromote failed:\n{WHY}\n{STATE}{log}\n"
        "`convox releases promote` exited with code 1. Its output is above.\n"
        "shop is running ROLDRELEASE.\nTo try again, run the same command with"
        " --release RNEWRELEASE (or DEPLOY_RELEASE=RNEWRELEASE).\n"
    )
    assert ran.out.count("\nERROR: rollback\n") == 1
    ended = "`convox releases promote` exited with code 1.\n  > ERROR: rollback"
    assert result_of(world)["error"] == f"{WHY}\n{STATE}{log}\n{ended}"


def test_the_question_names_the_app_and_asks_for_no_more_than_it_needs(world: World) -> None:
    deploy(world, report(), status=0, end="success")
    line = "convox deploy-debug --output json --lines 20 --no-events --app shop"
    assert set(world.commands(DEBUG)) == {line}


def test_the_question_names_the_rack(world: World) -> None:
    deploy(world, report(), status=0, end="success", CONVOX_RACK="org/staging")
    assert all("--rack org/staging" in line for line in world.commands(DEBUG))


def test_a_line_is_printed_whenever_a_state_changes(world: World) -> None:
    pulling = {**POD, "stateDetail": "ImagePullBackOff", "hint": "No such image."}
    ran = deploy(world, report(POD), report(POD), report(pulling), report(pulling), report(POD))
    lines = [line for line in ran.out.splitlines() if line.startswith("warning: web")]
    states = ["CrashLoopBackOff", "ImagePullBackOff", "CrashLoopBackOff"]
    assert lines == [f"warning: web: {state}" for state in states]


def test_each_service_has_its_own_state_and_log(world: World) -> None:
    worker = {
        **POD,
        "name": "worker-1",
        "service": "worker",
        "previousLogs": "",
        "logs": "no queue",
    }
    ran = deploy(world, report(POD, worker), report(POD, worker))
    state = f"worker: CrashLoopBackOff. {HINT}"
    for name in ("web", "worker"):
        assert ran.out.count(f"\nwarning: {name}: CrashLoopBackOff\n") == 1
    assert f"\n  | line 29\n{state}\n  | no queue\n" in ran.err


def test_two_containers_of_a_service_in_different_states_do_not_take_turns(world: World) -> None:
    other = {**POD, "name": "web-2", "stateDetail": "Error"}
    ran = deploy(world, *[report(POD, other)] * 4)
    assert ran.out.count("\nwarning: web: ") == 1 and ran.err.count("\nweb: ") == 1


def test_a_container_without_a_hint_and_a_log_has_a_state(world: World) -> None:
    ran = deploy(world, report({**POD, "hint": "", "logs": "", "previousLogs": ""}))
    assert "\nwarning: web: CrashLoopBackOff\n" in ran.out
    assert f"{WHY}\nweb: CrashLoopBackOff\n`convox releases promote` exited" in ran.err


def test_a_container_without_a_state_has_a_phase(world: World) -> None:
    bare = {**POD, "stateDetail": "", "phase": "Pending", "hint": "", "previousLogs": ""}
    ran = deploy(world, report(bare))
    assert f"{WHY}\nweb: Pending\n  | starting again\n" in ran.err


@pytest.mark.parametrize(
    "pod",
    [
        {**POD, "ageSeconds": 2000},  # broken before
        {**POD, "ageSeconds": 20, "phase": "Succeeded", "stateDetail": "Completed"},  # a hook's run
        {**POD, "classification": "not-ready"},
        {**POD, "classification": "new"},
        {**POD, "classification": "healthy"},
    ],
)
def test_only_new_containers_that_are_unhealthy_say_something_about_the_promote(
    world: World, pod: dict[str, Any]
) -> None:
    ran = deploy(world, report(pod), report(pod))
    assert "CrashLoop" not in ran.text and "Completed" not in ran.text and HINT not in ran.text
    assert f"{WHY}\n`convox releases promote` exited" in ran.err


def test_a_container_that_is_older_than_the_promote_does_not_count_because_the_answer_takes_long(
    world: World,
) -> None:
    """Such as a short before_release.sh, while the rack is reading logs."""
    ran = deploy(world, {**report({**POD, "ageSeconds": 1}), "pause": 1.5})
    assert "CrashLoop" not in ran.text


def test_a_container_that_is_younger_than_a_long_promote_counts(world: World) -> None:
    world.constants["DEBUG_SECONDS"] = [1.3, 0.05]
    assert STATE in deploy(world, report({**POD, "ageSeconds": 1})).err


def test_what_was_unhealthy_for_a_while_does_not_matter_in_the_end(world: World) -> None:
    ran = deploy(world, report(POD), report(), status=0, end="success")
    assert "\nwarning: web: CrashLoopBackOff\n" in ran.out and "line 29" not in ran.text
    assert result_of(world)["error"] == ""


def test_a_release_of_someone_else_is_no_matter_of_our_containers(world: World) -> None:
    world.rules[DEBUG] = {"sequence": [report(POD)]}
    world.rules[PROMOTE] = {"once": DEBUG, "times": 2, "usual": True}
    old = app("ROLDRELEASE", "running")
    other = app("ROTHERRELEASE", "running")
    world.rules[ASK] = {"sequence": [old, old, {"usual": True}, other]}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 1
    assert "promote failed:\nSomeone else promoted ROTHERRELEASE.\nshop is running" in ran.err


def test_containers_are_looked_at_while_the_rack_goes_on_after_the_cli(world: World) -> None:
    """`ERROR: timeout` after 35 minutes, while the rack waits for 50."""
    world.constants.update(POLL_SECONDS=0.5, DEBUG_SECONDS=[0.2, 0.2])
    world.rules[DEBUG] = {"sequence": [report(POD)]}
    world.rules[PROMOTE] = {"status": 1, "err": "ERROR: timeout\n"}
    old, new = app("ROLDRELEASE", "running"), app("RNEWRELEASE", "updating")
    world.rules[ASK] = {"sequence": [old, old, {"usual": True}, new, new, old]}
    ran = world.deploy("--result", "result.json", env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 1 and f"\n{WHY}\n{STATE}\n  | " in ran.err
    assert ran.text.count("ERROR: timeout\n") == 1
    assert result_of(world)["error"].endswith("\n  > ERROR: timeout")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGALRM, 124)])
def test_a_promote_that_is_stopped_says_what_is_wrong_with_its_containers(
    world: World, signum: Any, status: int
) -> None:
    world.rules[DEBUG] = {"sequence": [report(POD)]}
    world.rules[PROMOTE] = {"once": DEBUG, "times": 2, "hang": True}
    env = {"CONVOX_STANDIN_CLI": "v3"}
    ran = world.deploy_and_signal(signum, "--result", "result.json", env=env)
    assert ran.status == status
    assert f"\n{STATE}\n  | line 10\n" in ran.err
    assert f"\n{STATE}\n  | line 10\n" in result_of(world)["error"]


def test_a_rollback_is_looked_at_too(world: World) -> None:
    world.rules[DEBUG] = {"sequence": [report(POD)]}
    start = "convox releases rollback"
    text = "Rolling back to RABCDEFGHIJ... OK, RCOPYRELEAS\nERROR: rollback\n"
    world.rules[start] = {"once": DEBUG, "times": 2, "status": 1, "err": text}
    old, busy = app("ROLDRELEASE", "running"), app("RCOPYRELEAS", "rollback")
    world.rules[ASK] = {"sequence": [old, {"usual": True}, old, busy, old]}
    ran = world.deploy("--rollback", "RABCDEFGHIJ", env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 1
    assert f"RCOPYRELEAS did not become healthy.\n{STATE}\n  | " in ran.err


# --- when it is asked -----------------------------------------------------------------


@pytest.mark.parametrize(("pauses", "times"), [([9, 9], 0), ([0.05, 9], 1)])
def test_it_is_asked_a_while_after_the_promote_began_and_now_and_then(
    world: World, pauses: list[float], times: int
) -> None:
    world.constants["DEBUG_SECONDS"] = pauses
    world.rules[PROMOTE] = {"pause": 0.7, "usual": True}
    assert world.deploy(env={"CONVOX_STANDIN_CLI": "v3"}).status == 0
    assert len(world.commands(DEBUG)) == times


def test_it_is_not_asked_on_v2(world: World) -> None:
    world.rules[PROMOTE] = {"pause": 0.5, "usual": True}
    assert world.deploy(env={"CONVOX_STANDIN_CLI": "v2"}).status == 0
    assert world.commands(DEBUG) == []


@pytest.mark.parametrize(
    ("answer", "end"),
    paired(
        [
            {"out": "convox\n\nUsage: convox [command]\n"},  # of a CLI that does not know it
            {"out": ""},
            {"out": "null"},
            {"out": "[]"},
            {"out": '{"pods": [{"name": "web-1"}]}'},
            {"out": '{"pods": {"web": 1}}'},
            {"out": "[" * 100_000},
            {"status": 1, "err": "ERROR: response status: 404\n"},
            {"status": 1, "err": "ERROR: unknown flag: --no-events\n"},
            {"status": 1, "err": "ERROR: operation not permitted for deploy keys\n"},
            {"status": 1, "err": "ERROR: you are unauthorized to access this\n"},
            {"signal": signal.SIGSEGV},
        ],
        ["success", "rollback"],
    ),
)
def test_what_cannot_answer_is_asked_once_and_not_mentioned(
    world: World, answer: Rule, end: str
) -> None:
    world.rules[DEBUG] = answer
    is_success = end == "success"
    world.rules[PROMOTE] = {"pause": 0.6, "usual": is_success, "status": 0 if is_success else 1}
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == (0 if is_success else 1), ran.text
    assert len(world.commands(DEBUG)) == 1
    assert "deploy-debug" not in ran.text and "Traceback" not in ran.text
    assert "warning" not in ran.text


@pytest.mark.parametrize(
    "rule", [{"hang": True}, {"hang": True, "ignore_term": True, "child": True}]
)
def test_a_cli_that_hangs_in_it_delays_nothing(world: World, rule: Rule) -> None:
    world.rules[DEBUG] = rule
    world.rules[PROMOTE] = {"once_one_hangs": True, "usual": True}
    ran = world.deploy("--result", "result.json", env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    assert result_of(world)["seconds"]["promote"] < 3
    assert len(world.commands(DEBUG)) == 1


def test_an_environment_that_cannot_be_read_in_time_delays_nothing(world: World) -> None:
    world.rules[DEBUG] = report(POD)
    world.rules["convox env --app"] = {"hang": True}
    world.rules[PROMOTE] = {"once_one_hangs": True, "usual": True}
    ran = world.deploy("--result", "result.json", env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    assert result_of(world)["seconds"]["promote"] < 3


def test_a_signal_ends_it_too(world: World) -> None:
    world.rules[DEBUG] = {"hang": True}
    world.rules[PROMOTE] = {"once_one_hangs": True, "hang": True}
    process = world.start(env={"CONVOX_STANDIN_CLI": "v3"})
    for _ in range(2):
        world.await_hanging()
    process.send_signal(signal.SIGTERM)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 143 and "while running `convox releases promote`" in err


# --- these are the app's lines --------------------------------------------------------

SECRETS = {
    "DATABASE_URL": "postgres://shop:s3cret-pass@db:5432/shop",
    "API_TOKEN": "tok-0123456789",
    "ADMIN_PASSWORD": "pass/with'quotes",
    "SECRET_KEY_BASE": "key=with=signs",
}
LEAK = "\n".join(["connecting", *SECRETS.values(), "amqp://user:other-pass@queue/x", "no database"])


def test_secrets_in_the_log_are_redacted_in_the_output_and_in_the_result(world: World) -> None:
    env = "\n".join(f"{name}={value}" for name, value in SECRETS.items())
    ran = deploy(world, report({**POD, "previousLogs": LEAK}), STANDIN_APP_ENV=env)
    error = result_of(world)["error"]
    for text in (ran.text, error):
        for secret in ("s3cret-pass", "other-pass", "tok-", "pass/with", "with=signs"):
            assert secret not in text
        assert "\n  | connecting\n  | postgres://shop:***@db:5432/shop\n  | ***\n" in text
        assert "\n  | amqp://user:***@queue/x\n  | no database\n" in text


def test_where_the_environment_cannot_be_read_urls_are_redacted_all_the_same(world: World) -> None:
    world.rules["convox env --app"] = {"status": 1, "err": "ERROR: forbidden\n"}
    ran = deploy(world, report({**POD, "previousLogs": LEAK}))
    assert "\n  | postgres://shop:***@db:5432/shop\n" in ran.err
    assert "s3cret-pass" not in ran.text and "other-pass" not in ran.text
    assert "warning" in ran.out and "forbidden" not in ran.text


def test_a_secret_in_the_state_or_the_hint_is_redacted_too(world: World) -> None:
    bad = {**POD, "hint": "exec tok-0123456789 failed", "stateDetail": "Error: tok-0123456789"}
    ran = deploy(world, report(bad), STANDIN_APP_ENV="API_TOKEN=tok-0123456789")
    assert "tok-" not in ran.text + result_of(world)["error"]
    assert "\nwarning: web: Error: ***\n" in ran.out
    assert "\nweb: Error: ***. exec *** failed\n" in ran.err


def test_the_annotation_and_the_summary_have_the_state_and_the_hint_alone(world: World) -> None:
    summary = world.home / "summary.md"
    log = "\n".join(["::error::from the app", "no database", "::set-output name=x::y"])
    world.env.update(GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    ran = deploy(world, report({**POD, "previousLogs": log}))
    assert "\n  | no database\n" in ran.out
    [annotation] = [line for line in ran.text.splitlines() if line.startswith("::error ")]
    for text in (annotation, summary.read_text()):
        assert STATE in text and WHY in text and "ERROR: rollback" in text
        assert "no database" not in text and "from the app" not in text
    assert "\n::error::from" not in ran.text and "\n::set-output" not in ran.text
