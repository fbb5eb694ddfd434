"""The result file: its contents, which files it can replace, and that it is never out of date."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from typing import Any

import pytest
from conftest import DIGEST, ECR, SHORT_ID, World

from convox_deploy import STEPS

OURS = '{"status": "succeeded", "tool": "convox-deploy"}'


def result_of(world: World, name: str = "result.json") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((world.app / name).read_text())
    return result


def test_a_success_is_recorded(world: World) -> None:
    world.add_git()
    world.add_hooks()
    assert world.deploy("--result", "result.json").status == 0
    result = result_of(world)
    seconds = result.pop("seconds")
    assert 0 < result["images"][0].pop("build_seconds") <= seconds["build"]
    assert result == {
        "tool": "convox-deploy",
        "status": "succeeded",
        "exit_status": 0,
        "app": "shop",
        "release": "RNEWRELEASE",
        "running_before": "ROLDRELEASE",
        "promote_requested": True,
        "verified": True,
        "running": "RNEWRELEASE",
        "images": [
            {
                "image": world.call("docker tag").argv[-1],
                "digest": DIGEST,
                "platform": "linux/amd64",
                "services": ["web"],
            },
        ],
        "failed_step": "",
        "failed_service": "",
        "error": "",
    }
    assert list(seconds) == STEPS and all(second >= 0 for second in seconds.values())


def test_a_failure_is_recorded(world: World) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    assert world.deploy(env={"DEPLOY_RESULT": "result.json"}).status == 1
    result = result_of(world)
    assert (result["status"], result["exit_status"], result["failed_step"]) == ("failed", 1, "push")
    assert (result["release"], result["promote_requested"]) == ("", False)
    assert (result["running_before"], result["running"]) == ("ROLDRELEASE", "ROLDRELEASE")
    assert result["error"].startswith("`docker push` for web exited with code 1.")
    assert result["failed_service"] == "web"


@pytest.mark.parametrize("command", ["docker build", "convox releases promote --app"])
def test_an_interruption_is_recorded(world: World, command: str) -> None:
    world.rules[command] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM, "--result", "result.json")
    result = result_of(world)
    assert (result["status"], result["exit_status"], ran.status) == ("failed", 143, 143)
    is_promote = command != "docker build"
    assert result["failed_step"] == ("promote" if is_promote else "build")
    assert result["release"] == ("RNEWRELEASE" if is_promote else "")
    assert (result["promote_requested"], result["verified"]) == (is_promote, False)
    assert not (is_promote and result["running"])  # after a signal, the rack is not asked
    assert "Stopped by SIGTERM while running" in result["error"]


def test_a_preflight_problem_is_recorded(world: World) -> None:
    world.write("result.json", OURS)
    world.rules["docker version"] = {"status": 1}
    assert world.deploy("--result", "result.json").status == 2
    assert (result_of(world)["exit_status"], result_of(world)["failed_step"]) == (2, "preflight")


# --- which files it can replace -------------------------------------------------------

FOREIGN = {
    "docker-compose.yml": None,
    "Dockerfile": None,
    "deploy/before_build.sh": "#!/bin/sh\n",
    ".git/config": "[core]\n",
    "convox_deploy.py": "print()\n",
    "package.json": '{"name": "shop"}',
    "tool.json": '{"tool": "another"}',
    "list.json": "[1]",
    "number.json": "1",
    "text.json": '"convox-deploy"',
    "blank": "\n",
    "binary": "\x00\xff",
}


@pytest.mark.parametrize(("name", "how"), [*zip(FOREIGN, itertools.cycle(["option", "variable"]))])
def test_a_file_that_is_not_a_result_is_never_replaced(world: World, name: str, how: str) -> None:
    text = FOREIGN[name]
    path = world.app / name if text is None else world.write(name, text.encode("latin-1"), 0o755)
    before = path.read_bytes()
    args, env = (["--result", name], {}) if how == "option" else ([], {"DEPLOY_RESULT": name})
    ran = world.deploy(*args, env=env)
    assert ran.status == 2
    assert f"--result {name} would replace" in ran.err
    assert path.read_bytes() == before
    assert world.commands("docker build --tag") == []


def test_a_symlink_does_not_hide_a_file_that_is_not_a_result(world: World) -> None:
    (world.app / "result.json").symlink_to("Dockerfile")
    assert world.deploy("--result", "result.json").status == 2
    assert (world.app / "Dockerfile").read_text() == "FROM scratch\n"


def test_a_device_a_pipe_or_a_directory_is_never_replaced(world: World) -> None:
    os.mkfifo(world.app / "pipe")
    for name in ("pipe", ".", "/dev/null", "/dev/stdout"):
        assert world.deploy("--result", name).status == 2
    assert (world.app / "pipe").is_fifo()


@pytest.mark.parametrize("text", [None, "", OURS])
def test_a_result_is_written_to_a_new_file_an_empty_file_or_an_earlier_result(
    world: World, text: str | None
) -> None:
    if text is not None:
        world.write("result.json", text, 0o600)
    assert world.deploy("--result", "result.json").status == 0
    assert result_of(world)["status"] == "succeeded"


def test_a_result_that_cannot_be_written_does_not_hide_the_outcome(world: World) -> None:
    world.write("results/.keep", "")
    world.write("deploy/before_release.sh", "#!/bin/sh\n/bin/rm -r results\n", 0o755)
    ran = world.deploy("--result", "results/result.json")
    assert ran.status == 1
    assert "The result was not written: " in ran.err and "Traceback" not in ran.err
    assert "shop is now running RNEWRELEASE." in ran.out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system requires root")
def test_a_result_on_a_full_disk_does_not_hide_the_outcome(world: World) -> None:
    (world.app / "full").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(world.app / "full")]
    subprocess.run(mount, check=True)
    try:
        (world.app / "full" / "something").write_bytes(b"x" * 4096)
        ran = world.deploy("--result", "full/result.json")
    finally:
        subprocess.run(["umount", world.app / "full"], check=True)
    assert ran.status == 1
    assert "The result was not written: " in ran.err
    assert "shop is now running RNEWRELEASE." in ran.out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system requires root")
def test_an_earlier_result_that_cannot_be_removed_is_an_error(world: World) -> None:
    directory = world.app / "read-only"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        (directory / "result.json").write_text(OURS)
        subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
        ran = world.deploy("--result", "read-only/result.json")
    finally:
        subprocess.run(["umount", directory], check=True)
    assert ran.status == 2 and "Traceback" not in ran.err
    assert "--result read-only/result.json is not in an existing, writable directory." in ran.err
    assert world.calls == []


# --- never out of date ----------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h", "--version", "--dry-run"])
def test_invocations_that_deploy_nothing_keep_the_earlier_result(world: World, option: str) -> None:
    world.write("result.json", OURS)
    world.deploy(option, env={"DEPLOY_RESULT": "result.json"})
    assert (world.app / "result.json").read_text() == OURS


def test_the_earlier_result_is_removed_while_the_deploy_is_running(world: World) -> None:
    world.write("result.json", OURS)
    world.rules["docker build"] = {"hang": True}
    process = world.start("--result", "result.json")
    world.await_hanging()
    exists = (world.app / "result.json").exists()
    process.terminate()
    process.communicate(timeout=30)
    assert not exists


def test_the_digest_is_null_if_docker_draws_its_progress_on_a_terminal(world: World) -> None:
    from test_output import on_a_terminal

    on_a_terminal(world, "--result", "result.json")
    assert [image["digest"] for image in result_of(world)["images"]] == [None]
    assert result_of(world)["images"][0]["image"] == f"{ECR}/shop:{SHORT_ID}"


def test_a_result_in_a_file_instead_of_a_directory_is_refused(world: World) -> None:
    world.write("file", "")
    ran = world.deploy("--result", "file/result.json")
    assert ran.status == 2 and "--result file/result.json" in ran.err


def test_a_result_in_a_directory_with_an_impossible_name_is_refused(world: World) -> None:
    ran = world.deploy("--result", "d" * 300 + "/result.json")
    assert ran.status == 2 and "--result ddd" in ran.err and "Traceback" not in ran.err
