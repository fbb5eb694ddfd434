"""Every command and hook of a deploy uses the same rack: the one the user means."""

from __future__ import annotations

import itertools
import urllib.parse
from typing import Any

import pytest
from conftest import World

CLIS = ["2016", "2018", "v2", "v3"]
LOGIN = {"CONVOX_HOST": None, "CONVOX_PASSWORD": None}
PASSWORDS = ["secret", "pass/word", "p@ss@word", "a%2fb", "ä ö", "a:b?c#d", "x' y\"z"]


def rack_calls(world: World) -> list[Any]:
    """Return the calls that reach the rack, and those of the hooks."""
    calls = [
        call for call in world.calls if call.argv[0] in ("convox", "before_build", "before_release")
    ]
    return [call for call in calls if "--help" not in call.argv]


@pytest.mark.parametrize(
    ("cli", "how"),
    [
        *itertools.product(CLIS, [".convox", "option"]),
        ("v2", "CONVOX_RACK"),
        ("v2", "RACK_NAME"),
        ("v2", ".convox2"),
    ],
)
def test_every_command_and_hook_gets_the_specified_rack(world: World, how: str, cli: str) -> None:
    world.add_hooks()
    args, env = [], {**LOGIN, "CONVOX_STANDIN_CLI": cli}
    if how == "option":
        args, env = ["--rack", "org/production"], {**env, "CONVOX_RACK": "org/staging"}
        world.write(".convox/rack", "org/staging\n")
    elif how.startswith("."):
        world.write(f"{how}/rack", "org/production\n")
    else:
        env[how] = "org/production"
    ran = world.deploy(*args, env=env)
    assert ran.status == 0, ran.text
    assert "to org/production (running: ROLDRELEASE)" in ran.out
    for call in rack_calls(world):
        assert call.env["CONVOX_RACK"] == "org/production", call.line
        assert "RACK_URL" not in call.env
        if call.argv[0] == "convox":
            assert call.argv[call.argv.index("--rack") + 1] == "org/production"
        else:
            assert call.env["RACK_NAME"] == "org/production"


@pytest.mark.parametrize(("cli", "password"), [*zip(itertools.cycle(CLIS), PASSWORDS)])
def test_a_direct_login_reaches_every_cli_generation_and_overrides_the_local_setting(
    world: World, password: str, cli: str
) -> None:
    """In v3 RACK_URL overrides .convox/rack, and up to v2 CONVOX_HOST does."""
    world.add_hooks()
    world.write(".convox/rack", "org/staging\n")
    env = {
        "CONVOX_HOST": "rack.example.com:8443",
        "CONVOX_PASSWORD": password,
        "CONVOX_STANDIN_CLI": cli,
    }
    ran = world.deploy(env=env)
    assert ran.status == 0, ran.text
    for call in rack_calls(world):
        url = urllib.parse.urlsplit(call.env["RACK_URL"])
        assert (url.hostname, url.port) == ("rack.example.com", 8443)
        assert urllib.parse.unquote(url.password or "") == password
        assert call.env["CONVOX_PASSWORD"] == password
        assert "CONVOX_RACK" not in call.env and "--rack" not in call.argv
    assert "to rack.example.com:8443 (" in ran.out


@pytest.mark.parametrize("cli", ["2016", "v3"])
@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("https://convox:pass%2Fword@rack.example.com", "pass/word"),
        ("https://convox:pass%2fword@rack.example.com", "pass/word"),
        ("https://convox:p@ss@word@rack.example.com", "p@ss@word"),
    ],
)
def test_a_rack_url_also_reaches_old_cli_generations(
    world: World, url: str, password: str, cli: str
) -> None:
    world.write(".convox/rack", "org/staging\n")
    ran = world.deploy(env={**LOGIN, "RACK_URL": url, "CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    for call in rack_calls(world):
        assert call.env["RACK_URL"] == url
        assert (call.env["CONVOX_HOST"], call.env["CONVOX_PASSWORD"]) == (
            "rack.example.com",
            password,
        )
        assert "CONVOX_RACK" not in call.env
    assert "to rack.example.com (" in ran.out and "@ss" not in ran.text and "pass%" not in ran.text


@pytest.mark.parametrize(
    "host", ["console.convox.com", "Console.Convox.com", "console.convox.com:443"]
)
def test_the_console_is_never_mistaken_for_a_rack(world: World, host: str) -> None:
    ran = world.deploy(env={"CONVOX_HOST": host})
    assert ran.status == 2
    assert (
        f"{host} is the Convox Console, not a rack. Name the rack with --rack or CONVOX_RACK."
        in ran.err
    )
    assert world.calls == []


@pytest.mark.parametrize("how", ["--rack", ".convox/rack"])
def test_a_deploy_key_is_used_with_the_console_and_the_name_of_the_rack(
    world: World, how: str
) -> None:
    args = ["--rack", "org/production"] if how == "--rack" else []
    if how == ".convox/rack":
        world.write(how, "org/production")
    ran = world.deploy(*args, "--no-verify", env={"CONVOX_HOST": "console.convox.com"})
    assert ran.status == 0, ran.text
    for call in rack_calls(world):
        assert call.env["CONVOX_RACK"] == "org/production" and "RACK_URL" not in call.env
        assert call.env["CONVOX_HOST"] == "console.convox.com"


def test_the_first_line_names_the_host_through_which_a_named_rack_is_reached(world: World) -> None:
    """A Console's host, says v3. Older CLIs take it for the rack itself."""
    ran = world.deploy("--rack", "production", env={"CONVOX_HOST": "staging.example.com"})
    assert "to production via staging.example.com" in ran.out


def test_without_rack_settings_the_cli_chooses_the_rack(world: World) -> None:
    ran = world.deploy(env={**LOGIN, "APP_NAME": None})
    assert ran.status == 0, ran.text
    build = world.call("convox build --app shop")  # the directory's name
    assert not {"RACK_URL", "CONVOX_RACK", "CONVOX_HOST"} & build.env.keys()
    assert "to the convox CLI's current rack (" in ran.out


@pytest.mark.parametrize(
    ("files", "app"),
    [
        ({".convox/app": "from-convox\n"}, "from-convox"),
        ({".convox2/app": "from-convox2"}, "from-convox2"),
        ({".convox/app": "from-convox", ".convox2/app": "from-convox2"}, "from-convox"),
        ({".convox/app": ""}, "shop"),
    ],
)
def test_the_app_defaults_to_the_local_setting(
    world: World, files: dict[str, str], app: str
) -> None:
    for name, text in files.items():
        world.write(name, text)
    assert world.deploy(env={"APP_NAME": None}).status == 0
    assert world.commands(f"convox build --app {app} ")


def test_a_cli_without_the_rack_option_gets_only_the_variable(world: World) -> None:
    world.rules["convox build --help"] = {"out": "--manifest --app --description --id"}
    ran = world.deploy("--rack", "production", env=LOGIN)
    assert ran.status == 0, ran.text
    for call in rack_calls(world):
        assert "--rack" not in call.argv and call.env["CONVOX_RACK"] == "production"


@pytest.mark.parametrize(
    "password", ["hunter2/x", "hunter2?x", "hunter2#x", "x@hunter2/x", "x@hunter2?x", "x@hunter2#x"]
)
def test_a_rack_url_whose_password_is_not_encoded_is_refused_and_not_shown(
    world: World, password: str
) -> None:
    url = f"https://convox:{password}@rack.example.com"
    ran = world.deploy(env={**LOGIN, "RACK_URL": url})
    assert ran.status == 2 and "with PASSWORD percent-encoded." in ran.err
    assert "hunter2" not in ran.text and world.calls == []


def test_the_commands_that_are_suggested_name_the_rack(world: World) -> None:
    world.rules["convox releases promote --app"] = {"status": 1, "err": "ERROR: rollback\n"}
    ran = world.deploy("--rack", "staging", env=LOGIN)
    assert "Check:  convox apps info --app shop --rack staging\n" in ran.err
    assert "Cancel: convox apps cancel --app shop --rack staging\n" in ran.err


def test_a_rack_url_of_the_console_is_refused(world: World) -> None:
    url = "https://convox:password@console.convox.com"
    ran = world.deploy(env={**LOGIN, "RACK_URL": url})
    assert ran.status == 2 and "console.convox.com is the Convox Console, not a rack." in ran.err


@pytest.mark.parametrize("kind", ["directory", "not UTF-8"])
def test_a_local_setting_that_cannot_be_read_is_not_ignored(world: World, kind: str) -> None:
    if kind == "directory":
        (world.app / ".convox" / "rack").mkdir(parents=True)
    else:
        (world.app / ".convox").mkdir()
        (world.app / ".convox" / "rack").write_bytes(b"\xff")
    ran = world.deploy(env=LOGIN)
    assert ran.status == 2 and ".convox/rack cannot be read" in ran.err and world.calls == []


def test_an_empty_local_setting_does_not_hide_the_one_of_v2(world: World) -> None:
    world.write(".convox/rack", "")
    world.write(".convox2/rack", "org/production")
    ran = world.deploy(env=LOGIN)
    assert "to org/production (" in ran.out


@pytest.mark.parametrize(
    "url",
    [
        "https://convox:sec[retpass@staging.example.com",
        "https://convox:password@:5443",
        "https://convox:password@staging.example.com\n",
        "https://convox:@staging.example.com",
    ],
)
def test_a_rack_url_that_cannot_be_parsed_is_never_ignored(world: World, url: str) -> None:
    world.write(".convox/rack", "production")
    ran = world.deploy(env={**LOGIN, "RACK_URL": url})
    assert ran.status == 2 and "RACK_URL must be" in ran.err
    assert "retpass" not in ran.text and world.calls == []


def test_a_password_in_the_host_is_not_shown(world: World) -> None:
    ran = world.deploy(env={"CONVOX_HOST": "https://convox:hunter2secret@rack.example.com"})
    assert ran.status == 2 and "CONVOX_HOST must be a host name" in ran.err
    assert "hunter2" not in ran.text


def test_a_similar_variable_does_not_matter_if_another_setting_names_the_rack(
    world: World,
) -> None:
    env = {**LOGIN, "CONVOX_PASSWORDS": "for another tool"}
    assert world.deploy("--rack", "production", env=env).status == 0
