"""Every command and hook of a deploy uses the same rack: the one the user means."""

from __future__ import annotations

import itertools
import signal
import urllib.parse
from typing import Any

import pytest
from conftest import World, paired
from standin import Rule

CLIS = ["v2", "v3"]
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
        *itertools.product(CLIS, ["option", "CONVOX_RACK"]),
        ("v2", "RACK_NAME"),
    ],
)
def test_every_command_and_hook_gets_the_specified_rack(world: World, how: str, cli: str) -> None:
    world.add_hooks()
    args, env = [], {**LOGIN, "CONVOX_STANDIN_CLI": cli}
    if how == "option":
        args, env = ["--rack", "org/production"], {**env, "CONVOX_RACK": "org/staging"}
    else:
        env[how] = "org/production"
    ran = world.deploy(*args, env=env)
    assert ran.status == 0, ran.text
    source = "--rack" if how == "option" else how
    introduction = f"on org/production ({source})\nRunning now: ROLDRELEASE\n"
    assert f"\nDeploying shop (APP_NAME) {introduction}" in ran.out
    for call in rack_calls(world):
        assert call.env["CONVOX_RACK"] == "org/production", call.line
        assert "RACK_URL" not in call.env
        if call.argv[0] == "convox":
            assert call.argv[call.argv.index("--rack") + 1] == "org/production"
        else:
            assert call.env["RACK_NAME"] == "org/production"


@pytest.mark.parametrize(("cli", "password"), [*itertools.product(CLIS, PASSWORDS)])
def test_a_direct_login_reaches_every_cli_generation(world: World, password: str, cli: str) -> None:
    """v3 reads RACK_URL. So does v2, which reads CONVOX_HOST and CONVOX_PASSWORD, too."""
    world.add_hooks()
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
    assert " on rack.example.com:8443 (CONVOX_HOST)\n" in ran.out


@pytest.mark.parametrize(
    "host", ["console.convox.com", "Console.Convox.com", "console.convox.com:443"]
)
def test_the_console_is_never_mistaken_for_a_rack(world: World, host: str) -> None:
    ran = world.deploy(env={"CONVOX_HOST": host})
    assert ran.status == 2
    assert f"{host} is the Convox Console, not a rack." in ran.err
    assert world.commands("docker login", "docker build --tag", "convox build --app") == []


def test_a_deploy_key_is_used_with_the_console_and_the_name_of_the_rack(world: World) -> None:
    env = {"CONVOX_HOST": "console.convox.com"}
    ran = world.deploy("--rack", "org/production", env=env)
    assert ran.status == 0, ran.text
    assert " on org/production via console.convox.com (--rack)\n" in ran.out
    for call in rack_calls(world):
        assert call.env["CONVOX_RACK"] == "org/production" and "RACK_URL" not in call.env
        assert call.env["CONVOX_HOST"] == "console.convox.com"


def test_the_first_line_names_the_host_through_which_a_named_rack_is_reached(world: World) -> None:
    """A Console's host, says v3. Older CLIs take it for the rack itself."""
    ran = world.deploy("--rack", "production", env={"CONVOX_HOST": "staging.example.com"})
    assert " on production via staging.example.com (--rack)\n" in ran.out


def test_without_rack_settings_the_cli_chooses_the_rack(world: World) -> None:
    ran = world.deploy(env={**LOGIN, "APP_NAME": None})
    assert ran.status == 0, ran.text
    assert "\nDeploying shop (directory name) on" in ran.out
    build = world.call("convox build --app shop")
    assert not {"RACK_URL", "CONVOX_RACK", "CONVOX_HOST"} & build.env.keys()
    assert " on the convox CLI's current rack\n" in ran.out


MALFORMED = [
    "https://convox:hunter2/x@rack.example.com",
    "https://convox:hunter2?x@rack.example.com",
    "https://convox:hunter2#x@rack.example.com",
    "https://convox:x@hunter2/x@rack.example.com",
    "https://convox:x@hunter2#x@rack.example.com",
    "https://convox:hunter2[x@rack.example.com",
    "https://convox:hunter2%zz@rack.example.com",
    "convox:hunter2@rack.example.com",
]


@pytest.mark.parametrize(("url", "cli"), paired(MALFORMED, CLIS))
def test_a_malformed_rack_url_is_left_to_the_cli_and_its_password_is_not_shown(
    world: World, url: str, cli: str
) -> None:
    """The CLI never falls back to another rack. Its error may show the password."""
    part = "" if "[" in url or "%" in url else ", hunter2"
    reason = f'parse "{url}": invalid userinfo{part}'
    world.rules["convox api get"] = {"status": 1, "err": f"ERROR: {reason}\n"}
    ran = world.deploy(
        "--result", "result.json", env={**LOGIN, "RACK_URL": url, "CONVOX_STANDIN_CLI": cli}
    )
    assert ran.status == 2 and "invalid userinfo" in ran.err
    result = (world.app / "result.json").read_text()
    assert "hunter2" not in ran.text and "hunter2" not in result
    assert world.commands("convox switch", "docker build --tag", "convox build --app") == []
    assert {call.env["RACK_URL"] for call in rack_calls(world)} == {url}


def test_the_commands_that_are_suggested_name_the_rack(world: World) -> None:
    promote, ask = "convox releases promote --app", "convox api get --rack staging /apps/shop"
    world.rules[promote] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM, "--rack", "staging", env=LOGIN)
    assert "To look: `convox apps info --app shop --rack staging`." in ran.err
    asked = len(world.commands(ask))
    answer = '{"release": "RNEWRELEASX", "status": "updating"}'
    world.rules[ask] = {"since": 2 * asked, "out": answer}
    ran = world.deploy_and_signal(signal.SIGTERM, "--rack", "staging", env=LOGIN)
    assert "To cancel it: `convox apps cancel --app shop --rack staging`." in ran.err
    world.rules = {"convox build --app": {"hang": True}}
    ran = world.deploy_and_signal(signal.SIGTERM, "--rack", "staging", env=LOGIN)
    assert "To look: `convox releases --app shop --rack staging`." in ran.err


def test_a_rack_url_of_the_console_is_refused(world: World) -> None:
    url = "https://convox:password@console.convox.com"
    ran = world.deploy(env={**LOGIN, "RACK_URL": url})
    assert ran.status == 2 and "is the Convox Console, not a rack." in ran.err


def test_a_password_in_the_host_is_not_shown(world: World) -> None:
    ran = world.deploy(env={"CONVOX_HOST": "https://convox:hunter2secret@rack.example.com"})
    assert ran.status == 2 and "CONVOX_HOST must be a host name" in ran.err
    assert "hunter2" not in ran.text


# --- the convox CLI's own rack --------------------------------------------------------


def test_what_the_cli_prints_about_other_racks_is_no_answer(world: World) -> None:
    """v3 prints an error to stdout for each rack of its own whose Terraform fails."""
    noise = "err: exit status 1\n"
    (world.home / "running").write_text("ROLDRELEASE\n")
    api: list[Rule] = [
        {"out": f'{noise}{{"release": "{release}", "status": "running"}}\n'}
        for release in ("ROLDRELEASE", "RNEWRELEASE")
    ]
    world.rules = {
        "convox switch": {"out": f"{noise}org/staging\n"},
        "convox api get /apps/shop/releases": {"out": f'{noise}[{{"id": "RNEWRELEASE"}}]\n'},
        "convox api get /apps/shop": {"sequence": [api[0], api[0], api[0], api[1]]},
        "convox build --app": {"out": f"{noise}RNEWRELEASE\n"},
    }
    ran = world.deploy(env={**LOGIN, "CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    introduction = "on org/staging (convox switch)\nRunning now: ROLDRELEASE\n"
    assert f"\nDeploying shop (APP_NAME) {introduction}" in ran.out
    assert "warning" not in ran.out


@pytest.mark.parametrize(("cli", "running"), [*itertools.product(CLIS, ["ROLDRELEASE", ""])])
def test_the_clis_current_rack_is_asked_once_and_named_to_every_command_and_hook(
    world: World, cli: str, running: str
) -> None:
    """`convox switch` in another terminal cannot change the target, not even of a first deploy."""
    (world.home / "running").write_text(f"{running}\n")
    world.add_hooks()
    world.rules["convox switch"] = {"sequence": [{"out": "org/staging\n"}, {"out": "org/other\n"}]}
    ran = world.deploy(env={**LOGIN, "CONVOX_STANDIN_CLI": cli})
    assert ran.status == 0, ran.text
    assert "\nDeploying shop (APP_NAME) on org/staging (convox switch)\n" in ran.out
    assert world.call("convox switch").argv == ["convox", "switch"]
    calls = [call for call in rack_calls(world) if call.line != "convox switch"]
    assert len(calls) == (10 if running else 9)  # one reads the description of what runs
    for call in calls:
        assert call.env["CONVOX_RACK"] == "org/staging", call.line
        if call.argv[0] == "convox":
            assert call.argv[call.argv.index("--rack") + 1] == "org/staging"
        else:
            assert call.env["RACK_NAME"] == "org/staging"


def test_resuming_asks_for_the_clis_current_rack_too(world: World) -> None:
    world.rules["convox switch"] = {"out": "org/staging\n"}
    ran = world.deploy("--release", "RABCDEFGHIJ", env=LOGIN)
    assert ran.status == 0, ran.text
    assert world.call("convox releases promote --app").env["CONVOX_RACK"] == "org/staging"


@pytest.mark.parametrize("rule", [{"status": 1, "err": "ERROR: no current rack\n"}, {"out": "\n"}])
def test_a_cli_that_names_no_current_rack_is_used_as_it_is(world: World, rule: Rule) -> None:
    world.rules["convox switch"] = rule
    ran = world.deploy(env=LOGIN)
    assert ran.status == 0, ran.text
    assert " on the convox CLI's current rack\n" in ran.out
    assert not any("--rack" in call.argv or "CONVOX_RACK" in call.env for call in world.calls)


@pytest.mark.parametrize("how", ["--rack", "CONVOX_RACK", "CONVOX_HOST", "RACK_URL"])
def test_the_cli_is_not_asked_for_a_rack_that_a_setting_names(world: World, how: str) -> None:
    args = ["--rack", "production"] if how == "--rack" else []
    named = {"CONVOX_RACK": "production", "RACK_URL": "https://convox:password@rack.example.com"}
    env = {} if how == "CONVOX_HOST" else {**LOGIN, how: named.get(how)}
    assert world.deploy(*args, env=env).status == 0
    assert world.commands("convox switch") == []


@pytest.mark.parametrize(
    "url",
    [
        "https://convox:pass%2fword@rack.example.com",
        "https://convox:p%40ss@rack.example.com:8443/",
        "https://convox:password@gateway.example.com/racks/staging",
    ],
)
def test_a_rack_url_is_passed_on_as_it_is(world: World, url: str) -> None:
    world.add_hooks()
    ran = world.deploy(env={**LOGIN, "RACK_URL": url, "CONVOX_STANDIN_CLI": "v3"})
    assert ran.status == 0, ran.text
    assert {call.env["RACK_URL"] for call in rack_calls(world)} == {url}
    assert f" on {url.partition('@')[2].partition('/')[0]} (RACK_URL)\n" in ran.out
    password = url.split(":")[2].partition("@")[0]
    assert f":{password}@" not in ran.text
