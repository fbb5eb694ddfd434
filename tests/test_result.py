"""The result file: its contents, which files it can replace, and that it is never out of date."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
from typing import Any

import pytest
from conftest import COMPOSE, DIGEST, ECR, SHORT_ID, STEPS, World

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
    "quoting.json": '{"note": "such as \\"tool\\": \\"convox-deploy\\""}',
    "nesting.json": '{"name": "shop", "deploy": {"tool": "convox-deploy", "status": "failed"}}',
    "list-of-results.json": '[{"tool": "convox-deploy"}]',
    "cut.json": '{"tool": "convox-deploy", "status": ',
    "notes.md": 'A result contains "tool": "convox-deploy".',
    "deep.json": "[" * 100_000,
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
    assert ran.status == 2 and "Traceback" not in ran.err
    assert f"--result {name} would replace a file that is not a result." in ran.err
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
    assert len(world.commands("docker image rm")) == 1


def test_a_result_that_cannot_be_written_changes_no_other_exit_code(world: World) -> None:
    world.write("results/.keep", "")
    world.write("deploy/after_build.sh", "#!/bin/sh\n/bin/rm -r results\n", 0o755)
    world.rules["docker push"] = {"hang": True}
    ran = world.deploy_and_signal(signal.SIGTERM, "--result", "results/result.json")
    assert ran.status == 143
    assert "push failed:\nStopped by SIGTERM" in ran.err
    assert "The result was not written: results/result.json" in ran.err
    assert len(world.commands("docker image rm")) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system requires root")
def test_a_result_on_a_full_disk_does_not_hide_the_outcome(world: World) -> None:
    (world.app / "full").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(world.app / "full")]
    subprocess.run(mount, check=True)
    try:
        (world.app / "full" / "something").write_bytes(b"x" * 4096)
        ran = world.deploy("--result", "full/result.json")
        left = os.listdir(world.app / "full")
    finally:
        subprocess.run(["umount", world.app / "full"], check=True)
    assert ran.status == 1 and left == ["something"]
    assert "The result was not written: " in ran.err
    assert "shop is now running RNEWRELEASE." in ran.out


@pytest.mark.parametrize("how", ["succeeds", "fails"])
def test_a_directory_that_is_gone_hides_nothing_of_the_end(world: World, how: str) -> None:
    """A hook removes the app's directory. Only a result elsewhere can be written then."""
    status = 1 if how == "fails" else 0
    script = f'#!/bin/sh\n/bin/rm -r "$PWD"\nexit {status}\n'
    for result, is_written in (("result.json", False), (str(world.home / "result.json"), True)):
        world.app.mkdir(exist_ok=True)
        world.write("Dockerfile", "FROM scratch\n")
        world.write("docker-compose.yml", COMPOSE)
        world.write("deploy/before_release.sh", script, 0o755)
        (world.home / "calls").write_text("")
        ran = world.deploy("--result", result)
        assert ran.status == (status if is_written else 1), ran.text
        assert "Traceback" not in ran.text
        assert ("The result was not written: result.json" in ran.err) == (not is_written)
        if how == "fails":
            assert "before_release failed:\n" in ran.err and "--release RNEW" in ran.err
        else:
            assert "shop is now running RNEW" in ran.out
        assert len(world.commands("docker image rm")) == 1
    assert json.loads((world.home / "result.json").read_text())["exit_status"] == status


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
def test_an_output_that_is_closed_hides_nothing_else_of_the_end(world: World, stream: str) -> None:
    world.rules["docker push"] = {"hang": True}
    process = world.start("--result", "result.json")
    world.await_hanging()
    for name in ("stdout", "stderr") if stream == "both" else (stream,):
        getattr(process, name).close()
    process.terminate()
    err = process.stderr.read() if stream == "stdout" and process.stderr else ""
    assert process.wait(timeout=30) == 143
    result = result_of(world)
    assert (result["status"], result["exit_status"]) == ("failed", 143)
    assert result["failed_step"] == "push"
    assert stream != "stdout" or "push failed:\nStopped by SIGTERM" in err
    assert len(world.commands("docker image rm")) == 1


def test_an_output_that_is_closed_at_the_end_of_a_success_hides_no_result(world: World) -> None:
    world.rules["convox releases promote --app"] = {"pause": 1, "usual": "silent"}
    process = world.start("--result", "result.json")
    assert process.stdout and process.stderr
    for line in process.stdout:
        if "releases promote" in line:
            break
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=30) == 0
    assert (result_of(world)["status"], result_of(world)["verified"]) == ("succeeded", True)
    assert len(world.commands("docker image rm")) == 1


@pytest.mark.parametrize("locale", ["C", "POSIX", "tr_TR.ISO-8859-9"])
def test_a_locale_that_cannot_print_hides_nothing_of_the_end(world: World, locale: str) -> None:
    (world.home / "repositories").write_text("123456789012/shop\n")  # or it would be tried again
    world.rules["docker push"] = {"status": 1, "err": "denied: \u65e5\u672c \U0001f6a2\n"}
    env = {"LANG": locale, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = world.deploy("--result", "result.json", env=env, encoding="utf-8")
    assert ran.status == 1 and "push failed:\n" in ran.err
    assert ran.text.count("denied: \u65e5\u672c \U0001f6a2\n") == 1  # as it came, not in the end
    assert "denied: \u65e5\u672c \U0001f6a2" in result_of(world)["error"]
    assert len(world.commands("docker image rm")) == 1


def test_an_argument_that_is_too_long_is_said_in_the_systems_words(world: World) -> None:
    ran = world.deploy("--description", "x" * 200_000, "--result", "result.json")
    assert ran.status == 1
    assert "release failed:\nCannot run convox: Argument list too long.\n" in ran.err
    assert result_of(world)["error"] == "Cannot run convox: Argument list too long."
    assert len(world.commands("docker image rm")) == 1


@pytest.mark.parametrize("limit", [8, 9, 10])
def test_too_few_descriptors_are_said_in_the_systems_words(world: World, limit: int) -> None:
    limits = resource.RLIMIT_NOFILE, (limit, limit)
    process = world.start("--result", "result.json", preexec_fn=lambda: resource.setrlimit(*limits))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and "Traceback" not in err
    assert "preflight failed:\n" in err and ": Too many open files.\n" in err
    assert (world.app / "result.json").exists() or "The result was not written: " in err
    assert list(world.app.glob("result.json.*")) == []


def test_a_cleanup_that_fails_hides_nothing_of_the_end(world: World) -> None:
    world.rules["docker image rm"] = {"status": 1, "err": "Error: conflict\n"}
    ran = world.deploy("--result", "result.json")
    assert ran.status == 0, ran.text
    assert result_of(world)["status"] == "succeeded" and ran.err == ""
    assert "shop is now running RNEWRELEASE." in ran.out


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_nothing_is_left_beside_the_result(world: World, outcome: str) -> None:
    """It is written beside its place, and renamed once it is whole."""
    world.write("results/other", "")
    if outcome == "failure":
        world.rules["docker push"] = {"status": 1, "err": "denied"}
    world.deploy("--result", "results/result.json")
    assert sorted(os.listdir(world.app / "results")) == ["other", "result.json"]
    assert result_of(world, "results/result.json")["app"] == "shop"


def test_a_directory_in_the_place_of_the_result_is_kept_and_nothing_is_left_beside_it(
    world: World,
) -> None:
    script = "#!/bin/sh\n/bin/mkdir -p results/result.json\n"
    world.write("results/other", "")
    world.write("deploy/before_release.sh", script, 0o755)
    ran = world.deploy("--result", "results/result.json")
    assert ran.status == 1 and "The result was not written: " in ran.err
    assert sorted(os.listdir(world.app / "results")) == ["other", "result.json"]


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
    assert "Error: --result read-only/result.json: Read-only file system.\n" in ran.err
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


def test_a_deploy_that_is_killed_leaves_no_result(world: World) -> None:
    world.write("result.json", OURS)
    world.rules["docker build"] = {"hang": True}
    process = world.start("--result", "result.json")
    world.await_hanging()
    process.kill()
    process.wait()
    assert [name for name in os.listdir(world.app) if name.startswith("result")] == []


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
