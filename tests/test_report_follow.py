"""The report that follows runs: what is served, to whom, when it is written again, and how it ends."""

import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from foreshock.cli.main import main
from foreshock.core.errors import ConfigError, RunFolderError
from foreshock.core.run_folder import RunFolder
from foreshock.report import follow as following
from foreshock.report.follow import Server, edition, follow
from foreshock.report.page import write_report
from tests.fabricate import Planned, Planted, fabricate_study, plausible

PAGE = "<html><body>one</body></html>"


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.edition = edition(PAGE, refreshing=True)
        yield server


# The page


def test_only_the_page_that_is_served_has_the_script() -> None:
    first, other = edition(PAGE, refreshing=True), edition(PAGE.replace("one", "two"), refreshing=True)
    served = first.page.decode()
    script = served[served.index("<script") : served.index("</script>") + len("</script>\n")]
    assert served.replace(script, "") == PAGE
    assert f'data-version="{first.version}"' in script
    assert first.version != other.version
    assert first == edition(PAGE, refreshing=True)


def test_the_last_page_is_as_it_was_written_and_is_another_version() -> None:
    last = edition(PAGE, refreshing=False)
    assert last.page.decode() == PAGE
    assert last.version != edition(PAGE, refreshing=True).version  # so that open pages load it, and ask no more


# The server


def test_the_page_and_its_version_are_answered(server: Server) -> None:
    assert server.edition is not None
    assert ask(server, "/") == (200, server.edition.page.decode())
    assert ask(server, "/version") == (200, server.edition.version)


@pytest.mark.parametrize(
    "path", ["/report.html", "/.", "/../", "/version/", "/?", "/favicon.ico", "/etc/passwd", "/%2e%2e/", "*"]
)
def test_nothing_else_is_there(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "NONSENSE"])
@pytest.mark.parametrize("path", ["/", "/version"])
def test_nothing_but_get_is_answered(server: Server, method: str, path: str) -> None:
    assert ask(server, path, method)[0] == 404


def test_a_name_that_is_made_to_point_here_is_not_answered(server: Server) -> None:
    port = server.server_address[1]
    assert ask(server, "/", Host="evil.example")[0] == 404
    assert ask(server, "/", Host=f"evil.example:{port}")[0] == 404
    assert ask(server, "/", Host="localhost:9999")[0] == 200  # through a tunnel


def test_before_the_first_page_there_is_nothing() -> None:
    with Server() as server:
        assert ask(server, "/")[0] == ask(server, "/version")[0] == 404


def test_it_listens_at_the_loopback_address_alone(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):  # another address of this machine
        socket.create_connection(("127.0.0.2", server.server_address[1]), timeout=5)


def test_a_port_that_cannot_be_had_is_refused(server: Server) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        Server(server.server_address[1])
    with pytest.raises(ConfigError, match="must be from 0 to 65535"):
        Server(65536)


# Following


def begun(run: Planned) -> Planted:
    return replace(plausible(run), status="running", steps=20)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return fabricate_study(tmp_path / "s", sizes=((32, 2),), lrs=(1e-2,), arms=("none",), steps=40, plant=begun)


class Followed:
    """A study that is followed in a thread, with a page that counts how often it was written."""

    def __init__(self, study: Path, page: Path) -> None:
        (run,) = (study / "runs").iterdir()
        self.folder, self.page, self.writes = RunFolder(run), page, 0
        self.failing = False
        self.servers: list[Server] = []
        self.announced: list[str] = []
        self.error: Exception | None = None
        self.there, self.attempted = threading.Event(), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._follow, args=([study],))

    def _follow(self, dirs: list[Path]) -> None:
        try:
            follow(dirs, self._write, self._announce)
        except Exception as error:
            self.error = error
        self.there.set()

    def _write(self) -> Path:
        self.attempted.release()
        if self.failing:
            raise RunFolderError("in between")
        self.writes += 1
        self.page.write_text(f"<body>{len(self.folder.metrics())} rows, writing {self.writes}</body>")
        return self.page

    def _announce(self, url: str) -> None:
        self.announced.append(url)
        self.there.set()

    def ask(self, path: str) -> str:
        connection = http.client.HTTPConnection(self.announced[0].removeprefix("http://").rstrip("/"), timeout=10)
        connection.request("GET", path)
        body = connection.getresponse().read().decode()
        connection.close()
        return body

    def begin(self) -> None:
        self.thread.start()
        assert self.there.wait(10)
        assert self.attempted.acquire(timeout=10)

    def append(self) -> None:
        self.folder.append_metrics({"step": 21, "loss/train": 1.0})
        self.folder.close()


@pytest.fixture
def followed(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followed]:
    for name in ("PERIOD", "REWRITE", "LINGER"):
        monkeypatch.setattr(following, name, 0.02)
    followed = Followed(study, tmp_path / "report.html")
    followed.begin()
    yield followed
    followed.failing = False
    followed.folder.write_status("done", step=40)
    followed.thread.join(10)
    assert not followed.thread.is_alive()


def test_a_row_makes_another_version(followed: Followed) -> None:
    version = followed.ask("/version")
    before = len(followed.folder.metrics())
    followed.append()
    assert followed.attempted.acquire(timeout=10)
    while followed.ask("/version") == version:
        pass
    assert f"{before + 1} rows, writing 2" in followed.ask("/")
    assert "<script" in followed.ask("/")
    assert "<script" not in followed.page.read_text()


def test_a_sign_of_life_writes_nothing(followed: Followed) -> None:
    for step in range(20):
        followed.folder.write_status("running", step=step)
    assert not followed.attempted.acquire(timeout=0.5)
    assert followed.writes == 1


def test_a_page_that_cannot_be_made_for_a_moment_is_made_at_the_next_look(followed: Followed) -> None:
    followed.failing = True
    followed.append()
    assert followed.attempted.acquire(timeout=10)
    assert followed.attempted.acquire(timeout=10)
    assert followed.writes == 1
    followed.failing = False
    assert followed.attempted.acquire(timeout=10)
    while followed.writes < 2:
        assert followed.thread.is_alive()


def test_it_ends_with_the_last_run_after_a_last_page(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LINGER", 1.0)
    followed.append()
    followed.folder.write_status("failed", step=21)
    while not followed.ask("/version").endswith("-last"):
        pass
    assert followed.ask("/") == followed.page.read_text()
    followed.thread.join(10)
    assert not followed.thread.is_alive()
    assert followed.error is None
    with pytest.raises(OSError, match="refused"):
        followed.ask("/")


def test_a_last_page_that_cannot_be_made_is_an_error(followed: Followed) -> None:
    followed.failing = True
    followed.folder.write_status("done", step=40)
    followed.thread.join(10)
    assert isinstance(followed.error, RunFolderError)


# The command


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "8000"], "belongs to --follow"),
        (["--follow", "--port", "http"], "--port: cannot read 'http'"),
        (["--follow", "--port", "-1"], "must be from 0 to 65535"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], said: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", str(study), *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (study / "report.html").exists()


def test_following_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert run("report", str(tmp_path / "nowhere"), "--follow") == 2
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_with_130_and_leaves_the_page(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", interrupt)
    assert run("report", str(study), "--follow") == 130
    assert "follows the runs" in capsys.readouterr().err
    assert "data-version" not in (study / "report.html").read_text()


@pytest.mark.slow
def test_of_finished_runs_it_is_the_report(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (study / "runs").iterdir()
    RunFolder(folder).write_status("done", step=20, loss_held_out=2.0)
    assert run("report", str(study), "--follow", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 1
    assert (study / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_an_open_page_loads_the_next_version_where_it_was(study: Path) -> None:
    chromium = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM") or "chromium", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium was found: put one on the PATH, or name it in CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    content = write_report([study]).read_text()
    with Server() as server, sync_api.sync_playwright() as playwright:
        server.edition = edition(content, refreshing=True)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(server.url)
        drawn = "[...document.querySelectorAll('.chart')].some(chart => chart.dataset.drawn)"
        page.wait_for_function(drawn)
        page.locator("#norms summary").first.click()
        page.locator("#filter").fill("nothing such")
        page.wait_for_timeout(1000)
        page.evaluate("scrollTo(0, 1500)")
        server.edition = edition(content.replace("<h1>", "<h1>Anew: "), refreshing=True)
        page.wait_for_function("document.querySelector('h1').textContent.startsWith('Anew')")
        page.wait_for_function("scrollY === 1500")
        assert page.locator("#norms details").first.get_attribute("open") is not None
        assert page.locator("#filter").input_value() == "nothing such"
        assert page.locator("#shown").inner_text() == "0 of 1 runs"
        server.edition = edition(content, refreshing=False)
        page.wait_for_function("!document.querySelector('h1').textContent.startsWith('Anew')")
        assert page.evaluate("document.querySelectorAll('script[data-version]').length") == 0
        browser.close()
