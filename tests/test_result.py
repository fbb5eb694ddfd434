"""The result file: its contents, which files it can replace, and that it is never out of date."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import DIGEST, ECR, World

SHORT_ID = "3cbf733dcc19"
OURS = '{"status": "succeeded", "tool": "convox-deploy"}'
STEPS = [
    "preflight",
    "before_build",
    "build",
    "after_build",
    "push",
    "release",
    "before_release",
    "promote",
]


def result_of(world: World, name: str = "result.json") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((world.app / name).read_text())
    return result


def test_a_success_is_recorded(world: World) -> None:
    world.add_git()
    world.add_hooks()
    assert world.deploy("--result", "result.json").status == 0
    result = result_of(world)
    seconds = result.pop("seconds")
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
        "error": "",
    }
    assert list(seconds) == STEPS and all(second >= 0 for second in seconds.values())


def test_a_failure_is_recorded(world: World) -> None:
    world.rules["docker push"] = {"status": 1, "err": "denied"}
    assert world.deploy(env={"DEPLOY_RESULT": "result.json"}).status == 1
    result = result_of(world)
    assert (result["status"], result["exit_status"], result["failed_step"]) == ("failed", 1, "push")
    assert (result["release"], result["promote_requested"], result["running"]) == ("", False, "")
    assert result["error"].startswith("`docker push` exited with code 1.")


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
    assert result["running"] == ("ROLDRELEASE" if is_promote else "")
    assert "Stopped by SIGTERM while running" in result["error"]


def test_a_preflight_problem_is_recorded(world: World) -> None:
    assert world.deploy("--result", "result.json", "--tag", "a/b").status == 2
    assert (result_of(world)["exit_status"], result_of(world)["failed_step"]) == (2, "preflight")


# --- which files it can replace -------------------------------------------------------

FOREIGN = {
    "docker-compose.yml": None,
    "Dockerfile": None,
    "deploy/before_build.sh": "#!/bin/sh\n",
    ".git/config": "[core]\n",
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
    assert f"--result {name} would replace a file that is not a result." in ran.err
    assert path.read_bytes() == before
    world.deploy("--bogus", *args, env=env)
    assert path.read_bytes() == before
    assert world.commands("docker build") == []


def test_the_tool_itself_is_never_replaced(world: World) -> None:
    path = world.write("convox_deploy.py", "print()")
    assert world.deploy("--result", path.name).status == 2
    assert path.read_text() == "print()"


@pytest.mark.parametrize("target", ["nowhere", "result.json", "/dev/null"])
def test_a_symlink_is_never_replaced(world: World, target: str) -> None:
    world.write("result.json", OURS)
    (world.app / "link").symlink_to(target)
    assert world.deploy("--result", "link").status == 2
    assert os.readlink(world.app / "link") == target
    assert (world.app / "result.json").read_text() == OURS


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


def test_a_file_that_a_hook_creates_there_is_not_replaced(world: World) -> None:
    world.write("deploy/before_build.sh", "#!/bin/sh\necho mine >result.json\n", 0o755)
    ran = world.deploy("--result", "result.json")
    assert (world.app / "result.json").read_text() == "mine\n"
    assert ran.status == 1
    assert "The result was not written: --result result.json would replace a file" in ran.err
    assert "shop is now running RNEWRELEASE." in ran.out


def test_a_result_that_cannot_be_written_does_not_hide_the_outcome(world: World) -> None:
    world.write("results/.keep", "")
    world.write("deploy/before_release.sh", "#!/bin/sh\n/bin/rm -r results\n", 0o755)
    ran = world.deploy("--result", "results/result.json")
    assert ran.status == 1
    assert "The result was not written: " in ran.err and "Traceback" not in ran.err
    assert "shop is now running RNEWRELEASE." in ran.out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system requires root")
def test_a_full_disk_leaves_no_partial_result(world: World) -> None:
    import subprocess

    (world.app / "full").mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", world.app / "full"], check=True
    )
    try:
        (world.app / "full" / "something").write_bytes(b"x" * 4096)
        ran = world.deploy("--result", "full/result.json")
        assert [path.name for path in (world.app / "full").iterdir()] == ["something"]
    finally:
        subprocess.run(["umount", world.app / "full"], check=True)
    assert ran.status == 1
    assert (
        "The result was not written: " in ran.err and "shop is now running RNEWRELEASE." in ran.out
    )


# --- never out of date ----------------------------------------------------------------

UNUSABLE: dict[str, tuple[list[str], dict[str, str | None]]] = {
    "an unknown option": (["--bogus"], {}),
    "an option of docker": (["--platform", "linux/amd64"], {}),
    "a timeout in words": ([], {"DEPLOY_TIMEOUT": "an hour"}),
    "a switch in words": ([], {"SKIP_ECR_AUTH": "perhaps"}),
    "an empty option": (["--rack", ""], {}),
    "a problem in preflight": (["--tag", "a/b"], {}),
    "an option without its value": (["--rack"], {}),
    "help for docker build": (["--bogus", "--", "--help"], {}),
}


@pytest.mark.parametrize(
    ("mistake", "how"),
    [
        *itertools.product(UNUSABLE, ["variable"]),
        *itertools.product(
            ["an unknown option", "help for docker build"], ["before", "after", "joined"]
        ),
    ],
)
def test_an_earlier_result_is_removed_even_if_the_settings_are_invalid(
    world: World, mistake: str, how: str
) -> None:
    world.write("result.json", OURS)
    args, env = UNUSABLE[mistake]
    given = ["--result=result.json"] if how == "joined" else ["--result", "result.json"]
    if how == "variable":
        env = {**env, "DEPLOY_RESULT": "result.json"}
    elif how == "after":
        where = args.index("--") if "--" in args else len(args)
        args = [*args[:where], *given, *args[where:]]
    else:
        args = [*given, *args]
    assert world.deploy(*args, env=env).status == 2
    path: Path = world.app / "result.json"
    assert not path.exists() or json.loads(path.read_text())["status"] == "failed"


@pytest.mark.parametrize(
    "args", [["--help"], ["-h"], ["--version"], ["--dry-run"], ["--dry-run", "--bogus"]]
)
def test_invocations_that_deploy_nothing_keep_the_earlier_result(
    world: World, args: list[str]
) -> None:
    world.write("result.json", OURS)
    world.deploy(*args, env={"DEPLOY_RESULT": "result.json"})
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
    assert ran.status == 2 and "Cannot write --result file/result.json." in ran.err


def test_the_name_of_a_result_can_be_as_long_as_the_file_system_allows(world: World) -> None:
    name = "r" * 255
    assert world.deploy("--result", name).status == 0
    assert (world.app / name).exists()


def test_a_result_in_a_directory_with_an_impossible_name_is_refused(world: World) -> None:
    ran = world.deploy("--result", "d" * 300 + "/result.json")
    assert ran.status == 2 and "Cannot write --result" in ran.err and "Traceback" not in ran.err


def test_an_earlier_result_is_removed_even_if_a_local_setting_cannot_be_read(world: World) -> None:
    (world.app / ".convox" / "app").mkdir(parents=True)
    world.write("result.json", '{"tool": "convox-deploy", "status": "succeeded"}')
    ran = world.deploy("--result", "result.json", env={"APP_NAME": None})
    assert ran.status == 2 and ".convox/app cannot be read" in ran.err
    assert not (world.app / "result.json").exists()


def test_a_service_and_its_init_container_are_listed_once(world: World) -> None:
    image = f"{ECR}/shop:TAG"
    world.write(
        "docker-compose.yml",
        f"services: {{web: {{image: '{image}', initContainer: {{image: '{image}'}}}}}}\n",
    )
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0 and "\nImage for web: " in ran.out
    assert [image["services"] for image in result_of(world)["images"]] == [["web"]]
