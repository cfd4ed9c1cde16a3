"""docs/performance.md: counted floors beside what was measured, device by device."""

from __future__ import annotations

import pytest

from benchmarks import performance, rows

COMMON = {
    "p20": 1.0,
    "p80": 4.0,
    "samples": 5,
    "torch": "2.13",
    "threads": 2,
    "backend": "native",
    "commit": "abc",
    "date": "2026-01-01",
    "load": 0.1,
    "device": "a CPU",
}


def row(suite, case, p50, name="ours", unit="ms", **more):
    return {"suite": suite, "case": case, "implementation": name, "unit": unit, "p50": p50, **COMMON, **more}


def of_weights(case, p50, moved, device="a CPU"):
    """At a copy bandwidth of 50 GB/s."""
    numbers = {"bytes": moved, "gb_s": moved / p50 / 1e6, "copy_gb_s": 50.0, "copy_share": moved / p50 / 1e6 / 50}
    return row("perturb", case, p50, parameters=10_000_000, **numbers) | {"device": device}


@pytest.fixture
def folder(tmp_path):
    weights = [
        of_weights("ResNet-18 fp32 element", 10.0, 400_000_000),
        of_weights("ResNet-18 fp32 stage: perturb", 4.0, 160_000_000),
        of_weights("ResNet-18 fp32 stage: perturb", 8.0, 160_000_000) | {"implementation": "foreach"},
    ]
    rows.save(tmp_path / "cpu" / "perturb.json", weights)
    steps = [row("step", f"net b32 fp32 {method}(SGD)", 340.0) for method in ("ESAM", "SAM", "ESAM element")]
    steps += [one | {"implementation": "SGD alone", "p50": 200.0} for one in steps]
    rows.save(tmp_path / "cpu" / "step.json", steps)
    return tmp_path


def block(kind):
    return f"before\n<!-- floor:{kind} -->\nold\n<!-- /floor -->\nafter\n"


def test_stages_stand_beside_their_bytes_arithmetic_and_floor(folder):
    text = performance.rendered(block("weights"), folder)
    assert "| ResNet-18 fp32 stage: perturb | 20.0 M | 160 MB | 3.20 ms | 4.00 ms | 40.0 | 80 % |" in text
    assert "| ResNet-18 fp32 element | 100 M | 400 MB | 8.00 ms | 10.0 ms | 40.0 | 80 % |" in text
    assert text.index("stage: perturb") < text.index("fp32 element")
    assert "8.00 ms | 20.0" not in text, "a peer's row"
    assert "a CPU; 2 threads; torch 2.13; backend native; commit abc" in text
    assert "old" not in text
    assert performance.rendered(text, folder) == text


def test_whole_steps_stand_beside_the_counted_multiple(folder):
    text = performance.rendered(block("steps"), folder)
    assert "| net b32 fp32 ESAM(SGD) | ours | 1.70 | 1.70 | 1.00 |" in text
    assert "| net b32 fp32 SAM(SGD) | ours | 2.00 | 1.70 | 0.85 |" in text
    assert "| net b32 fp32 ESAM element(SGD) | ours | 1.83 | 1.70 | 0.93 |" in text


def test_rows_of_another_number_of_threads_have_a_table_of_their_own(folder):
    alone = of_weights("ResNet-18 fp32 stage: perturb", 16.0, 160_000_000) | {"threads": 1}
    rows.save(folder / "cpu" / "perturb.json", [alone])
    text = performance.rendered(block("weights"), folder)
    two, one = text.index("| 4.00 ms | 40.0"), text.index("| 16.0 ms | 10.0")
    assert two < text.index("a CPU; 2 threads;") < one < text.index("a CPU; 1 thread;")


def test_a_gpu_is_not_measured_until_its_rows_are_there(folder):
    assert performance.NOT_MEASURED in performance.rendered(block("weights"), folder)
    on_gpu = [of_weights("flat billion fp32 stage: norm", 2.0, 4_000_000_000, device="a GPU")]
    rows.save(folder / "a-gpu" / "perturb.json", on_gpu)
    text = performance.rendered(block("weights"), folder)
    assert performance.NOT_MEASURED not in text
    assert "| flat billion fp32 stage: norm | 20.0 M | 4000 MB | 80.0 ms | 2.00 ms | 2000 | 4000 % |" in text
    assert text.index("a CPU;") < text.index("a GPU;")
    assert performance.NOT_MEASURED in performance.rendered(block("steps"), folder)


@pytest.mark.parametrize(
    ("text", "message"), [("<!-- floor:weights -->\n", "not closed"), (block("guesses"), "unknown block")]
)
def test_what_cannot_be_filled_is_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        performance.rendered(text, folder)


def test_a_modes_cost_comes_from_its_pairs_with_the_base_optimizer(tmp_path):
    case = "net b32 fp32 first_order"
    found = [
        row("modes", case, 270.0, counted=1.37),
        row("modes", case, 999.0, "SGD alone", ratio=0.72),
        row("modes", case, 999.0, "SAM, ours", ratio=1.44),
    ]
    rows.save(tmp_path / "cpu" / "modes.json", found)
    text = performance.rendered(block("modes"), tmp_path)
    assert "| net b32 fp32 first_order | 1.37 | 1.39 | 1.01 | 1.44 |" in text
    assert "first_order" not in performance.rendered(block("modes b128"), tmp_path)
    assert performance.rendered(block("modes b32 fp32"), tmp_path).count("first_order") == 1
