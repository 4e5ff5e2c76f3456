"""The page in a real browser: charts appear, hover and sorting work, nothing is fetched, nothing is logged."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foreshock.report.page import write_report
from tests.fabricate import fabricate_study

CHROMIUM = next(
    (
        found
        for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
        if name and (found := shutil.which(name))
    ),
    None,
)
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

# A browser is no Python package, so that not every machine that can run the other tests has one. `.ci/run` installs one
# where it can.
if CHROMIUM is None:
    pytest.skip(
        "the report was not opened, as no Chromium was found: put one on the PATH, or name it in CHROMIUM",
        allow_module_level=True,
    )
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: the report was not opened")

CHARTS = "[...document.querySelectorAll('.chart')]"
ALL_DRAWN = f"scheme => {CHARTS}.every(chart => chart.dataset.drawn === scheme)"

LINES = "[...document.querySelectorAll('#training_curves .mark-line path')]"
FAINT = f"{LINES}.filter(line => line.getAttribute('opacity') < 0.5)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "study"
    return write_report(
        [fabricate_study(folder, sizes=((32, 2), (64, 3)), lrs=(1e-3, 1e-2, 1e-1), steps=40)], figures=["svg"]
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The opened page; the module's last word is that it logged nothing and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.locator("#norms summary").first.click()
    page.wait_for_function(ALL_DRAWN, arg="light")
    yield page
    page.close()
    assert complaints == []
    assert requests == [report.as_uri()]


def test_every_chart_has_marks(page: Any) -> None:
    charts = page.locator(".chart").all()
    assert len(charts) == 11
    for chart in charts:
        assert chart.locator("svg.marks path[aria-roledescription='point']").count() >= 12
        assert chart.locator("svg.marks .mark-line path").count() >= 2


def test_pointing_at_a_run_shows_its_facts(page: Any) -> None:
    page.locator("#loss_vs_lr path[aria-roledescription='point']").first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    shown = tooltip.inner_text()
    for fact in ("arm", "none", "32×2 (24.6k)", "peak LR", "0.001", "outcome", "held-out loss", "max attention logit"):
        assert fact in shown


def test_pointing_at_a_curve_follows_the_run_in_every_panel(page: Any) -> None:
    curves = page.locator("#training_curves")
    assert page.evaluate(f"{FAINT}.length") == 0
    curves.locator("path[aria-roledescription='point']").nth(3).hover()
    page.locator("#vg-tooltip-element.visible").wait_for()
    shown = page.locator("#vg-tooltip-element").inner_text()
    assert "step" in shown
    assert "64×3 (147k)" in shown
    assert "undefined" not in shown
    lines = curves.locator(".mark-line path").count()
    assert page.evaluate(f"{FAINT}.length") == lines - 3  # one run, in three rows of panels


def test_clicking_a_learning_rate_isolates_it(page: Any) -> None:
    lines = page.locator("#training_curves .mark-line path").count()
    rate = page.locator("#training_curves .role-legend-label text", has_text="0.01").first
    rate.click()
    page.mouse.move(0, 0)
    page.wait_for_function(f"() => {FAINT}.length === {lines * 2 // 3}")  # two of three learning rates
    page.locator("#training_curves svg.marks").dblclick(position={"x": 300, "y": 40})
    page.mouse.move(0, 0)
    page.wait_for_function(f"() => {FAINT}.length === 0")


def test_choosing_a_size_redraws_the_curves(page: Any) -> None:
    points = page.locator("#training_curves path[aria-roledescription='point']")
    page.locator("#training_curves select").select_option("32×2 (24.6k)")
    page.wait_for_timeout(200)
    assert "32×2" in points.first.get_attribute("aria-label")


def column(page: Any, index: int) -> list[str]:
    return [text.strip() for text in page.locator(f"#run-table tbody td:nth-child({index})").all_inner_texts()]


def test_sorting_by_number_with_mouse_and_keyboard(page: Any) -> None:
    heading = page.locator("#run-table thead th", has_text="Peak LR")
    index = 1 + page.locator("#run-table thead th").all_inner_texts().index(heading.inner_text())
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    rates = [float(text) for text in column(page, index)]
    assert rates == sorted(rates)
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in column(page, index)] == rates[::-1]


def test_sorting_counts_with_separators_by_value(page: Any) -> None:
    page.locator("#run-table thead th", has_text="N").first.locator("button").click()
    sizes = [int(text.replace(",", "")) for text in column(page, 3)]
    assert sizes == [24_576] * 6 + [147_456] * 6


def test_filtering_by_words(page: Any) -> None:
    box = page.locator("#filter")
    box.fill("qk_norm 64x3")
    assert page.locator("#run-table tbody tr:visible").count() == 3
    assert page.locator("#shown").inner_text() == "3 of 12 runs"
    box.fill("")
    assert page.locator("#run-table tbody tr:visible").count() == 12


def test_dark_scheme_redraws_the_charts(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(ALL_DRAWN, arg="dark")
    background = page.locator("#loss_vs_lr svg.marks").evaluate("svg => getComputedStyle(svg).backgroundColor")
    assert background == "rgb(22, 26, 32)"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(ALL_DRAWN, arg="light")


def test_narrow_window_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function(
        "[...document.querySelectorAll('.chart')].every(chart => Math.abs(chart.clientWidth - chart.dataset.width) < 5)"
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    wide = "[...document.querySelectorAll('.chart')].filter(chart => chart.scrollWidth > chart.clientWidth)"
    assert page.evaluate(f"{wide}.map(chart => chart.dataset.chart)") == []
    page.set_viewport_size({"width": 1280, "height": 900})


def test_run_table_fits_a_usual_window(page: Any) -> None:
    table = page.locator("section#runs .scroll")
    assert table.evaluate("box => box.scrollWidth - box.clientWidth") <= 0


# Waits for colours: while a chart is drawn anew its menu has none.
MENU_STYLE = """() => {
    const menu = document.querySelector("#loss_vs_lr summary"), icon = menu && menu.querySelector("svg");
    if (!icon) return false;
    const { opacity, backgroundColor: ground } = getComputedStyle(menu), ink = getComputedStyle(icon).stroke;
    return [ink, ground].every((colour) => colour.startsWith("rgb")) && { opacity, ink, ground };
}"""


def test_menu_of_a_chart_stands_out(page: Any) -> None:
    """WCAG 2.1 asks 3:1 of controls."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(ALL_DRAWN, arg=scheme)
        style = page.wait_for_function(MENU_STYLE).json_value()
        assert style["opacity"] == "1"
        assert contrast(style["ink"], style["ground"]) >= 3
    page.emulate_media(color_scheme="light")
    page.wait_for_function(ALL_DRAWN, arg="light")


def contrast(one: str, other: str) -> float:
    """Contrast of two CSS colours (WCAG 2.1)."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_legends_of_a_figure_as_a_file_do_not_overlap(browser: Any, report: Path) -> None:
    """In whatever fonts this machine has: their widths need not be those that the writer measured."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((report.parent / "figures" / "overview.svg").as_uri())
    boxes = page.evaluate(
        "[...document.querySelectorAll('.role-legend-title text, .role-legend-label text, .role-legend-symbol path')]"
        ".map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
    )
    page.close()
    assert len(boxes) >= 12
    for (left, top, right, bottom), other in itertools.combinations(boxes, 2):
        beside = right <= other[0] or other[2] <= left
        above = bottom <= other[1] + 1.5 or other[3] <= top + 1.5  # boxes of text have room for accents
        assert beside or above


def test_many_arms_show_some_panels_and_others_when_chosen(browser: Any, tmp_path: Path) -> None:
    """Nothing is drawn of an arm not chosen; choosing redraws every chart; a fold is drawn when opened."""
    arms = ("none", *(f"optim.weight_decay={i}.0" for i in range(1, 9)))
    study = fabricate_study(tmp_path / "s", arms=arms, sizes=((32, 2),), lrs=(1e-2, 1e-1), steps=20)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_report([study]).as_uri())
    unfolded = f"() => {CHARTS}.filter(c => !c.closest('.fold')).every(c => c.dataset.drawn)"
    page.wait_for_function(unfolded)
    titles = "svg.marks .role-title text"
    assert page.locator(f"#loss_vs_lr {titles}").count() == 6
    assert page.locator(f"#training_curves {titles}").count() == 18
    assert page.locator("#norms_update_vs_lr svg.marks").count() == 0
    page.locator("#arms > summary").click()
    page.locator("#arms [data-choose=none]").click()
    page.locator("#arms label", has_text="optim.weight_decay=7").click()
    page.wait_for_function(
        "() => document.querySelectorAll('#training_curves svg.marks .role-title text').length === 3"
    )
    assert page.locator(f"#loss_vs_lr {titles}").all_text_contents() == ["optim.weight_decay=7"]
    assert page.locator("#arms output").inner_text() == "1 of 9 arms"
    page.evaluate("location.hash = '#norms'")
    page.wait_for_function(f"() => {CHARTS}.every(c => c.dataset.drawn)")
    assert page.locator(f"#norms_update_vs_lr {titles}").all_text_contents() == ["optim.weight_decay=7"]
    page.close()
    assert complaints == []
