"""How the streaming kernels fill a GPU, counted without one: ``python -m benchmarks.kernel_counts``.

Of each kernel and network: blocks and programs, how many programs an H100 holds at once with the registers that the
disassembly shows (codegen_summary.json, cuda_registers.json), in how many rounds these work through their blocks, what
the last of the rounds still has in flight, and the bytes that move. The rows, results/kernel_counts.json, are what
docs/kernels.md shows.

A round is the time of one block. Programs take equal rounds for it: that is a count, and no time.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks import cases
from benchmarks.rows import RESULTS, ROOT
from esam_kernels.backends.reference import NUM_PARTIALS

ROWS = RESULTS / "kernel_counts.json"

# An H100 (sm_90): multiprocessors, and what each has. Registers are granted to a warp 256 at a time.
MULTIPROCESSORS, REGISTERS, WARPS, PROGRAMS, GRANTED = 132, 65536, 64, 32, 256
SHARED_BYTES = 227 << 10  # that one block of threads may take
BLOCK_BYTES, UNLIMITED = 8192, 1 << 30
PARTIAL_BYTES = 8 * NUM_PARTIALS
NETWORKS = {
    "CNN": cases.small_cnn,
    "ResNet-18": cases.resnet18,
    "ResNet-50": cases.resnet50,
    "ViT-S/16": cases.vit_small,
}
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Kernel:
    """``reads`` and ``writes``: lists of tensors. ``name``: in the file of the registers, by backend."""

    label: str
    reads: int
    writes: int
    triton: str
    cuda: str
    shares: tuple[str, ...] = ()
    """The backends that cut the blocks into the shares of 1,024 programs at most; others start one for each block."""


KERNELS = (
    Kernel("norm", 1, 0, "norm {}", "norm: stream<Norm<{}, false>, {}>", ("triton", "cuda")),
    Kernel("perturb", 2, 2, "perturb mask {}", "perturb: stream<Perturb<{}, true>, {}>", ("triton", "cuda")),
    Kernel("restore + SGD", 3, 2, "sgd {}", "update: stream<RestoreSgd<{}, true, false>, {}>", ("triton",)),
    Kernel("restore + AdamW", 4, 3, "adamw {}", "update: stream<RestoreAdam<{}, false>, {}>"),
)
C_NAMES = {"float32": "float", "bfloat16": "device::BFloat16"}


def resident(registers: int, warps: int) -> int:
    """How many programs of so many warps a multiprocessor holds."""
    of_warp = -(-registers * 32 // GRANTED) * GRANTED
    return min(REGISTERS // of_warp // warps, WARPS // warps, PROGRAMS)


def rounds(blocks: int, programs: int, slots: int) -> tuple[int, int]:
    """Rounds until all is done, and how many programs work in the last one.

    Block number i is program i % programs's; a program that is not held at first takes the place of one that ends.
    """
    ends = [0] * min(slots, programs)
    last: list[int] = []
    for program in range(programs):
        end = heapq.heappop(ends) + blocks // programs + (program < blocks % programs)
        heapq.heappush(ends, end)
        last.append(end)
    return max(last), sum(end == max(last) for end in last)


def row(
    network: str, kernel: Kernel, backend: str, dtype: str, registers: int, block_bytes: int, most: int
) -> dict[str, Any]:
    """One kernel over one network, in blocks of ``block_bytes`` a list, on at most so many programs."""
    shapes = [math.prod(shape) for shape in NETWORKS[network]()]
    blocks = sum(-(-numel * ITEMSIZE[dtype] // block_bytes) for numel in shapes)
    programs = min(blocks, most)
    held = resident(registers, 4 if backend == "triton" else 8)
    slots = MULTIPROCESSORS * held
    count, working = rounds(blocks, programs, slots)
    moved = sum(shapes) * ITEMSIZE[dtype] * (kernel.reads + kernel.writes)
    return {
        "network": network,
        "tensors": len(shapes),
        "parameters": sum(shapes),
        "kernel": kernel.label,
        "backend": backend,
        "dtype": dtype,
        "block_bytes": block_bytes,
        "blocks": blocks,
        "programs": programs,
        "registers": registers,
        "held_by_a_multiprocessor": held,
        "waves": round(programs / slots, 2),
        "rounds": count,
        "balance": round(blocks / (min(programs, slots) * count), 2),
        "working_in_the_last_round": working,
        "read_in_flight_then": working * kernel.reads * block_bytes,
        "bytes_moved": moved,
        "bytes_of_sums": programs * PARTIAL_BYTES if kernel.label == "perturb" else 0,
    }


def registers_of(kernel: Kernel, backend: str, dtype: str, tensors: int) -> int:
    """On sm_90."""
    if backend == "triton":
        summary = json.loads((ROOT / "benchmarks" / "codegen_summary.json").read_text())["kernels"]
        return int(summary[kernel.triton.format(dtype)]["sm_90"]["registers"])
    summary = json.loads((ROOT / "benchmarks" / "cuda_registers.json").read_text())["registers"]
    capacity = next(size for size in (64, 192, 448) if tensors <= size)
    return int(summary[kernel.cuda.format(C_NAMES[dtype], capacity)]["sm_90"])


def as_built(kernel: Kernel, backend: str, dtype: str) -> tuple[int, int]:
    """The bytes of a block in one list, and the most programs of a launch."""
    halves = (backend, kernel.label, dtype) == ("triton", "restore + AdamW", "bfloat16")
    return BLOCK_BYTES // 2 if halves else BLOCK_BYTES, NUM_PARTIALS if backend in kernel.shares else UNLIMITED


def streaming() -> list[dict[str, Any]]:
    """As the kernels are built; and, of Triton in float32, with half the block and with the other number of programs.

    Those in place of what is built count with its registers.
    """
    found = []
    for network, backend, dtype, kernel in itertools.product(NETWORKS, ("triton", "cuda"), ITEMSIZE, KERNELS):
        registers = registers_of(kernel, backend, dtype, len(NETWORKS[network]()))
        block, most = as_built(kernel, backend, dtype)
        variants = {"": (block, most)}
        if (backend, dtype) == ("triton", "float32"):
            variants |= {"blocks of 4 KiB": (block // 2, most)}
            if kernel.label.startswith("restore"):
                variants |= {
                    "one for each block" if most == NUM_PARTIALS else "1,024 programs": (
                        block,
                        UNLIMITED if most == NUM_PARTIALS else NUM_PARTIALS,
                    )
                }
        for name, (size, programs) in variants.items():
            found.append(
                {"in_place_of_what_is_built": name, **row(network, kernel, backend, dtype, registers, size, programs)}
            )
    return found


def losses() -> list[dict[str, Any]]:
    """Passes over the logits of a forward and a backward, as it is and with softmax - q written in the forward."""
    found = []
    for classes, dtype in itertools.product((32768, 50257, 128256), ITEMSIZE):
        found.append(
            {
                "classes": classes,
                "dtype": dtype,
                "bytes_of_a_row": classes * ITEMSIZE[dtype],
                "fits_shared_memory": classes * ITEMSIZE[dtype] <= SHARED_BYTES,
                "passes": {"forward": 1, "backward": 2},
                "passes_with_gradient_in_forward": {"forward": 2, "backward": 2},
                "passes_if_the_gradient_of_the_losses_were_known": {"forward": 2, "backward": 0},
            }
        )
    return found


def rows() -> dict[str, list[dict[str, Any]]]:
    """All of the file."""
    return {"streaming": streaming(), "cross_entropy": losses()}


SHOWN = ("CNN", "ResNet-18", "ResNet-50")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """For docs/kernels.md: float32 on Triton."""
    lines = [
        "| network, kernel | blocks | programs | held | rounds | balance | last round reads | moved | sums |",
        "|---" + "|---:" * 8 + "|",
    ]
    for one in found["streaming"]:
        if (one["backend"], one["dtype"]) != ("triton", "float32") or one["network"] not in SHOWN:
            continue
        variant = one["in_place_of_what_is_built"]
        cells = [
            f"{one['network']}, {one['kernel']}{f', *{variant}*' if variant else ''}",
            f"{one['blocks']:,}",
            f"{one['programs']:,}",
            f"{one['held_by_a_multiprocessor'] * MULTIPROCESSORS:,}",
            str(one["rounds"]),
            f"{one['balance']:.2f}",
            f"{one['read_in_flight_then'] / 1e6:.1f} MB",
            f"{one['bytes_moved'] / 1e6:.1f} MB",
            f"{one['bytes_of_sums'] / 1e6:.1f} MB" if one["bytes_of_sums"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text(found: dict[str, list[dict[str, Any]]]) -> str:
    """The file: a row in a line."""
    parts = (f'"{name}": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]" for name, lines in found.items())
    return "{" + ",\n".join(parts) + "}\n"


def main() -> int:
    """Write the rows; with ``--check`` compare them. Returns 1 where they differ."""
    new = text(rows())
    if "--check" in sys.argv[1:]:
        return 0 if ROWS.read_text() == new else 1
    ROWS.write_text(new)
    print(f"wrote {ROWS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
