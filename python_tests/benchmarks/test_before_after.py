"""Two checkouts measured in turn."""

from __future__ import annotations

import pytest

from benchmarks import before_after, rows


def test_two_checkouts_take_turns_and_both_get_a_row(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(before_after, "CASES", [before_after.Case("two", [(3,), (2, 2)], "float32", "tensor", 4, 1)])
    assert before_after.main([str(rows.ROOT), "--rounds", "3", "--out", str(tmp_path / "rows.json")]) == 0
    found = {row["implementation"]: row for row in rows.load(tmp_path / "rows.json")}
    assert list(found) == ["ours", "before"]
    assert [row["samples"] for row in found.values()] == [3, 3]
    assert found["before"]["before"] == found["ours"]["commit"].rstrip("+")
    assert 0.05 < found["before"]["ratio"] < 20.0
    assert "two: before / after" in capfd.readouterr().out


def test_the_order_of_the_turns_alternates():
    seen = []

    class Turn:
        def __init__(self, name):
            self.name = name

        def turn(self):
            seen.append(self.name)
            return {"old": 3.0, "new": 2.0}[self.name]

    measurement = before_after.measure(Turn("old"), Turn("new"), rounds=4)
    assert seen == ["new", "old", "old", "new"] * 2
    assert measurement.ratios("before") == [1.5] * 4


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no package esam_kernels"):
        before_after.Checkout(tmp_path, 1)
