"""Every measured number in the prose of README and site comes from a row, or a test computes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.study import report

ROOT = Path(__file__).resolve().parents[2]
# Written as a whole from their rows, which test_gpu_page.py and test_paper_report.py compare.
GENERATED = {"docs/gpu.md", "docs/reproduction.md"}
SITE = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
PAGES = sorted((SITE - GENERATED) | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"})

NUMBER = r"\d[\d,]*(?:\.\d+)?"
FROM_ROWS = re.compile(
    rf"<!-- (rows|floor|counts|study|agreement|modes|versions)\b[^\n]*-->\n.*?<!-- /\1 -->|{NUMBER}<!-- row: .+? -->",
    re.DOTALL,
)
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
UNIT = r"[nµum]?s|seconds?|minutes?|hours?|[MGT]i?B(?:/s)?|x|times|%|per cent|points?|images/s"
MEASURED = re.compile(rf"(?<![\w.]){NUMBER} ?(?:{UNIT})(?![\w/])|\b\w+ per cent\b")

# What looks like a measured number and is none, or is computed by a test. "#" is any number.
ANYWHERE = {"# % wrong labels", "# % wrong training labels", "# % flipped labels", "# means # % more"}
ALLOWED = {
    "README.md": {
        "up to # % less or # % more": "test_bench_readme.py computes it",
    },
    "CHANGELOG.md": {
        "# times SGD's price": "counted: test_pages.py",
    },
    "docs/examples.md": {
        "reached #, # and # %": "test_demo_study.py computes it",
        "and ESAM #, # and # %": "test_demo_study.py computes it",
        "the last # % of the steps": "an option",
        "# to # % of the area": "an option",
    },
    "docs/kernels.md": {
        "More than # % of the copy's bandwidth": "what a column can hold",
        "From # MiB on": "how a kernel is built",
        "# MB of code in place of #": "test_registers_page.py computes it",
        "# s of nvcc's processor time in place of #": "test_registers_page.py computes it",
        "copies at # TB/s": "an assumption",
        "# µs": "the bounds that follow from it, computed below",
    },
    "docs/performance.md": {
        "Above #x": "where a column says faster",
    },
}


def unbacked(text: str, allowed: set[str] = frozenset()) -> list[str]:
    """What in a page looks like a measured number, and is neither from the rows nor ``allowed``."""
    text = " ".join(CODE.sub(" ", FROM_ROWS.sub(" ", text)).split())
    for words in allowed | ANYWHERE:
        text = re.sub(re.escape(words).replace(r"\#", NUMBER), " ", text)
    return [text[max(0, match.start() - 40) : match.end() + 20] for match in MEASURED.finditer(text)]


@pytest.mark.parametrize("page", PAGES)
def test_a_measured_number_in_prose_comes_from_a_row(page):
    assert unbacked((ROOT / page).read_text(), set(ALLOWED.get(page, ()))) == []


@pytest.mark.parametrize("page", ALLOWED)
def test_each_exception_is_needed(page):
    text = (ROOT / page).read_text()
    for words in ALLOWED[page]:
        assert unbacked(text, set(ALLOWED[page]) - {words}), words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 1.81x our time", 1),
        ("takes 1.81<!-- row: cpu/perturb.json#a|b|ratio -->x our time", 0),
        ("gains one or two per cent", 1),
        ("reaches 94.9 % on 40 % wrong labels", 1),
        ("30 ms, 3 points, 1,200 images/s and 4.3 TB/s", 4),
        ("<!-- rows:cpu/step -->\n12 ms\n<!-- /rows -->\n", 0),
        ("<!-- mine -->\n12 ms\n<!-- /mine -->\n", 1),
        ("`--phase 30%`, 32x32 images, 8 samples, SAM 2.00", 0),
    ],
)
def test_a_number_with_a_unit_and_without_a_row_is_found(text, found):
    assert len(unbacked(text)) == found


def test_every_block_stands_where_its_check_losses():
    checked = {"modes": {str(page) for page in report.PAGES}, "versions": {"docs/versions.md"}}
    of_readme = {str(page.relative_to(ROOT)) for page in readme.PAGES}
    for page in PAGES:
        for kind in re.findall(r"<!-- (rows|floor|counts|study|agreement|modes|versions)\b", (ROOT / page).read_text()):
            assert page in checked.get(kind, of_readme), (page, kind)


def test_the_bounds_of_a_gpu_are_bytes_over_bandwidth():
    page = (ROOT / "docs" / "kernels.md").read_text()
    bandwidth = float(re.search(r"copies at (\d+) TB/s", page)[1]) * 1e12
    header, *lines = re.search(r"(\| stage, fp32, element mask .*?)\n\n", page, re.DOTALL)[1].splitlines()
    networks = [1e6 * float(number) for number in re.findall(r"([\d.]+) M\b", header)]
    bytes_each = {"norm": 4, "perturb": 16, "restore + SGD": 20, "together": 40}
    found = {cells[1]: cells[2:5] for cells in (re.split(r" *\| *", line) for line in lines[1:])}
    assert found == {
        stage: [f"{each * parameters / bandwidth * 1e6:.0f} µs" for parameters in networks]
        for stage, each in bytes_each.items()
    }
