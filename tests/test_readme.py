"""Holds the README to the truth: its commands run, its outputs are what is printed, its tables are complete."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import click
import pytest
import yaml
from conftest import COMPOSE, ROOT, TOOL, World

import convox_deploy

README = (ROOT / "README.md").read_text()
STANDIN = ROOT / "examples" / "sandbox" / "convox"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)


def table_under(heading: str) -> list[list[str]]:
    """Returns the cells of the first table under a heading, without its head."""
    lines = README[README.index(f"\n{heading}\n") :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = lines[start + 1 :]
    end = next(number for number, line in enumerate(rows) if not line.startswith("|"))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[:end]]


def in_code(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


@pytest.fixture
def typed(world: World) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs what a user would type in the app's directory, where the tool has been copied to."""
    shutil.copy(TOOL, world.app)
    (world.bin / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (world.bin / "python3").chmod(0o755)
    world.ready_standins()

    def run(line: str, **env: str) -> subprocess.CompletedProcess[str]:
        shell = ["/bin/sh", "-xec", line]
        env = {**world.env, "PATH": f"{world.bin}:{os.environ['PATH']}", **env}
        return subprocess.run(
            shell, cwd=world.app, env=env, capture_output=True, text=True, check=False
        )

    return run


SHELL_LINES = [line.strip() for block in blocks("sh") for line in block.splitlines()]
RUN_HERE = {"examples/sandbox/demo.py", "tests/run.py"}  # by .ci/run, which runs this too


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line not in RUN_HERE])
def test_a_command_runs(
    world: World, typed: Callable[..., subprocess.CompletedProcess[str]], line: str
) -> None:
    if line.startswith("convox "):
        env = {
            **world.env,
            "PATH": os.environ["PATH"],
            "CONVOX_HOST": "rack.sandbox",
            "CONVOX_PASSWORD": "rack/password",
        }
        subprocess.run([STANDIN, "apps", "create", "your-app"], env=env, check=True)
        subprocess.run([STANDIN, *shlex.split(line)[1:]], env=env, check=True)
    else:
        done = typed(line)
        assert done.returncode == 0, done.stderr


def test_the_commands_that_ci_runs_are_there() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in RUN_HERE:
        assert command in SHELL_LINES and command in ci
        assert os.access(ROOT / command, os.X_OK)


def as_in_the_readme(text: str, commit: str) -> str:
    text = re.sub(
        r"/\S*/convox-deploy-\w{8}", "/tmp/convox-deploy-...", text.replace(commit, "5c55d44")
    )
    return re.sub(r"shop:deploy-[0-9a-f]{8}", "shop:deploy-...", text)


def test_the_plan_is_what_a_dry_run_prints(world: World) -> None:
    commit = world.add_git()
    plan = blocks("console")[0]
    ran = world.deploy("--dry-run")
    assert ran.status == 0
    assert "$ ./convox_deploy.py --dry-run\n" + as_in_the_readme(ran.out, commit) == plan


def test_the_failure_is_what_a_failure_prints(world: World) -> None:
    world.write(
        "docker-compose.yml", COMPOSE.replace(".dkr.ecr.us-east-1.amazonaws.com", ".example.com")
    )
    world.write("deploy/before_build.sh", "#!/bin/sh\n")
    world.rules["convox api get"] = {"status": 1, "err": "ERROR: no such app: shop\n"}
    assert "$ ./convox_deploy.py\n" + world.deploy().text == blocks("console")[1]


def test_the_result_file_has_the_keys_of_the_sample_and_of_the_table(world: World) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(value[0])] if isinstance(value, list) else type(value)

    world.add_git()
    assert world.deploy("--result", "result.json").status == 0
    result = json.loads((world.app / "result.json").read_text())
    [sample] = blocks("json")
    assert shape(json.loads(sample)) == shape(result)
    assert [in_code(row[0])[0] for row in table_under("### The result file")] == list(result)


def test_the_settings_are_those_of_the_command() -> None:
    documented = {}
    for variable, option, _ in table_under("## Settings"):
        for name in in_code(option):
            documented[name.split()[0]] = in_code(variable)
    actual = {}
    for parameter in convox_deploy.main.params:
        if isinstance(parameter, click.Option) and parameter.name != "version":
            variables = parameter.envvar or []
            actual[parameter.opts[0]] = (
                [variables] if isinstance(variables, str) else list(variables)
            )
    assert {name: variables for name, variables in documented.items() if name != "--"} == actual


def test_the_hooks_get_the_variables_of_the_table(world: World) -> None:
    world.add_hooks()
    world.add_git()
    documented: dict[str, list[str]] = {"before_build": [], "after_build": [], "before_release": []}
    for variables, _, since in table_under("### Hooks"):
        for hook in list(documented)[list(documented).index(since) :]:
            documented[hook] += [name.replace("<SERVICE>", "WEB") for name in in_code(variables)]
    assert world.deploy().status == 0
    own = {"RACK_URL", *world.env, *os.environ, "_", "SHLVL", "OLDPWD"} - {"APP_NAME"}
    for hook, names in documented.items():
        assert world.call(hook).env.keys() - own == set(names), hook


def test_the_steps_are_those_of_the_lifecycle() -> None:
    assert [row[1] for row in table_under("## What a deploy does")] == list(convox_deploy.STEPS)
    [diagram] = blocks("mermaid")
    for number, step in enumerate(convox_deploy.STEPS, 1):
        assert f"{number} {step}" in diagram


def test_the_manifest_of_the_readme_and_those_of_the_examples_can_be_deployed(
    tmp_path: Path,
) -> None:
    for number, text in enumerate(blocks("yaml")):
        (tmp_path / f"{number}.yml").write_text(text)
    found = [
        *tmp_path.glob("*.yml"),
        *ROOT.glob("examples/*.yml"),
        *ROOT.glob("examples/moving/*.yml"),
    ]
    assert len(found) == 6
    for path in found:
        assert yaml.safe_load(path.read_text())
        assert convox_deploy.Manifest.load(str(path)).services


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if "://" not in link:
            assert (ROOT / link).exists(), link


@pytest.mark.parametrize("release", ["", "RABCDEFGHIJ"])
@pytest.mark.parametrize("promote", ["true", "false"])
def test_the_shell_step_of_the_jenkinsfile_runs(
    world: World, typed: Callable[..., subprocess.CompletedProcess[str]], promote: str, release: str
) -> None:
    deploy, describe = re.findall(
        "'''\n(.*?)'''", (ROOT / "examples" / "Jenkinsfile").read_text(), re.DOTALL
    )
    env = {"RELEASE": release, "PROMOTE": promote, "DEPLOY_RESULT": "deploy.json"}
    nothing_to_do = bool(release) and promote == "false"
    done = typed(deploy, **env)
    assert done.returncode == (2 if nothing_to_do else 0), done.stderr
    described = f"{release or 'RNEWRELEASE'} {'failed' if nothing_to_do else 'succeeded'}"
    assert typed(describe, **env).stdout == f"{described}\n"
    assert bool(world.commands("convox releases promote --app")) == (promote == "true")
