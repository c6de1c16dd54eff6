"""Kernels compiled for cards that need not be here, and what of the card they would take."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, recorded, triton
from .op import Op

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block may have
MATRIX = r"wgmma|tcgen05\.mma|mma\.sync|v_mfma"  # instructions of tensor cores
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES = {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", **NAMES}
SMALL = 257  # entries of the cases compiled: lengths are no part of a kernel


@dataclass(frozen=True)
class Built:
    """What one compiled kernel takes: registers a thread, bytes or registers spilled, bytes of shared memory.

    dot: the tensor-core instruction its products became, "fma" if none, "" without products.
    """

    op: str
    kernel: str
    case: str
    target: str
    registers: int
    spills: int
    shared: int
    dot: str


def launches(op: Op, D: int, dtype: torch.dtype, target: str) -> Iterator[tuple[str, Launch]]:
    """What the fused path of an op starts for heads of size D on a target, labelled by case; nothing is run."""
    for variant in op.variants if op.fused not in (None, op.cpu) else ():
        case = {**op.usual, "D": D, "T": SMALL, **variant}
        label = " ".join([f"D={D}", NAMES[dtype], *(f"{name}={value}" for name, value in variant.items())])
        with recorded(target) as noted:
            op.fused(*op.inputs(case, dtype, 0))  # type: ignore[misc]
        yield from ((label, launch) for launch in noted)


def build(op: Op, label: str, launch: Launch, target: str) -> Built:
    """Compile one launch for a target, as its just-in-time compiler would for these arguments."""
    found = compiled(launch, target)
    code = found.asm.get("ptx") or found.asm["amdgcn"]
    products = "tt.dot" in found.asm["ttir"]
    matrix = re.search(MATRIX, code)
    dot = matrix[0] if matrix else "fma" if products else ""
    registers, spills = _amd(code) if "amdgcn" in found.asm else _nvidia(found.asm["cubin"])
    return Built(op.name, launch.kernel.name, label, target, registers, spills, found.metadata.shared, dot)


def compiled(launch: Launch, target: str) -> Any:
    """The kernel of a launch for a target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = launch.kernel
    names, blocks = kernel.jit.arg_names, kernel.blocks(launch.blocks, False)
    given = {**dict(zip(names, launch.args, strict=False)), **blocks}
    types = {name: _type(given[name], name in blocks) for name in names}
    constants = {name: given[name] for name in names if types[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _aligned(given[name], types[name])}
    source = ASTSource(fn=kernel.jit, signature=types, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in blocks.items() if name not in names}
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _type(value: Any, constant: bool) -> str:
    if constant or value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any, kind: str) -> bool:
    return kind != "constexpr" and (kind[0] == "*" or (kind[0] == "i" and value % 16 == 0))


def _nvidia(binary: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return _sum(r"REG:(\d+)", usage), _sum(r"(?:STACK|LOCAL):(\d+)", usage)


def _amd(code: str) -> tuple[int, int]:
    return _sum(r"\.vgpr_count:\s+(\d+)", code), _sum(r"[sv]gpr_spill_count:\s+(\d+)", code)


def _sum(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))
