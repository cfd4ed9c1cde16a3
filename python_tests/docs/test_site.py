"""The site is built without a warning, and looked at in a browser where Chromium is installed."""

import functools
import html
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Made by Sphinx, not written.
INDICES = {"genindex.html", "py-modindex.html", "search.html"}
# One colour a theme: the page's own background.
COLOURS = {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 20, 22)"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the site, and what the build said."""
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    process = subprocess.run(
        [*command, "docs", str(folder / "html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return folder / "html", process.stderr


def test_the_site_is_built_without_a_warning(built):
    assert [line for line in built[1].splitlines() if line.strip()] == []


def test_equations_are_rendered_and_nothing_is_fetched(built):
    text = (built[0] / "how_it_works.html").read_text()
    assert text.count("<math") >= 15
    assert "\\lVert" not in text
    for page in built[0].rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert fetched == [], page


class Tables(html.parser.HTMLParser):
    """The rows of each table, and whether it stands in a fold."""

    def __init__(self):
        super().__init__()
        self.folds, self.found = 0, []

    def handle_starttag(self, tag, attributes):
        self.folds += tag == "details"
        if tag == "table" and "docutils" in (dict(attributes).get("class") or ""):
            self.found.append([0, self.folds > 0])
        if tag == "tr" and self.found:
            self.found[-1][0] += 1

    def handle_endtag(self, tag):
        self.folds -= tag == "details"


def test_a_table_of_more_than_15_rows_is_folded(built):
    folded = 0
    for page in built[0].glob("*.html"):
        tables = Tables()
        tables.feed(page.read_text())
        assert tables.folds == 0, f"{page.name} leaves a fold open"
        for rows, is_folded in tables.found:
            assert is_folded == (rows - 1 > 15), f"{page.name}: a table of {rows - 1} rows"
            folded += is_folded
    assert folded >= 5


@pytest.fixture(scope="module")
def seen(built):
    """What look.html found, and what the browser wrote on its console."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: the site was not looked at")
    pages = sorted(str(path.relative_to(built[0])) for path in built[0].rglob("*.html"))
    pages = [page for page in pages if page not in INDICES and not page.startswith("_")]
    assert len(pages) > 30
    shutil.copy(Path(__file__).with_name("look.html"), built[0])
    handler = functools.partial(QuietHandler, directory=str(built[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/look.html?search=stochastic&pages={','.join(pages)}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
        command = [CHROMIUM, *options, "--virtual-time-budget=200000", "--dump-dom", url]
        process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        server.shutdown()
    found = re.search(r'<pre id="results">(.+?)</pre>', process.stdout, re.DOTALL)
    assert found, process.stdout[-2000:] + process.stderr[-2000:]
    console = [line for line in process.stderr.splitlines() if "CONSOLE" in line]
    results = json.loads(html.unescape(found[1]))
    assert len(results["looks"]) == 4 * len(pages)
    return results, console


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_no_page_scrolls_sideways_on_a_phone_or_a_desktop(seen):
    assert [look for look in seen[0]["looks"] if look["scrolls"] > 0] == []


def test_light_and_dark_are_what_they_are_called(seen):
    assert [look for look in seen[0]["looks"] if look["colour"] != COLOURS[look["theme"]]] == []


def test_the_search_finds_a_page(seen):
    assert any(path.startswith("how_it_works.html") for path in seen[0]["found"])


def test_the_console_is_empty(seen):
    assert seen[1] == []
