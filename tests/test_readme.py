"""Check that the documentation is accurate: commands run, samples match real output, tables are complete, links work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import COMPOSE, REAL_GIT, ROOT, TOOL, World

import convox_deploy

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted(
        [
            ROOT / "README.md",
            ROOT / "CONTRIBUTING.md",
            ROOT / "CHANGELOG.md",
            *ROOT.glob("docs/*.md"),
        ]
    )
}
README, CONTRIBUTING = DOCUMENTS["README.md"], DOCUMENTS["CONTRIBUTING.md"]
REFERENCE, CI = DOCUMENTS["docs/reference.md"], DOCUMENTS["docs/ci.md"]
TOPICS = [  # of the first README, which people still look for
    "Getting started",
    "Build lifecycle",
    "Hooks",
    "On-cluster vs. off-cluster",
    "* * * * *",
    "Testing your deploy locally",
    "Customizing",
    "How does this actually work",
    "Rollback",
    "Example apps",
    "gtin-matcher",
    "Development manifest",
]
[REPOSITORY] = re.findall(r"^git clone (\S+)", README, re.MULTILINE)
RUN_BY_CI = {"examples/sandbox/demo.py", "tests/run.py"}


def blocks(document: str, language: str) -> list[str]:
    """Return the code blocks in a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", document, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def without_code_blocks(document: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document, flags=re.MULTILINE | re.DOTALL)


def table_under(document: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    lines = document[document.index(f"\n{heading}\n") :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = lines[start + 1 :]
    end = next(number for number, line in enumerate(rows) if not line.startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[:end]]


def in_code(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


# --- commands -------------------------------------------------------------------------


def commands(document: str) -> list[str]:
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line]


def is_convox_command(line: str) -> bool:
    return line.startswith("convox ")


@pytest.fixture
def machine(world: World) -> World:
    """An app with its own copy of the tool, on a machine with python3, uv and this project's repository to clone."""
    repository = world.home / "repository"
    repository.mkdir()
    for directory in (world.app, repository):
        shutil.copy(TOOL, directory)
    [version] = {*re.findall(r"\bv\d+\.\d+\.\d+\b", DOCUMENTS["docs/updating.md"])}
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init"], ["add", "."], ["commit", "--message", "Release"], ["tag", version]):
        subprocess.run(
            [REAL_GIT, *identity, *words], cwd=repository, check=True, capture_output=True
        )
    world.env.update(
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.{repository}.insteadOf",
        GIT_CONFIG_VALUE_0=REPOSITORY,
        PIP_NO_COMPILE="1",  # as nothing runs what is installed
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    python = f'exec {shlex.quote(sys.executable)} "$@"'
    for name, script in [("python3", python), ("uv", f'[ "$1" = run ] && shift && {python}')]:
        (world.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (world.bin / name).chmod(0o755)
    world.ready_standins()
    return world


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if commands(DOCUMENTS[name])])
def test_the_commands_in_a_document_run(machine: World, name: str) -> None:
    lines = [line for line in commands(DOCUMENTS[name]) if not line.startswith((*RUN_BY_CI,))]
    [clone] = [line for line in commands(README) if line.startswith("git clone ")]
    if clone not in lines:
        lines.insert(0, f"{clone.partition('  #')[0]} 2>/dev/null")
    script = "\n".join(line for line in lines if not is_convox_command(line))
    path = f"{machine.bin}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-exc", script],
        cwd=machine.app,
        env={**machine.env, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_convox_commands_are_accepted_by_a_convox_cli(tmp_path: Path) -> None:
    lines = [line for text in DOCUMENTS.values() for line in commands(text)]
    convox = [line for line in lines if is_convox_command(line)]
    assert convox[0] == "convox apps create your-app"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CONVOX_STANDIN": str(tmp_path),
        "CONVOX_HOST": "rack.sandbox",
        "CONVOX_PASSWORD": "rack/password",
    }
    for line in convox:
        cli = ROOT / "examples" / "sandbox" / "convox"
        subprocess.run([cli, *shlex.split(line)[1:]], cwd=tmp_path, env=env, check=True)


def test_the_demo_and_the_test_suite_are_in_the_readme_and_run_by_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in RUN_BY_CI:
        assert command in commands(README) and command in ci
        assert os.access(ROOT / command, os.X_OK)


def test_the_selections_of_tests_in_contributing_select_something() -> None:
    names = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for line in commands(CONTRIBUTING):
        _, *words = shlex.split(line)
        if words and words[0] == "-k":
            assert re.search(rf"def test_\w*{words[1]}", names), line
        elif words:
            assert (ROOT / words[0]).is_file(), line


# --- samples --------------------------------------------------------------------------


def as_documented(text: str, commit: str = "") -> str:
    text = text.replace(commit, "5c55d44") if commit else text
    text = re.sub(r"(?m)^(\w+): \d+\.\d s$", r"\1: 0.1 s", text)
    text = re.sub(r"/\S*/convox-deploy-\w{8}", "/tmp/convox-deploy-...", text)
    return re.sub(r"shop:deploy-[0-9a-f]{8}", "shop:deploy-...", text)


def test_the_sample_of_a_dry_run_is_what_is_printed(world: World) -> None:
    commit = world.add_git()
    ran = world.deploy("--dry-run")
    assert ran.status == 0
    expected = blocks(REFERENCE, "console")[0]
    assert "$ ./convox_deploy.py --dry-run\n" + as_documented(ran.out, commit) == expected


def test_the_sample_of_a_failure_is_what_is_printed(world: World) -> None:
    world.write("docker-compose.yml", COMPOSE.replace(":TAG", ":${TAG}"))
    world.write("deploy/before_build.sh", "#!/bin/sh\n")
    printed = as_documented(world.deploy().text, "")
    assert f"$ ./convox_deploy.py\n{printed}" == blocks(REFERENCE, "console")[1]


def test_the_sample_of_a_rollback_is_what_is_printed(world: World) -> None:
    ran = world.deploy(env={"CONVOX_PASSWORD": "needs-no-encoding"})
    assert ran.out.endswith(blocks(DOCUMENTS["docs/rollback.md"], "text")[0])


def test_the_sample_of_the_end_is_what_is_printed(world: World) -> None:
    [sample] = [text for text in blocks(REFERENCE, "text") if "Verified" in text]
    assert sample in re.sub(r"Total: \d+\.\d s", "Total: 43.2 s", world.deploy().out)


def test_the_sample_of_what_to_do_is_what_is_printed(world: World) -> None:
    world.write("deploy/before_release.sh", "#!/bin/sh\nexit 1\n", 0o755)
    env = {"PATH": f"{world.bin}:{os.environ['PATH']}"}
    [sample] = [text for text in blocks(REFERENCE, "text") if "To resume" in text]
    assert world.deploy(env=env).err.endswith(sample)


def test_the_sample_result_has_the_shape_of_a_result_and_the_keys_of_the_table(
    world: World,
) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(value[0])] if isinstance(value, list) else type(value)

    world.add_git()
    assert world.deploy("--result", "result.json").status == 0
    result = json.loads((world.app / "result.json").read_text())
    [sample] = blocks(REFERENCE, "json")
    assert shape(json.loads(sample)) == shape(result)
    table = table_under(REFERENCE, "## The result file")
    assert [in_code(row[0])[0] for row in table] == list(result)


@pytest.mark.parametrize("name", ["README.md", "docs/troubleshooting.md"])
def test_the_sample_manifest_can_be_deployed(tmp_path: Path, name: str) -> None:
    [text] = blocks(DOCUMENTS[name], "yaml")
    path = tmp_path / "docker-compose.yml"
    path.write_text(text)
    assert convox_deploy.Manifest.load(str(path)).services


def test_the_polling_trigger_is_that_of_the_jenkinsfile() -> None:
    [trigger] = blocks(CI, "groovy")
    [schedule] = re.findall(r"pollSCM\(.*?\)", trigger)
    assert schedule in (ROOT / "examples" / "Jenkinsfile").read_text()


def test_the_iam_policies_differ_in_the_permission_to_create_repositories() -> None:
    without, with_create = map(json.loads, blocks(CI, "json"))
    allowed = []
    for policy in (without, with_create):
        login, push = policy["Statement"]
        assert login == {
            "Effect": "Allow",
            "Action": "ecr:GetAuthorizationToken",
            "Resource": "*",
        }
        assert push["Effect"] == "Allow" and push["Resource"].startswith("arn:aws:ecr:")
        allowed.append({*push["Action"]})
    assert allowed[1] - allowed[0] == {"ecr:CreateRepository"}
    assert allowed[0] == {
        "ecr:BatchCheckLayerAvailability",
        "ecr:InitiateLayerUpload",
        "ecr:UploadLayerPart",
        "ecr:CompleteLayerUpload",
        "ecr:PutImage",
        "ecr:BatchGetImage",
        "ecr:GetDownloadUrlForLayer",
    }


# --- tables ---------------------------------------------------------------------------


def test_the_settings_table_is_complete() -> None:
    documented = {}
    for variables, option, _ in table_under(REFERENCE, "## Settings"):
        for name in in_code(option):
            documented[name.split()[0]] = in_code(variables)
    actual = {}
    for parameter in convox_deploy.main.params:
        if isinstance(parameter, click.Option) and parameter.name != "version":
            variable = parameter.envvar or []
            for name in parameter.opts:
                actual[name] = [variable] if isinstance(variable, str) else list(variable)
    assert {name: names for name, names in documented.items() if name != "--"} == actual


def test_the_hooks_table_has_the_variables_that_hooks_get(world: World) -> None:
    world.add_hooks()
    world.add_git()
    documented: dict[str, list[str]] = {"before_build": [], "after_build": [], "before_release": []}
    for variables, _, since in table_under(REFERENCE, "## Hooks"):
        for hook in list(documented)[list(documented).index(since) :]:
            documented[hook] += [name.replace("<SERVICE>", "WEB") for name in in_code(variables)]
    assert world.deploy().status == 0
    own = {"RACK_URL", *world.env, *os.environ, "_", "SHLVL", "OLDPWD"} - {"APP_NAME"}
    for hook, names in documented.items():
        assert world.call(hook).env.keys() - own == set(names), hook


def test_the_steps_are_those_of_the_lifecycle() -> None:
    steps = [row[0] for row in table_under(README, "## What happens during a deploy")]
    assert steps == list(convox_deploy.STEPS)
    [diagram] = blocks(DOCUMENTS["docs/how-it-works.md"], "mermaid")
    for number, step in enumerate(convox_deploy.STEPS, 1):
        assert f"{number} {step}" in diagram


def test_the_exit_codes_are_those_of_the_tool() -> None:
    codes = [convox_deploy.FAILED, convox_deploy.NOT_STARTED, convox_deploy.TIMED_OUT]
    table = table_under(REFERENCE, "## Exit codes")
    assert [row[0] for row in table] == ["0", *map(str, codes), "128 + n"]


BRANCH_TABLE, URL_TABLE = (
    re.findall(r"^\| `(\w+)`", text.split("\n## ")[0], re.MULTILINE)
    for text in CI.split("\n## Branch and run URL\n")[1].split("\nThe URL")
)


@pytest.mark.parametrize("variable", BRANCH_TABLE)
def test_the_branch_is_read_from_the_variables_in_the_table(world: World, variable: str) -> None:
    world.add_hooks("before_build")
    world.add_git()
    subprocess.run([REAL_GIT, "checkout", "--quiet", "--detach"], cwd=world.app, check=True)
    assert world.deploy("--no-promote", env={variable: "feature/x"}).status == 0
    assert world.call("before_build").env["GIT_BRANCH"] == "feature/x"


@pytest.mark.parametrize("variable", URL_TABLE)
def test_the_run_url_is_read_from_the_variables_in_the_table(world: World, variable: str) -> None:
    world.add_git()
    env = {variable: "https://ci.example.com/7"}
    url = env[variable]
    if variable == "GITHUB_RUN_ID":
        repository = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "org/shop"}
        env, url = {variable: "7", **repository}, "https://github.com/org/shop/actions/runs/7"
    assert world.deploy("--no-promote", env=env).status == 0
    assert url in world.call("convox build --app").line


# --- troubleshooting ------------------------------------------------------------------


FROM_OTHERS = """
    externally-managed-environment
    Cannot connect to the Docker daemon
    Unable to locate credentials
    No such image
    detected dubious ownership
    ERROR: build failed
    ERROR: timeout
"""  # printed by pip, docker, aws, git and convox


def test_troubleshooting_is_headed_by_what_is_printed() -> None:
    document = DOCUMENTS["docs/troubleshooting.md"]
    headings = re.findall("^## (`.*)$", document, re.MULTILINE)
    assert re.findall(r"^\d+\. \[(.*)\]\(", document, re.MULTILINE) == headings
    assert len(headings) == 12
    printed = TOOL.read_text() + FROM_OTHERS
    printed += (ROOT / "examples" / "sandbox" / "convox").read_text()
    _, anything_else = document.split("\n## Anything else\n")
    ours, _ = anything_else.split("\nTexts of docker and aws")
    words = [*headings, *re.findall("^- ((?:`[^`]*`(?: or |, )?)+)", ours, re.MULTILINE)]
    for word in [word for heading in words for word in in_code(heading)]:
        assert re.sub(r"after \d+ minutes", "after {shell.minutes:g} minutes", word) in printed, (
            word
        )


# --- the README and links -------------------------------------------------------------


def test_the_readme_is_short() -> None:
    prose = re.sub(r"\|(-+\|)*", " ", without_code_blocks(README))
    assert len(prose.split()) <= 900


@pytest.mark.parametrize("topic", TOPICS)
def test_the_readme_has_the_topics_of_the_first_one(topic: str) -> None:
    assert topic.lower() in README.lower()


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    assert f'"{REPOSITORY}"' in (ROOT / "pyproject.toml").read_text()
    assert REPOSITORY in TOOL.read_text()


@pytest.mark.parametrize(
    "text",
    [*DOCUMENTS.values(), (ROOT / "examples" / "github-actions.yml").read_text()],
    ids=[*DOCUMENTS, "examples/github-actions.yml"],
)
def test_actions_are_pinned_to_commits(text: str) -> None:
    for line in re.findall(r"^.*\buses:.*$", text, re.MULTILINE):
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_the_readme_links_to_all_documents() -> None:
    assert {*DOCUMENTS, "LICENSE"} - {*links(README)} == {"README.md"}


def test_the_pictures_have_descriptions() -> None:
    images = re.findall("<img [^>]*>", README)
    assert [re.findall(r'src="docs/(\w+)\.svg"', image) for image in images] == [
        ["deploy"],
        ["failure"],
    ]
    assert all(re.search(r'alt="[^"]{50,}"', image) for image in images)


def links(document: str) -> list[str]:
    text = without_code_blocks(document)
    found = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [link for link in found if "://" not in link]


def anchors(document: str) -> list[str]:
    """Return the anchors of the headings, as GitHub derives them."""
    headings = re.findall("^#+ (.*)$", without_code_blocks(document), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_links_in_a_document_work(name: str) -> None:
    for link in links(DOCUMENTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            document = DOCUMENTS[str(target.resolve().relative_to(ROOT))]
            assert anchors(document).count(anchor) == 1, link


def test_the_changelog_and_the_license_are_those_of_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+) ", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == re.sub(r"\.dev\d+$", "", convox_deploy.__version__)
    assert "The convox-deploy authors" in (ROOT / "LICENSE").read_text()
    assert 'license = "MIT"' in (ROOT / "pyproject.toml").read_text()


def test_the_test_files_in_contributing_exist() -> None:
    for name in re.findall(r"`(test_\w+\.py)`", CONTRIBUTING):
        assert (ROOT / "tests" / name).is_file(), name
