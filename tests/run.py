#!/usr/bin/env python3
"""Install everything the tests need and run them. Arguments are passed to pytest: tests/run.py -k manifest

The complete suite runs in parallel. A selection by -k or by file runs in a single process, which starts faster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "sandbox"))

from bootstrap import ROOT, use_environment  # noqa: E402

if __name__ == "__main__":
    use_environment(HERE / "requirements.txt")
    is_selection = any(
        word.startswith("-k") or os.path.exists(word.partition("::")[0]) for word in sys.argv[1:]
    )
    workers = (
        2 * (os.cpu_count() or 1) + 1
    )  # many tests wait, and one worker runs the sandbox tests
    parallel = [] if is_selection else [f"--numprocesses={workers}", "--dist=loadscope"]
    command = [sys.executable, "-m", "pytest", *parallel, *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)
