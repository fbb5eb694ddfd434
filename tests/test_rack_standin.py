"""What the sandbox's rack refuses and answers: one test for each rule, with a docker that only pretends."""

from __future__ import annotations

import fcntl
import json
import os
import py_compile
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from conftest import ROOT, World, documented_copy_of_a_build

BY_URL = "https://convox:{}@rack.sandbox"
MANIFEST = "services:\n  web:\n    image: shop/web\n    port: 8080\n"
OLDER = "ERROR: can not promote an older release, try rollback\n"
UPDATING = "ERROR: app is currently updating\n"
# Containers are files. A file named crash or no-image changes how they are. One named hold keeps
# the rack from seeing and from removing them.
DOCKER = """\
#!/bin/sh
printf '%s\\n' "$*" >>calls
case "$1 $2" in
    "run --rm") printf '%s\\n' "$*" ;;
    run*)
        if [ -e no-image ]; then echo "manifest unknown" >&2; exit 125; fi
        : >"c$$"
        echo "c$$"
        ;;
    inspect*)
        case "$3" in
            *Running*)
                while [ -e hold ]; do sleep 0.01; done
                shift 3
                for id; do
                    if [ -e crash ]; then echo "$id false 3"; else echo "$id true 0"; fi
                done
                ;;
            *) shift 3; [ -e "$1" ] ;;
        esac
        ;;
    port*) echo "8080/tcp -> 127.0.0.1:$(cat port)" ;;
    logs*) echo "no database" ;;
    rm*)
        while [ -e hold ]; do sleep 0.01; done
        shift 2
        rm -f "$@"
        ;;
    pull*) [ ! -e no-image ] ;;
esac
"""


class Rack:
    """A rack with the app shop and two releases, none of which runs, and a CLI."""

    def __init__(self, program: Path, home: Path, cli: str, state: str) -> None:
        self.home, self.cli, self.program = home, cli, program
        self.state, self.engine = home / "rack", home / "engine"
        for directory in (self.state, self.engine, home / "app"):
            directory.mkdir()
        (home / "app" / "convox.yml").write_text(MANIFEST)
        (self.state / "rack.json").write_text(state)
        (self.state / "own-registry.json").write_text(
            json.dumps({"host": "registry.sandbox", "username": "rack", "password": "secret"})
        )
        docker = self.engine / "docker"
        docker.write_text(DOCKER.replace("#!/bin/sh\n", f"#!/bin/sh\ncd {self.engine}\n"))
        docker.chmod(0o755)
        self.env = {
            "PATH": f"{self.engine}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(yaml.__file__).parents[1]),  # -S starts faster without it
            "CONVOX_STANDIN": str(self.state),
            "CONVOX_STANDIN_CLI": cli,
            "CONVOX_STANDIN_SECOND": "0.002",
            "RACK_URL": BY_URL.format("sandbox-password"),
        }

    def start(self, *args: str, **env: str) -> Any:
        return subprocess.Popen(
            [sys.executable, "-S", self.program, *args], cwd=self.home, env={**self.env, **env}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *args: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def ask(self, *args: str, **env: str) -> str:
        status, out, err = self.run(*args, **env)
        assert status == 0, err
        return out

    def refused(self, *args: str, **env: str) -> str:
        """Return the error of a command that must change nothing."""
        before = self.apps
        status, _, err = self.run(*args, **env)
        assert status == 1 and self.apps == before
        return err

    @property
    def apps(self) -> Any:
        return json.loads((self.state / "rack.json").read_text())["apps"]

    @property
    def app(self) -> Any:
        return self.apps["shop"]

    def edit(self, change: Callable[[Any], Any]) -> None:
        path = self.state / "rack.json"
        with open(self.state / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads(path.read_text())
            change(state["apps"]["shop"])
            part = path.with_suffix(".edited")
            part.write_text(json.dumps(state))
            part.rename(path)

    def get(self, path: str = "", **env: str) -> Any:
        return json.loads(self.ask("api", "get", f"/apps/shop{path}", **env))

    def releases(self) -> list[str]:
        return [release["id"] for release in self.get("/releases")]

    def seen(self) -> tuple[str, str]:
        app = self.get()
        return app["status"], app["release"]

    def await_app(self, is_so: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + 20
        while not is_so(self.app):
            assert time.monotonic() < deadline, self.app
            time.sleep(0.005)

    def await_status(self, status: str) -> None:
        self.await_app(lambda app: app["status"] == status)

    def promote(self, release: str, *args: str, **env: str) -> tuple[int, str, str]:
        wait = ["--wait"] if self.cli == "v2" else []
        return self.run("releases", "promote", "-a", "shop", *wait, *args, release, **env)

    def start_promote(self, release: str, **env: str) -> Any:
        process = self.start("releases", "promote", "-a", "shop", release, "--wait", **env)
        self.await_status("updating")
        return process

    def engine_has(self, name: str) -> None:
        (self.engine / name).touch()

    def let_go(self) -> None:
        (self.engine / "hold").unlink(missing_ok=True)

    def build(self, *args: str, **env: str) -> tuple[int, str, str]:
        manifest = ["--manifest", "convox.yml"]
        return self.run("build", "-a", "shop", *manifest, "--id", *args, "app", **env)

    def write(self, text: str, name: str = "convox.yml") -> None:
        (self.home / "app" / name).write_text(text)

    def debug(self, *args: str) -> Any:
        return json.loads(self.ask("deploy-debug", "-a", "shop", "--output", "json", *args))


class Page(BaseHTTPRequestHandler):
    """The response of all containers. One in `unhealthy` is not ready."""

    unhealthy = False

    def do_GET(self) -> None:
        self.send_response(503 if Page.unhealthy else 200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CLI, compiled: it starts some hundred times."""
    path = tmp_path_factory.mktemp("compiled") / "convox.pyc"
    py_compile.compile(str(ROOT / "examples" / "sandbox" / "convox"), str(path), doraise=True)
    return path


@pytest.fixture(scope="module")
def state(program: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The rack's state with the app and two releases."""
    rack = Rack(program, tmp_path_factory.mktemp("first"), "v3", '{"apps": {}}')
    rack.ask("apps", "create", "shop")
    for _ in range(2):
        assert rack.build()[0] == 0
    return (rack.state / "rack.json").read_text()


@pytest.fixture
def new(program: Path, tmp_path: Path, state: str, port: int) -> Iterator[Callable[[str], Rack]]:
    made = []

    def make(cli: str) -> Rack:
        made.append(Rack(program, tmp_path, cli, state))
        (made[0].engine / "port").write_text(str(port))
        return made[0]

    yield make
    for rack in made:  # what the rack still does ends, because another update follows
        rack.let_go()
        rack.edit(lambda app: app.update(updates=-1))


@pytest.fixture(params=["v2", "v3"])
def rack(new: Callable[[str], Rack], request: pytest.FixtureRequest) -> Rack:
    return new(request.param)


@pytest.fixture
def v2(new: Callable[[str], Rack]) -> Rack:
    return new("v2")


@pytest.fixture
def v3(new: Callable[[str], Rack]) -> Rack:
    return new("v3")


@pytest.fixture
def unhealthy() -> Iterator[None]:
    """No container becomes ready, until Page.unhealthy is False."""
    Page.unhealthy = True
    yield
    Page.unhealthy = False


def let_run(rack: Rack, release: str) -> None:
    """Let a release run, without containers."""
    rack.edit(lambda app: app.update(release=release))


# --- rack.md, Refusals ----------------------------------------------------------------


def test_a_release_created_before_the_running_one_is_not_promoted(rack: Rack) -> None:
    newest, older = rack.releases()
    let_run(rack, newest)
    for force in ([], ["--force"]):
        before = rack.app
        status, out, err = rack.promote(older, *force)
        assert (status, out, err) == (1, f"Promoting {older}... ", OLDER)
        assert rack.app == before


def test_created_decides_and_not_the_order_of_the_list(v3: Rack) -> None:
    """Go drops trailing zeros: .9 is later than .25."""
    first, second = (release["id"] for release in v3.app["releases"])
    moments = [{"created": f"2026-11-02T10:00:00.{fraction}Z"} for fraction in ("9", "25")]
    v3.edit(lambda app: [release.update(moments.pop(0)) for release in app["releases"]])
    assert v3.releases() == [first, second]
    let_run(v3, first)
    assert v3.promote(second)[2] == OLDER


def test_a_release_of_env_set_before_any_build_is_not_promoted(v3: Rack) -> None:
    v3.ask("apps", "create", "empty")
    release = v3.ask("env", "set", "-a", "empty", "A=1").split()[-1]
    error = v3.refused("releases", "promote", "-a", "empty", release)
    assert error == "ERROR: can not promote a release with an empty manifest\n"


def test_a_release_that_does_not_exist(rack: Rack) -> None:
    text = {
        "v2": "release not found: RNOSUCHXXXX",
        "v3": 'releases.convox.com "rnosuchxxxx" not found',
    }[rack.cli]
    for command in ("promote", "rollback"):
        error = rack.refused("releases", command, "-a", "shop", "RNOSUCHXXXX")
        assert error == f"ERROR: {text}\n"
    assert rack.refused("api", "get", "/apps/shop/releases/RNOSUCHXXXX") == f"ERROR: {text}\n"


def test_a_promote_waits_for_an_app_that_is_not_running(rack: Rack) -> None:
    (rack.state / "status.shop").write_text("failed\n")
    status, out, err = rack.promote(rack.releases()[0], CONVOX_STANDIN_SECOND="0.0001")
    assert (status, out, err) == (1, "Waiting for app to be ready... ", "ERROR: timeout\n")
    assert rack.app["updates"] == 0


def test_a_promote_that_waited_for_a_rollback_was_never_requested(rack: Rack) -> None:
    (rack.state / "status.shop").write_text("rollback\n")
    status, out, err = rack.promote(rack.releases()[0])
    assert (status, out, err) == (1, "Waiting for app to be ready... ", "ERROR: rollback\n")
    assert rack.app["updates"] == 0


def test_a_promote_that_waited_goes_on(rack: Rack) -> None:
    forced = rack.state / "status.shop"
    forced.write_text("updating\n")
    release = rack.releases()[0]
    process = rack.start("releases", "promote", "-a", "shop", release)
    start = "Waiting for app to be ready... "
    assert process.stdout.read(len(start)) == start
    forced.unlink()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "") and out.startswith(f"OK\nPromoting {release}... ")


def test_an_exceeded_budget_stops_promotes_and_not_builds(v3: Rack) -> None:
    (v3.state / "budget.shop").write_text("120.50 100\n")
    release = v3.releases()[0]
    text = "budget cap exceeded for app shop: spent $120.50 of $100 cap this month; recovery opt"
    assert text in v3.refused("releases", "promote", "-a", "shop", release)
    assert text in v3.refused("run", "-a", "shop", "--release", release, "web", "ls")
    assert text in v3.run("releases", "rollback", "-a", "shop", release)[2]
    assert v3.build()[0] == 0


def test_a_variable_without_a_default_is_required(rack: Rack) -> None:
    entries = "environment:\n  - GLOBAL\n  - '*'\n"
    rack.write(f"{entries}{MANIFEST}    environment:\n      - OWN\n      - HAS=one\n")
    before = rack.app["builds"]
    status, out, err = rack.build()
    assert (status, out) == (1, "") and err.endswith("ERROR: required env: GLOBAL, OWN\n")
    assert rack.app["builds"] == before
    rack.ask("env", "set", "-a", "shop", "GLOBAL=1", "OWN=1")
    release = rack.build()[1]
    rack.edit(lambda app: app["releases"][-1].update(env={"OWN": "1"}))
    assert rack.promote(release)[2] == "ERROR: required env: GLOBAL\n"


def test_an_app_that_is_not_updating_cannot_be_canceled(v3: Rack) -> None:
    status, _, err = v3.run("apps", "cancel", "-a", "shop")
    assert (status, err) == (1, "ERROR: app is not updating\n")
    (v3.state / "status.shop").write_text("rollback\n")
    assert v3.refused("apps", "cancel", "shop") == "ERROR: app is not updating\n"


def test_a_wrong_password(v3: Rack) -> None:
    error = v3.refused("rack", RACK_URL=BY_URL.format("wrong"))
    assert error == "ERROR: invalid authentication\n"


def test_a_read_only_login_may_only_read(v3: Rack) -> None:
    login = {"RACK_URL": BY_URL.format("read-only")}
    release = v3.get(**login) and v3.get("/releases", **login)[0]["id"]
    error = "ERROR: you are unauthorized to access this\n"
    for command in (
        ["releases", "promote", release],
        ["releases", "rollback", release],
        ["env", "set", "A=1"],
        ["build", "app"],
        ["run", "web", "ls"],
    ):
        assert v3.refused(*command, "-a", "shop", **login) == error
    assert v3.refused("apps", "create", "other", **login) == error


def test_no_rack(rack: Rack) -> None:
    text = {
        "v2": "no racks found, try `convox login`",
        "v3": "no current rack, use `convox racks` to list and `convox switch <name>` to select",
    }[rack.cli]
    assert rack.refused("rack", RACK_URL=" ") == f"ERROR: {text}\n"


def test_an_app_is_created_once(v3: Rack) -> None:
    assert v3.refused("apps", "create", "shop") == "ERROR: app already exists: shop\n"
    assert v3.refused("apps", "create", "system") == "ERROR: app name is reserved\n"
    assert v3.refused("env", "-a", "nobody") == "ERROR: app not found: nobody\n"


def test_unknown_commands_and_flags(rack: Rack) -> None:
    assert rack.ask("bogus", "--app", "shop").startswith("convox\n")  # and exit code 0
    assert rack.refused("build", "--bogus") == "ERROR: unknown flag: --bogus\n"
    has_wait = "--wait" in rack.ask("releases", "promote", "--help")
    assert has_wait == (rack.cli == "v2")
    lacks = {"CONVOX_STANDIN_LACKS": "--wait"}
    error = rack.refused("releases", "promote", "--wait", "R", **lacks)
    assert error == "ERROR: unknown flag: --wait\n"


def test_flags_of_run_are_parsed_anywhere(v3: Rack) -> None:
    release = v3.releases()[0]
    one_off = ["run", "-a", "shop", "--release", release, "web"]
    assert v3.refused(*one_off, "ls", "-la") == "ERROR: unknown flag: -la\n"
    for words in (["--", "ls", "-la"], ["ls -la"]):
        assert v3.ask(*one_off, *words).endswith(" ls -la\n")


# --- rack.md, The state of an app, and A promote --------------------------------------


def test_a_promote(rack: Rack) -> None:
    release = rack.releases()[0]
    status, out, err = rack.promote(release)
    assert (status, err) == (0, "")
    if rack.cli == "v2":
        assert out == f"Promoting {release}... OK\n"
    else:
        assert out.startswith(f"Promoting {release}... \n") and out.endswith("\nOK\n")
    assert (rack.app["status"], rack.app["release"]) == ("running", release)


@pytest.mark.usefixtures("unhealthy")
def test_what_can_be_read_while_a_promote_runs(rack: Rack) -> None:
    newest, older = rack.releases()
    let_run(rack, older)
    process = rack.start_promote(newest)
    rack.await_app(lambda app: bool(app["pods"]))
    assert rack.seen() == ("updating", {"v2": older, "v3": newest}[rack.cli])
    Page.unhealthy = False
    assert process.wait(20) == 0
    assert rack.seen() == ("running", newest)
    process.communicate()


@pytest.mark.usefixtures("unhealthy")
def test_killing_the_cli_does_not_stop_the_rack(v3: Rack) -> None:
    release = v3.releases()[0]
    process = v3.start_promote(release)
    v3.await_app(lambda app: bool(app["pods"]))  # the rack has taken over
    process.kill()
    process.communicate()
    Page.unhealthy = False
    v3.await_app(lambda app: app["status"] == "running" and app["release"] == release)


@pytest.mark.usefixtures("unhealthy")
def test_v3_is_a_moment_behind(v3: Rack) -> None:
    newest, older = v3.releases()
    let_run(v3, older)
    process = v3.start_promote(newest, CONVOX_STANDIN_SECOND="100")
    assert v3.seen() == ("running", older)
    v3.edit(lambda app: app["before"].update(until=0.0))
    assert v3.seen() == ("updating", newest)
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("unhealthy")
def test_without_wait_v2_returns_at_once(v2: Rack) -> None:
    release = v2.releases()[0]
    assert v2.ask("releases", "promote", "-a", "shop", release) == f"Promoting {release}... OK\n"
    assert v2.app["status"] == "updating"


def test_the_cli_ends_while_the_rack_is_still_rolling_back(rack: Rack) -> None:
    newest, older = rack.releases()
    let_run(rack, older)
    rack.engine_has("hold")
    process = rack.start_promote(newest)
    rack.await_app(lambda app: bool(app["pods"]))
    rack.edit(lambda app: app.update(status="rollback"))
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (1, "ERROR: rollback\n")
    assert rack.seen()[0] == "rollback"
    rack.let_go()
    rack.await_status("running")
    assert rack.app["release"] == older and rack.app["pods"] == []


def test_a_container_that_exits_ends_a_promote_on_v2(v2: Rack) -> None:
    v2.engine_has("crash")
    assert v2.promote(v2.releases()[0])[::2] == (1, "ERROR: rollback\n")


def test_an_unhealthy_deploy_on_v3_ends_with_a_timeout(v3: Rack) -> None:
    """The CLI gives up after 35 minutes, the rack after 50. Until then the new release is reported."""
    newest, older = v3.releases()
    let_run(v3, older)
    v3.engine_has("hold")
    v3.engine_has("crash")
    status, _, err = v3.promote(newest, CONVOX_STANDIN_SECOND="0.0002")
    assert (status, err) == (1, "ERROR: timeout\n")
    assert v3.seen() == ("updating", newest)
    v3.let_go()
    v3.await_status("running")
    assert v3.seen() == ("running", older)


def test_a_limit_of_restarts_ends_a_crash_loop(v3: Rack) -> None:
    v3.write(f"{MANIFEST}    deployment:\n      crashRestartLimit: 2\n")
    release = v3.build()[1]
    v3.engine_has("crash")
    assert v3.promote(release)[2] == "ERROR: rollback\n"
    v3.await_status("running")
    assert v3.seen() == ("running", "")  # a first promote that failed


def test_a_deadline_ends_a_container_that_never_responds(v3: Rack, unhealthy: None) -> None:
    v3.write(f"{MANIFEST}    deployment:\n      progressDeadline: 60\n")
    assert v3.promote(v3.build()[1])[2] == "ERROR: rollback\n"


def test_an_image_that_the_nodes_cannot_pull(v2: Rack) -> None:
    v2.engine_has("no-image")
    assert v2.promote(v2.releases()[0])[2] == "ERROR: rollback\n"


def test_agents_and_services_with_count_0_are_not_waited_for(v3: Rack, unhealthy: None) -> None:
    text = MANIFEST + "    agent: true\n  idle:\n    image: shop/idle\n    scale: {count: 0}\n"
    v3.write(text.replace("    port: 8080\n", ""))
    release = v3.build()[1]
    v3.engine_has("crash")
    assert v3.promote(release)[::2] == (0, "")
    assert [pod["service"] for pod in v3.app["pods"]] == ["web"]


@pytest.mark.usefixtures("unhealthy")
def test_another_release_runs_in_the_end(v3: Rack) -> None:
    newest, older = v3.releases()
    process = v3.start_promote(older)
    other = v3.start("releases", "promote", "-a", "shop", "--force", newest)
    v3.await_app(lambda app: app["promoting"] == newest)
    Page.unhealthy = False
    assert other.wait(20) == 0 and process.wait(20) == 1
    assert process.communicate()[1] == "ERROR: rollback\n"
    other.communicate()


def test_failed_stays(v2: Rack) -> None:
    (v2.state / "status.shop").write_text("failed\n")
    assert v2.seen()[0] == "failed"
    assert v2.run("releases", "rollback", "-a", "shop", v2.releases()[0])[2] == UPDATING


@pytest.mark.usefixtures("unhealthy")
def test_cancel_rolls_back_and_copies_the_newest_release(rack: Rack) -> None:
    newest, older = rack.releases()
    let_run(rack, older)
    process = rack.start_promote(newest)
    out = rack.ask("apps", "cancel", "-a", "shop")
    assert out == "Cancelling deployment of shop... Rewriting last active release... OK\n"
    assert process.communicate(timeout=20)[1] == "ERROR: rollback\n"
    copied, *rest = rack.get("/releases")
    assert [release["id"] for release in rest] == [newest, older]
    assert copied["build"] == rest[0]["build"]
    rack.await_status("running")
    assert rack.app["release"] == older


def test_a_change_of_the_app_makes_it_updating_for_a_moment(v3: Rack) -> None:
    assert v3.ask("apps", "lock", "-a", "shop", CONVOX_STANDIN_SECOND="100") == (
        "Locking shop... OK\n"
    )
    assert v3.seen()[0] == "updating"
    v3.ask("apps", "unlock", "-a", "shop")
    assert v3.ask("apps", "params", "set", "-a", "shop", "A=1").endswith("OK\n")


# --- rack.md, Rollback ----------------------------------------------------------------


def test_a_rollback_promotes_a_copy(rack: Rack) -> None:
    newest, older = rack.releases()
    let_run(rack, newest)
    out = rack.ask("releases", "rollback", "-a", "shop", older, "--wait")
    copied = rack.releases()[0]
    assert out.startswith(f"Rolling back to {older}... OK, {copied}\nPromoting {copied}... ")
    assert copied not in (newest, older) and rack.app["release"] == copied
    old, new = (find(rack, name) for name in (older, copied))
    assert all(old[key] == new[key] for key in ("build", "env", "manifest"))


def find(rack: Rack, name: str) -> Any:
    [found] = [release for release in rack.app["releases"] if release["id"] == name]
    return found


def test_with_id_a_rollback_prints_the_copy_alone(rack: Rack) -> None:
    older = rack.releases()[1]
    status, out, err = rack.run("releases", "rollback", "-a", "shop", "--id", "--wait", older)
    assert (status, out) == (0, rack.releases()[0])
    assert err.startswith(f"Rolling back to {older}... OK, {out}\n")


def test_a_rollback_does_not_wait_and_its_copy_stays(rack: Rack) -> None:
    releases = rack.releases()
    (rack.state / "status.shop").write_text("updating\n")
    status, out, err = rack.run("releases", "rollback", "-a", "shop", releases[1])
    copied = rack.releases()[0]
    assert (status, err) == (1, UPDATING) and out.endswith(f"Promoting {copied}... ")
    assert copied not in releases


# --- rack.md, Releases ----------------------------------------------------------------


def test_releases_as_the_api_gives_them(rack: Rack) -> None:
    rack.ask("env", "set", "-a", "shop", "KEY=a value=1")
    newest = rack.get("/releases?limit=1")[0]
    assert newest == rack.get(f"/releases/{newest['id']}")
    assert sorted(newest) == ["app", "build", "created", "description", "env", "id", "manifest"]
    assert newest["env"] == {"v2": "", "v3": "KEY=a value=1"}[rack.cli]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d*[1-9])?Z", newest["created"])
    assert re.fullmatch("R[A-Z]{10}", newest["id"])


def test_ten_releases_are_listed(v3: Rack) -> None:
    v3.edit(lambda app: app["releases"].extend(app["releases"] * 5))
    assert len(v3.get("/releases")) == 10
    assert len(v3.get("/releases?limit=11")) == 11


def test_a_new_release_inherits_from_the_newest_promoted_or_not(v3: Rack) -> None:
    let_run(v3, v3.releases()[0])
    done = v3.ask("env", "set", "-a", "shop", "B=2", "A=secret")
    assert re.fullmatch("Setting B, A... OK\nRelease: R[A-Z]{10}\n", done)
    release = v3.build()[1]
    assert find(v3, release)["env"] == {"A": "secret", "B": "2"}
    assert v3.ask("env", "-a", "shop") == "A=secret\nB=2\n"
    v3.ask("env", "set", "-a", "shop", "--replace", "C=3")
    assert v3.ask("env", "-a", "shop") == "C=3\n"


# --- rack.md, deploy-debug ------------------------------------------------------------


def test_deploy_debug_shows_what_crashes_now(v3: Rack) -> None:
    newest, older = v3.releases()
    let_run(v3, older)
    v3.engine_has("crash")
    process = v3.start_promote(newest)
    v3.await_app(lambda app: bool(app["pods"]) and app["pods"][0]["restarts"] > 0)
    report = v3.debug()
    [pod] = report["pods"]
    assert (pod["service"], pod["classification"], pod["ready"]) == ("web", "unhealthy", "0/1")
    assert pod["stateDetail"] == "CrashLoopBackOff: exit code 3" and pod["hint"]
    assert pod["logs"] == pod["previousLogs"] == "no database"
    assert isinstance(pod["ageSeconds"], int) and pod["restarts"] > 0
    [service] = report["overview"]["services"]
    assert (service["name"], service["status"], service["readyReplicas"]) == ("web", "deploying", 0)
    assert report["overview"]["events"][0]["reason"] == "BackOff" and "initPods" not in report
    few = v3.debug("--no-events", "--no-previous", "--service", "web", "--lines", "5")
    assert "events" not in few["overview"] and "previousLogs" not in few["pods"][0]
    assert "pods" not in v3.debug("--service", "other")
    assert "no database" in v3.ask("deploy-debug", "-a", "shop")
    v3.ask("apps", "cancel", "-a", "shop")
    v3.await_status("running")
    assert "pods" not in v3.debug()  # they are gone
    process.communicate(timeout=20)


def test_deploy_debug_shows_an_image_that_cannot_be_pulled(v3: Rack) -> None:
    v3.engine_has("no-image")
    process = v3.start_promote(v3.releases()[0])
    v3.await_app(lambda app: bool(app["pods"]))
    [pod] = v3.debug()["pods"]
    assert (pod["phase"], pod["stateDetail"]) == ("Pending", "ImagePullBackOff: manifest unknown")
    assert "logs" not in pod
    process.kill()
    process.communicate()


def test_deploy_debug_leaves_out_what_is_healthy(v3: Rack) -> None:
    assert v3.promote(v3.releases()[0])[0] == 0
    report = v3.debug()
    assert "pods" not in report and report["overview"]["services"][0]["status"] == "running"
    assert v3.debug("--all")["pods"][0]["classification"] == "healthy"


def test_a_finished_one_off_shows_as_unhealthy(v3: Rack) -> None:
    v3.ask("run", "-a", "shop", "--release", v3.releases()[0], "web", "ls")
    [pod] = v3.debug()["pods"]
    assert (pod["classification"], pod["stateDetail"]) == ("unhealthy", "Completed")


def test_a_cli_without_deploy_debug_prints_its_help(rack: Rack) -> None:
    lacks = {"CONVOX_STANDIN_LACKS": "deploy-debug"} if rack.cli == "v3" else {}
    out = rack.ask("deploy-debug", "-a", "shop", "--output", "json", **lacks)
    assert out.startswith("convox\n\nUsage:") and "deploy-debug" not in out


def test_logs_on_v3_are_of_healthy_containers(rack: Rack, unhealthy: None) -> None:
    process = rack.start_promote(rack.releases()[0])
    rack.await_app(lambda app: bool(app["pods"]))
    assert ("no database" in rack.ask("logs", "-a", "shop")) == (rack.cli == "v2")
    process.kill()
    process.communicate()


# --- rack.md, Deploy keys -------------------------------------------------------------

KEY = {"RACK_URL": BY_URL.format("deploy-key")}


@pytest.mark.parametrize(
    "line",
    ["build app", "builds", "env set --replace A=1", "logs", "rack", "releases promote R"],
)
def test_a_deploy_key_may(v3: Rack, line: str) -> None:
    words = [v3.app["releases"][-1]["id"] if word == "R" else word for word in line.split()]
    v3.ask(*words, *(["-a", "shop"] if line != "rack" else []), **KEY)
    assert v3.get(**KEY)["name"] == "shop"


@pytest.mark.parametrize(
    "line",
    [
        *("releases", "env", "env set A=1", "releases rollback R", "deploy-debug", "apps cancel"),
        *("build --external app", "releases promote", "apps info", "services"),
    ],
)
def test_a_deploy_key_may_not(v3: Rack, line: str) -> None:
    error = v3.refused(*line.split(), "-a", "shop", **KEY)
    assert error == "ERROR: operation not permitted for deploy keys\n"


def test_a_deploy_key_may_not_read_releases(v3: Rack) -> None:
    for path in ("/releases", "/releases?limit=1", "/releases/RNEWRELEASE"):
        error = v3.refused("api", "get", f"/apps/shop{path}", **KEY)
        assert error == "ERROR: operation not permitted for deploy keys\n"


# --- builds ---------------------------------------------------------------------------


def test_with_id_a_build_prints_the_release_alone(v3: Rack) -> None:
    status, out, err = v3.build()
    assert (status, out) == (0, v3.releases()[0])
    assert "Running: docker pull shop/web" in err


def test_a_build_that_fails(v3: Rack) -> None:
    v3.engine_has("no-image")
    status, out, err = v3.build()
    assert (status, out) == (1, "") and err.endswith("\nERROR: build failed\n")
    assert v3.app["builds"][-1]["status"] == "failed"


def test_a_build_warns_of_variables_that_it_drops(v3: Rack) -> None:
    release = v3.releases()[0]
    v3.edit(lambda app: app["releases"][1].update(env={"B": "2", "A": "1"}))
    v3.ask("env", "set", "-a", "shop", "--replace", "C=3")
    let_run(v3, release)
    what = "this build will drop env var(s) that are set in your running release"
    status, _, err = v3.build()
    assert status == 0 and f"WARNING: {what} {release}: A, B\n" in err
    builds = v3.app["builds"]
    status, _, err = v3.build(CONVOX_ENV_DROP_GUARD="strict")
    assert status == 1 and err.endswith(f"ERROR: {what} {release}: A, B\n")
    assert v3.app["builds"] == builds


MERGED = "x-base: &base\n  image: shop/base\nservices:\n  web:\n    <<: *base\n    port: 8080\n"


def test_merge_keys_are_dropped_in_a_convox_yml(rack: Rack) -> None:
    rack.write(MERGED)
    assert rack.build()[2].count("service web has no image") == 1


def test_merge_keys_work_in_a_compose_file_on_a_v2_rack(v2: Rack) -> None:
    name = "docker-compose.yml"
    mapping = "    build:\n      args: {A: b}\n    environment: {C: d}\n"
    v2.write(MERGED + mapping, name)
    done = v2.run("build", "-a", "shop", "--manifest", name, "app")
    assert "docker pull shop/base" in done[1] and done[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        "environment:\n  A: b\n" + MANIFEST,
        MANIFEST + "    environment:\n      A: b\n",
        MANIFEST + "    build:\n      args:\n        A: b\n",
    ],
)
def test_mappings_are_errors_in_a_convox_yml(v3: Rack, text: str) -> None:
    v3.write(text)
    builds = v3.app["builds"]
    status, _, err = v3.build()
    assert status == 1 and "cannot unmarshal !!map into []string\n" in err
    assert v3.app["builds"] == builds


def test_services_at_the_top_level_are_no_services(v3: Rack) -> None:
    assert v3.promote(v3.releases()[0])[0] == 0
    v3.write("web:\n  image: shop/web\n")
    assert v3.promote(v3.build()[1])[0] == 0
    assert v3.app["pods"] == []  # what ran has been removed


def test_a_manifest_that_is_not_valid(v3: Rack) -> None:
    v3.write(MANIFEST.replace("web:", "my_web:"))
    error = v3.build()[2]
    assert error.endswith("ERROR: validation errors:\nservice name my_web invalid\n")


def test_a_v3_build_sends_a_password_as_it_stands(v3: Rack) -> None:
    encoded = {"RACK_URL": BY_URL.format("rack%2Fpassword")}
    assert v3.ask("rack", **encoded)
    assert v3.refused("build", "-a", "shop", "app", **encoded) == "ERROR: invalid authentication\n"


def test_an_external_build_makes_two_releases(v3: Rack) -> None:
    v3.write("services:\n  web:\n    build: .\n    port: 8080\n")
    v3.write("FROM scratch\nARG KEY\nARG BUILD_APP\nARG OTHER\n", "Dockerfile")
    v3.ask("env", "set", "-a", "shop", "KEY=value")
    external = ["--external", "--description", "Sell more", "--manifest", "convox.yml"]
    release = v3.ask("build", "-a", "shop", *external, "--id", str(v3.home / "app"))
    newest, first, *_ = v3.get("/releases")
    assert newest["id"] == release and newest["build"] == first["build"]
    calls = (v3.engine / "calls").read_text()
    assert "--build-arg KEY=value --build-arg BUILD_APP=shop " in calls and "OTHER" not in calls
    assert f"push registry.sandbox/shop:web.{newest['build']}" in calls


@pytest.fixture
def exported(v3: Rack) -> Path:
    """The first build of shop in a file, and an app to import it to."""
    v3.ask("apps", "create", "other")
    v3.ask("env", "set", "-a", "other", "KEY=theirs")
    path = v3.home / "build.tgz"
    build = v3.app["builds"][0]["id"]
    assert (
        v3.ask("builds", "export", build, "-a", "shop", "-f", str(path))
        == "Exporting build... OK\n"
    )
    return path


def imports(rack: Rack, path: Path, **env: str) -> tuple[int, str, str]:
    return rack.run("builds", "import", "-a", "other", "--file", str(path), "--id", **env)


def test_a_build_is_moved_to_another_app(v3: Rack, exported: Path) -> None:
    v3.edit(lambda app: [release.update(git_sha="abc") for release in app["releases"]])
    status, out, err = imports(v3, exported)
    release = v3.apps["other"]["releases"][-1]
    assert (status, out, err) == (0, release["id"], f"Importing build... OK, {out}\n")
    assert release["manifest"] == MANIFEST and release["images"] == v3.app["releases"][0]["images"]
    assert release["env"] == {"KEY": "theirs"} and release["git_sha"] == ""
    [build] = v3.apps["other"]["builds"]
    assert (build["status"], build["release"]) == ("complete", release["id"])


def test_a_build_is_moved_through_a_pipe(v3: Rack, exported: Path) -> None:
    words = f"export {v3.app['builds'][0]['id']} -a shop | convox builds import -a other"
    pipe = f'convox() {{ "{sys.executable}" -S "{v3.program}" "$@"; }}; convox builds {words}'
    process = subprocess.run(["sh", "-c", pipe], env=v3.env, capture_output=True, text=True)
    release = v3.apps["other"]["releases"][-1]["id"]
    assert process.stdout == f"Importing build... OK, {release}\n"
    assert process.stderr == "Exporting build... OK\n"


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda whole: b"", "EOF"),
        (lambda whole: whole[:-20], "unexpected EOF"),
        (lambda whole: b"not an archive", "gzip: invalid header"),
        (lambda whole: whole[:10] + b"exit status 1\n", "flate: corrupt input before offset 1"),
    ],
)
def test_a_damaged_archive_makes_no_release(
    v3: Rack, exported: Path, damage: Callable[[bytes], bytes], error: str
) -> None:
    exported.write_bytes(damage(exported.read_bytes()))
    before = v3.apps
    assert imports(v3, exported) == (1, "", f"Importing build... ERROR: {error}\n")
    assert v3.apps == before


def test_an_export_that_loses_its_images_ends_with_ok_and_cannot_be_imported(
    v3: Rack, exported: Path
) -> None:
    (v3.state / "no-registry").touch()
    v3.ask("builds", "export", v3.app["builds"][0]["id"], "-a", "shop", "-f", str(exported))
    (v3.state / "no-registry").unlink()
    status, _, err = imports(v3, exported)
    assert status == 1 and "ERROR: flate: corrupt input" in err


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_documented_lines_deploy_nothing_without_a_whole_archive(
    v3: Rack, exported: Path, shell: str
) -> None:
    """With docs/staging-and-production.md, in a shell without pipefail."""
    _, production = documented_copy_of_a_build()
    lines = production.replace("./convox_deploy.py", "echo deploys").replace("your-app", "other")
    program = f'convox() {{ "{sys.executable}" -S "{v3.program}" "$@"; }}\n'

    def run() -> tuple[int, str]:
        command = [shell, "-ec", program + lines]
        done = subprocess.run(command, cwd=v3.home, env=v3.env, capture_output=True, text=True)
        return done.returncode, done.stdout

    status, out = run()
    release = v3.apps["other"]["releases"][-1]["id"]
    assert (status, out) == (0, f"deploys --app other --release {release}\n")
    exported.write_bytes(exported.read_bytes()[:-20])
    assert run() == (1, "")


def test_an_import_that_pushes_nothing_is_an_error_on_v2_alone(v3: Rack, exported: Path) -> None:
    (v3.state / "no-registry").touch()
    assert imports(v3, exported, CONVOX_STANDIN_CLI="v2")[0] == 1
    assert imports(v3, exported)[0] == 0
    assert v3.apps["other"]["releases"][-1]["images"] == {"web": "registry.invalid/nothing"}


def test_a_build_without_a_release_is_not_exported(rack: Rack) -> None:
    rack.edit(lambda app: app["builds"][0].update(release=""))
    path = rack.home / "build.tgz"
    build = rack.app["builds"][0]["id"]
    error = rack.refused("builds", "export", build, "-a", "shop", "--file", str(path))
    assert error.endswith(" not be empty\n") and path.read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["export"], "1 arg required"),
        (["export", "BNOSUCHBUIL"], 'builds.convox.com "bnosuchbuil" not found'),
        (["export", "BNOSUCHBUIL", "--file", "no/file"], "open no/file: no such file or directory"),
        (["import", "build.tgz"], "0 args required"),
        (["import", "--file", "no-file"], "open no-file: no such file or directory"),
    ],
)
def test_exports_and_imports_that_are_refused(v3: Rack, words: list[str], error: str) -> None:
    assert v3.refused("builds", *words, "-a", "shop").endswith(f"ERROR: {error}\n")


# --- which rack, which app ------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("convox:secret@rack.sandbox", "unsupported protocol scheme"),
        ("https://convox:secret@", "no Host"),
        ("https://convox@rack.sandbox", "no password"),
        ("https://convox:%zz@rack.sandbox", 'invalid URL escape "%zz"'),
        ("https://convox:se#cret@rack.sandbox", 'parse "https://convox:se": invalid port'),
        ("https://convox:secret@other.sandbox", "dial tcp: lookup other.sandbox: no such host"),
    ],
)
def test_a_malformed_url_never_falls_back_to_another_rack(v3: Rack, url: str, text: str) -> None:
    (v3.state / "logged-in").touch()
    error = v3.refused("rack", "--rack", "sandbox", RACK_URL=url, CONVOX_RACK="sandbox")
    assert error.startswith("ERROR: ") and text in error


def test_the_url_overrides_the_name(v3: Rack) -> None:
    assert v3.ask("rack", "--rack", "nowhere", CONVOX_RACK="nowhere")
    assert "could not find rack" in v3.refused("rack", RACK_URL="", CONVOX_RACK="nowhere")


def test_host_and_password_are_the_rack_of_v2_and_the_console_of_v3(rack: Rack) -> None:
    host = {"v2": "rack.sandbox", "v3": "console.sandbox"}[rack.cli]
    login = {"RACK_URL": "", "CONVOX_HOST": host, "CONVOX_PASSWORD": "sandbox-password"}
    named = {"CONVOX_RACK": "sandbox"} if rack.cli == "v3" else {}
    assert rack.ask("rack", **login, **named)
    wrong = {**login, "CONVOX_PASSWORD": "wrong"}
    assert rack.refused("rack", **wrong, **named) == "ERROR: invalid authentication\n"
    if rack.cli == "v3":
        assert "no current rack" in rack.refused("rack", **login)
        at_rack = {**login, "CONVOX_HOST": "rack.sandbox"}
        assert "no such host" in rack.refused("rack", **at_rack, **named)


def test_racks_are_listed(v3: Rack) -> None:
    assert "sandbox" not in v3.ask("racks")
    v3.ask("switch", "sandbox")
    assert v3.ask("racks").split() == ["NAME", "STATUS", "sandbox", "running"]


def test_the_app_comes_from_a_local_setting(rack: Rack) -> None:
    local = rack.home / {"v2": ".convox2", "v3": ".convox"}[rack.cli] / "app"
    local.parent.mkdir()
    local.write_text("shop\n")
    assert rack.ask("apps", "info").startswith("Name        shop\n")
    assert "app not found: a" in rack.refused("apps", "info", CONVOX_APP="a")
    assert "app not found: b" in rack.refused("apps", "info", "-a", "b", CONVOX_APP="a")


def test_errors_of_other_racks_come_before_an_answer_of_v3(v3: Rack) -> None:
    (v3.state / "broken-racks").write_text("err: exit status 1\n")
    assert v3.ask("api", "get", "/apps/shop").startswith('err: exit status 1\n{"name": "shop"')


# --- the stand-in that only records ---------------------------------------------------


def recorded(world: World, *args: str, cli: str = "v3") -> str:
    """Return the answer of tests/standin."""
    world.ready_standins()
    return subprocess.run(
        [world.bin / "convox", *args], env={**world.env, "CONVOX_STANDIN_CLI": cli},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_the_recording_standin_knows_when_releases_were_created(world: World) -> None:
    newest, older = json.loads(recorded(world, "api", "get", "/apps/shop/releases"))
    assert (newest["id"], older["id"]) == ("RNEWRELEASE", "ROLDRELEASE")
    for release in (newest, older):
        path = f"/apps/shop/releases/{release['id']}"
        assert json.loads(recorded(world, "api", "get", path)) == release
    other = json.loads(recorded(world, "api", "get", "/apps/shop/releases/RABCDEFGHIJ"))
    assert other["id"] == "RABCDEFGHIJ" and other["created"] > older["created"]
    assert json.loads(recorded(world, "api", "get", "/apps/shop"))["release"] == older["id"]


def test_the_recording_standin_rolls_back(world: World) -> None:
    out = recorded(world, "releases", "rollback", "--app", "shop", "ROLDRELEASE")
    assert out == "Rolling back to ROLDRELEASE... OK, RCOPYRELEAS\nPromoting RCOPYRELEAS... \nOK\n"
    assert world.running == "RCOPYRELEAS"
    words = ["releases", "rollback", "--app", "shop", "--id", "--wait", "ROLDRELEASE"]
    assert recorded(world, *words, cli="v2") == "RCOPYRELEAS"


def test_the_recording_standin_has_no_unhealthy_containers(world: World) -> None:
    report = json.loads(recorded(world, "deploy-debug", "--app", "shop", "--output", "json"))
    assert "pods" not in report and "events" not in report["overview"]
    help_of_all = recorded(world, "deploy-debug", "--app", "shop", cli="v2")
    assert help_of_all.startswith("convox\n\nUsage:")
    assert "--id" in recorded(world, "releases", "rollback", "--help")
