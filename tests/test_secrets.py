"""Secrets never appear in arguments, output, the result file or temporary files, even if a command prints them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, World

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


@pytest.mark.parametrize(
    ("cli", "args"), [("v2", []), ("v3", []), ("v2", ["--dry-run"]), ("v3", ["--no-promote"])]
)
def test_a_deploy_reveals_no_secrets(world: World, args: list[str], cli: str) -> None:
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


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("git describe", 1),
        ("docker version", 1),
        ("aws ecr get-login-password", 1),
        ("docker login", 1),
        ("docker push", 0),
        ("docker push", 1),
        ("convox build --help", 0),
        ("convox build --help", 1),
        ("convox api get", 0),
        ("convox api get", 1),
        ("aws ecr create-repository", 1),
        ("convox build --app", 0),
        ("convox build --app", 1),
        ("convox releases promote --app", 0),
        ("convox releases promote --app", 1),
    ],
)
def test_a_command_that_prints_its_environment_reveals_no_secrets(
    world: World, command: str, status: int
) -> None:
    world.add_git()
    world.constants = {"PUSH_PAUSE": 0}
    world.rules[command] = {"environment": True, "status": status}
    ran = world.deploy("--result", "result.json", env=dict(SECRETS))
    assert found_in(ran.text + (world.app / "result.json").read_text()) == []


# --- both spellings of a secret -------------------------------------------------------


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda secret: secret,
    "percent-encoded": lambda secret: urllib.parse.quote(secret, safe=""),
}
HARD = [
    "p@ss/word%:&",
    "a b+c=d$e,f;g",
    'quo"te\\d',
    "ünïcode☕",
    "prefix",
    "prefix-and-more",
    "trailing newline\n",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_is_redacted_as_it_is_and_percent_encoded(world: World, spelling: str) -> None:
    env: dict[str, str | None] = {f"SECRET_{number}": secret for number, secret in enumerate(HARD)}
    written = [SPELLINGS[spelling](secret.strip()) for secret in HARD]
    world.rules["convox build --app"] = {
        "status": 1,
        "err": "".join(f"<{text}>\n" for text in written),
    }
    ran = world.deploy("--result", "result.json", env=env)
    assert ran.status == 1
    text = ran.text + (world.app / "result.json").read_text()
    assert [secret for secret in written if f"<{secret}" in text] == []
    assert text.count("<***>") >= len(HARD)


URLS = {  # what is a secret in each
    "https://convox:p@ss@word@rack.example.com": ["p@ss@word", "p%40ss%40word"],
    "https://convox:pass%2fword@rack.example.com": ["pass%2fword", "pass/word", "pass%2Fword"],
    "https://convox:p%61ssword@rack.example.com": ["p%61ssword", "password"],
    "https://convox:marked1/marked2@rack.example.com": ["marked1/marked2", "marked1", "marked2"],
    "https://convox:marked1:marked2@rack.example.com": ["marked1:marked2", "marked1", "marked2"],
    "https://convox:marked1?marked2@rack.example.com": ["marked1?marked2", "marked1", "marked2"],
    "https://convox:marked1#marked2@rack.example.com": ["marked1#marked2", "marked1", "marked2"],
    "https://marked-user:marked-word@rack.example.com": ["marked-user", "marked-word"],
    "https://marked-alone@rack.example.com": ["marked-alone"],
}


@pytest.mark.parametrize("url", URLS)
def test_the_login_in_a_rack_url_is_redacted(world: World, url: str) -> None:
    lines = [url, *(f"<{secret}>" for secret in URLS[url])]
    world.rules["convox build --app"] = {"status": 1, "err": "\n".join(lines) + "\n"}
    env = {"RACK_URL": url, "CONVOX_HOST": None, "CONVOX_PASSWORD": None}
    ran = world.deploy("--result", "result.json", env=env)
    assert ran.status == 1
    written = (world.app / "result.json").read_text()
    assert "https://***@rack.example.com\n" in ran.out and "https://***@" in written
    for secret in URLS[url]:
        assert secret not in (ran.text + written).replace("get-login-password", "").replace(
            "password-stdin", ""
        )
    shown = re.findall(r"^<\*{3}(?:[:/?#]\*{3})?>$", ran.out, re.MULTILINE)
    assert len(shown) == len(URLS[url])


def test_the_usual_user_and_the_host_in_a_rack_url_are_not_redacted(world: World) -> None:
    world.rules["convox build --app"] = {"usual": True, "err": "a convox rack\n"}
    env = {"RACK_URL": "https://convox:marked-word@rack.example.com/marked-path"}
    ran = world.deploy(env={**env, "CONVOX_HOST": None, "CONVOX_PASSWORD": None})
    assert ran.status == 0 and "***" not in ran.text
    assert "\na convox rack\n" in ran.out and "rack.example.com (RACK_URL)\n" in ran.out


def test_a_multiline_secret_is_redacted_line_by_line(world: World) -> None:
    key = "-----BEGIN KEY-----\nmarkedline1\nmarkedline2\n-----END KEY-----\n"
    world.rules["convox build --app"] = {"status": 1, "err": f"the key is\n{key}"}
    ran = world.deploy(env={"DEPLOY_TOKEN": key})
    assert ran.status == 1 and "markedline" not in ran.text


def test_short_secrets_are_not_redacted(world: World) -> None:
    ran = world.deploy(env={"MY_TOKEN": "shop", "CONVOX_PASSWORD": "short"})
    assert ran.status == 0 and "***" not in ran.text


def test_the_ecr_password_is_redacted_in_the_warning_before_a_repetition(world: World) -> None:
    world.constants = {"PUSH_PAUSE": 0}
    (world.home / "repositories").write_text("123456789012/shop\n")
    world.rules["docker push"] = {"number": 1, "status": 1, "err": f"EOF while sending {TOKEN}"}
    ran = world.deploy(env={"STANDIN_ECR_TOKEN": TOKEN})
    assert ran.status == 0 and "EOF while sending ***" in ran.text and TOKEN not in ran.text


def test_a_secret_in_the_arguments_is_redacted_when_the_command_is_shown(world: World) -> None:
    ran = world.deploy(
        "--", "--build-arg", f"PASSWORD={PASSWORD}", env={"CONVOX_PASSWORD": PASSWORD}
    )
    assert ran.status == 0 and "'PASSWORD=***'" in ran.out and found_in(ran.text) == []


@pytest.mark.parametrize("pause", [0, 0.3])
def test_a_secret_that_is_printed_in_pieces_is_redacted(world: World, pause: float) -> None:
    script = (
        "import os,sys,time; p=os.environ['CONVOX_PASSWORD']; log=sys.stderr; "
        "print('x' * 70000 + p, file=log); log.write('half ' + p[:9]); log.flush(); "
        f"time.sleep({pause}); print(p[9:], file=log); print('ROURSXXXXXX')"
    )
    fake = world.home / "convox"
    fake.write_text(
        f"#!{sys.executable}\nimport os,sys\n"
        f"if sys.argv[1:3] == ['build', '--app']:\n    exec({script!r})\nelse:\n"
        f"    os.execv({str(world.bin / 'convox')!r}, ['convox', *sys.argv[1:]])\n"
    )
    fake.chmod(0o755)
    env = {**SECRETS, "PATH": f"{world.home}:{world.bin}"}
    ran = world.deploy("--no-promote", env=env)
    assert ran.status == 0 and "Built release ROURSXXXXXX" in ran.out, ran.text
    assert ran.out.count("***") == 2 and found_in(ran.text) == []


def test_no_running_process_shows_a_secret(world: World) -> None:
    """Read the argument lists of the tool and of all its commands while docker pushes."""
    world.rules["docker push"] = {"hang": True}
    process = world.start(env=dict(SECRETS), real=True)
    world.await_hanging()
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(world.home) in path.with_name("environ").read_bytes():
                lines.append(path.read_bytes().decode(errors="replace"))
    temporary = "".join(
        path.read_text(errors="replace") for path in world.tmp.rglob("*") if path.is_file()
    )
    process.terminate()
    process.communicate(timeout=30)
    assert any("convox_deploy.py" in line for line in lines)
    assert found_in("\n".join(lines) + temporary) == []


def test_a_secret_at_the_end_of_a_failed_build_is_not_cut_and_shown(world: World) -> None:
    secret = "AbCdEfGhIj" * 9
    world.rules["convox build --app"] = {"out": f"log\nlogin with {secret}\n"}
    ran = world.deploy("--result", "result.json", env={"API_TOKEN": secret})
    assert ran.status == 1 and "login with ***" in ran.err
    assert secret[-10:] not in ran.text + (world.app / "result.json").read_text()


def test_the_traceback_of_a_bug_reveals_no_secrets(world: World) -> None:
    bug = f"""
import convox_deploy
def bug(self, image):
    raise KeyError({PASSWORD!r})
convox_deploy.Docker.build = bug
convox_deploy.main()
"""
    env = {**SECRETS, "PYTHONPATH": str(ROOT)}
    ran = world.deploy("--result", "result.json", program=["-c", bug], env=env)
    assert ran.status == 1 and "KeyError: '***'" in ran.err
    assert found_in(ran.text + (world.app / "result.json").read_text()) == []
