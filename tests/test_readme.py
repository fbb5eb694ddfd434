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
from conftest import COMPOSE, REAL_GIT, ROOT, STEPS, TOOL, World

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
    """An app with its own copy of the tool, on a machine with python3, uv and a clone of this project beside the app."""
    repository = world.home / "repository"
    repository.mkdir()
    for directory in (world.app, repository):
        shutil.copy(TOOL, directory)
    [version] = {*re.findall(r"\bv\d+\.\d+\.\d+\b", DOCUMENTS["docs/updating.md"])}
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    clone = ["clone", ".", world.app.parent / "convox-deploy"]
    release = [["init"], ["add", "."], ["commit", "--message", "Release"], ["tag", version]]
    for words in (*release, clone):
        subprocess.run(
            [REAL_GIT, *identity, *words], cwd=repository, check=True, capture_output=True
        )
    (world.bin / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (world.bin / "python3").chmod(0o755)
    world.ready_standins()
    return world


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if commands(DOCUMENTS[name])])
def test_the_commands_in_a_document_run(machine: World, name: str) -> None:
    lines = [line for line in commands(DOCUMENTS[name]) if not line.startswith((*RUN_BY_CI,))]
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
    assert f"\n{blocks(DOCUMENTS['docs/rollback.md'], 'text')[0]}Total: " in ran.out


def test_the_sample_of_the_end_is_what_is_printed(world: World) -> None:
    commit = world.add_git()
    [sample] = [text for text in blocks(REFERENCE, "text") if "Verified" in text]
    printed = as_documented(world.deploy().out, commit)
    # The stand-in's older release has no description.
    sample = sample.replace("ROLDRELEASE (8f2e1a0 Add search)", "ROLDRELEASE")
    assert printed.endswith(f"\n\n{sample}".replace("Total: 43.2 s", "Total: 0.1 s"))


def test_the_sample_of_what_to_do_is_what_is_printed(world: World) -> None:
    world.write("deploy/before_release.sh", "#!/bin/sh\nexit 1\n", 0o755)
    env = {"PATH": f"{world.bin}:{os.environ['PATH']}"}
    [sample] = [text for text in blocks(REFERENCE, "text") if "To resume" in text]
    assert world.deploy(env=env).err.endswith(sample)


def test_the_sample_result_has_the_shape_of_a_result(world: World) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(value[0])] if isinstance(value, list) else type(value)

    world.add_git()
    assert world.deploy("--result", "result.json").status == 0
    result = json.loads((world.app / "result.json").read_text())
    [sample] = blocks(REFERENCE, "json")
    # Steps that take no time worth noting have no entry, and one is enough for the shape.
    documented, written = shape(json.loads(sample)), shape(result)
    assert documented.pop("seconds").keys() >= written.pop("seconds").keys()
    assert documented == written
    explained = REFERENCE.partition("\n## The result file\n")[2].partition("```json")[0]
    words = {word for line in re.findall("^-.*", explained, re.M) for word in in_code(line)}
    assert words - {"--rollback", "null", "failed", "digest", "image"} < result.keys()


def test_the_sample_manifest_can_be_deployed(tmp_path: Path) -> None:
    [text] = blocks(README, "yaml")
    path = tmp_path / "docker-compose.yml"
    path.write_text(text)
    assert convox_deploy.Manifest.load(str(path)).services


def test_the_polling_trigger_is_that_of_the_jenkinsfile() -> None:
    [trigger] = blocks(CI, "groovy")
    [schedule] = re.findall(r"pollSCM\(.*?\)", trigger)
    assert schedule in (ROOT / "examples" / "Jenkinsfile").read_text()


def test_the_iam_policy_allows_to_push_and_says_what_creates_repositories() -> None:
    [policy] = map(json.loads, blocks(CI, "json"))
    login, push = policy["Statement"]
    assert login == {"Effect": "Allow", "Action": "ecr:GetAuthorizationToken", "Resource": "*"}
    assert push["Effect"] == "Allow" and push["Resource"].startswith("arn:aws:ecr:")
    assert {*push["Action"]} == {
        "ecr:BatchCheckLayerAvailability",
        "ecr:InitiateLayerUpload",
        "ecr:UploadLayerPart",
        "ecr:CompleteLayerUpload",
        "ecr:PutImage",
        "ecr:BatchGetImage",
        "ecr:GetDownloadUrlForLayer",
    }
    assert "Add `ecr:CreateRepository`" in CI


def test_the_message_to_slack_keeps_its_address_out_of_command_lines(tmp_path: Path) -> None:
    [script] = [text for text in blocks(CI, "text") if "SLACK_WEBHOOK_URL" in text]
    [sample] = blocks(REFERENCE, "json")
    (tmp_path / "deploy.json").write_text(sample)
    curl = '#!/bin/sh\nprintf "%s\\n" "$*" > argv; cat > config; cp slack.json sent\n'
    jq = f"#!{sys.executable}\nimport json\nprint(json.dumps({{'text': 'shop'}}))\n"
    for name, program in (("curl", curl), ("jq", jq)):
        if name == "curl" or not shutil.which("jq"):
            (tmp_path / name).write_text(program)
            (tmp_path / name).chmod(0o755)
    env = {**os.environ, "SLACK_WEBHOOK_URL": "https://hooks/secret"}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["/bin/sh", "-exc", script], cwd=tmp_path, env=env, check=True)
    assert "secret" not in (tmp_path / "argv").read_text()
    assert (tmp_path / "config").read_text() == "url = https://hooks/secret\n"
    assert "shop" in json.loads((tmp_path / "sent").read_text())["text"]


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
    assert steps == STEPS
    [diagram] = blocks(DOCUMENTS["docs/how-it-works.md"], "mermaid")
    path = re.sub(r"\(\[\w+\]\)", "", diagram).split("release -.")[0]
    assert list(dict.fromkeys(re.findall(r"[a-z_]{4,}", path)))[1:] == STEPS


def test_the_exit_codes_are_those_of_the_tool() -> None:
    codes = [convox_deploy.FAILED, convox_deploy.NOT_STARTED, convox_deploy.TIMED_OUT]
    table = table_under(REFERENCE, "## Exit codes")
    assert [row[0] for row in table] == ["0", *map(str, codes), "128 + n"]


BRANCH_TABLE = [
    name for row in table_under(CI, "## Branch and run URL") for name in in_code(row[0])
]
URL_TABLE = re.findall(r"`(\w+)`", CI.partition("with the URL of the run")[2].partition("\n## ")[0])


def test_all_variables_of_ci_systems_are_documented() -> None:
    assert sorted(BRANCH_TABLE) == sorted(convox_deploy.BRANCHES)
    assert sorted(URL_TABLE) == sorted(["GITHUB_RUN_ID", *convox_deploy.RUN_URLS])


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
    Unable to locate credentials
    ERROR: build failed
    ERROR: timeout
"""  # printed by pip, docker, aws, git and convox


def test_troubleshooting_is_headed_by_what_is_printed() -> None:
    document = DOCUMENTS["docs/troubleshooting.md"]
    headings = re.findall("^## (`.*)$", document, re.MULTILINE)
    assert len(headings) >= 9
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


def test_what_readers_copy_has_no_placeholder_for_the_address_of_the_repository() -> None:
    for path in [TOOL, ROOT / "pyproject.toml"]:
        assert "git.example" not in path.read_text()
    for name, text in DOCUMENTS.items():
        assert "git.example" not in text and "git clone" not in text, name


def test_the_documentation_is_short() -> None:
    texts = [
        text for name, text in DOCUMENTS.items() if name not in ("CONTRIBUTING.md", "CHANGELOG.md")
    ]
    assert sum(len(text.split()) for text in texts) <= 7000


NEW_READERS_LOOK_FOR = [
    "docs/reference.md#choosing-the-app-and-the-rack",
    "docs/reference.md#an-app-in-a-subfolder",
    "docs/moving.md#flags-of-convox-deploy",
    "docs/moving.md#going-back-to-convox-deploy",
    "docs/ci.md#resume-and-roll-back-in-a-job",
    "docs/ci.md#a-message-to-slack",
    "docs/ci.md#iam-policies",
]


@pytest.mark.parametrize("link", NEW_READERS_LOOK_FOR)
def test_what_readers_look_for_is_one_step_from_the_readme(link: str) -> None:
    assert link in links(README)


def test_an_app_in_a_subfolder_may_have_its_context_outside_only_with_an_image(
    world: World,
) -> None:
    (world.app.parent / "Dockerfile").write_text("FROM scratch\n")
    world.write("docker-compose.yml", COMPOSE.replace("    image", "    build: ..\n    image", 1))
    assert world.deploy().status == 0
    assert world.call("docker build --tag").argv[-1] == ".."
    world.write("convox.yml", "services:\n  web:\n    build: ..\n")
    ran = world.deploy(env={"CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 2 and "../Dockerfile is outside the project" in ran.err


def test_the_flags_of_convox_deploy_are_all_there() -> None:
    rows = table_under(DOCUMENTS["docs/moving.md"], "### Flags of `convox deploy`")
    flags = {word.split()[0] for row in rows for word in in_code(row[0])}
    names = "app rack manifest description build-args no-cache development external id force"
    assert flags >= {*(f"--{name}" for name in names.split(" ")), "--wildcard-domain"}
    assert flags >= {"-a", "-r", "-m", "-d"}


def test_each_document_with_parameters_for_jobs_names_those_of_the_examples() -> None:
    for name in ("Jenkinsfile", "github-actions.yml", "gitlab-ci.yml"):
        example = (ROOT / "examples" / name).read_text()
        assert {"DEPLOY_RELEASE", "DEPLOY_ROLLBACK"} <= {*re.findall("DEPLOY_[A-Z]+", example)}
        assert f"examples/{name}" in CI


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
