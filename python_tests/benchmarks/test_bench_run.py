"""Every suite runs, at sizes that say nothing about speed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import harness, heap, peers, rows, run
from benchmarks.cases import TINY, sizes_of
from benchmarks.gpu.journal import Journal
from benchmarks.suites import Case, Context, kept_heap, loss, memory, modes, overhead, perturb, step

CPU = torch.device("cpu")
SUITES = {"perturb": perturb, "loss": loss, "overhead": overhead, "step": step, "modes": modes, "kept_heap": kept_heap}
ROW = {"suite": "loss", "implementation": "ours", "device": "a CPU", "threads": 2, "unit": "us", "p50": 1.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SUITES)
def test_suite_runs_every_case_and_compares_ours(name):
    for case in SUITES[name].cases(Context(CPU, TINY)):
        found = case.run(0.0)
        assert {row["case"] for row in found} == {case.name}
        assert found[0]["implementation"] == "ours"
        assert len(found) >= 2
        assert all(row["p50"] > 0 and row["ratio"] > 0 for row in found[1:])
        assert len({rows.key(row) for row in found}) == len(found)


def test_memory_is_measured_in_fresh_processes():
    found = memory.in_fresh_process(Context(CPU, TINY), "ours", "ESAM")
    assert 0 < found["above_model"] < found["peak"]


def test_memory_suite_compares_with_sgd_in_both_kinds_of_heap(monkeypatch):
    peaks = {"SGD alone": 100.0, "ours": 101.0, "as released": 150.0}
    heaps = []

    def in_fresh_process(_, step, __, variables):
        heaps.append(dict(variables))
        return {"peak": peaks[step], "above_model": 1.0}

    monkeypatch.setattr(memory, "in_fresh_process", in_fresh_process)
    found = [row for case in memory.cases(Context(CPU, TINY)) for row in case.run(0.0)]
    assert len({rows.key(row) for row in found}) == len(found) == 14
    above: dict[str, set[float]] = {}
    for row in found:
        above.setdefault(row["implementation"], set()).add(row["above_sgd"])
    assert (above["SGD"], above["ESAM, ours"], above["SAM, as released"]) == ({0.0}, {1.0}, {50.0})
    assert heaps == [{}] * 7 + [{"MALLOC_MMAP_THRESHOLD_": "1048576"}] * 7


def test_full_run_names_every_case_once():
    sizes = sizes_of(CPU)
    names = [case.name for module in (*SUITES.values(), memory) for case in module.cases(Context(CPU, sizes))]
    assert len(names) == len(set(names))
    for network in sizes.parameters:
        for dtype in ("fp32", "bf16"):
            for mask in ("tensor", "element"):
                assert f"{network} {dtype} {mask}" in names
    assert {"cross-entropy 4096x32000", "cross-entropy 64x131072 + backward", "gather 512x3x224x224"} <= set(names)
    assert "resnet18 b32 bf16 ESAM(SGD)" in names
    assert {f"resnet18 b128 bf16 {mode}" for mode in modes.OF_LARGER_BATCH} <= set(names)
    assert "ascent_share=0.25" in modes.OF_LARGER_BATCH


def test_the_modes_carry_their_counted_cost_and_are_compared_with_sam():
    counted = {}
    for case in (case for case in modes.cases(Context(CPU, TINY)) if f" b{TINY.batch} fp32 " in case.name):
        found = {row["implementation"]: row for row in case.run(0.0)}
        counted[case.name.partition(" fp32 ")[2]] = found["ours"]["counted"]
        assert ("SAM, ours" in found) == (not case.name.endswith("rho = 0"))
    assert (counted["rho = 0"], counted["momentum"], counted["ascent_share=0.25"]) == (1.0, 1.0, 1.25)
    assert 1.0 < counted["normalization, first_order"] < counted["first_order"] < counted["rise"] < 2.0


def test_a_suite_that_keeps_the_heap_says_so_before_its_first_case(monkeypatch):
    order = []
    monkeypatch.setattr(heap, "keep", lambda: order.append("keep"))
    for name in ("overhead", "kept_heap"):
        cases = [Case(f"a case of {name}", 1.0, lambda _, name=name: order.append(name) or [])]
        monkeypatch.setattr(SUITES[name], "cases", lambda _, cases=cases: cases)
        run.run_suite(name, Context(CPU, TINY), harness.time.monotonic() + 100, 1.0, "", None)
    assert order == ["overhead", "keep", "kept_heap"]
    run.run_suite("kept_heap", Context(CPU, TINY, default_heap=True), harness.time.monotonic() + 100, 1.0, "", None)
    assert order[3:] == ["kept_heap"]
    # There is no way back: a suite that wants the default heap comes before any that keeps it.
    keeps = [getattr(module, "KEEPS_HEAP", False) for module in map(run.suite_named, run.SHARES)]
    assert keeps == sorted(keeps)


def test_whole_steps_in_the_default_heap_have_names_of_their_own():
    kept, default = (list(step.cases(Context(CPU, TINY, default_heap=heap))) for heap in (False, True))
    assert [case.name for case in default] == [f"{case.name}, default heap" for case in kept]


def test_the_published_way_is_asked_for_as_many_samples_as_ours(monkeypatch):
    chosen = []
    published = peers.published_select

    def noting(*arguments):
        chosen.append(published(*arguments))
        return chosen[-1]

    monkeypatch.setattr(peers, "published_select", noting)
    context = Context(CPU, TINY)
    step.training_step(context, "as released", "ESAM", "SGD", "fp32")(*step.batch(context))
    assert len(chosen[0][0]) == 2  # half of four


def test_run_writes_rows_and_names_what_it_left_out(tmp_path, capsys):
    context = Context(CPU, TINY)
    run.run_suite("overhead", context, harness.time.monotonic() + 100, 0.001, "10, tensor", tmp_path)
    assert len(rows.load(tmp_path / "overhead.json")) == 4
    run.run_suite("overhead", context, harness.time.monotonic() - 1, 1.0, "", None)
    printed = capsys.readouterr().out
    assert "SGD alone" in printed
    assert "no time left: 2 tensors of 10, tensor; 2 tensors of 10, element" in printed


def test_a_case_that_fails_loses_no_other_row(tmp_path, monkeypatch, capsys):
    def cases(_):
        for name in ("first", "second", "third"):
            row = ROW | {"case": name}
            yield Case(name, 1.0, lambda _, name=name, row=row: 1 / 0 if name == "second" else [row])

    monkeypatch.setattr(loss, "cases", cases)
    deadline = harness.time.monotonic() + 100
    assert run.run_suite("loss", Context(CPU, TINY), deadline, 1.0, "", tmp_path).failed == ["second"]
    assert [row["case"] for row in rows.load(tmp_path / "loss.json")] == ["first", "third"]
    assert "second: FAILED, ZeroDivisionError" in capsys.readouterr().out


def test_what_the_journal_holds_is_not_measured_again(tmp_path, monkeypatch):
    """A call that was cut off goes on; another commit begins anew."""
    ran = []

    def cases(_):
        for name in ("first", "second"):
            row = ROW | {"case": name}
            yield Case(name, 1.0, lambda _, name=name, row=row: ran.append(name) or [row])

    monkeypatch.setattr(loss, "cases", cases)
    for commit in ("a", "a", "b"):
        run_loss(tmp_path, commit)
    assert ran == ["first", "second", "first", "second"]


def test_a_case_that_kills_its_process_is_tried_twice(tmp_path, monkeypatch):
    """Its third call passes over it, and reaches what comes after it."""

    class Killed(BaseException):
        pass

    def killed(_):
        raise Killed

    good = ROW | {"case": "good"}
    monkeypatch.setattr(loss, "cases", lambda _: iter([Case("bad", 1.0, killed), Case("good", 1.0, lambda _: [good])]))
    for _ in range(2):
        with pytest.raises(Killed):
            run_loss(tmp_path)
    assert run_loss(tmp_path).failed == ["bad"]
    entries = Journal(tmp_path / "j.jsonl", "a commit").entries()
    assert {name: entry["outcome"] for name, entry in entries.items()} == {"bad": "failed", "good": "passed"}


def run_loss(folder, commit="a commit"):
    journal = Journal(folder / "j.jsonl", commit)
    return run.run_suite("loss", Context(CPU, TINY), harness.time.monotonic() + 100, 1.0, "", folder, journal)


def test_a_peer_that_fails_is_named_and_costs_its_own_number_only(tmp_path, monkeypatch, capsys):
    build = step.training_step

    def training_step(context, name, *rest):
        if name == "as released":
            raise RuntimeError("cannot be made")
        return build(context, name, *rest)

    monkeypatch.setattr(step, "training_step", training_step)
    deadline = harness.time.monotonic() + 100
    ended = run.run_suite("step", Context(CPU, TINY), deadline, 0.001, "fp32 SAM(SGD)", tmp_path)
    assert ended.failed == ["cnn b4 fp32 SAM(SGD): as released"]
    ours, alone = rows.load(tmp_path / "step.json")
    assert ours["failed"] == {"as released": "RuntimeError: cannot be made"}
    assert (alone["implementation"], alone["ratio"] > 0) == ("SGD alone", True)
    assert "FAILED, without a number: cnn b4 fp32 SAM(SGD): as released" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [loss, perturb])
def test_contenders_of_inductor_have_a_run_of_their_own(suite, monkeypatch):
    """With the others nothing is compiled; alone, each stands beside ours."""
    compiled, sizes = [], dataclasses.replace(TINY, compiles=True)
    monkeypatch.setattr(peers, "compiled", lambda function: compiled.append(function) or function)
    implementations = {}
    for which in ("without", "only"):
        cases = list(suite.cases(Context(CPU, sizes, inductor=which)))
        chosen = [case for case in cases if which == "without" or case.has_inductor]
        found = [row for case in chosen for row in case.run(0.0)]
        implementations[which] = {row["implementation"] for row in found}
        assert bool(compiled) == (which == "only")
    assert "compile" not in implementations["without"]
    assert implementations["only"] == {"ours", "compile"}


def test_peers_move_the_weights_as_ours_does():
    """beta = 1: a step of ours, of the loop and of foreach end at the same weights."""
    lists = perturb.Lists(Context(CPU, TINY), TINY.parameters["tiny"](), torch.float32)
    ends = []
    for make in (
        lambda: lists._ours("tensor"),
        lambda: lists._published("as released", False, 1.0),
        lambda: lists._published("foreach", True, 1.0),
    ):
        lists.generator.manual_seed(1)
        made = []
        keep = lists.params
        lists.params = lambda keep=keep, made=made: made.append(keep()) or made[-1]
        contender = make()
        lists.params = keep
        contender.prepare()
        contender.runs[0]()
        ends.append([param.detach().clone() for param in made[0]])
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-5, atol=1e-7)
