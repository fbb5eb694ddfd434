"""In CI: groups, annotations, outputs and summaries, branches and URLs of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import DIGEST, ECR, SHORT_ID, STEPS, World

GITHUB = {"GITHUB_ACTIONS": "true"}
GITLAB = {"GITLAB_CI": "true"}


@pytest.fixture
def files(world: World) -> dict[str, Path]:
    """The files that GitHub gives to a step. Both exist, and may have contents."""
    paths = {name: world.home / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for name, path in paths.items():
        path.write_text("earlier=1\n")
        world.env[name] = str(path)
    return paths


def commands(text: str) -> list[str]:
    """Return the lines that GitHub's runner takes for commands."""
    return [line for line in text.splitlines() if re.match(r"\s*(::|##\[)", line)]


# --- GitHub ---------------------------------------------------------------------------


def test_each_step_is_a_group_in_github(world: World, files: dict[str, Path]) -> None:
    world.add_hooks()
    ran = world.deploy(env=GITHUB)
    assert ran.status == 0, ran.text
    groups = [f"::group::==> {step}" for step in STEPS]
    found = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in commands(ran.out)]
    assert found == [line for group in groups for line in (group, "::endgroup::")]


def test_the_color_is_on_in_github_and_gitlab_unless_no_color_is_set(world: World) -> None:
    for env in (GITHUB, GITLAB):
        assert "\x1b[32m" in world.deploy(env=env).out
    assert "\x1b[" not in world.deploy(env={**GITHUB, "NO_COLOR": "1"}).out


def test_a_success_has_outputs_and_a_summary(world: World, files: dict[str, Path]) -> None:
    assert world.deploy(env=GITHUB).status == 0
    outputs = files["GITHUB_OUTPUT"].read_text()
    assert re.sub(r'"build_seconds": [\d.]+', '"build_seconds": 0.1', outputs) == (
        "earlier=1\nstatus=succeeded\nrelease=RNEWRELEASE\nrunning=RNEWRELEASE\n"
        f"running_before=ROLDRELEASE\nimages={json.dumps([IMAGE])}\n"
    )


IMAGE = {
    "image": f"{ECR}/shop:{SHORT_ID}",
    "digest": DIGEST,
    "platform": "linux/amd64",
    "services": ["web"],
    "build_seconds": 0.1,
}


def test_the_summary_is_a_table_for_people(world: World, files: dict[str, Path]) -> None:
    commit = world.add_git("Sell | <b>more</b> `x`")
    world.describe("ROLDRELEASE", "Sell")
    world.rules["docker push"] = {"status": 1, "err": "denied: 100% no\n"}
    assert world.deploy(env=GITHUB).status == 1
    summary = files["GITHUB_STEP_SUMMARY"].read_text()
    assert (
        re.sub(r"\d+\\\.\d", "4\\.3", summary)
        == f"""\
earlier=1
### shop: deploy failed

| | |
|---|---|
| App | shop |
| Rack | rack\\.example\\.com |
| Release |  |
| Commit | {commit} Sell \\| \\<b\\>more\\<\\/b\\> \\`x\\` |
| Running | ROLDRELEASE \\(Sell\\) |
| Time | 4\\.3 s |

    `docker push` for web exited with code 1.
      > denied: 100% no
    You are not allowed to push to this repository, or docker's login has expired. For ECR, see IAM policies in docs/ci.md of convox-deploy.
    Nothing was released or promoted. shop was last seen running ROLDRELEASE (Sell).
"""
    )


def test_a_dry_run_reports_no_outcome(world: World, files: dict[str, Path]) -> None:
    assert world.deploy("--dry-run", env=GITHUB).status == 0
    assert {path.read_text() for path in files.values()} == {"earlier=1\n"}


def test_a_failure_is_an_annotation_in_one_line(world: World, files: dict[str, Path]) -> None:
    error = "denied: 100% no\r\nsecond line\n"
    world.rules["docker push"] = {"status": 1, "err": error}
    ran = world.deploy(env=GITHUB)
    assert ran.status == 1
    [annotation] = [line for line in commands(ran.text) if line.startswith("::error")]
    assert annotation.startswith(
        "::error title=push failed::`docker push` for web exited with code"
    )
    assert "100%25 no%0" in annotation and "second line%0A" in annotation
    assert "\x1b" not in annotation
    assert "status=failed\n" in files["GITHUB_OUTPUT"].read_text()
    assert "running=ROLDRELEASE\n" in files["GITHUB_OUTPUT"].read_text()


def test_the_annotation_has_cause_state_and_next_step_and_is_all_that_is_printed(
    world: World,
) -> None:
    """GitHub shows it in the log, too."""
    world.describe("ROLDRELEASE", "Sell")
    world.add_hooks("before_release")
    world.rules["before_release"] = {"status": 3, "err": "no database\n"}
    ran = world.deploy(env=GITHUB)
    assert ran.err == ""
    cause = "`deploy/before_release.sh` exited with code 3.%0A  > no database%0A"
    state = (
        "Nothing was promoted. shop was last seen running ROLDRELEASE (Sell). Release RNEWRELEASE"
    )
    assert f"::error title=before_release failed::{cause}{state} is built.%0A" in ran.out
    assert ran.out.endswith(" (or DEPLOY_RELEASE=RNEWRELEASE).\n")


def test_a_warning_is_an_annotation(world: World) -> None:
    env = {**GITHUB, "DEPLOY_CACHE_FROM_RUNNING": "1", "STANDIN_BUILDKIT": "0"}
    world.rules["convox api get /apps/shop/releases/ROLDRELEASE"] = {
        "status": 1,
        "err": "ERROR: 100%\n",
    }
    ran = world.deploy(env=env)
    assert ran.status == 0, ran.text
    [warning] = [line for line in commands(ran.out) if line.startswith("::warning")]
    assert warning.startswith("::warning::Building without the running images as cache: ")
    assert "warning: " not in ran.out


def test_a_failure_in_preflight_has_its_group_closed(world: World, files: dict[str, Path]) -> None:
    world.rules["docker version"] = {"status": 1, "err": "no\n"}
    ran = world.deploy(env=GITHUB)
    assert [line.split("::")[1].split()[0] for line in commands(ran.out)] == [
        "group",
        "endgroup",
        "error",
    ]


def test_a_resumed_deploy_reports_what_is_running(world: World, files: dict[str, Path]) -> None:
    assert world.deploy("--release", "RABCDEFGHIJ", env=GITHUB).status == 0
    assert "running=RABCDEFGHIJ\n" in files["GITHUB_OUTPUT"].read_text()
    assert "RABCDEFGHIJ" in files["GITHUB_STEP_SUMMARY"].read_text()


def test_files_that_cannot_be_written_change_nothing(world: World) -> None:
    for env in ({"GITHUB_OUTPUT": "/no/such/file"}, {"GITHUB_STEP_SUMMARY": "/no/such/file"}, {}):
        ran = world.deploy(env={**GITHUB, **env})
        assert ran.status == 0, ran.text
        assert "Traceback" not in ran.text


def test_secrets_are_in_no_output(world: World, files: dict[str, Path]) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied: the/rack's secret\n"}
    ran = world.deploy(env=GITHUB)
    printed = ran.text + "".join(path.read_text() for path in files.values())
    assert "denied: ***" in printed and "rack's secret" not in printed


@pytest.mark.parametrize(
    ("env", "subject"),
    [
        (GITHUB, "::error::x"),
        (GITHUB, "##[error]x"),
        (GITHUB, "::set-output name=a::b"),
        (GITLAB, "a \x1b[31mred\x1b[0m b"),
        ({}, "\x9b31m"),
    ],
)
def test_a_commit_subject_does_not_act(world: World, env: dict[str, str], subject: str) -> None:
    world.add_git(f"{subject}")
    ran = world.deploy("--no-promote", env=env)
    assert ran.status == 0, ran.text
    assert not any("x" in line or "set-output" in line for line in commands(ran.text))
    assert "##[error" not in ran.text
    assert "\x1b[31m" not in ran.text and "\x9b" not in ran.text


def test_nothing_is_printed_for_ci_elsewhere(world: World, files: dict[str, Path]) -> None:
    ran = world.deploy(env={"CI": "true", "GITHUB_ACTIONS": "false", "GITLAB_CI": ""})
    assert commands(ran.text) == [] and "section_start" not in ran.text
    assert {path.read_text() for path in files.values()} == {"earlier=1\n"}


# --- GitLab ---------------------------------------------------------------------------


def test_in_gitlab_the_error_follows_the_last_section_and_needs_nothing_above(world: World) -> None:
    world.rules["docker build"] = {"status": 1, "err": "the cause\n"}
    ran = world.deploy(env=GITLAB)
    assert ran.err == ""
    _, _, end = ran.out.rpartition("section_end")
    assert "build failed:" in end and "\n  > the cause\n" in end and "Nothing was released" in end


def test_each_step_is_a_section_in_gitlab(world: World) -> None:
    world.add_hooks()
    world.rules["docker push"] = {"status": 1, "err": "denied\n"}
    ran = world.deploy(env=GITLAB)
    assert ran.status == 1
    out = ran.out.replace("\n\x1b[0K", "\r\x1b[0K")  # Python reads \r as \n
    found = re.findall(r"\x1b\[0Ksection_(start|end):(\d+):(\w+)\r\x1b\[0K", out)
    expected = [(what, step) for step in STEPS[:5] for what in ("start", "end")]
    assert [(what, step) for what, _, step in found] == expected
    starts = {step: int(seconds) for what, seconds, step in found if what == "start"}
    assert all(int(seconds) >= starts[step] for _, seconds, step in found)
    assert "\r\x1b[0K==> preflight" in out


# --- branches and URLs of runs --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("GIT_BRANCH", "fix/allow-origin/cors"),
        ("BRANCH_NAME", "origin-2"),
    ],
)
def test_the_branch_of_a_detached_checkout_keeps_its_name(
    world: World, name: str, branch: str
) -> None:
    world.add_git()
    world.add_hooks("before_build")
    head = (world.app / ".git" / "refs" / "heads" / "main").read_text()
    (world.app / ".git" / "HEAD").write_text(head)
    given = f"origin/{branch}" if name == "GIT_BRANCH" else branch
    assert world.deploy("--no-promote", env={name: given}).status == 0
    assert world.call("before_build").env["GIT_BRANCH"] == branch
