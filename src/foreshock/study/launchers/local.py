"""Runs on this machine: one process a run, so many side by side.

On Linux a worker is forked from a server that has torch loaded, elsewhere it is a process of its own; the first
saves the second or two that importing torch costs every run. multiprocessing's own fork server is not used: it
imports the user's main module again, which breaks scripts without a main guard and notebooks.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foreshock.core.run_config import RuntimeConfig
from foreshock.study import machine
from foreshock.study.launchers.base import Handle, RunSpec

WORKER = "foreshock.tasks._worker"
"""Module whose `main(folder)` does a run."""
PRELOADED = ("torch", "torch._dynamo", "foreshock.training.run")
"""What a fork server loads for all runs; torch's optimizers import torch._dynamo when they are built."""
LOG = "log.txt"
"""File of the run folder that a worker's output is appended to."""
CLOSE_TICK = 0.02
"""Seconds between looks at workers that are to end."""


class LocalLauncher:
    """Starts workers on this machine; a context manager."""

    def __init__(
        self,
        slots: int,
        *,
        devices: Sequence[str] = (),
        fork: bool = sys.platform == "linux",
        worker: str = WORKER,
        preload: Sequence[str] = PRELOADED,
    ) -> None:
        """Prepare `slots` slots; slot i sees only CUDA device `devices[i % len(devices)]` where devices are given."""
        self._slots = slots
        self._devices = devices
        self._worker, self._preload = worker, ",".join(preload)
        self._taken: dict[int, Handle] = {}
        self._servers = [_Server(worker, self._preload)] if fork else []

    @property
    def slots(self) -> int:
        """How many runs may be in progress at once."""
        return self._slots

    def submit(self, spec: RunSpec) -> Handle:
        """Start a run in the first free slot."""
        slot = next(i for i in range(self._slots) if i not in self._taken or self._taken[i].poll() is not None)
        env = {"CUDA_VISIBLE_DEVICES": self._devices[slot % len(self._devices)]} if self._devices else {}
        handle = self._fork(spec, env) if self._servers else _start_process(self._worker, spec.folder, env)
        self._taken[slot] = handle
        return handle

    def close(self) -> None:
        """Ask what is still running to checkpoint and exit, and wait until it has."""
        for handle in self._taken.values():
            handle.terminate()
        while any(handle.poll() is None for handle in self._taken.values()):
            time.sleep(CLOSE_TICK)
        for server in self._servers:
            server.close()

    def _fork(self, spec: RunSpec, env: dict[str, str]) -> Handle:
        if not self._servers[-1].alive():  # its orphans are still asked about by their handles
            self._servers.append(_Server(self._worker, self._preload))
        return self._servers[-1].start(spec.folder, env)

    def __enter__(self) -> "LocalLauncher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def on_this_machine(slots: int, runtime: RuntimeConfig, preload: Sequence[str] = ()) -> LocalLauncher:
    """A launcher for runs that compute as `runtime` says and import these modules too, on the devices there are."""
    devices = machine.cuda_devices() if runtime.device == "cuda" else ()
    return LocalLauncher(slots, devices=devices, preload=(*PRELOADED, *preload))


def worker_environment() -> dict[str, str]:
    """This process's environment, such that a worker finds the same modules and starts no idle threads."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # A thread pool that numpy starts on import would be lost in a fork.
    return {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class _Process:
    """A worker that is a process of its own."""

    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        self.process.terminate()


def _start_process(worker: str, folder: Path, env: dict[str, str]) -> _Process:
    with (folder / LOG).open("ab") as log:
        return _Process(
            subprocess.Popen(
                [sys.executable, "-P", "-m", worker, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment() | env,
                start_new_session=True,  # Ctrl-C in the terminal is the study's to handle
            )
        )


@dataclass(frozen=True)
class _Forked:
    """A worker forked by the server."""

    server: "_Server"
    key: int

    def poll(self) -> int | None:
        return self.server.exit_code(self.key)

    def terminate(self) -> None:
        self.server.terminate(self.key)


class _Server:
    """The study's end of `fork_server`."""

    def __init__(self, worker: str, preload: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "foreshock.study.launchers.fork_server", worker, preload, *sys.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is the study's to handle
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._results = self._process.stdin, self._process.stdout
        os.set_blocking(self._results.fileno(), False)
        self._folders: list[Path] = []
        self._exit_codes: dict[int, int] = {}
        self._partial = b""

    def alive(self) -> bool:
        return self._process.poll() is None

    def start(self, folder: Path, env: dict[str, str]) -> _Forked:
        key = len(self._folders)
        self._folders.append(folder)
        self._send({"start": key, "folder": str(folder.absolute()), "log": LOG, "env": env})
        return _Forked(self, key)

    def terminate(self, key: int) -> None:
        if key not in self._exit_codes:
            self._send({"terminate": key})

    def exit_code(self, key: int) -> int | None:
        alive = self.alive()  # asked before reading: what a dead server still wrote is then there to read
        *lines, self._partial = (self._partial + self._read()).split(b"\n")
        for line in lines:
            result = json.loads(line)
            self._exit_codes[result["key"]] = result["code"]
        if not alive and key not in self._exit_codes:
            self._blame_server(key)
        return self._exit_codes.get(key)

    def close(self) -> None:
        if not self._folders:
            self._process.terminate()  # it may still be importing torch, for nothing
        with suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._results.close()
        self._errors.close()

    def _send(self, request: dict[str, object]) -> None:
        with suppress(BrokenPipeError):  # a server that died shows in `exit_code`
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def _read(self) -> bytes:
        try:
            return os.read(self._results.fileno(), 1 << 16)
        except BlockingIOError:
            return b""

    def _blame_server(self, key: int) -> None:
        """Say in the run's log what the server's end was, and take its exit code for the run's."""
        self._errors.seek(0)
        with (self._folders[key] / LOG).open("ab") as log:
            log.write(self._errors.read() + b"\nthe process that workers are forked from ended\n")
        self._exit_codes[key] = self._process.returncode or 1
