"""The report as a browser shows it: alone, without an error, and with something to see."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_report import content, figures, resized, shown, timed, written

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium here: apt-get install chromium"),
]


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Headless, with a profile of its own and none of the browser's own errands."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    quiet += ["--disable-default-apps", "--disable-sync", "--disable-gpu", "--no-sandbox"]
    quiet += ["--hide-scrollbars"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run(
        [BROWSER, "--headless", *quiet, profile, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section that there is."""
    folder = tmp_path_factory.mktemp("browser")
    written(folder, timed(resized(content())))
    return folder / "report.html"


def requests(log: Path) -> Iterator[str]:
    """What a page asked the network for; the browser's own errands have no page that began them."""
    for event in json.loads(log.read_text())["events"]:
        params: dict[str, Any] = event.get("params", {})
        if params.get("initiator", "not an origin") != "not an origin":
            yield params["url"]


@pytest.fixture(scope="module")
def opened(page: Path) -> tuple[str, str, list[str]]:
    """The page's DOM, the browser's console, and what it asked the network for."""
    log = page.with_name("net.json")
    options = ("--dump-dom", "--enable-logging=stderr", "--v=0", f"--log-net-log={log}")
    done = browse(page, *options)
    return done.stdout, done.stderr, list(requests(log))


def test_the_browser_says_nothing_of_the_page(opened: tuple[str, str, list[str]]):
    console = [line for line in opened[1].splitlines() if "CONSOLE" in line]
    assert console == []


def test_the_page_asks_for_nothing(opened: tuple[str, str, list[str]]):
    assert opened[2] == []


def test_the_checks_above_see_an_error_and_a_request(tmp_path: Path):
    page, log = tmp_path / "bad.html", tmp_path / "net.json"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>missing()</script>")
    done = browse(page, "--dump-dom", "--enable-logging=stderr", f"--log-net-log={log}")
    assert "CONSOLE" in done.stderr and "missing is not defined" in done.stderr
    assert list(requests(log)) == ["http://127.0.0.1:9/x.png"]


def test_every_figure_of_metrics_json_stands_on_the_opened_page(
    page: Path, opened: tuple[str, str, list[str]]
):
    text = re.sub(r"<wbr>|<svg.*?</svg>|<style.*?</style>", "", opened[0], flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", text)
    metrics = json.loads(page.with_name("metrics.json").read_text())
    missing = [name for name, value in figures(metrics) if not shown(value, text)]
    assert missing == []
    assert opened[0].count("<svg") == 6


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (500, 1600)], ids=["desk", "phone"])
def test_the_first_screen_is_readable_on_both_grounds(
    page: Path, theme: str, width: int, height: int
):
    """Text and pictures on it, on the right ground, and nothing that is wider than the screen."""
    shot = page.with_name(f"{theme}-{width}.png")
    scheme = f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    browse(page, f"--screenshot={shot}", f"--window-size={width},{height}", scheme)
    with Image.open(shot) as image:
        assert image.size == (width, height)
        grey = image.convert("L")
        ground = grey.getpixel((2, 2))
        assert isinstance(ground, int) and (ground > 240) == (theme == "light")
        counted = grey.histogram()
        inked = 1 - sum(counted[max(ground - 12, 0) : ground + 13]) / sum(counted)
        assert 0.03 < inked < 0.6
        edge = grey.crop((width - 4, 0, width, height))
        assert max(edge.getextrema()) - min(edge.getextrema()) <= 12  # pyright: ignore
