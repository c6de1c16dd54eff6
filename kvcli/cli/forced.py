"""KVCLI_KERNELS, which forces one twin of every op: refused before any work where that twin cannot run."""

import os

from ..errors import UsageError


def check_kernels() -> None:
    """Raises UsageError for a word that is no twin, and for triton where no kernel can run; imports torch for that."""
    forced = os.environ.get("KVCLI_KERNELS", "")
    if forced in ("", "ref", "cpu"):
        return
    if forced != "triton":
        raise UsageError(f"KVCLI_KERNELS={forced}: there is no such path", fix="write ref, cpu or triton, or unset it")
    import torch

    from ..kernels.launch import triton

    fix = "write ref or cpu, or unset it"
    if triton is None:
        raise UsageError("KVCLI_KERNELS=triton: Triton is not installed", fix=fix)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        why = "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
        raise UsageError("KVCLI_KERNELS=triton: no kernel can run here", why, fix)
