"""The harness's arithmetic, and rows that a re-run replaces."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clocks, harness, rows
from benchmarks.harness import Contender, Measurement

CPU = torch.device("cpu")


class FakeClock:
    """Returns what the callable returns: times are then known."""

    __name__ = "fake_clock"

    def __call__(self, run):
        return run()


def take(values):
    remaining = iter(values)
    return lambda: next(remaining)


def measure(contenders, rounds=1, **options):
    options = {"seconds": 100.0, "max_rounds": rounds, "with_copy": False} | options
    return harness.measure(contenders, CPU, clock=FakeClock(), **options)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([5.0], (5.0, 5.0, 5.0)), ([1, 2, 3, 4, 5, 6], (2.0, 3.5, 5.0)), ([3, 1, 2], (1.4, 2.0, 2.6))],
)
def test_quantiles_are_p20_median_and_p80(samples, expected):
    assert harness.quantiles(samples) == pytest.approx(expected)


def test_quantiles_refuse_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        harness.quantiles([])


def test_implementations_alternate_and_so_does_who_comes_first():
    order = []

    def noting(name):
        return Contender(name, [lambda: order.append(name) or 1.0])

    rounds = 20
    measure([noting("ours"), noting("a"), noting("b")], rounds=rounds)
    assert order[:6] == ["ours", "ours", "a", "a", "b", "b"]
    found = [tuple(order[i : i + 4]) for i in range(6, len(order), 4)]
    assert len(found) == rounds
    assert set(found[::2]) == {("ours", "a", "ours", "b"), ("ours", "b", "ours", "a")}
    assert set(found[1::2]) == {("a", "ours", "b", "ours"), ("b", "ours", "a", "ours")}


@pytest.mark.parametrize(("seconds", "again"), [(1e-6, ["ours", "a"]), (1.0, [])])
def test_after_a_copy_everybody_runs_once_untimed_where_that_matters(seconds, again):
    order = []

    def noting(name):
        return Contender(name, [lambda: order.append(name) or seconds])

    measured = measure([noting("ours"), noting("a")], rounds=2, with_copy=True, copy_bytes=1 << 12)
    assert order == ["ours", "ours", "a", "a", "ours", "a", *again, "a", "ours", *again]
    assert (len(measured.ours), len(measured.pairs["a"]), len(measured.copies)) == (2, 2, 2)


def test_ratio_is_the_median_of_the_paired_ratios():
    """Noise that lasts changes the times of both, not their ratio. The ratio of the medians would be 2 here."""
    warm_up = [0.0] * harness.WARM_UP_ROUNDS
    ours = Contender("ours", [take([*warm_up, 1.0, 2.0, 4.0])])
    peer = Contender("peer", [take([*warm_up, 4.0, 2.0, 12.0])])
    measured = measure([ours, peer], rounds=3)
    assert measured.ratios("peer") == pytest.approx([4.0, 1.0, 3.0])
    row = rows.of_measurement("suite", "case", measured, CPU)[1]
    assert row["ratio"] == 3.0
    assert row["p50"] == 4.0 * 1e3


@pytest.mark.parametrize(("seconds", "rounds"), [(0.5, harness.FEWEST_ROUNDS), (2.0, 5), (8.0, 8)])
def test_rounds_fill_the_seconds_with_a_minimum_that_overtime_cuts(monkeypatch, seconds, rounds):
    """Each round takes a second here."""
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=take(range(100))))
    measured = measure([Contender("ours", [lambda: 1.0])], seconds=seconds, min_rounds=5, rounds=20)
    assert len(measured.ours) == rounds


@pytest.mark.parametrize("runs", [0, 1, harness.WARM_UP_ROUNDS, harness.WARM_UP_ROUNDS + 1])
def test_a_peer_that_fails_leaves_the_case(runs, capsys):
    """At its first run, in the warm-up, or in a round: the others keep their rounds."""
    broken = Contender("broken", [take([1.0] * runs)])
    measured = measure([Contender("ours", [lambda: 1.0]), broken, Contender("peer", [lambda: 2.0])], rounds=4)
    assert measured.failed == {"broken": "StopIteration: "}
    assert "broken: FAILED" in capsys.readouterr().out
    assert list(measured.pairs) == ["peer"]
    assert measured.ratios("peer") == [2.0] * 4


def test_what_ours_raises_is_not_caught():
    with pytest.raises(ZeroDivisionError):
        measure([Contender("ours", [lambda: 1 / 0]), Contender("peer", [lambda: 2.0])])


def test_the_first_contender_must_be_ours():
    with pytest.raises(ValueError, match="ours"):
        measure([Contender("peer", [lambda: 1.0])])


def test_preparation_is_not_timed_and_buffers_take_turns():
    events = []
    runs = [lambda i=i: events.append(i) or 1.0 for i in range(3)]
    measure([Contender("ours", runs, prepare=lambda: events.append("prepare"))], rounds=4)
    assert events == ["prepare", 0, "prepare", 1, "prepare", 2] * 2


def test_buffer_sets_exceed_the_cache_twice_over():
    cache = clocks.cache_bytes(CPU)
    assert cache >= 1 << 20
    for size in (cache // 16, cache, 10 * cache):
        assert (harness.buffer_sets(size, CPU) - 1) * size >= harness.CACHE_MULTIPLE * cache
    assert harness.buffer_sets(1, CPU) == harness.MAX_BUFFER_SETS


def test_bandwidth_is_bytes_over_time_and_its_share_is_of_the_copy():
    measured = Measurement(
        ours=[0.5, 0.5], copies=[0.1, 0.2, 0.3], copy_bytes=2 * 10**9, bytes_moved={"ours": 3 * 10**9}
    )
    (row,) = rows.of_measurement("suite", "case", measured, CPU)
    assert row["gb_s"] == pytest.approx(6.0)
    assert row["copy_gb_s"] == pytest.approx(10.0)
    assert row["copy_share"] == pytest.approx(0.6)


def test_copy_counts_what_is_read_and_what_is_written():
    assert harness.copy_contender(CPU, 1 << 12).bytes_moved == 2 << 12
    measured = measure([Contender("ours", [lambda: 1.0])], with_copy=True, copy_bytes=1 << 12)
    assert measured.copy_bytes == 2 << 12


def row(value, **more):
    return {"suite": "s", "case": "c", "implementation": "ours", "device": "d", "threads": 1, "p50": value} | more


def test_a_rerun_replaces_the_row_of_the_same_key_in_its_place():
    other = row(2.0, case="other")
    assert rows.replace([row(1.0), other], [row(3.0)]) == [row(3.0), other]


@pytest.mark.parametrize("name", rows.KEY)
def test_rows_that_differ_in_any_part_of_the_key_are_kept(name):
    assert len(rows.replace([row(1.0)], [row(2.0) | {name: "another"}])) == 2


def test_saved_rows_are_json_one_line_each(tmp_path):
    path = tmp_path / "cpu" / "suite.json"
    rows.save(path, [row(1.0), row(2.0, case="other")])
    rows.save(path, [row(3.0)])
    assert [found["p50"] for found in rows.load(path)] == [3.0, 2.0]
    assert len(path.read_text().splitlines()) == 4
    assert json.loads(path.read_text()) == rows.load(path)


def test_rows_say_where_and_with_what_they_were_measured():
    (found,) = rows.of_measurement("suite", "case", Measurement(ours=[1.0]), CPU)
    names = {"device", "python", "torch", "triton", "esam_kernels", "commit", "threads", "date", "load", "samples"}
    assert names <= set(found)
    assert found["torch"] == torch.__version__


def test_a_gpu_is_timed_from_clean_caches_and_while_it_is_busy(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(("sleep", cycles)))
    monkeypatch.setattr(clocks, "read_through_cache", lambda index: order.append("read"))
    assert clocks.event_clock(lambda: order.append("run")) == 3e-3
    assert order == ["synchronize", "read", ("sleep", 200_000), "record", "run", "record", "wait"]


def test_reading_through_the_cache_writes_nothing(monkeypatch):
    memory = torch.zeros(1000)
    monkeypatch.setattr(clocks, "_unchanged_memory", lambda index: memory)
    version = memory._version
    clocks.read_through_cache(0)
    assert memory._version == version


@pytest.mark.parametrize(("moved", "size"), [(None, None), (10_000, 5_000), (10, 1 << 12), (1 << 40, 1 << 30)])
def test_on_a_gpu_the_copy_moves_as_many_bytes_as_ours(moved, size):
    contender = Contender("ours", [lambda: 1.0], bytes_moved=moved)
    assert harness._same_bytes(contender, torch.device("cuda")) == size
    assert harness._same_bytes(contender, CPU) is None


def test_without_git_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.delenv("ESAM_COMMIT", raising=False)
    assert rows.commit() == "unknown"
    monkeypatch.setenv("ESAM_COMMIT", "0123456789")
    assert rows.commit() == "0123456789"
