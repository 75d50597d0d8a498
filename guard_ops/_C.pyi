from typing import Any

def build_info() -> dict[str, Any]:
    """Versions, architectures, compiler and flags of this build, and the ISA in use."""

def keep_buffers(bytes: int) -> None:
    """How many bytes of freed results the CPU operators keep for their next ones."""

def release_buffers() -> int:
    """Gives the kept memory back to the system; returns how many bytes that were."""

def layout() -> dict[str, Any]:
    """As ``backends.compiled.layout``: what the operators take, by name and in order."""

# With CUDA kernels only.
def cuda_unsupported(device: int) -> str:
    """Why this device cannot run the kernels of this build; empty where it can."""

def force_cuda_path(name: str) -> None:
    """How guard_loss reads the batch: automatic, cooperative, cluster, two_launches."""

def leave_multiprocessors_free(multiprocessors: int) -> None:
    """How many of every device the cooperative launches leave to other streams."""

def last_cuda_path() -> str:
    """The path that the last guard_loss took."""
