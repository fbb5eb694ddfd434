"""The file itself: how it starts, its Python versions and modules, and that only a bug shows a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import ROOT, TOOL, World

import convox_deploy

TRAP = 'import os\nos.write(2, b"the app\'s own module was imported\\n")\nos._exit(99)\n'


def test_the_help_shows_each_option_with_its_variable_and_default(world: World) -> None:
    text = " ".join(world.deploy("--help").out.split()).replace("docker- compose", "docker-compose")
    for parameter in convox_deploy.main.params:
        if isinstance(parameter, click.Option) and parameter.name != "version":
            [option] = [name for name in parameter.opts if name.startswith("--")]
            shown = f" {option} {parameter.metavar or ''}".rstrip()
            about = text.rpartition(f"{shown} ")[2].partition(" --")[0]
            assert shown in text, option
            variables = list(parameter.envvar or [])
            if variables != [f"DEPLOY_{option[2:].replace('-', '_').upper()}"]:
                assert ", ".join(variables) in about, option
    for default in ("the directory name", "convox.yml or docker-compose.yml", "60", "4"):
        assert f"default: {default}]" in text or f"or {default}]" in text, default
    for option in ("[-- DOCKER_BUILD_ARGS...]", "--version"):
        assert option in text


def test_the_help_fits_on_a_screen_and_begins_with_the_options_of_every_day(world: World) -> None:
    lines = world.deploy("--help", env={"COLUMNS": "200"}).out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    rare = lines.index("Rare, or for CI:")
    for option in ("--app", "--dry-run", "--no-promote", "--release", "--rollback"):
        assert any(re.search(rf" {option}\b", line) for line in lines[:rare]), option


# --- the app's own modules ------------------------------------------------------------


def modules() -> list[str]:
    """Return the names of all modules that a deploy imports, and of the complete standard library."""
    return sorted({*sys.stdlib_module_names, "click", "sh", "yaml"} - {"sys"})


@pytest.mark.parametrize(
    "how", ["python convox_deploy.py", "./convox_deploy.py", "python lib/../convox_deploy.py"]
)
def test_the_apps_own_modules_are_never_imported(world: World, how: str) -> None:
    shutil.copy(TOOL, world.app)
    (world.app / "lib").mkdir()
    for name in modules():
        if not name.startswith("__"):
            world.write(f"{name}.py", TRAP)
    (world.bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (world.bin / "python3").chmod(0o755)
    program = how.split()[-1]
    command = [sys.executable, program] if how.startswith("python") else [program]
    world.ready_standins()
    ran = subprocess.run(
        command, cwd=world.app, env=world.env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "shop is now running RNEWRELEASE." in ran.stdout
    assert not any("PYTHONSAFEPATH" in call.env for call in world.calls)


@pytest.mark.parametrize("option", ["-P", "-I"])
def test_it_starts_in_isolated_and_safe_path_mode(option: str) -> None:
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("-P requires Python 3.11")
    done = subprocess.run(
        [sys.executable, option, TOOL, "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_zipapp_finds_its_bundled_libraries(tmp_path: Path) -> None:
    import zipapp

    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(TOOL, source / "__main__.py")
    for package in ("click", "sh", "yaml"):
        module = __import__(package)
        shutil.copytree(Path(str(module.__file__)).parent, source / package)
    zipapp.create_archive(source, tmp_path / "tool.pyz")
    command = [sys.executable, "-S", str(tmp_path / "tool.pyz"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "version" in done.stdout, done.stderr


# --- other Python versions and missing packages ---------------------------------------


def run_without_packages(
    directory: Path, *command: str, path: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the tool in a directory. uv is there only if `path` has it."""
    return subprocess.run(
        [sys.executable, "-S", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={"PATH": path or str(directory)},
    )


def test_missing_packages_are_reported_with_ways_to_install_them(tmp_path: Path) -> None:
    done = run_without_packages(tmp_path, str(TOOL))
    assert done.returncode == 2
    first, *ways = done.stderr.splitlines()
    why = "No module named 'click'"
    assert first == f"convox_deploy.py cannot import a Python package: {why}. Use one of these:"
    # both work with Debian's externally managed Python
    assert [way.split()[0] for way in ways] == ["uv", "python3"]


def test_a_package_that_is_there_and_cannot_be_imported_is_not_called_missing(
    tmp_path: Path,
) -> None:
    (tmp_path / "click.py").write_text("from enum import Nothing\n")
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, TOOL], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot import a Python package: cannot import name 'Nothing' from 'enum'" in done.stderr


def test_the_command_for_a_virtual_environment_names_all_packages(tmp_path: Path) -> None:
    shutil.copy(TOOL, tmp_path)
    done = run_without_packages(tmp_path, TOOL.name)
    way = done.stderr.splitlines()[2].strip()
    assert way == (
        "python3 -m venv .venv && .venv/bin/pip install click sh PyYAML && .venv/bin/python convox_deploy.py"
    )


def test_it_hands_over_to_uv_once_if_packages_are_missing(tmp_path: Path) -> None:
    """With the same arguments, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    shutil.copy(TOOL, tmp_path / "bin" / "deploy")
    again = f'echo "$@" >> asked; shift 2; exec {sys.executable} -S "$@"'
    (tmp_path / "uv").write_text(f"#!/bin/sh\n{again}\n")
    (tmp_path / "uv").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = run_without_packages(tmp_path, "bin/deploy", "--app", "a b", path=path)
    assert (tmp_path / "asked").read_text() == "run --script bin/deploy --app a b\n"
    assert done.returncode == 2 and "cannot import a Python package" in done.stderr


def test_hooks_do_not_see_that_uv_has_taken_over(world: World) -> None:
    world.add_hooks("before_release")
    assert world.deploy(env={convox_deploy.BY_UV: "1"}, real=True).status == 0
    assert convox_deploy.BY_UV not in world.call("before_release").env


def test_the_docstring_contains_nothing_that_a_shell_would_run() -> None:
    """`sh convox_deploy.py` would run it."""
    docstring = TOOL.read_text().split('"""')[1]
    assert "`" not in docstring and "$(" not in docstring


def test_the_file_and_the_package_declare_the_same_dependencies() -> None:
    inline = re.search(r"^# dependencies = (\[.*\])$", TOOL.read_text(), re.MULTILINE)
    package = re.search(
        r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert inline and package and json.loads(inline[1]) == json.loads(package[1])


@pytest.mark.parametrize("how", ["itself", "python", "uv", "hand-over", "console script"])
def test_it_runs_in_every_way_the_readme_describes(how: str) -> None:
    commands = {
        "itself": [str(TOOL)],
        "python": [sys.executable, str(TOOL)],
        "uv": ["uv", "run", "--quiet", "--no-project", str(TOOL)],
        "hand-over": [sys.executable, "-S", str(TOOL)],  # to uv
        "console script": ["convox-deploy"],
    }
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    program = shutil.which(commands[how][0], path=path)
    assert program, f"{commands[how][0]} is not installed"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(
        [program, *commands[how][1:], "--version"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert re.search(r"version \d+\.\d+\.\d+(\.dev\d+)?$", done.stdout.strip()), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads signals from /proc")
def test_a_deploy_that_the_tests_fork_is_as_one_that_is_really_started(world: World) -> None:
    look = "export -p; pwd; umask; /bin/grep -E 'Sig(Blk|Ign|Cgt)' /proc/$PPID/status"
    world.write("deploy/before_build.sh", f"#!/bin/sh\n{look}\n", 0o755)
    seen = []
    for is_real in (False, True):
        ran = world.deploy("--no-promote", real=is_real)
        assert ran.status == 0, ran.text
        [step] = re.findall(
            r"before_build\n(.*)\n==> build", re.sub(r"before_build: .*\n", "", ran.out), re.DOTALL
        )
        seen.append((re.sub("deploy-[0-9a-f]{8}", "deploy-...", step), ran.err))
    assert "SigIgn" in seen[0][0] and seen[0] == seen[1]


# --- tracebacks -----------------------------------------------------------------------


@pytest.mark.parametrize("debug", [None, "1"])
def test_a_bug_prints_its_traceback_at_once_and_is_in_the_result(
    world: World, debug: str | None
) -> None:
    """There is no DEPLOY_DEBUG to set before one has met it."""
    bug = """
import sys, convox_deploy
def bug(self, image):
    raise KeyError("a bug\\nof two lines")
convox_deploy.Docker.build = bug
convox_deploy.main()
"""
    ran = world.deploy(
        "--result",
        "result.json",
        program=["-c", bug],
        env={"DEPLOY_DEBUG": debug, "PYTHONPATH": str(ROOT)},
    )
    assert ran.status == 1
    text, _, end = ran.err.partition("\nbuild failed:\n")
    assert text.startswith("Traceback (most recent call last):\n") and ", in bug\n" in text
    assert text.count("Traceback") == 1 and text.endswith("KeyError: 'a bug\\nof two lines'\n\n")
    assert end.startswith(
        "Unexpected KeyError: 'a bug\\nof two lines'. This is a bug in convox_dep"
    )
    assert "Please report it with the traceback.\nNothing was released or promoted." in end
    result = json.loads((world.app / "result.json").read_text())
    assert (result["status"], result["failed_step"]) == ("failed", "build")
    assert "Traceback" not in result["error"] and "This is a bug" in result["error"]
    assert world.commands("convox releases promote --app") == [] and world.nothing_is_left()


def test_a_deleted_working_directory_does_not_cause_a_traceback(world: World) -> None:
    gone = world.home / "gone"
    gone.mkdir()
    world.ready_standins()
    command = f'cd {gone} && rmdir {gone} && exec "$@"'
    env = {**world.env, "PATH": f"{world.bin}:/usr/bin:/bin"}
    done = subprocess.run(
        ["/bin/sh", "-c", command, "sh", sys.executable, TOOL],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "bug" not in done.stderr
    assert done.stderr.endswith("\nNothing has been changed.\n")
