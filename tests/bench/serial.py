#!/usr/bin/env python3
"""Deploys as convox_deploy.py does, but without one overlap: serial.py preflight|lookup|push|promote [ARGS...]

What would run side by side in that step runs one after another; `lookup` asks for the repositories in the push step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Callable, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import convox_deploy as tool

T = TypeVar("T")
STEP = sys.argv.pop(1)
side_by_side, begin = tool.Commands.side_by_side, tool.Commands.begin


class Later(Future[T]):
    """Calls its task when its result is wanted."""

    def __init__(self, task: Callable[[], T]) -> None:
        super().__init__()
        self.task = task

    def result(self, timeout: float | None = None) -> T:
        return self.task()


def one_after_another(commands: tool.Commands, tasks: Iterable[Callable[[], T]]) -> list[T]:
    calls = sys._getframe(1).f_code.co_name
    return [task() for task in tasks] if calls == STEP else side_by_side(commands, tasks)


def begin_later(commands: tool.Commands, task: Callable[[], T]) -> Future[T]:
    calls = sys._getframe(1).f_code.co_name
    return Later(task) if STEP == "lookup" and calls == "begin_lookups" else begin(commands, task)


if __name__ == "__main__":
    tool.Commands.side_by_side = one_after_another  # type: ignore[method-assign, assignment]
    tool.Commands.begin = begin_later  # type: ignore[method-assign, assignment]
    tool.main()
