"""The rows on how well rankings agree with the measured rise: how they are made, and the table that shows them."""

from __future__ import annotations

import json

import pytest

from benchmarks import agreement, readme


def test_a_run_has_a_row_for_each_epoch_and_ranking():
    pytest.importorskip("sklearn")
    run = agreement.Run("digits", 0.05, 32, (1, 2), samples=96)
    rows = agreement.measure(run, None)
    assert [(row["epoch"], row["ranking"]) for row in rows] == [
        (epoch, name) for epoch in (1, 2) for name in agreement.RANKINGS
    ]
    assert all(0.0 <= row["shared"] <= 1.0 and -1.0 <= row["correlation"] <= 1.0 for row in rows)
    assert {(row["batches"], row["batch_size"], row["training_samples"]) for row in rows} == {(6, 32, 96)}
    assert rows[3]["shared"] > rows[5]["shared"]


def test_the_table_has_a_line_for_each_setting_and_epoch(tmp_path):
    path = tmp_path / "rows.json"
    row = {"setting": "digits", "batches": 20, "batch_size": 64}
    cells = [(1, "first_order", 0.861, 0.8912), (1, "random", 0.5, -0.046), (5, "first_order", 0.9, 0.7)]
    cells.append((5, "random", 0.4812, 0.0))
    rows = [
        {**row, "epoch": epoch, "ranking": name, "shared": shared, "correlation": correlation}
        for epoch, name, shared, correlation in cells
    ]
    environment = {"torch": "2.13", "commit": "abc", "date": "2026-01-01"}
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    assert readme.rendered("before\n<!-- agreement:rows -->\nold\n<!-- /agreement -->\n", tmp_path).splitlines() == [
        "before",
        "<!-- agreement:rows -->",
        "| network and data | after epoch | first_order | random |",
        "|---|---:|---:|---:|",
        "| digits | 1 | 86% (0.89) | 50% (-0.05) |",
        "| digits | 5 | 90% (0.70) | 48% (0.00) |",
        "",
        "Means over 20 batches of 64; torch 2.13, commit abc, 2026-01-01.",
        "<!-- /agreement -->",
    ]
