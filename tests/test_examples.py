"""Check that the examples work: shell steps run against the stand-ins, result readers read real result files."""

from __future__ import annotations

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
from conftest import REAL_GIT, ROOT, STANDIN, TOOL, World

import convox_deploy

EXAMPLES = ROOT / "examples"
WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
[JOB] = WORKFLOW["jobs"].values()
JENKINSFILES = ["Jenkinsfile", "Jenkinsfile.approval"]
MANIFESTS = [
    *(EXAMPLES / name for name in ("convox.yml", "docker-compose.yml")),
    *sorted((EXAMPLES / "moving").iterdir()),
]
TEMPLATES = sorted((ROOT / "deploy").iterdir())
HOOKS = [*TEMPLATES, *sorted((EXAMPLES / "deploy").iterdir())]
SECRETS = {"CONVOX_HOST": "rack.example.com", "CONVOX_PASSWORD": "the/rack's secret"}
STALE = '{"tool": "convox-deploy", "app": "stale", "release": "RSTALE", "status": "succeeded"}'
LIBJQ = """
import jq
import sys
option, program, file = sys.argv[1:]
assert option == "--raw-output"
for line in jq.compile(program).input_text(open(file).read()):
    print(line)
"""


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
    find_output = '#!/bin/sh\nwhile [ "$1" != --output ]; do shift; done\n'
    download = f'cat {shlex.quote(str(STANDIN))} >"$2"\n'  # not executable yet
    add_program(world, "curl", find_output + download)
    return world


@pytest.fixture(params=["libjq", *filter(None, [shutil.which("jq")])])
def jq(machine: World, request: pytest.FixtureRequest) -> None:
    """Give the machine a jq: one made from the library in tests/requirements.txt, and the installed one, if any."""
    if request.param == "libjq":
        add_program(machine, "jq", f"#!{sys.executable}\n{LIBJQ}")
    else:
        (machine.bin / "jq").symlink_to(request.param)


def run_script(
    world: World, shell: list[str], script: str, **env: str
) -> subprocess.CompletedProcess[str]:
    world.ready_standins()
    env = {**world.env, "PATH": f"{world.bin}:{os.environ['PATH']}", **env}
    where: dict[str, Any] = {"cwd": env.get("WORKSPACE", world.app), "env": env}
    return subprocess.run([*shell, script], **where, capture_output=True, text=True, check=False)


# --- GitHub Actions -------------------------------------------------------------------


class Run:
    """A run of the workflow without its `uses` steps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.summary_file, self.path_file = world.home / "summary", world.home / "path"
        self.summary_file.write_text("")
        self.path_file.write_text("")
        self.failed: list[str] = []

    def env_of(self, step: dict[str, Any]) -> dict[str, str]:
        """Return the environment variables that GitHub sets for a step."""
        env = {**JOB["env"], **step.get("env", {})}
        env = {
            name: re.sub(r"\$\{\{ secrets\.(\w+) \}\}", lambda match: SECRETS[match[1]], value)
            for name, value in env.items()
        }
        assert not any("${{" in value for value in env.values())
        added = self.path_file.read_text().split("\n")[::-1]
        return {
            "PATH": ":".join(filter(None, [*added, str(self.world.bin), os.environ["PATH"]])),
            "RUNNER_TEMP": str(self.world.home / "runner"),
            "GITHUB_PATH": str(self.path_file),
            "GITHUB_STEP_SUMMARY": str(self.summary_file),
            "GITHUB_RUN_ID": "7",
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_REPOSITORY": "your-org/your-app",
            **env,
        }

    def script_of(self, step: dict[str, Any]) -> str:
        """Return the script that GitHub writes for a step and runs with `bash -e`."""
        path = self.world.home / "step.sh"
        path.write_text(step["run"])
        return str(path)

    def run(self) -> str:
        """Run all steps. Return the job summary, with the times replaced."""
        del self.world.env["CONVOX_HOST"], self.world.env["CONVOX_PASSWORD"]
        for step in JOB["steps"]:
            if "run" in step and (not self.failed or step.get("if") == "always()"):
                script = self.script_of(step)
                done = run_script(self.world, ["bash", "-e"], script, **self.env_of(step))
                if done.returncode:
                    self.failed.append(step["name"])
        return re.sub(r"\d+(\.\d+)? s \|", "1.5 s |", self.summary_file.read_text())


def test_the_workflow_has_the_expected_shape() -> None:
    assert WORKFLOW[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}  # on:
    assert WORKFLOW["concurrency"] == {"group": "production", "cancel-in-progress": False}
    assert JOB["permissions"] == {"contents": "read", "id-token": "write"}
    assert JOB["environment"] == "production"
    assert JOB["timeout-minutes"] == 120
    used = {step["uses"]: step["with"] for step in JOB["steps"] if "uses" in step}
    assert [*used] == [
        "actions/checkout@v6",
        "aws-actions/configure-aws-credentials@v6",
        "astral-sh/setup-uv@v7",
    ]
    checkout, aws, _ = used.values()
    assert checkout == {"fetch-depth": 0, "persist-credentials": False}
    assert aws.keys() == {"role-to-assume", "aws-region"}
    assert [step["name"] for step in JOB["steps"] if step.get("if") == "always()"] == [
        JOB["steps"][-1]["name"]
    ]


def test_the_workflow_removes_the_previous_result_before_anything_can_fail() -> None:
    assert JOB["steps"][0]["run"] == "rm -f deploy.json"


def test_only_the_deploy_step_gets_secrets_and_none_is_in_a_command() -> None:
    for step in JOB["steps"]:
        assert "${{" not in step.get("run", "")
        assert ("secrets." in json.dumps(step)) == (step.get("name") == "Deploy")
    assert "${{" not in json.dumps([JOB["env"], WORKFLOW.get("env")])


def test_the_settings_of_the_examples_exist() -> None:
    known = {"APP_NAME", "CONVOX_HOST", "CONVOX_PASSWORD"}
    for parameter in convox_deploy.main.params:
        if isinstance(parameter, click.Option) and parameter.envvar:
            known |= {
                *([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar)
            }
    used = {name for step in [JOB, *JOB["steps"]] for name in step.get("env", {})}
    for name in JENKINSFILES:
        used |= environment_of(name).keys()
    assert used <= known


@pytest.mark.usefixtures("jq")
def test_the_workflow_deploys_and_adds_the_result_to_the_summary(machine: World) -> None:
    (machine.bin / "convox").unlink()  # the workflow installs it
    tag = f"{machine.add_git()}-3cbf733dcc19"
    manifest = json.dumps({"services": {"web": {"image": "registry.example.com/shop:old"}}})
    machine.rules["convox api get /apps/your-app/releases/"] = {
        "out": json.dumps({"manifest": manifest})
    }
    machine.rules["docker build --help"] = {"out": "--secret"}  # BuildKit
    run = Run(machine)
    assert run.run() == "\n".join(
        [
            "### Deploy of your-app succeeded",
            "",
            "| | |",
            "|---|---|",
            "| release | RNEWRELEASE |",
            "| running before | ROLDRELEASE |",
            "| running now | RNEWRELEASE |",
            f"| image | 123456789012.dkr.ecr.us-east-1.amazonaws.com/shop:{tag} |",
            "| preflight | 1.5 s |",
            "| build | 1.5 s |",
            "| push | 1.5 s |",
            "| release | 1.5 s |",
            "| promote | 1.5 s |",
            "",
        ]
    )
    assert run.failed == []
    assert machine.running == "RNEWRELEASE"
    assert "--cache-from registry.example.com/shop:old" in machine.call("docker build --tag").line
    description = machine.call("convox build --app").argv
    assert any(
        "https://github.com/your-org/your-app/actions/runs/7" in word for word in description
    )
    assert "secret" not in str([call.argv for call in machine.calls])


@pytest.mark.usefixtures("jq")
def test_the_summary_says_what_failed(machine: World) -> None:
    machine.rules["docker push"] = {"status": 1, "err": "denied: <no> | access\n"}
    run = Run(machine)
    summary = run.run()
    assert run.failed == ["Deploy"]
    assert summary.startswith(
        "### Deploy of your-app failed\n\n| | |\n|---|---|\n| release | - |\n"
    )
    assert (
        "| running before | ROLDRELEASE |\n| running now | - |\n| preflight | 1.5 s |\n" in summary
    )
    failure = "\nFailed in step push:\n\n    `docker push` exited with code 1.\n      denied: <no> | access\n"
    assert failure in summary


@pytest.mark.usefixtures("jq")
def test_the_summary_tells_a_failed_promote_from_a_failed_build(machine: World) -> None:
    machine.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    run = Run(machine)
    summary = run.run()
    assert run.failed == ["Deploy"]
    assert (
        "| release | RNEWRELEASE |\n| running before | ROLDRELEASE |\n| running now | ROLDRELEASE |\n"
        in summary
    )
    assert "\nFailed in step promote:\n" in summary


@pytest.mark.usefixtures("jq")
def test_the_summary_says_that_there_is_no_result(machine: World) -> None:
    machine.write("deploy.json", STALE)
    add_program(machine, "curl", "#!/bin/sh\nexit 22\n")
    run = Run(machine)
    assert run.run() == "There is no result: convox_deploy.py did not start, or it was killed.\n"
    assert run.failed == ["Install the convox CLI"]
    assert machine.calls == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_canceling_the_run_stops_the_deploy(machine: World, signum: int) -> None:
    """Signal only the step's own process, as GitHub does. It must be the deploy, not a shell around it."""
    machine.rules["docker build --tag"] = {"hang": True}
    [step] = [step for step in JOB["steps"] if step.get("name") == "Deploy"]
    run = Run(machine)
    env: dict[str, str | None] = {**run.env_of(step)}
    script = ["-e", run.script_of(step)]
    ran = machine.deploy_and_signal(signum, program=script, python="bash", env=env)
    assert ran.status == 128 + signum
    result = json.loads((machine.app / "deploy.json").read_text())
    assert (result["failed_step"], result["exit_status"]) == ("build", 128 + signum)


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
    for literal in re.findall('"[^"\n]*\\$[^"\n]*"', re.sub("(?s)'''.*?'''", "", text)):
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


@pytest.mark.parametrize("release", ["", "RABCDEFGHIJ"])
@pytest.mark.parametrize("promote", ["true", "false"])
def test_the_jenkinsfile_deploys_and_describes_the_build(
    machine: World, promote: str, release: str
) -> None:
    machine.write("deploy.json", STALE)
    remove, deploy, describe = shell_steps("Jenkinsfile")
    env = {"RELEASE": release, "PROMOTE": promote}
    assert jenkins(machine, "Jenkinsfile", remove).returncode == 0
    assert not (machine.app / "deploy.json").exists()
    contradictory = bool(release) and promote == "false"
    done = jenkins(machine, "Jenkinsfile", deploy, **env)
    assert done.returncode == (2 if contradictory else 0), done.stderr
    description = f"{release or 'RNEWRELEASE'} {'failed' if contradictory else 'succeeded'}"
    assert jenkins(machine, "Jenkinsfile", describe, **env).stdout == f"{description}\n"
    assert bool(machine.commands("convox releases promote --app")) == (promote == "true")
    assert "secret" not in done.stdout + done.stderr


def test_the_jenkinsfile_describes_a_failure(machine: World) -> None:
    machine.rules["docker push"] = {"status": 1, "err": "denied\n"}
    _, deploy, describe = shell_steps("Jenkinsfile")
    assert jenkins(machine, "Jenkinsfile", deploy, PROMOTE="true").returncode == 1
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
        "RELEASE": jenkins(machine, name, read_release).stdout.strip(),
        "WORKSPACE": str(second_agent),
    }
    assert env["RELEASE"] == "RNEWRELEASE" and machine.running == "ROLDRELEASE"
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


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_hook_template_does_nothing(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([path], cwd=tmp_path, env={}, capture_output=True, check=True)
    assert done.stdout + done.stderr == b"" and not [*tmp_path.iterdir()]


def test_the_hook_templates_name_each_variable(world: World) -> None:
    world.add_hooks()
    world.add_git()
    assert world.deploy(env={"CONVOX_RACK": "staging", "CONVOX_HOST": None}).status == 0
    documented: set[str] = set()
    for hook in convox_deploy.HOOKS:
        text = (ROOT / "deploy" / f"{hook}.sh").read_text()
        documented |= {
            name.replace("<SERVICE>", "WEB") for name in re.findall("^#   ([A-Z_<>]+) ", text, re.M)
        }
        actual = {
            name
            for name in world.call(hook).env
            if re.match("APP_NAME|RACK_NAME|GIT_|DOCKER_|RELEASE_ID", name)
        }
        assert actual == documented, hook


def test_the_rails_hooks_run(world: World) -> None:
    shutil.copytree(EXAMPLES / "deploy", world.app / "deploy")
    world.add_git()
    world.rules["docker image inspect --format {{json"] = {"out": '["bundle", "exec", "puma"]\n'}
    world.rules["docker create"] = {"out": "a-container\n"}
    ran = world.deploy(env={"PATH": f"{world.bin}:{os.environ['PATH']}"})
    assert ran.status == 0, ran.text
    assert (world.app / "REVISION").read_text() == git(world.app, "rev-parse", "HEAD") + "\n"
    [local] = world.call("docker build").argv[3:4]
    assert world.commands("docker create", "docker start", "docker commit", "docker rm") == [
        f"docker create {local} bundle exec rake assets:precompile",
        "docker start --attach a-container",
        f'docker commit --change CMD ["bundle", "exec", "puma"] a-container {local}',
        "docker rm --force a-container",
    ]
    migrate = "convox run --app shop --release RNEWRELEASE web bundle exec rake db:migrate"
    lines = world.commands("convox run", "convox releases promote --app")
    assert lines[0] == migrate and len(lines) == 2
