"""A process that has imported what a deploy imports, and forks for each one: imports are two thirds of its CPU time.

The first half runs in the tests, the second one in the server: forkserver.py DIRECTORY DESCRIPTOR
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


class Server:
    """Starts deploys for one process that runs tests. It ends with that process."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        """Start a server that imports the tool from a directory. The variables are for the interpreter."""
        ours, its = socket.socketpair()
        self.connection = ours
        words = [__file__, str(directory), str(its.fileno())]
        with its:
            self.process = subprocess.Popen(
                [sys.executable, *words], env=env, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL
            )

    def close(self) -> None:
        self.connection.close()
        self.process.wait()

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> tuple[int, int]:
        """Run a program in a new process. Return its ID and a pipe from which its status can be read once it has ended."""
        report, write_end = os.pipe()
        data = json.dumps(request).encode()
        size = len(data).to_bytes(8, "big")
        socket.send_fds(self.connection, [size], [*descriptors, write_end])
        os.close(write_end)
        self.connection.sendall(data)
        return int(os.read(report, 8)), report


class Forked(subprocess.Popen[Any]):
    """A process that is a child of the server. To the tests, it looks like one of ours."""

    def __init__(self, server: Server, program: str, args: list[str], **how: Any) -> None:
        self.server, self.program = server, program
        super().__init__(args, **how)

    def _execute_child(self, args: Any, *given: Any) -> None:  # called by __init__
        cwd, env = given[4:6]
        pipes = {"stdin": given[9:11], "stdout": given[12:10:-1], "stderr": given[14:12:-1]}
        its = [number if end < 0 else end for number, (end, _) in enumerate(pipes.values())]
        request = {"program": self.program, "argv": args, "cwd": str(cwd), "env": env}
        self.pid, self.report = self.server.fork(request, its)
        self._child_created = True
        self._close_pipe_fds(*given[9:15])  # type: ignore[attr-defined]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.report], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(os.read(self.report, 8)))
            os.close(self.report)
        return self.returncode


# --- the server -----------------------------------------------------------------------


def await_request(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request. Return it, in a process that is as one that has just been started for it."""
    while True:
        size, descriptors, _, _ = socket.recv_fds(connection, 8, 4)
        if not size:
            os._exit(0)
        with connection.makefile("rb", buffering=0) as stream:
            data = b""
            while len(data) < int.from_bytes(size, "big"):
                data += stream.read(int.from_bytes(size, "big") - len(data)) or b""
        *streams, report = descriptors
        if os.fork() == 0:
            connection.close()
            if (pid := os.fork()) == 0:
                os.close(report)
                request: dict[str, Any] = json.loads(data)
                become(request, streams)
                return request
            os.write(report, b"%8d" % pid)
            for descriptor in streams:
                os.close(descriptor)
            os.write(report, b"%8d" % os.waitpid(pid, 0)[1])
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Change what differs between the server and a new process."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["argv"]]


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    import convox_deploy  # noqa: F401

    del sys.modules["convox_deploy"]  # it is to be imported again, with the variables of the deploy
    gc.freeze()  # what is there need not be looked at again, and stays shared
    exec(await_request(socket.socket(fileno=int(sys.argv[2])))["program"], {"__name__": "__main__"})
