#!/usr/bin/env python3
"""Runs all tests, with all that they need set up first. Arguments go to pytest: tests/run.py -k manifest"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "sandbox"))

from bootstrap import ROOT, use_environment  # noqa: E402

if __name__ == "__main__":
    use_environment(HERE / "requirements.txt")
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], cwd=ROOT, check=False).returncode)
