"""Secrets are in no argument list, output, result file, dry run or temporary file, also where commands tell all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import World

PASSWORD, TOKEN = "marked/pass word%&", "marked-token-of-ecr"
SECRETS = {
    "CONVOX_PASSWORD": PASSWORD,
    "AWS_SECRET_ACCESS_KEY": "marked-aws-key/+",
    "AWS_SESSION_TOKEN": "marked-aws-session",
    "STANDIN_ECR_TOKEN": TOKEN,
}
FORMS = [*SECRETS.values(), "marked%2Fpass%20word%25%26", "marked%2Fpass"]


def found_in(text: str) -> list[str]:
    return [secret for secret in FORMS if secret in text]


@pytest.mark.parametrize("args", [[], ["--dry-run"], ["--no-promote"]])
@pytest.mark.parametrize("cli", ["2016", "v3"])
def test_a_deploy_keeps_its_secrets(world: World, args: list[str], cli: str) -> None:
    world.add_git()
    world.add_hooks()
    ran = world.deploy(*args, "--result", "result.json", env={**SECRETS, "CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    written = world.app / "result.json"
    assert found_in(ran.text + (written.read_text() if written.exists() else "")) == []
    assert [call.line for call in world.calls if found_in(call.line)] == []
    for call in world.calls:
        if call.line.startswith("convox build --app"):
            assert found_in("".join(call.upload.values())) == []


def test_only_the_programs_that_deal_with_the_rack_get_its_password(world: World) -> None:
    world.add_hooks()
    assert world.deploy(env=dict(SECRETS)).status == 0
    with_it = {call.argv[0] for call in world.calls if found_in(call.env.get("CONVOX_PASSWORD", ""))}
    with_url = {call.argv[0] for call in world.calls if found_in(call.env.get("RACK_URL", ""))}
    assert with_it == with_url == {"convox", "before_build", "after_build", "before_release"}


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize(
    "command",
    [
        "git describe",
        "docker version",
        "aws ecr get-login-password",
        "docker login",
        "convox build --help",
        "convox api get",
        "aws ecr describe-repositories",
        "convox build --app",
        "convox releases promote --app",
    ],
)
def test_a_command_that_prints_its_environment_gives_nothing_away(world: World, command: str, status: int) -> None:
    world.add_git()
    world.rules[command] = {"environment": True, "status": status}
    ran = world.deploy("--result", "result.json", env=dict(SECRETS))
    assert found_in(ran.text + (world.app / "result.json").read_text()) == []


def test_docker_cannot_print_what_it_does_not_get(world: World) -> None:
    """Its output goes straight to ours, and AWS's variables are for its credential helper."""
    world.rules["docker build"] = {"environment": True, "status": 1}
    ran = world.deploy(env={"CONVOX_PASSWORD": PASSWORD, "STANDIN_ECR_TOKEN": None})
    assert "APP_NAME=shop" in ran.out
    assert found_in(ran.text) == []


@pytest.mark.parametrize("pause", [0, 0.3])
def test_a_secret_that_comes_in_pieces_is_kept_too(world: World, pause: float) -> None:
    script = (
        f"import os,sys,time; p=os.environ['CONVOX_PASSWORD']; print('x' * 70000 + p); "
        f"sys.stdout.write('half '); sys.stdout.flush(); time.sleep({pause}); print(p); print('ROURSXXXXXX', end='')"
    )
    fake = world.home / "convox"
    fake.write_text(
        f"#!{sys.executable}\nimport os,sys\n"
        f"if sys.argv[1:3] == ['build', '--app']:\n    exec({script!r})\nelse:\n"
        f"    os.execv({str(world.bin / 'convox')!r}, ['convox', *sys.argv[1:]])\n"
    )
    fake.chmod(0o755)
    ran = world.deploy(
        env={**SECRETS, "PATH": f"{world.home}:{world.bin}", "CONVOX_STANDIN_CLI": "2016"},
    )
    assert ran.status == 0, ran.text
    assert ran.out.count("***") == 2 and found_in(ran.text) == []


def test_no_process_shows_a_secret_while_it_runs(world: World) -> None:
    """Reads the argument list of every process there is, ours and the sandbox's, while docker pushes."""
    world.rules["docker push"] = {"hang": True}
    process = world.start(env=dict(SECRETS))
    world.await_hanging()
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    temporary = "".join(path.read_text(errors="replace") for path in world.tmp.rglob("*") if path.is_file())
    process.terminate()
    process.communicate(timeout=30)
    assert any("convox_deploy.py" in line for line in lines)
    assert found_in("\n".join(lines) + temporary) == []
