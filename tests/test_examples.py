"""Check that the examples work: shell steps run against the stand-ins, result readers read real result files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from conftest import (
    REAL_GIT,
    ROOT,
    STANDIN,
    TOOL,
    World,
    documented_copy_of_a_build,
    is_alive,
)

import convox_deploy

EXAMPLES = ROOT / "examples"
WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
[JOB] = WORKFLOW["jobs"].values()
STEPS: list[dict[str, Any]] = JOB["steps"]
GITLAB: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())
GITLAB_JOB = GITLAB["deploy"]
WAYS_TO_DEPLOY = ["DEPLOY_RELEASE", "DEPLOY_ROLLBACK"]  # the parameters of each example
JENKINSFILES = ["Jenkinsfile", "Jenkinsfile.approval"]
MANIFESTS = [
    *(EXAMPLES / name for name in ("convox.yml", "docker-compose.yml")),
    *sorted((EXAMPLES / "moving").iterdir()),
]
HOOKS = [*sorted((ROOT / "deploy").iterdir()), *sorted((EXAMPLES / "deploy").iterdir())]
SECRETS = {"CONVOX_HOST": "rack.example.com", "CONVOX_PASSWORD": "the/rack's secret"}
FIND_OUTPUT = '#!/bin/sh\nwhile [ "$1" != --output ]; do shift; done\n'
STALE = '{"tool": "convox-deploy", "app": "stale", "release": "RSTALE", "status": "succeeded"}'


def add_program(world: World, name: str, text: str) -> None:
    (world.bin / name).unlink(missing_ok=True)
    (world.bin / name).write_text(text)
    (world.bin / name).chmod(0o755)


@pytest.fixture
def machine(world: World) -> World:
    """An app with its own copy of the tool, on a machine that also has python3, uv and curl."""
    shutil.copy(TOOL, world.app)
    python = shlex.quote(sys.executable)
    add_program(world, "python3", f'#!/bin/sh\nexec {python} "$@"\n')
    add_program(world, "uv", f'#!/bin/sh\n[ "$1" = run ] && shift && exec {python} "$@"\n')
    download = f'cat {shlex.quote(str(STANDIN))} >"$2"\n'  # not executable yet
    add_program(world, "curl", FIND_OUTPUT + download)
    return world


def run_script(
    world: World, shell: list[str], script: str, **env: str
) -> subprocess.CompletedProcess[str]:
    world.ready_standins()
    env = {**world.env, "PATH": f"{world.bin}:{os.environ['PATH']}", **env}
    where: dict[str, Any] = {"cwd": env.get("WORKSPACE", world.app), "env": env}
    return subprocess.run([*shell, script], **where, capture_output=True, text=True, check=False)


# --- GitHub Actions -------------------------------------------------------------------

ACTIONLINT, ACT = (
    shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("actionlint", "act")
)
SETUP_UV = """
name: setup-uv
description: does nothing, as the machine has a uv
inputs:
  enable-cache:
    description: whether to keep what uv downloads
    required: true
runs:
  using: composite
  steps:
    - run: '[ "${{ inputs.enable-cache }}" = false ]'
      shell: bash
"""
OUTPUTS = """
      - if: always()
        run: |
          echo "outputs: ${{ steps.deploy.outputs.release }} ${{ steps.deploy.outputs.running }} ${{ steps.deploy.outputs.status }}"
"""


class Run:
    """A run of the workflow by nektos/act on this machine. Only the download of uv and of the convox CLI is faked."""

    def __init__(self, world: World, *args: str) -> None:
        checksum = hashlib.sha256(STANDIN.read_bytes()).hexdigest()
        workflow = (EXAMPLES / "github-actions.yml").read_text()
        assert workflow.count("replace-with-the-checksum") == 1
        workflow = workflow.replace("replace-with-the-checksum", checksum)
        world.write(".github/workflows/deploy.yml", workflow + OUTPUTS)
        (world.bin / "convox").unlink(missing_ok=True)  # the workflow installs it
        world.add_git()
        subprocess.run(
            [REAL_GIT, "remote", "add", "origin", "https://github.com/your-org/your-app"],
            cwd=world.app,
            check=False,  # there is one in a second run
        )
        uv = world.home / "setup-uv"
        uv.mkdir(exist_ok=True)
        (uv / "action.yml").write_text(SETUP_UV)
        [used] = [step["uses"] for step in STEPS if step.get("uses", "").startswith("astral-sh/")]
        assert ACT is not None
        command = [
            ACT,
            *(args or ["push"]),
            "--platform=ubuntu-latest=-self-hosted",  # not in a container
            f"--var=CONVOX_HOST={SECRETS['CONVOX_HOST']}",
            f"--secret=CONVOX_PASSWORD={SECRETS['CONVOX_PASSWORD']}",
            f"--local-repository={used}={uv}",
            f"--action-cache-path={world.home / 'cache'}",
        ]
        world.ready_standins()
        world.env = {**world.env, "PATH": f"{world.bin}:{os.environ['PATH']}"}
        for name in ("APP_NAME", "CONVOX_HOST", "CONVOX_PASSWORD"):  # the workflow sets them
            del world.env[name]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            command, cwd=world.app, env=world.env, text=True, stdin=subprocess.DEVNULL, **streams
        )

    def log(self) -> str:
        """Wait for the run to end, and return its log."""
        return str(self.process.communicate(timeout=60)[0])


needs_act = pytest.mark.skipif(ACT is None, reason="needs nektos/act")


@pytest.mark.skipif(ACTIONLINT is None, reason="needs actionlint")
def test_actionlint_finds_nothing_in_the_workflow() -> None:
    path = str(EXAMPLES / "github-actions.yml")
    done = subprocess.run([str(ACTIONLINT), path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_workflow_has_the_expected_shape() -> None:
    assert WORKFLOW[True]["push"] == {"branches": ["main"]}  # on:
    assert [*WORKFLOW[True]["workflow_dispatch"]["inputs"]] == WAYS_TO_DEPLOY
    for name in WAYS_TO_DEPLOY:
        assert JOB["env"][name] == f"${{{{ inputs.{name} }}}}"
    assert WORKFLOW["permissions"] == {}
    assert WORKFLOW["concurrency"] == {"group": "production", "cancel-in-progress": False}
    assert JOB["permissions"] == {"contents": "read"}
    assert JOB["environment"] == "production"
    assert JOB["timeout-minutes"] == 120
    used = {step["uses"].partition("@")[0]: step["with"] for step in STEPS if "uses" in step}
    assert [*used] == ["actions/checkout", "astral-sh/setup-uv"]
    assert used["actions/checkout"] == {"fetch-depth": 0, "persist-credentials": False}


def test_the_staging_job_of_the_workflow_can_be_uncommented(tmp_path: Path) -> None:
    text = (EXAMPLES / "github-actions.yml").read_text()
    active, comment = text.split("  # To try the build in staging first")
    production, staging = comment.split("  # staging:\n")
    steps = "\n".join(line for line in production.splitlines() if line.startswith("  #     "))
    active = active[: active.index("      # With exec, canceling")]
    active = active.replace("  deploy:\n", "  deploy:\n    needs: staging\n")
    path = tmp_path / "deploy.yml"
    path.write_text(re.sub("(?m)^  # ", "  ", f"{active}{steps}\n  # staging:\n{staging}"))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    assert [*jobs] == ["deploy", "staging"]
    for job in jobs.values():
        [deploy] = [step for step in job["steps"] if "convox_deploy.py" in step.get("run", "")]
        assert {*deploy["env"]} == {"CONVOX_HOST", "CONVOX_PASSWORD"}
        assert "RACK_URL" in deploy["run"] and "${{" not in deploy["run"]
    if ACTIONLINT:
        done = subprocess.run([ACTIONLINT, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_only_the_deploy_step_gets_secrets_and_none_is_in_a_command() -> None:
    for step in STEPS:
        assert "${{" not in step.get("run", "")
        assert ("secrets." in json.dumps(step)) == (step.get("name") == "Deploy")
    assert "secrets." not in json.dumps([JOB["env"], WORKFLOW.get("env")])


def test_the_settings_of_the_examples_exist() -> None:
    known = {"APP_NAME", "CONVOX_HOST", "CONVOX_PASSWORD"}
    for parameter in convox_deploy.main.params:
        if isinstance(parameter, click.Option) and parameter.envvar:
            variables = parameter.envvar
            known |= {*([variables] if isinstance(variables, str) else variables)}
    [deploy] = [step for step in STEPS if step.get("name") == "Deploy"]
    used = {*JOB["env"], *deploy["env"], *GITLAB["variables"], *GITLAB_JOB["variables"]}
    used |= parameters().keys()
    for name in JENKINSFILES:
        used |= environment_of(name).keys()
    assert used - {"GIT_DEPTH"} <= known


@needs_act
def test_the_workflow_deploys(machine: World) -> None:
    log = Run(machine).log()
    assert "Job succeeded" in log, log
    assert machine.running == "RNEWRELEASE"
    assert "outputs: RNEWRELEASE RNEWRELEASE succeeded" in log
    assert "::group::" in log and "::endgroup::" in log and "::error" not in log
    assert re.search(r"Summary - .*your-app", log), log
    build = machine.call("convox build --app")
    assert "https://github.com/your-org/your-app/actions/runs/1" in build.line
    assert build.env["CONVOX_HOST"] == SECRETS["CONVOX_HOST"]
    assert SECRETS["CONVOX_PASSWORD"] not in log + str([call.argv for call in machine.calls])


@needs_act
def test_the_workflow_promotes_a_release_that_is_already_built(machine: World) -> None:
    log = Run(machine, "workflow_dispatch", "--input=DEPLOY_RELEASE=RABCDEFGHIJ").log()
    assert "Job succeeded" in log, log
    assert machine.running == "RABCDEFGHIJ"
    assert "outputs: RABCDEFGHIJ RABCDEFGHIJ succeeded" in log
    assert not machine.commands("docker")


@needs_act
def test_the_workflow_rolls_back(machine: World) -> None:
    log = Run(machine, "workflow_dispatch", "--input=DEPLOY_ROLLBACK=RABCDEFGHIJ").log()
    assert "Job succeeded" in log, log
    assert machine.commands("convox releases rollback")[0].endswith(" RABCDEFGHIJ")
    assert f"outputs: {machine.running} {machine.running} succeeded" in log
    assert machine.running not in ("ROLDRELEASE", "RABCDEFGHIJ")


@needs_act
def test_the_workflow_shows_a_failing_hook(machine: World) -> None:
    hook = "#!/bin/sh\necho 'tests | 100%: failed' >&2\nexit 3\n"
    machine.write("deploy/after_build.sh", hook, 0o755)
    for _ in range(3):  # act may lose the end of what a step prints on its terminal
        log = Run(machine).log()
        assert "Job failed" in log
        assert machine.running == "ROLDRELEASE"
        if "::error" in log:
            break
    assert re.search(r"::error title=[^:]*after_build[^:]*::.*after_build", log), log
    assert "exit status 1\n" in log
    assert "outputs:  ROLDRELEASE failed" in log
    assert re.search(r"Summary - .*your-app", log), log


@needs_act
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_canceling_the_workflow_stops_the_deploy(machine: World, signum: int) -> None:
    """Signal only the step's own process, as GitHub does. It must be the deploy, not a shell around it."""
    machine.rules["docker build --tag"] = {"hang": True}
    run = Run(machine)
    build = machine.await_hanging()
    os.kill(parent_of(build), signum)
    log = run.log()
    assert f"exit status {128 + signum}\n" in log, log
    assert "outputs:  ROLDRELEASE failed" in log
    assert not is_alive(build)
    assert not machine.commands("convox build --app")


@needs_act
def test_the_workflow_does_not_run_a_convox_cli_with_another_checksum(machine: World) -> None:
    add_program(machine, "curl", FIND_OUTPUT + 'echo "#!/bin/sh" >"$2"\n')
    log = Run(machine).log()
    assert "Job failed" in log and "convox: FAILED" in log
    assert machine.calls == []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- GitLab ---------------------------------------------------------------------------


def test_the_gitlab_job_deploys(machine: World) -> None:
    assert GITLAB_JOB["artifacts"] == {"when": "always", "paths": ["deploy.json"]}
    assert GITLAB_JOB["environment"] and GITLAB_JOB["resource_group"]
    assert [*GITLAB["variables"]] == WAYS_TO_DEPLOY
    form = {name: field["value"] for name, field in GITLAB["variables"].items()}
    for line in GITLAB_JOB["script"]:
        done = run_script(machine, ["/bin/bash", "-ec"], line, **form, **GITLAB_JOB["variables"])
        assert done.returncode == 0, done.stderr
    assert machine.commands("convox releases promote --app your-app")
    assert json.loads((machine.app / "deploy.json").read_text())["status"] == "succeeded"


# --- Jenkins --------------------------------------------------------------------------

STEP = re.compile(r"\bsh(?: |\(returnStdout: true, script: )(?:'''(.*?)'''|'(.*?)')", re.DOTALL)


def shell_steps(name: str) -> list[str]:
    """Return the shell steps of a Jenkinsfile, in order."""
    text = (EXAMPLES / name).read_text()
    return [match[1] or match[2] for match in STEP.finditer(text)]


def environment_of(name: str) -> dict[str, str]:
    """Return the `environment` of a Jenkinsfile."""
    [block] = re.findall(r"environment \{\n(.*?)\}", (EXAMPLES / name).read_text(), re.DOTALL)
    return dict(re.findall("(\\w+) = '(.*)'", block))


def jenkins(world: World, name: str, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell step as Jenkins does."""
    return run_script(world, ["/bin/sh", "-xec"], script, **environment_of(name), **env)


@pytest.mark.parametrize("name", JENKINSFILES)
def test_a_jenkinsfile_has_the_expected_shape(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    code = re.sub(
        r"'''.*?'''|'[^'\n]*'|\"[^\"\n]*\"",
        "''",
        re.sub("(?m)^ *//.*| // .*", "", text),
        flags=re.DOTALL,
    )
    for opening, closing in ("{}", "()", "[]"):
        assert code.count(opening) == code.count(closing)
    assert "pollSCM('* * * * *')" in text
    assert re.search(r"options \{[^}]*disableConcurrentBuilds\(\)[^}]*timestamps\(\)", text)
    assert len(shell_steps(name)) == len(re.findall(r"\bsh\b(?=[ (])", code))
    for script in shell_steps(name):
        assert "\\" not in script  # Groovy would interpret it
    for literal in re.findall('"[^"\n]*\\$[^"\n]*"', re.sub("(?s)'''.*?'''|//.*?\n", "", text)):
        assert "CONVOX" not in literal  # Groovy would put the secret in the command


def test_every_deploy_in_a_jenkinsfile_starts_without_an_earlier_result() -> None:
    remove, deploy, _ = shell_steps("Jenkinsfile")
    assert remove == "rm -f deploy.json" and "./convox_deploy.py" in deploy
    text = (EXAMPLES / "Jenkinsfile").read_text()
    assert text.index("sh 'rm -f deploy.json'") < text.index("checkout scm")
    assert "skipDefaultCheckout()" in text
    deploys = [step for step in shell_steps("Jenkinsfile.approval") if "convox_deploy.py" in step]
    assert len(deploys) == 2
    for step in deploys:
        assert step.split("\n")[1].strip() == "rm -f deploy.json"


def parameters() -> dict[str, str]:
    """Return the variables by which Jenkins exports the parameters of a build that is started without any."""
    text = (EXAMPLES / "Jenkinsfile").read_text()
    [block] = re.findall(r"\n  parameters \{\n(.*?)\n  \}", text, re.DOTALL)
    return {
        name: default.strip("'")
        for name, default in re.findall(r"name: '(\w+)', defaultValue: ('.*?'|\w+)", block)
    }


@pytest.mark.parametrize(
    ("given", "release", "promotes"),
    [
        ({}, "RNEWRELEASE", "convox releases promote --app your-app --wait RNEWRELEASE"),
        ({"DEPLOY_NO_PROMOTE": "true"}, "RNEWRELEASE", ""),
        (
            {"DEPLOY_RELEASE": "RABCDEFGHIJ", "DEPLOY_NO_PROMOTE": "true"},
            "RABCDEFGHIJ",
            "convox releases promote --app your-app --wait RABCDEFGHIJ",
        ),
        (
            {"DEPLOY_ROLLBACK": "RABCDEFGHIJ"},
            "RCOPYRELEAS",
            "convox releases rollback --app your-app --wait --id RABCDEFGHIJ",
        ),
    ],
)
def test_the_jenkinsfile_deploys_and_describes_the_build(
    machine: World, given: dict[str, str], release: str, promotes: str
) -> None:
    machine.write("deploy.json", STALE)
    remove, deploy, describe = shell_steps("Jenkinsfile")
    env = {**parameters(), **given}
    assert [*env] == [*WAYS_TO_DEPLOY, "DEPLOY_NO_PROMOTE"]
    assert jenkins(machine, "Jenkinsfile", remove).returncode == 0
    assert not (machine.app / "deploy.json").exists()
    done = jenkins(machine, "Jenkinsfile", deploy, **env)
    assert done.returncode == 0, done.stderr
    assert jenkins(machine, "Jenkinsfile", describe, **env).stdout == f"{release} succeeded\n"
    promoted = machine.commands("convox releases promote --app", "convox releases rollback")
    assert promoted == ([promotes] if promotes else [])
    assert bool(machine.commands("docker build")) == (release == "RNEWRELEASE")
    assert "secret" not in done.stdout + done.stderr


def test_the_jenkinsfile_describes_a_failure(machine: World) -> None:
    machine.rules["docker push"] = {"status": 1, "err": "denied\n"}
    _, deploy, describe = shell_steps("Jenkinsfile")
    assert jenkins(machine, "Jenkinsfile", deploy, **parameters()).returncode == 1
    assert jenkins(machine, "Jenkinsfile", describe).stdout == "no release failed\n"


@pytest.mark.parametrize("name", JENKINSFILES)
def test_a_jenkins_agent_without_python_leaves_no_result(machine: World, name: str) -> None:
    machine.write("deploy.json", STALE)
    (machine.bin / "python3").unlink()
    (machine.bin / "rm").symlink_to(shutil.which("rm") or "rm")
    codes = [
        jenkins(machine, name, script, PATH=str(machine.bin)).returncode
        for script in shell_steps(name)
        if "rm -f" in script or "convox_deploy.py" in script
    ]
    assert set(codes) == ({0, 127} if name == "Jenkinsfile" else {127})
    assert not (machine.app / "deploy.json").exists()


def git(directory: Path, *words: str) -> str:
    command = [REAL_GIT, "-c", "user.name=test", "-c", "user.email=test@localhost", *words]
    done = subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def second_agent(machine: World) -> Path:
    """Another workspace, with a later commit checked out and the result of an earlier build."""
    hook = "deploy/before_release.sh"
    machine.write(hook, '#!/bin/sh\necho first >>"$STANDIN/hooks"\n', 0o755)
    machine.add_git()
    origin = machine.home / "origin"
    git(machine.home, "clone", "--quiet", str(machine.app), str(origin))
    (origin / hook).write_text('#!/bin/sh\necho later >>"$STANDIN/hooks"\n')
    git(origin, "commit", "--quiet", "--all", "--message", "Later")
    workspace = machine.home / "second-agent"
    git(machine.home, "clone", "--quiet", f"file://{origin}", str(workspace))
    (workspace / "deploy.json").write_text(STALE)
    return workspace


def test_the_approved_release_is_promoted_with_the_commit_it_was_built_from(
    machine: World, second_agent: Path
) -> None:
    name = "Jenkinsfile.approval"
    build, read_commit, read_release, checkout, promote = shell_steps(name)
    done = jenkins(machine, name, build)
    assert done.returncode == 0, done.stderr
    env = {
        "COMMIT": jenkins(machine, name, read_commit).stdout.strip(),
        "DEPLOY_RELEASE": jenkins(machine, name, read_release).stdout.strip(),
        "WORKSPACE": str(second_agent),
    }
    assert env["DEPLOY_RELEASE"] == "RNEWRELEASE" and machine.running == "ROLDRELEASE"
    assert git(second_agent, "rev-parse", "HEAD") != env["COMMIT"]

    for script in (checkout, promote):
        done = jenkins(machine, name, script, **env)
        assert done.returncode == 0, done.stderr
    assert machine.running == "RNEWRELEASE"
    assert (machine.home / "hooks").read_text() == "first\n"
    result = json.loads((second_agent / "deploy.json").read_text())
    assert (result["release"], result["status"]) == ("RNEWRELEASE", "succeeded")
    assert len(machine.commands("docker build")) == 1


def test_the_approved_release_is_not_promoted_without_its_commit(
    machine: World, second_agent: Path
) -> None:
    shallow = machine.home / "shallow"
    git(machine.home, "clone", "--quiet", "--depth", "1", f"file://{second_agent}", str(shallow))
    checkout = shell_steps("Jenkinsfile.approval")[3]
    env = {"COMMIT": git(machine.app, "rev-parse", "HEAD"), "WORKSPACE": str(shallow)}
    assert jenkins(machine, "Jenkinsfile.approval", checkout, **env).returncode != 0


@pytest.mark.parametrize("name", ["Jenkinsfile.approval", "github-actions.yml"])
def test_the_lines_that_copy_a_build_from_staging_are_the_documented_ones(name: str) -> None:
    example = "\n".join(
        re.sub(r"^\s*(//|#)?\s*(first stage:|last stage:|- run: \|)?\s*(exec )?", "", line)
        for line in (EXAMPLES / name).read_text().splitlines()
    )
    for line in "".join(documented_copy_of_a_build()).splitlines():
        where = line.strip()
        if name == "Jenkinsfile.approval":  # which sets DEPLOY_RESULT
            where = where.replace(" --result deploy.json", "")
        assert f"\n{where}\n" in example, line


# --- manifests and hooks --------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_a_manifest_can_be_deployed(path: Path) -> None:
    assert yaml.safe_load(path.read_text())
    assert convox_deploy.Manifest.load(str(path)).services


@pytest.mark.parametrize("path", HOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_hook_is_valid(path: Path) -> None:
    assert path.stem in convox_deploy.HOOKS and os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["/bin/sh", "-n", path], check=True)


@pytest.mark.parametrize("status", [0, 1])
def test_nothing_is_pushed_if_the_tests_in_the_image_fail(world: World, status: int) -> None:
    world.write("deploy/after_build.sh", (ROOT / "deploy/after_build.sh").read_text(), 0o755)
    world.rules["docker run"] = {"status": status}
    ran = world.deploy(env={"PATH": f"{world.bin}:{os.environ['PATH']}"})
    assert ran.status == status, ran.text
    [local] = world.call("docker build").argv[3:4]
    assert world.commands("docker run") == [f"docker run --rm {local} bundle exec rake test"]
    assert bool(world.commands("docker push")) == (not status)


def test_the_rails_hooks_run(world: World) -> None:
    shutil.copytree(EXAMPLES / "deploy", world.app / "deploy")
    shutil.copy(ROOT / "deploy" / "before_release.sh", world.app / "deploy")
    world.add_git()
    world.rules["docker image inspect --format {{json"] = {"out": '["bundle", "exec", "puma"]\n'}
    world.rules["docker create"] = {"out": "a-container\n"}
    world.rules["convox run"] = {"out": "== AddIndex: migrated\nMIGRATED-RNEWRELEASE\n"}
    ran = world.deploy(env={"PATH": f"{world.bin}:{os.environ['PATH']}"})
    assert ran.status == 0, ran.text
    assert (world.app / "REVISION").read_text() == git(world.app, "rev-parse", "HEAD") + "\n"
    [local] = world.call("docker build").argv[3:4]
    assert world.commands("docker create", "docker start", "docker commit", "docker rm") == [
        f"docker create {local} env SECRET_KEY_BASE_DUMMY=1 bundle exec rake assets:precompile",
        "docker start --attach a-container",
        f'docker commit --change CMD ["bundle", "exec", "puma"] a-container {local}',
        "docker rm --force a-container",
    ]
    migrate = "sh -c 'bundle exec rake db:migrate && echo MIGRATED-RNEWRELEASE'"
    words = ["convox", "run", "--app", "shop", "--release", "RNEWRELEASE", "web", migrate]
    assert world.call("convox run").argv == words
    assert len(world.commands("convox releases promote --app")) == 1


@pytest.mark.parametrize(
    ("rule", "succeeds"),
    [
        ({"out": "== AddIndex: migrating\n"}, False),  # the connection is lost, and nobody says so
        ({"out": "== AddIndex: migrating\n", "status": 1}, False),
        ({"out": "MIGRATED-RNEWRELEASE\n", "status": 1}, False),
        ({"out": "+ echo MIGRATED-RNEWRELEASE\n"}, False),  # the command, and not what it prints
        ({"out": "== AddIndex: migrated\r\nMIGRATED-RNEWRELEASE\r\n"}, True),  # by a terminal
    ],
)
def test_a_migration_counts_only_if_its_end_is_seen(
    world: World, rule: Any, succeeds: bool
) -> None:
    hook = (ROOT / "deploy" / "before_release.sh").read_text()
    world.write("deploy/before_release.sh", hook, 0o755)
    world.rules["convox run"] = rule
    ran = world.deploy(env={"PATH": f"{world.bin}:{os.environ['PATH']}"})
    assert ran.status == (0 if succeeds else 1), ran.text
    assert "== AddIndex" in ran.text or "MIGRATED" in ran.text  # what it prints is shown
    assert bool(world.commands("convox releases promote --app")) == succeeds
    assert world.nothing_is_left()
