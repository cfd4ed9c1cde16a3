"""tools/sanitize.py trusts a sanitizer only where it has seen it at work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import sanitize  # noqa: E402


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Puts what the probes answer in the place of their processes, in a folder that is the build's."""
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    build = sanitize.BUILDS["address"]
    build.folder.mkdir(parents=True)

    def put(extension: Path = build.folder / "_native.so", content: bytes = build.symbol, **probes: tuple[int, str]):
        extension.write_bytes(content)
        given = {"where": (0, f"{extension}\n"), "memory": (1, "heap-buffer-overflow")}
        given |= {"arithmetic": (1, "signed integer overflow"), **probes}
        monkeypatch.setattr(
            sanitize, "probe", lambda _, name: subprocess.CompletedProcess(name, given[name][0], stdout=given[name][1])
        )
        return sanitize.fault_of_the_watch(build)

    return put


def test_an_extension_under_watch_is_accepted(answers):
    assert answers() is None


def test_an_extension_from_elsewhere_is_not(answers, tmp_path):
    assert "is not imported from" in answers(tmp_path / "_native.so")
    assert "is not imported from" in answers(where=(1, "ImportError: no such symbol"))


def test_an_extension_that_is_built_without_sanitizers_is_not(answers):
    assert "is not built with -fsanitize=address" in answers(content=b"plain")


@pytest.mark.parametrize("probe", ["memory", "arithmetic"])
@pytest.mark.parametrize("answer", [(0, "nothing"), (1, "Killed")], ids=["got through", "died of something else"])
def test_a_fault_that_is_not_seen_is_told(answers, probe, answer):
    assert f"does not see the fault of the probe {probe}" in answers(**{probe: answer})
