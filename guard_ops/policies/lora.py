"""Low-rank adapters on a diffusers transformer, through peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trainer.extras import require

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

# What the published recipes train of each backbone.
TARGETS: dict[str, tuple[str, ...]] = {
    "sd3": (*ATTENTION, *TEXT_ATTENTION),
    "flux": (
        *ATTENTION,
        *TEXT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "wan": tuple(f"{block}.{name[5:]}" for block in ("attn1", "attn2") for name in ATTENTION),
    "qwen_image": (
        *ATTENTION,
        *TEXT_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
}


class _MasterLinear(nn.Linear):
    """A Linear whose weight is float32 for the optimizer, and computed in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def add_lora(transformer: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add adapters to the Linear layers whose names end in a target; only they are trainable.

    They begin as the identity (A normal, B zero). Their weights are float32, computed in the dtype
    of what they are added to.

    Raises:
        ValueError: a target matches no layer. peft would leave it out in silence as long as another
            one matches.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"`lora_targets` has {target!r}, which matches no Linear layer of "
                f"{type(transformer).__name__}; a name is the end of one such as {names[-1]!r}"
            )
    peft = require("peft", "models")
    transformer.requires_grad_(False)
    transformer.add_adapter(
        peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
        )
    )
    for layer in transformer.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.cast_input_dtype_enabled = False
            for adapters in (layer.lora_A, layer.lora_B):
                for name, linear in adapters.items():
                    adapters[name] = _with_master(linear)


def _with_master(linear: nn.Linear) -> _MasterLinear:
    replaced = _MasterLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    replaced.weight = nn.Parameter(linear.weight.detach().float())
    return replaced


def has_lora(transformer: nn.Module) -> bool:
    return bool(getattr(transformer, "peft_config", None))


@contextmanager
def without_lora(transformer: Any) -> Iterator[None]:
    """The base model inside the block, bitwise."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def state_of(transformer: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The adapters, in full and on the CPU; every rank has to call where they are sharded."""
    peft = require("peft", "models")
    found = peft.get_peft_model_state_dict(transformer)
    gathered = ((name, whole(value, keep=keep)) for name, value in found.items())
    return {name: value for name, value in gathered if value is not None}


def export_lora(transformer: Any, state: dict[str, Tensor], pipeline: str, folder: Path) -> None:
    """Write the adapters so that ``pipeline.load_lora_weights(folder)`` takes them.

    Args:
        state: of :func:`state_of`.
        pipeline: the name of the diffusers pipeline class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = transformer.peft_config["default"].to_dict()
    getattr(require("diffusers", "models"), pipeline).save_lora_weights(
        folder,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=config,
    )


def whole(value: Tensor, *, keep: bool = True) -> Tensor | None:
    """A parameter in full, float32, on the CPU; None on ranks that do not keep it."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().to("cpu", torch.float32).contiguous() if keep else None
