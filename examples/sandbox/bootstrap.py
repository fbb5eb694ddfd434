"""Run a script with its Python dependencies, in a virtual environment inside this repository."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = os.path.exists("/etc/debian_version") and shutil.which("apt-get") is not None


def use_environment(requirements: Path) -> None:
    """Restart the calling script in .sandbox/<name>, a virtual environment with the packages in `requirements`.

    Return if the script is already running there. The environment is created on first use, which needs
    network access.
    """
    home = ROOT / ".sandbox" / requirements.parent.name
    if Path(sys.prefix) == home:
        return
    stamp = home / "fingerprint"
    current = fingerprint(requirements)
    if not stamp.exists() or stamp.read_text() != current:
        create_environment(home, requirements)
        stamp.write_text(current)
    python = str(home / "bin" / "python")
    os.execv(python, [python, *sys.argv])


def fingerprint(requirements: Path) -> str:
    """Return a fingerprint of everything the environment depends on. A change means a new environment."""
    files = [
        requirements,
        ROOT / "pyproject.toml",
        ROOT / "examples" / "sandbox" / "requirements.txt",
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return f"{sys.version}\n{digest}\n"


def create_environment(home: Path, requirements: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        if not DEBIAN or os.geteuid() != 0:
            sys.exit(
                "Python's venv module is missing. Install it (on Debian: apt-get install python3-venv)."
            )
        install_packages("python3-venv")
    print(
        f"Installing Python packages ({requirements.relative_to(ROOT)}) into {home.relative_to(ROOT)} ...",
        flush=True,
    )
    shutil.rmtree(home, ignore_errors=True)
    pip = [
        str(home / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [*pip, "--editable", str(ROOT), "--requirement", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\n`{' '.join(command)}` failed.")


def install_packages(*packages: str) -> None:
    """Install Debian packages as root, without starting their services."""
    print(
        f"Installing Debian packages: {', '.join(packages)} (not removed afterwards) ...",
        flush=True,
    )
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (
            ["apt-get", "update"],
            ["apt-get", "install", "--yes", "--no-install-recommends", *packages],
        ):
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                sys.exit(f"{done.stdout}{done.stderr}\n`{' '.join(command)}` failed.")
    finally:
        if ours:
            policy.unlink()
