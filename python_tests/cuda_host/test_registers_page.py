"""The registers that docs/kernels.md names are those of the committed file."""

import json
import re
from pathlib import Path

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
