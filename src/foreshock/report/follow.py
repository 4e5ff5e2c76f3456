"""The report of runs that go on: written again while they do, and served to this machine alone."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files as resources
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread
from typing import Any

from foreshock.analysis.live_run import ENDED
from foreshock.analysis.metrics import FoundRun, find_runs, not_started
from foreshock.core.errors import ConfigError, UserError, require

LOOPBACK = "127.0.0.1"
"""The only address that is listened at."""
PERIOD = 1.0
"""Seconds between looks at the folders."""
REWRITE = 3.0
"""Seconds between the end of one writing and the next, at least."""
REST = 3.0
"""The same, in multiples of what the last writing took: the page must not slow down the runs it shows."""
LINGER = 5.0
"""Seconds in which open pages may fetch the last version: more than twice their period."""
_HOSTS = {LOOPBACK, "localhost"}


@dataclass(frozen=True, kw_only=True)
class Edition:
    """What is served at a time."""

    page: bytes
    """The page, as HTML."""
    version: str
    """Changes with the page."""


def edition(content: str, *, refreshing: bool) -> Edition:
    """The page that is served for one that was written.

    Args:
        content: the self-contained page.
        refreshing: whether it is given the script that loads the next version.
    """
    version = hashlib.sha256(content.encode()).hexdigest()[:16]
    if not refreshing:
        return Edition(page=content.encode(), version=f"{version}-last")
    script = resources("foreshock.report").joinpath("templates/follow.js").read_text()
    before, _, after = content.rpartition("</body>")
    return Edition(
        page=f'{before}<script data-version="{version}">\n{script}</script>\n</body>{after}'.encode(), version=version
    )


class Server(ThreadingMixIn, TCPServer):
    """Answers GET of `/` and `/version` on the loopback address, and nothing else."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        """Listen.

        Args:
            port: the port; 0 for a free one.

        Raises:
            ConfigError: it cannot be had.
        """
        require(0 <= port < 2**16, "--port", "must be from 0 to 65535", port)
        self.edition: Edition | None = None
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port} cannot be listened at ({error.strerror}); choose another, or leave it out"
            ) from error
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "foreshock", ""
    timeout = 10.0

    def do_GET(self) -> None:
        """The page, or its version."""
        answers = {}
        if (served := self.server.edition) is not None:
            answers = {"/": (served.page, "text/html"), "/version": (served.version.encode(), "text/plain")}
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.path not in answers or host not in _HOSTS:  # another name is a site that had itself resolved to here
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content, kind = answers[self.path]
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Whatever is not answered is not there."""
        with suppress(ConnectionError):
            super().send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def follow(dirs: Sequence[Path], write: Callable[[], Path], announce: Callable[[str], None], port: int = 0) -> None:
    """Write a page again and again while runs go on, and serve it; returns when all of them have ended.

    A page that cannot be made while folders change under it is made at the next look.

    Args:
        dirs: what the page is of: study folders or run folders.
        write: writes the page and returns where it is.
        announce: is told the address once the page is there.
        port: the port to listen at; 0 for a free one.

    Raises:
        UserError: the first page or the last cannot be made.
        ConfigError: the port cannot be had.
    """
    with Server(port) as server:
        over, seen = _state(dirs)
        due = _publish(server, write, refreshing=not over)
        announce(server.url)
        if over:
            return
        while not over:
            time.sleep(PERIOD)
            with suppress(UserError, OSError):
                over, found = _state(dirs)
                if found != seen and not over and time.monotonic() >= due:
                    due = _publish(server, write, refreshing=True)
                    seen = found
        _publish(server, write, refreshing=False)
        time.sleep(LINGER)


def _publish(server: Server, write: Callable[[], Path], *, refreshing: bool) -> float:
    """Write the page and serve it; returns when, by the monotonic clock, it may be written again."""
    begun = time.monotonic()
    server.edition = edition(write().read_text(encoding="utf-8"), refreshing=refreshing)
    ended = time.monotonic()
    return ended + max(REWRITE, REST * (ended - begun))


def _state(dirs: Sequence[Path]) -> tuple[bool, object]:
    """Whether all runs have ended, and what changes with what a page would say."""
    found = find_runs(list(dirs))
    statuses = [run.folder.status()["status"] for run in found]
    over = set(statuses) <= ENDED and not not_started(found)
    return over, [(run.run_id, status, *_sizes(run)) for run, status in zip(found, statuses, strict=True)]


def _sizes(run: FoundRun) -> list[tuple[int, int] | None]:
    """Length and time of each log; the status is left out, which says every second that a run is alive."""
    sizes: list[tuple[int, int] | None] = []
    for name in ("metrics.jsonl", "events.jsonl"):
        try:
            facts = (run.folder.path / name).stat()
        except OSError:
            sizes.append(None)
        else:
            sizes.append((facts.st_size, facts.st_mtime_ns))
    return sizes
