"""Results as rows of JSON. A row says what was measured, where, when and with what; a re-run replaces it."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import esam_kernels
from benchmarks.harness import OURS, Measurement, quantiles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("suite", "case", "implementation", "device", "threads")

Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"{found.group(1) if found else platform.processor()}, {os.cpu_count()} cores"


def folder(device: torch.device) -> Path:
    """Where the rows of this device lie: results/cpu, or a folder named after the GPU."""
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / name


@functools.cache
def environment(device: torch.device) -> Row:
    """What every row carries: device, versions, commit, threads, date, and the load when the run began."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "esam_kernels": esam_kernels.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def commit() -> str:
    """The commit that was measured; "+" behind it where the code differs from it. Without git, ESAM_COMMIT says it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "esam_kernels", "csrc", "benchmarks/*.py", "examples/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ESAM_COMMIT") or "unknown"


def of_measurement(
    suite: str, case: str, measurement: Measurement, device: torch.device, unit: str = "ms", **more: Any
) -> list[Row]:
    """A row for ours and one for each peer. A peer's ``ratio`` is its time over ours, the median over the pairs."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    copy = measurement.copy_bandwidth()
    result = []
    for name in (OURS, *measurement.pairs):
        p20, p50, p80 = quantiles(measurement.times(name))
        row: Row = {"suite": suite, "case": case, "implementation": name, "unit": unit}
        row |= {key: _round(value * factor) for key, value in (("p20", p20), ("p50", p50), ("p80", p80))}
        row["samples"] = len(measurement.times(name))
        if name != OURS:
            ratios = quantiles(measurement.ratios(name))
            row |= {key: _round(value) for key, value in zip(("ratio_p20", "ratio", "ratio_p80"), ratios)}
        moved = measurement.bytes_moved.get(name)
        if moved:
            row |= {"bytes": moved, "gb_s": _round(moved / p50 / 1e9)}
        if moved and copy:
            row |= {"copy_gb_s": _round(copy / 1e9), "copy_share": _round(moved / p50 / copy)}
        row["timing"] = measurement.timing.get(name, "wall clock")
        if name == OURS and measurement.failed:
            row["failed"] = dict(measurement.failed)
        result.append(row | more | environment(device))
    return result


def of_samples(
    suite: str, case: str, name: str, samples: Sequence[float], device: torch.device, unit: str, **more: Any
) -> Row:
    """A row of numbers that are not times, peak memory for one."""
    p20, p50, p80 = (_round(value) for value in quantiles(samples))
    row = {"suite": suite, "case": case, "implementation": name, "unit": unit, "p20": p20, "p50": p50, "p80": p80}
    return row | {"samples": len(samples)} | more | environment(device)


def _round(value: float) -> float:
    """Four significant digits: more than any machine here repeats."""
    return float(f"{value:.4g}")


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each device and number of threads: only these are compared with each other."""
    result: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        result.setdefault((row["device"], row["threads"]), []).append(row)
    return list(result.values())


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of :func:`by_machine`, what was measured last."""
    return max(by_machine(rows), key=lambda group: max(row["date"] for row in group), default=[])


def load(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def replace(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``old`` with the rows of the same key replaced, in their place, and the others appended."""
    result = {key(row): row for row in old}
    result |= {key(row): row for row in new}
    return list(result.values())


def save(path: Path, new: Iterable[Row]) -> None:
    """Put ``new`` into the file at ``path``; one line a row, so that diffs can be read."""
    lines = ",\n".join(json.dumps(row) for row in replace(load(path), new))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")
