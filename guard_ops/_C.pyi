from typing import Any

from torch import Tensor

from .transitions import LossArguments

def build_info() -> dict[str, Any]:
    """Versions, architectures, compiler and flags of this build, and the ISA in use."""

def keep_buffers(bytes: int) -> None:
    """How many bytes of freed results the CPU operators keep for their next ones."""

def release_buffers() -> int:
    """Gives the kept memory back to the system; returns how many bytes that were."""

class PlainCall:
    """A loss whose arguments are what a backend takes, without history."""

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...], bool]:
        """As ``transitions.Shape``."""

    @property
    def wide(self) -> bool:
        """Whether a latent is float64."""

    def transitions(self) -> tuple[Any, ...]:
        """As ``transitions.Transitions``."""

    def rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``advantages, old_log_prob, step_weights`` [K, B]."""

    def guard_loss(
        self,
        mean_std: Tensor | None,
        objective: tuple[int | bool | float, ...],
        cond: bool,
        uncond: bool,
    ) -> tuple[Tensor, ...]:
        """The operator's results, gradients [K, B, D]."""

    def shaped(self, grad: Tensor) -> Tensor:
        """A gradient [K, B, D] that nobody else holds, in the shape of ``model_output``."""

def plain_call(given: LossArguments, table: Tensor, keep: bool) -> PlainCall | None:
    """The call, or None for arguments that need a closer look."""

# With CUDA kernels only.
def cuda_unsupported(device: int) -> str:
    """Why this device cannot run the kernels of this build; empty where it can."""

def force_cuda_path(name: str) -> None:
    """How guard_loss reads the batch: automatic, cooperative, cluster, in_turn, two_launches."""

def last_cuda_path() -> str:
    """The path that the last guard_loss took."""
