from typing import Any

def build_info() -> dict[str, Any]:
    """Versions, architectures, compiler and flags of this build, and the ISA in use."""

def cuda_unsupported(index: int) -> str:
    """Why CUDA device ``index`` cannot run this build's kernels, or nothing."""
