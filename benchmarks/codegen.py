"""What each Triton kernel compiles to: registers, spills, access widths, instructions an element. Needs no GPU.

python benchmarks/codegen.py rewrites codegen_summary.json beside this file.

Every kernel is compiled ahead of time with the specialisations of its real launches and read back with the
disassembler that comes with Triton. The cost of a kernel that walks over blocks is that of one trip through its loop:
the shortest way around that passes every 128-bit access. Elsewhere it is all instructions.
"""

from __future__ import annotations

import heapq
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from esam_kernels.backends.reference import NUM_PARTIALS  # noqa: E402
from esam_kernels.backends.triton import adam, blocks, cross_entropy, norm, perturb, select_gather, update  # noqa: E402

MODULES = (norm, perturb, update, adam, cross_entropy, select_gather)
SUMMARY = Path(__file__).with_name("codegen_summary.json")
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

POINTERS = {
    "addresses_ptr": "*i64",
    "layout_ptr": "*i64",
    "partials_ptr": "*fp64",
    "scale_ptr": "*fp64",
    "random_state_ptr": "*i64",
    "lr_ptr": "*fp32",
    "indices_ptr": "*i64",
    "target_ptr": "*i64",
}


# -- The kernels, as they are launched ---------------------------------------------------------------------------------


@dataclass
class Case:
    """A kernel and what specialises it.

    ``elements``: how many one thread handles on the measured path. ``bytes``: what has to move for each. ``walks``:
    the path is one trip through a loop, and 128-bit accesses are promised on it.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    elements: float
    bytes: float
    walks: bool = False
    pointers: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pointer_to(dtype: torch.dtype) -> str:
    return "*" + triton.runtime.jit.type_canonicalisation_dict[name_of(dtype)]


def streaming(name: str, kernel: Any, dtype: torch.dtype, accesses: int, bits: bool = False, **constants: Any) -> Case:
    block_bytes = adam.block_bytes(dtype) if kernel is adam.restore_adam_kernel else blocks.BLOCK_BYTES
    block = blocks.block_size(dtype, block_bytes)
    constants["DTYPE"] = update.BITS[dtype.itemsize] if bits else blocks.TRITON_DTYPES[dtype]
    constants["BLOCK"] = block
    if "NUM_PARTIALS" in kernel.arg_names:
        constants["NUM_PARTIALS"] = NUM_PARTIALS
    return Case(
        f"{name} {name_of(dtype)}",
        kernel,
        constants,
        elements=block / (32 * blocks.NUM_WARPS),
        bytes=accesses * dtype.itemsize,
        walks=True,
        options=blocks.LAUNCH_OPTIONS,
    )


def streaming_cases() -> list[Case]:
    sgd = {"LR_TENSOR": False, "FIRST": False, "MOMENTUM": True, "WEIGHT_DECAY": True}
    adamw = {"LR_TENSOR": True, "WEIGHT_DECAY": True, "DECOUPLED": True, "AMSGRAD": False}
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases += [
            streaming("norm", norm.norm_kernel, dtype, 1, ANY_ADAPTIVE=False),
            streaming("perturb mask", perturb.perturb_kernel, dtype, 4, ANY_ADAPTIVE=False, ELEMENT_MASK=True),
            streaming("restore", update.restore_kernel, dtype, 2, bits=True),
            streaming("sgd", update.restore_sgd_kernel, dtype, 5, NESTEROV=False, MAXIMIZE=False, **sgd),
            streaming("adamw", adam.restore_adam_kernel, dtype, 7, MAXIMIZE=False, **adamw),
        ]
    for dtype in (torch.float32, torch.bfloat16):
        cases += [
            streaming("norm adaptive", norm.norm_kernel, dtype, 2, ANY_ADAPTIVE=True),
            streaming("perturb", perturb.perturb_kernel, dtype, 4, ANY_ADAPTIVE=False, ELEMENT_MASK=False),
            streaming("perturb mask adaptive", perturb.perturb_kernel, dtype, 4, ANY_ADAPTIVE=True, ELEMENT_MASK=True),
        ]
    return cases


def cross_entropy_cases() -> list[Case]:
    cases = []
    for dtype, classes in (
        (torch.float32, 10),
        (torch.bfloat16, 1000),
        (torch.float32, 16384),
        (torch.float32, 128256),
        (torch.bfloat16, 128256),
    ):
        launch = cross_entropy.launch_of(4096, classes)
        forward, backward = (
            (cross_entropy.forward_tile_kernel, cross_entropy.backward_tile_kernel)
            if launch.tiled
            else (cross_entropy.forward_row_kernel, cross_entropy.backward_row_kernel)
        )
        pointers = dict.fromkeys(("losses_ptr", "normalizer_ptr", "grad_losses_ptr"), "*fp32")
        pointers |= dict.fromkeys(("logits_ptr", "gradient_ptr"), pointer_to(dtype))
        vector = cross_entropy.common_vector(classes, torch.empty(1, classes, dtype=dtype))
        for name, kernel, accesses, extra in (
            ("forward", forward, 1, {"SMOOTHED": False}),
            ("backward", backward, 2, {}),
        ):
            cases.append(
                Case(
                    f"cross_entropy {name} {classes} {name_of(dtype)}",
                    kernel,
                    {"INDICES": True, "VECTOR": vector, **launch.shape, **extra},
                    elements=launch.shape.get("ROWS", 1) * launch.shape["BLOCK"] / (32 * launch.num_warps),
                    bytes=accesses * dtype.itemsize,
                    walks=not launch.tiled,
                    pointers=pointers,
                    options={"num_warps": launch.num_warps},
                )
            )
    return cases


def select_gather_cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.float64):
        samples = select_gather.MAX_SELECT_BYTES // dtype.itemsize
        warps = select_gather.select_warps(samples)
        cases.append(
            Case(
                f"select {samples} {name_of(dtype)}",
                select_gather.select_kernel,
                {"COMPUTE": blocks.TRITON_DTYPES[dtype], "BLOCK": samples},
                elements=samples / (32 * warps),
                bytes=2 * dtype.itemsize,
                pointers=dict.fromkeys(("before_ptr", "after_ptr"), pointer_to(dtype)),
                options={"num_warps": warps},
            )
        )
    for name, row_bytes in (("3x224x224 float32", 602112), ("3x32x32 uint8", 3072), ("label int64", 8)):
        rows = select_gather.row_shape(row_bytes, width=min(16, row_bytes))
        cases.append(
            Case(
                f"gather {name}",
                select_gather.gather_kernel,
                {"LANE": rows.lane, "VECTOR": rows.vector, "ROWS": rows.tile_rows, "BLOCK": rows.tile_lanes},
                elements=rows.tile_rows * rows.tile_lanes / (32 * select_gather.GATHER_WARPS),
                bytes=2 * rows.lane.primitive_bitwidth // 8,
                options={"num_warps": select_gather.GATHER_WARPS},
            )
        )
    return cases


def cases() -> list[Case]:
    return streaming_cases() + cross_entropy_cases() + select_gather_cases()


# -- Compiling and disassembling ---------------------------------------------------------------------------------------


def compile_case(case: Case, architecture: int) -> triton.compiler.CompiledKernel:
    signature, attributes = {}, {}
    for parameter in case.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = case.pointers.get(name) or POINTERS[name]
            if not parameter.do_not_specialize:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type or "i32"
    source = ASTSource(case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)


@dataclass
class Instruction:
    opcode: str
    conditional: bool
    target: str | None


@dataclass
class BasicBlock:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)

    @property
    def is_vectorized(self) -> bool:
        return any(is_global(i.opcode) and ".128" in i.opcode for i in self.instructions)


def is_global(opcode: str) -> bool:
    return opcode.split(".")[0] in ("LDG", "STG", "LD", "ST")


def disassemble(cubin: bytes) -> tuple[dict[str, BasicBlock], int]:
    """The basic blocks of a kernel by label, in order, and its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return basic_blocks(listing), registers


def basic_blocks(listing: str) -> dict[str, BasicBlock]:
    found: dict[str, BasicBlock] = {}
    label = "entry"
    for line in listing.splitlines():
        if named := re.match(r"\s*(\.L_x_\d+|\$?\w+):\s*$", line):
            label = named.group(1)
            found.setdefault(label, BasicBlock())
            continue
        parsed = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", line)
        if parsed is None:
            continue
        predicate, opcode, operands = parsed.groups()
        target = re.search(r"`\(([^)]+)\)", operands) if opcode.startswith("BRA") else None
        # `BRA P3, label` is conditional as well
        conditional = predicate is not None or re.match(r"\s*!?U?P\d", operands) is not None
        found.setdefault(label, BasicBlock()).instructions.append(
            Instruction(opcode, conditional, target.group(1) if target else None)
        )
        if opcode.split(".")[0] in ("BRA", "EXIT", "RET"):
            label = f"{label}+"
            found[label] = BasicBlock()
    labels = list(found)
    for current, following in zip(labels, [*labels[1:], None]):
        block = found[current]
        last = block.instructions[-1] if block.instructions else None
        leaves = last is not None and last.opcode.split(".")[0] in ("BRA", "EXIT", "RET")
        if leaves and last.target in found:
            block.successors.append(last.target)
        if following and (not leaves or last.conditional):
            block.successors.append(following)
    return found


def distance(graph: dict[str, BasicBlock], start: str, end: str) -> int:
    """Instructions from the end of ``start`` to the end of ``end`` on the shortest way."""
    queue, reached = [(0, start)], set()
    while queue:
        cost, label = heapq.heappop(queue)
        if cost and label == end:
            return cost
        if label in reached:
            continue
        reached.add(label)
        for successor in graph[label].successors:
            if successor not in reached or successor == end:
                heapq.heappush(queue, (cost + len(graph[successor].instructions), successor))
    raise ValueError(f"{end} cannot be reached from {start}")


def loop_instructions(graph: dict[str, BasicBlock]) -> int:
    """One trip through the loop, past every 128-bit access."""
    stops = [label for label, block in graph.items() if block.is_vectorized]
    return sum(distance(graph, start, end) for start, end in zip(stops, [*stops[1:], stops[0]]))


def measure(case: Case, architecture: int) -> dict[str, float]:
    graph, registers = disassemble(compile_case(case, architecture).asm["cubin"])
    opcodes = [instruction.opcode for block in graph.values() for instruction in block.instructions]
    instructions = loop_instructions(graph) if case.walks else len(opcodes)
    return {
        "registers": registers,
        "spills": sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        "loads_128": sum(opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes),
        "stores_128": sum(opcode.startswith("STG") and ".128" in opcode for opcode in opcodes),
        "instructions": len(opcodes),
        "instructions_per_element": round(instructions / case.elements, 1),
    }


def summarize() -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "kernels": {
            case.name: {f"sm_{architecture}": measure(case, architecture) for architecture in ARCHITECTURES}
            for case in cases()
        },
    }


if __name__ == "__main__":
    SUMMARY.write_text(json.dumps(summarize(), indent=1) + "\n")
    print(f"wrote {SUMMARY.relative_to(ROOT)}")
