"""A process that has loaded what a run needs, and forks one child a run.

    python -m foreshock.study.launchers.fork_server WORKER MODULE,MODULE,… [COMMAND …]

Requests come on stdin, one JSON object a line: {"start": key, "folder": …, "log": …, "env": {…}} or
{"terminate": key}. Results go to stdout: {"key": key, "code": exit code, negative for a signal}. When stdin closes,
the study is gone or done: children are asked to checkpoint, and the server ends after them.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn


class Server:
    """Children by key, and the pipe that results go to."""

    def __init__(self, worker: str, results: int) -> None:
        self.worker = worker
        self.results = results
        self.children: dict[int, int] = {}

    def handle(self, request: dict[str, Any]) -> None:
        """Do what one line of stdin asks for."""
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                self.run_child(request)
            self.children[pid] = request["start"]
        else:
            for pid, key in self.children.items():
                if key == request["terminate"]:
                    os.kill(pid, signal.SIGTERM)

    def run_child(self, request: dict[str, Any]) -> NoReturn:
        """Be a worker: own process group, own log, no trace of the server."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self.results)
            log = os.open(os.path.join(request["folder"], request["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.environ.update(request["env"])
            code = importlib.import_module(self.worker).main(request["folder"])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # no clean-up of the server's objects in its child

    def reap(self, *, wait: bool = False) -> None:
        """Report every child that has ended; with `wait`, every child there is."""
        while self.children:
            pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            if pid == 0:
                return
            result = {"key": self.children.pop(pid), "code": os.waitstatus_to_exitcode(status)}
            with suppress(BrokenPipeError):  # the study is gone; its successor reads the run's folder
                os.write(self.results, json.dumps(result).encode() + b"\n")

    def end(self) -> None:
        """Ask the children to checkpoint, and wait for them."""
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)
        self.reap(wait=True)


def requests(server: Server) -> Iterator[dict[str, Any]]:
    """Lines of stdin until it closes; meanwhile, children are reaped as soon as they end."""
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    partial = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if wake_read in ready:
                os.read(wake_read, 1 << 12)
                server.reap()
            if 0 in ready:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    return
                *lines, partial = (partial + chunk).split(b"\n")
                yield from map(json.loads, lines)


def main(worker: str, modules: str, *command: str) -> int:
    """Load the worker and what its runs need, then serve until stdin closes."""
    for module in (worker, *filter(None, modules.split(","))):
        importlib.import_module(module)
    gc.freeze()  # children then share these pages with the server
    # Whatever prints must not write among the results.
    results = os.dup(1)
    os.dup2(2, 1)
    sys.argv = list(command)  # a run's record names the command that a person gave
    server = Server(worker, results)
    for request in requests(server):
        server.handle(request)
    server.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
