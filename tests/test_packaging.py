"""The wheel, and the Python versions the tool supports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, World

import convox_deploy

UV = str(Path(sys.executable).with_name("uv"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST, NEWEST = 9, 13


def python_of(version: str) -> str:
    """Return the path of that Python version. Skip the test if it is not installed."""
    places = [
        *os.environ["PATH"].split(os.pathsep),
        *map(str, Path.home().glob(".pyenv/versions/*/bin")),
    ]
    found = (shutil.which(f"python{version}", path=place) for place in places)
    for path in filter(None, found):
        if subprocess.run([path, "-c", ""], check=False).returncode == 0:
            return path
    pytest.skip(f"Python {version} is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", directory, ROOT], check=True)
    [wheel] = directory.glob("*.whl")
    return wheel


def test_the_wheel_contains_one_module_and_takes_its_version_from_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".dist-info/" not in name] == ["convox_deploy.py"]
    assert wheel.name == f"convox_deploy-{convox_deploy.__version__}-py3-none-any.whl"
    assert convox_deploy.__version__ not in PYPROJECT


def test_the_supported_python_versions_are_the_same_everywhere() -> None:
    classified = re.findall(r"Programming Language :: Python :: 3\.(\d+)", PYPROJECT)
    assert [int(minor) for minor in classified] == list(range(OLDEST, NEWEST + 1))
    assert f'requires-python = ">=3.{OLDEST}"' in PYPROJECT
    assert f'# requires-python = ">=3.{OLDEST}"' in (ROOT / "convox_deploy.py").read_text()
    assert f"Python 3.{OLDEST}+" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(OLDEST, NEWEST + 1)])
def test_the_installed_command_deploys_with_each_python_version(
    world: World, wheel: Path, tmp_path: Path, version: str
) -> None:
    python, venv = python_of(version), tmp_path / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", python, venv], check=True)
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--python", venv / "bin" / "python", wheel], check=True
    )
    ran = world.deploy(program=[venv / "bin" / "convox-deploy"], python=venv / "bin" / "python")
    assert ran.status == 0, ran.text
    assert "shop is now running RNEWRELEASE." in ran.out
