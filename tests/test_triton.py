"""Triton kernels without a card: interpreted against the reference, and compiled for real targets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.kernels import window
from kvcli.kernels.op import Op
from kvcli.kernels.window import window_scores

triton = pytest.importorskip("triton", reason="no Triton for this system")

OPS = {op.name: op for op in (window_scores,)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = 1e-6  # relative RMS: products and sums are float32, whatever the dtype of the inputs
TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes a block may have
MATRIX = {"sm_90": r"wgmma|mma\.sync", "gfx942": r"v_mfma"}  # tensor-core instructions


def errors(op: Op) -> dict[str, float]:
    """Relative RMS error of the kernel by case, input and dtype."""
    found = {}
    for i, case in enumerate(op.cases):
        for name, dtype in DTYPES.items():
            args = op.inputs(case, dtype, seed=5)
            sparse = [torch.stack([arg, -arg], -1)[..., 0] if isinstance(arg, torch.Tensor) else arg for arg in args]
            want = op.ref(*args)
            for kind, given in (("", args), ("strided", sparse)) if i == 2 else (("", args),):
                gap = op.fused(*given) - want
                found[f"{op.name}-{i}-{name}{kind}"] = float(gap.norm() / want.norm())
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """What `errors` finds in a process of its own, since where Triton interprets nothing compiles."""
    run = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "i"), [(name, i) for name, op in OPS.items() for i in range(len(op.cases))])
def test_interpreted_is_the_reference(op: str, i: int, dtype: str, interpreted: dict[str, float]) -> None:
    assert interpreted[f"{op}-{i}-{dtype}"] < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_with_any_strides(dtype: str, interpreted: dict[str, float]) -> None:
    assert interpreted[f"window_scores-2-{dtype}strided"] < TOLERANCE


def compiled(kernel: Any, types: dict[str, str], blocks: dict[str, Any], target: str) -> Any:
    """The kernel for a target that need not be here; aligned, with unit strides, as at a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    constants = {name: value for name, value in blocks.items() if name in names} | {"q_d": 1, "k_d": 1}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] == "i64" or signature[name][0] == "*"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in blocks.items() if name not in names}
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def spills(kernel: Any, folder: Path) -> int:
    """Bytes of stack (cuobjdump) or registers (AMD) that did not fit."""
    if "amdgcn" in kernel.asm:
        return sum(map(int, re.findall(r"[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])))
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_window_scores_compile(
    target: str, dtype: str, D: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    types = {"q": f"*{dtype}", "q_pos": "*i64", "k": f"*{dtype}", "pos": "*i32", "scale": "fp32"}
    types["softcap"] = "fp32"
    types |= dict.fromkeys(("bias", "lse", "score"), "*fp32") | dict.fromkeys(("G", "W", "T"), "i32")
    types |= dict.fromkeys(("q_h", "q_w", "k_h", "k_t"), "i64")
    blocks = {"SLICE": window.SLICE, **window._blocks(D, DTYPES[dtype].itemsize)}
    for kernel in (window._slice_lse, window._column_sums):
        built = compiled(kernel, types, blocks, target)
        assert spills(built, tmp_path) == 0
        assert built.metadata.shared <= SHARED[target]
        code = built.asm["ptx" if target == "sm_90" else "amdgcn"]
        assert dtype == "fp32" or re.search(MATRIX[target], code)


if __name__ == "__main__":
    print(json.dumps({key: value for op in OPS.values() for key, value in errors(op).items()}))
