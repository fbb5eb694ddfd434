"""The sandbox's simulated convox CLI: what it prints where no Docker Engine is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

CONVOX = ROOT / "examples" / "sandbox" / "convox"
BY_URL = "https://convox:sandbox-password@rack.sandbox"


class Cli:
    """The CLI of one generation, in a directory of its own, with the app shop."""

    def __init__(self, home: Path, generation: str) -> None:
        self.home, self.generation = home, generation
        self.state = home / "rack"
        self.env = {"PATH": os.environ["PATH"], "CONVOX_STANDIN": str(self.state)}
        self.env["CONVOX_STANDIN_CLI"] = generation
        self.login = (
            {"RACK_URL": BY_URL}
            if generation == "v3"
            else {"CONVOX_HOST": "rack.sandbox", "CONVOX_PASSWORD": "rack/password"}
        )
        self.ask("apps", "create", "shop")

    def run(self, *args: str, **env: str) -> Any:
        return subprocess.run(
            [sys.executable, CONVOX, *args], cwd=self.home, env={**self.env, **env},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def ask(self, *args: str, **env: str) -> str:
        done = self.run(*args, **{**self.login, **env})
        assert done.returncode == 0, done.stderr
        return str(done.stdout)


@pytest.fixture(params=["v2", "v3"])
def cli(tmp_path: Path, request: pytest.FixtureRequest) -> Cli:
    return Cli(tmp_path, request.param)


@pytest.fixture
def v3(tmp_path: Path) -> Cli:
    return Cli(tmp_path, "v3")


def test_only_v3_can_build_externally(cli: Cli) -> None:
    has_external = "--external" in cli.ask("build", "--help")
    assert has_external == (cli.generation == "v3")
    if not has_external:
        done = cli.run("build", "--external", "--app", "shop", ".", **cli.login)
        assert done.returncode == 1


def test_switch_prints_the_rack_that_the_cli_would_use(cli: Cli) -> None:
    none = cli.run("switch")
    assert (none.returncode, none.stdout) == (0, "\n")
    assert "Switched to sandbox" in cli.ask("switch", "sandbox")
    assert cli.run("switch").stdout == "sandbox\n"
    local = cli.home / (".convox2" if cli.generation == "v2" else ".convox") / "rack"
    local.parent.mkdir()
    local.write_text("org/staging\n")
    assert cli.run("switch").stdout == "org/staging\n"
    named = {"CONVOX_RACK": "org/production"}
    assert cli.run("switch", **named).stdout == "org/production\n"
    assert cli.run("switch", "--rack", "other", **named).stdout == "other\n"
    if cli.generation == "v3":
        assert cli.run("switch", **cli.login, **named).stdout == "direct\n"


def test_env_prints_the_apps_variables(cli: Cli) -> None:
    assert cli.ask("env", "--app", "shop") == ""
    cli.ask("env", "set", "--app", "shop", "KEY=a value=1", "HOST=x")
    assert cli.ask("env", "--app", "shop") == "HOST=x\nKEY=a value=1\n"


def test_an_unknown_app(cli: Cli) -> None:
    done = cli.run("api", "get", "/apps/nobody", **cli.login)
    assert (done.returncode, done.stderr) == (1, "ERROR: app not found: nobody\n")


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_the_url_of_a_rack_may_have_a_path(tmp_path: Path, generation: str) -> None:
    cli = Cli(tmp_path, generation)
    assert "sandbox" in cli.ask("rack", RACK_URL=f"{BY_URL}/api/v1/rack-proxy")


def test_v3_does_not_take_a_rack_from_host_and_password(v3: Cli) -> None:
    done = v3.run("rack", CONVOX_HOST="rack.sandbox", CONVOX_PASSWORD="rack/password")
    assert done.returncode == 1 and done.stderr.startswith("ERROR: no current rack, use `convox")
    v3.ask("switch", "sandbox")
    assert v3.run("rack").returncode == 0


def test_the_status_of_an_app_can_be_forced(cli: Cli) -> None:
    (cli.state / "status.shop").write_text("updating\n")
    assert '"status": "updating"' in cli.ask("api", "get", "/apps/shop")
    assert "updating" in cli.ask("apps", "info", "--app", "shop")


def test_a_failed_build_is_listed(cli: Cli) -> None:
    (cli.home / "app").mkdir()
    (cli.home / "app" / "app.yml").write_text("services:\n  web:\n    build: .\n")
    done = cli.run("build", "--app", "shop", "--manifest", "app.yml", "app", **cli.login)
    assert done.returncode == 1 and "the sandbox's rack does not build" in done.stdout
    assert done.stderr.endswith("build failed\n")
    header, build = cli.ask("builds", "--app", "shop").splitlines()
    assert header.split()[:2] == ["ID", "STATUS"] and build.split()[1:] == ["failed"]
