"""The registers that docs/kernels.md names are those of the committed file."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import cuda_tables

ROOT = Path(__file__).resolve().parents[2]
# What the page calls a kernel, and what the file does.
NAMES = {
    "norm": "norm: Norm",
    "perturb": "perturb: Perturb",
    "restore": "update: Restore<",
    "restore + SGD": "update: RestoreSgd",
    "restore + Adam": "update: RestoreAdam",
    "cross-entropy, forward": "cross_entropy: forward",
    "cross-entropy, backward": "cross_entropy: backward",
    "select": "select_gather: select_kernel",
    "gather": "select_gather: gather_kernel",
    "losses, selection and gathering": "select_gather: fused_kernel",
}


def test_the_page_says_what_the_file_holds():
    found = json.loads((ROOT / "benchmarks" / "cuda_registers.json").read_text())["registers"]
    page = (ROOT / "docs" / "kernels.md").read_text()
    table = re.search(r"\| kernel \| registers, sm_80.*?\n\n", page, re.DOTALL).group().splitlines()[2:]
    rows = {cells[1]: cells[2:5] for cells in (re.split(r" *\| *", line) for line in table if line)}
    assert rows.keys() == NAMES.keys()
    for name, prefix in NAMES.items():
        kernels = [counts for kernel, counts in found.items() if kernel.replace("stream<", "").startswith(prefix)]
        for cell, architecture in zip(rows[name], ("sm_80", "sm_90")):
            least, most = (choose(counts[architecture] for counts in kernels) for choose in (min, max))
            assert cell == (str(least) if least == most else f"{least} to {most}"), name
        assert rows[name][2] == str(len(kernels)), name


def test_the_page_says_what_a_launch_copies():
    found = json.loads((ROOT / "benchmarks" / "cuda_registers.json").read_text())["argument_bytes"]
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    few, most = (found[f"update: stream<RestoreSgd<float, true, false>, {capacity}>"] for capacity in (64, 448))
    assert f"SGD with momentum copies {few:,} bytes, where the largest table takes {most:,}" in page


def test_the_page_says_what_three_tables_cost():
    one, three = json.loads(cuda_tables.ROWS.read_text())
    assert (one["tables"], three["tables"]) == (1, 3)
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    code = f"{three['cubin_bytes'] / 1e6:.1f} MB of code in place of {one['cubin_bytes'] / 1e6:.1f}"
    time = f"{three['nvcc_cpu_seconds']:.0f} s of nvcc's processor time in place of {one['nvcc_cpu_seconds']:.0f}"
    assert f"{code} for the two architectures, and {time} (`benchmarks/results/cuda_tables.json`" in page


def test_the_rows_of_the_tables_are_those_of_the_sources():
    """The sizes are those of blocks.cuh, the bytes of a launch those of cuda_registers.json, the commit is known."""
    one, three = json.loads(cuda_tables.ROWS.read_text())
    sizes = cuda_tables.capacities((ROOT / "csrc" / "cuda" / "blocks.cuh").read_text())
    assert (one["tensors"], three["tensors"]) == (sizes[-1:], sizes)
    found = json.loads((ROOT / "benchmarks" / "cuda_registers.json").read_text())["argument_bytes"]
    copied = [found[f"update: {cuda_tables.KERNEL.format(capacity)}"] for capacity in sizes]
    assert (one["sgd_momentum_argument_bytes"], three["sgd_momentum_argument_bytes"]) == (copied[-1:], copied)
    shallow = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True).stdout != b"false\n":
        pytest.skip("the history is not there")
    for row in (one, three):
        command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", row["commit"], "HEAD"]
        assert subprocess.run(command, capture_output=True).returncode == 0, f"{row['commit']} is not in the history"


def test_with_one_table_every_capacity_is_the_largest():
    header = (ROOT / "csrc" / "cuda" / "blocks.cuh").read_text()
    assert cuda_tables.capacities(header) == [64, 192, 448]
    changed = cuda_tables.with_one_table(header)
    assert cuda_tables.capacities(changed) == [448] * 3
    assert len(changed.splitlines()) == len(header.splitlines())
