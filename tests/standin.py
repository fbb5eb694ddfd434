"""Apply the test's rules to a call of a stand-in: standin.py STANDIN ARGUMENTS...

STANDIN is the path the stand-in was called by. It has already recorded the call, and gives the usual response if
a rule asks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict


class Rule(TypedDict, total=False):
    """What a test makes of a command, for each call, for one, or for all from one on."""

    number: int  # of the only call it applies to
    since: int  # number of the first call it applies to
    sequence: list[Rule]  # one for each call, the last one for all others
    words: dict[str, Rule]  # for calls with that argument, instead
    lock: str  # a file that no two calls may hold at the same time
    environment: bool  # print it
    once: str  # another command has started
    times: int  # as often as this
    once_one_hangs: bool
    pause: float  # seconds before anything is printed
    ticks: int  # lines that are printed one after another
    bytes: list[int]
    out: str
    err: str
    usual: bool | str  # respond as usual, too; or "silent" or "idle"
    ignore_term: bool
    child: bool | str  # is left behind; or "ignores TERM"
    daemon: bool | str  # is left behind; or "keeps writing"
    hang: bool
    signal: int  # that ends it
    status: int


HOME = Path(os.environ.get("STANDIN", ""))
STANDIN, *WORDS = sys.argv[1:] or [""]
COMMAND = " ".join([Path(STANDIN).stem, *WORDS])


def calls_of(start: str) -> int:
    records = (HOME / "calls").read_text(errors="replace").split("\x1e")[:-1]
    return sum(" ".join(record.split("\x1f")[3:]).startswith(start) for record in records)


def is_turn(start: str, rule: Rule) -> bool:
    """Return True if the rule applies to this call: to every call, to the nth, or to all from the nth on."""
    calls = calls_of(start)
    return bool(rule.get("number", calls) == calls and rule.get("since", 0) <= calls)


def rule_for_words(rule: Rule) -> Rule:
    for word, own in rule.get("words", {}).items():
        if word in WORDS:
            return own
    return Rule()


def await_other(what: str, has_happened: Callable[[], bool]) -> None:
    """Wait for another command to do something. Exit if it does not, because the two are not running in parallel."""
    deadline = time.monotonic() + 20
    while not has_happened():
        if time.monotonic() > deadline:
            sys.exit(f"{COMMAND}: timed out waiting for {what}")
        time.sleep(0.01)


def announce(name: str) -> None:
    """Write our process ID to the pipe the test is waiting on. The pipe buffers it until then."""
    descriptor = os.open(HOME / name, os.O_RDWR)
    os.set_inheritable(descriptor, False)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    (HOME / f"{name}.noted").touch()


def disturb(rule: Rule) -> None:
    """Apply the rule, in this order: wait, print, respond as usual, leave children behind, hang, exit."""
    print_first(rule)
    if rule.get("usual"):
        respond_as_usual(rule["usual"])
    leave_behind(rule)
    if rule.get("hang"):
        announce("hanging")
        while True:
            signal.pause()
    if "signal" in rule:
        os.kill(os.getpid(), rule["signal"])
    sys.exit(rule.get("status", 0))


def print_first(rule: Rule) -> None:
    if "lock" in rule:
        (HOME / rule["lock"]).touch(exist_ok=False)
        time.sleep(0.2)  # long enough for another call to find the lock
        (HOME / rule["lock"]).unlink()
    if "environment" in rule:
        text = "".join(f"{name}={value}\n" for name, value in os.environ.items())
        print(text)
        print(text, file=sys.stderr)
    if "once" in rule:
        times = rule.get("times", 1)
        await_other(rule["once"], lambda: calls_of(rule["once"]) >= times)
    if "once_one_hangs" in rule:
        await_other("a command that hangs", (HOME / "hanging.noted").exists)
    if "pause" in rule:
        time.sleep(rule["pause"])
    for _ in range(rule.get("ticks", 0)):
        print("progress", file=sys.stderr, flush=True)
        time.sleep(0.1)
    sys.stderr.buffer.write(bytes(rule.get("bytes", [])))
    for stream, text in ((sys.stdout, rule.get("out", "")), (sys.stderr, rule.get("err", ""))):
        stream.buffer.write(text.encode("utf-8", "surrogatepass"))
        stream.flush()


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: a deploy may kill us at any moment, and a test reads what is there."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.rename(path)


def leave_behind(rule: Rule) -> None:
    if rule.get("ignore_term"):
        signal.signal(signal.SIGTERM, lambda *_: announce("termed"))
    if rule.get("child"):
        ignores = "trap '' TERM; " if rule["child"] == "ignores TERM" else ""
        child = subprocess.Popen(["/bin/sh", "-c", f"{ignores}exec /bin/sleep 600"])
        write_whole(HOME / "child", str(child.pid))
    if rule.get("daemon"):
        writer = ["/bin/sh", "-c", "while :; do echo more >&2; /bin/sleep 0.01; done"]
        program = writer if rule["daemon"] == "keeps writing" else ["/bin/sleep", "600"]
        daemon = subprocess.Popen(program, start_new_session=True)
        write_whole(HOME / "daemon", str(daemon.pid))


def respond_as_usual(how: object) -> None:
    """Let the stand-in respond: `silent` without printing anything, `idle` without doing anything."""
    env = {**os.environ, "STANDIN_USUAL": "1", "STANDIN_IDLE": "1" if how == "idle" else ""}
    output = subprocess.DEVNULL if how == "silent" else None
    done = subprocess.run([STANDIN, *WORDS], env=env, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        rules: dict[str, Rule] = json.loads((HOME / "rules.json").read_text())
        for start, rule in rules.items():
            if COMMAND.startswith(start) and is_turn(start, rule):
                turns = rule.get("sequence") or [Rule()]
                turn = turns[min(calls_of(start), len(turns)) - 1]
                disturb(rule_for_words(rule) or {**rule, **turn})
    os.execve(STANDIN, [STANDIN, *WORDS], {**os.environ, "STANDIN_USUAL": "1", "STANDIN_IDLE": ""})
