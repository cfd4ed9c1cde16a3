"""docs/diagnostics.md: its snippets run, one after the other, and leave the model as it is."""

import re
from pathlib import Path

import oracles
import pytest

from esam_kernels import diagnostics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md"
SNIPPETS = re.findall(r"^```python *(\S*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_snippets_run_and_leave_the_weights(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    (setup,) = [code for mark, code in SNIPPETS if mark == "setup"]
    runnable = [code for mark, code in SNIPPETS if mark == ""]
    assert len(runnable) == len(SNIPPETS) - 1 >= 9
    exec(setup, namespace)
    before = [tensor.clone() for tensor in namespace["model"].state_dict().values()]
    for code in runnable:
        exec(code, namespace)
    assert oracles.same_bits(before, list(namespace["model"].state_dict().values()))
    assert (tmp_path / "landscape.png").exists()


def test_the_page_names_every_function():
    functions = [name for name in diagnostics.__all__ if name.islower()]
    assert len(functions) == 7
    assert all(f"[`{name}`](#" in PAGE.read_text() for name in functions)
