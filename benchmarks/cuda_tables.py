"""What tables of addresses in three sizes cost: ``python -m benchmarks.cuda_tables`` writes results/cuda_tables.json.

The streaming kernels are compiled twice: as they are, with tables for few, some and all tensors of a launch, and with
the largest table alone. A row says what nvcc makes of it, in how much processor time, and what a launch copies then.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import cuda_registers
from benchmarks.rows import RESULTS, ROOT

ROWS = RESULTS / "cuda_tables.json"
SOURCES = ("norm", "perturb", "update")
CAPACITY = re.compile(r"constexpr int (k(?:Few|Some|Max)Tensors) = (\d+);")
# The kernel whose arguments are named: SGD with momentum, in float32.
KERNEL = "stream<RestoreSgd<float, true, false>, {}>"


def capacities(header: str) -> list[int]:
    """How many tensors each table holds, by the source of blocks.cuh."""
    found = dict(CAPACITY.findall(header))
    return [int(found[f"k{name}Tensors"]) for name in ("Few", "Some", "Max")]


def with_one_table(header: str) -> str:
    """The same source, with the largest table in the place of each."""
    largest = capacities(header)[-1]
    return CAPACITY.sub(lambda match: f"constexpr int {match[1]} = {largest};", header)


def compiled(csrc: Path, folder: Path) -> tuple[float, int, dict[str, int]]:
    """Seconds of processor time, bytes of all cubins, and the bytes of the arguments of each kernel."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cubins = {
        (source, architecture): cuda_registers.compile_source(csrc / "cuda" / f"{source}.cu", architecture, folder)
        for source in SOURCES
        for architecture in cuda_registers.ARCHITECTURES
    }
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    arguments = cuda_registers.argument_bytes(cubins["update", "90"])
    return seconds, sum(cubin.stat().st_size for cubin in cubins.values()), arguments


def commit_of(folder: str) -> str:
    """The last commit that has changed what is compiled; "+" behind it where the files differ from it."""
    changed = cuda_registers.output("git", "-C", str(ROOT), "status", "--porcelain", "--", folder)
    last = cuda_registers.output("git", "-C", str(ROOT), "log", "-1", "--format=%h", "--abbrev=10", "--", folder)
    return last.strip() + ("+" if changed else "")


def measured(tables: list[int], csrc: Path, folder: Path) -> dict[str, Any]:
    seconds, nbytes, arguments = compiled(csrc, folder)
    architectures = " and ".join(f"sm_{architecture}" for architecture in cuda_registers.ARCHITECTURES)
    return {
        "tables": len(tables),
        "tensors": tables,
        "nvcc_cpu_seconds": round(seconds, 1),
        "cubin_bytes": nbytes,
        "sgd_momentum_argument_bytes": [arguments[KERNEL.format(capacity)] for capacity in tables],
        "of": f"{', '.join(SOURCES)} for {architectures}",
        "nvcc": re.search(r"release ([\d.]+)", cuda_registers.output("nvcc", "--version")).group(1),  # type: ignore[union-attr]
        "commit": commit_of("csrc"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main() -> int:
    if (reason := cuda_registers.missing()) is not None:
        print(f"benchmarks.cuda_tables: {reason}", file=sys.stderr)
        return 1
    build = cuda_registers.ROOT / "build" / "cuda_tables"
    shutil.rmtree(build, ignore_errors=True)
    csrc = cuda_registers.ROOT / "csrc"
    shutil.copytree(csrc, build / "csrc")
    header = build / "csrc" / "cuda" / "blocks.cuh"
    sizes = capacities(header.read_text())
    header.write_text(with_one_table(header.read_text()))
    rows = [measured(sizes[-1:], build / "csrc", build / "one"), measured(sizes, csrc, build / "three")]
    ROWS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"wrote {ROWS.relative_to(cuda_registers.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
