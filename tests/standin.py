"""Apply the test's rules to a call of a stand-in: standin.py STANDIN ARGUMENTS...

STANDIN is the path the stand-in was called by. It has already recorded the call, and gives the usual response if
a rule asks for it. This runs a thousand times, so it imports nothing that takes longer than all the rest.
"""

from __future__ import annotations

import marshal
import os
import signal
import sys
import time

TYPE_CHECKING = __name__ != "__main__"
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypedDict

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
        ignore_term: bool | str  # what it says then
        child: bool | str  # is left behind; or "ignores TERM"
        daemon: bool | str  # is left behind; or "keeps writing"
        hang: bool
        signal: int  # that ends it
        status: int


HOME = os.environ.get("STANDIN", "")
STANDIN, *WORDS = sys.argv[1:] or [""]
RELEASE = "/releases/R"
COMMAND = " ".join([os.path.basename(STANDIN).partition(".")[0], *WORDS])


def in_home(name: str) -> str:
    return os.path.join(HOME, name)


def calls_of(start: str) -> int:
    with open(in_home("calls"), errors="replace") as calls:
        records = calls.read().split("\x1e")[:-1]
    lines = [" ".join(record.split("\x1f")[3:]) for record in records]
    if RELEASE not in start:
        lines = without_descriptions(lines)
    return sum(line.startswith(start) for line in lines)


def without_descriptions(lines: list[str]) -> list[str]:
    """Leave out the first reading of each release that runs: it is only for its description."""
    first = {line: number for number, line in reversed([*enumerate(lines)])}
    return [
        line
        for number, line in enumerate(lines)
        if first[line] != number or not is_reading_of_what_runs(line)
    ]


def is_reading_of_what_runs(line: str) -> bool:
    name = line.rpartition(RELEASE)[2]
    return RELEASE in line and name.startswith(("OLDRELEASE", "OTHER", "THEIR"))


def is_turn(start: str, rule: Rule) -> bool:
    """Return True if the rule applies to this call: to every call, to the nth, or to all from the nth on."""
    calls = calls_of(start)
    return bool(rule.get("number", calls) == calls and rule.get("since", 0) <= calls)


def rule_for_words(rule: Rule) -> Rule:
    for word, own in rule.get("words", {}).items():
        if word in WORDS:
            return own
    return {}


def await_other(what: str, has_happened: Callable[[], bool]) -> None:
    """Wait for another command to do something. Exit if it does not, because the two are not running in parallel."""
    deadline = time.monotonic() + 20
    while not has_happened():
        if time.monotonic() > deadline:
            sys.exit(f"{COMMAND}: timed out waiting for {what}")
        time.sleep(0.01)


def announce(name: str) -> None:
    """Write our process ID to the pipe the test is waiting on. The pipe buffers it until then."""
    descriptor = os.open(in_home(name), os.O_RDWR)
    os.set_inheritable(descriptor, False)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    open(in_home(f"{name}.noted"), "w").close()


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
        open(in_home(rule["lock"]), "x").close()
        time.sleep(0.2)  # long enough for another call to find the lock
        os.unlink(in_home(rule["lock"]))
    if "environment" in rule:
        text = "".join(f"{name}={value}\n" for name, value in os.environ.items())
        print(text)
        print(text, file=sys.stderr)
    if "once" in rule:
        times = rule.get("times", 1)
        await_other(rule["once"], lambda: calls_of(rule["once"]) >= times)
    if "once_one_hangs" in rule:
        await_other("a command that hangs", lambda: os.path.exists(in_home("hanging.noted")))
    if "pause" in rule:
        time.sleep(rule["pause"])
    for _ in range(rule.get("ticks", 0)):
        print("progress", file=sys.stderr, flush=True)
        time.sleep(0.1)
    sys.stderr.buffer.write(bytes(rule.get("bytes", [])))
    for stream, text in ((sys.stdout, rule.get("out", "")), (sys.stderr, rule.get("err", ""))):
        stream.buffer.write(text.encode("utf-8", "surrogatepass"))
        stream.flush()


def write_whole(path: str, text: str) -> None:
    """Write a file at once: a deploy may kill us at any moment, and a test reads what is there."""
    part = f"{path}.{os.getpid()}"
    with open(part, "w") as file:
        file.write(text)
    os.rename(part, path)


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def spawn(argv: list[str], env: Mapping[str, str] = os.environ, **how: Any) -> int:
    """Start a program that dies of a broken pipe, although Python ignores it. Return its process ID."""
    return os.posix_spawn(argv[0], argv, env, setsigdef=[signal.SIGPIPE], **how)


def say_and_go_on(what: object) -> None:
    if isinstance(what, str):
        print(what, file=sys.stderr, flush=True)
    announce("termed")


def leave_behind(rule: Rule) -> None:
    if rule.get("ignore_term"):
        signal.signal(signal.SIGTERM, lambda *_: say_and_go_on(rule["ignore_term"]))
    if rule.get("child"):
        ignores = "trap '' TERM; " if rule["child"] == "ignores TERM" else ""
        write_whole(in_home("child"), str(spawn(shell(f"{ignores}exec /bin/sleep 600"))))
    if rule.get("daemon"):
        writer = "while :; do echo more >&2; /bin/sleep 0.01; done"
        script = writer if rule["daemon"] == "keeps writing" else "exec /bin/sleep 600"
        write_whole(in_home("daemon"), str(spawn(shell(script), setsid=True)))


def respond_as_usual(how: object) -> None:
    """Let the stand-in respond: `silent` without printing anything, `idle` without doing anything."""
    env = {**os.environ, "STANDIN_USUAL": "1", "STANDIN_IDLE": "1" if how == "idle" else ""}
    files = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    response = spawn([STANDIN, *WORDS], env, file_actions=files if how == "silent" else [])
    if status := os.waitstatus_to_exitcode(os.waitpid(response, 0)[1]):
        sys.exit(status)


def main() -> None:
    with open(in_home("rules.marshal"), "rb") as file:
        rules: dict[str, Rule] = marshal.load(file)
    is_for_description = is_reading_of_what_runs(COMMAND) and calls_of(COMMAND) == 1
    for start, rule in rules.items():
        if is_for_description and RELEASE not in start:
            continue
        if COMMAND.startswith(start) and is_turn(start, rule):
            turns = rule.get("sequence") or [{}]
            turn = turns[min(calls_of(start), len(turns)) - 1]
            disturb(rule_for_words(rule) or {**rule, **turn})


if __name__ == "__main__":
    try:  # noqa: SIM105 (contextlib takes longer to import than the rest)
        main()
    except BrokenPipeError:
        pass  # the reader wants no more
    os.execve(STANDIN, [STANDIN, *WORDS], {**os.environ, "STANDIN_USUAL": "1", "STANDIN_IDLE": ""})
