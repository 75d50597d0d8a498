"""Measures the share of a whole training step that the loss takes, with guard_ops and without.

The models are diffusers' own classes with random weights and their published depth; on a CPU their
width and their pictures are scaled down, on a GPU they are whole. A step is the model's forward,
the loss, the backward through the model and an SGD update (AdamW's state for FLUX would not fit
one GPU, and AdamW would make the loss's share smaller).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guard_ops.policies.published import PUBLISHED
from guard_ops.trainer.extras import require

from . import contenders, measure
from .results import Row
from .suite import peak_bytes
from .workloads import Workload

ROUNDS = 2  # each with three contenders of three calls
TEXT_TOKENS = 77
LEARNING_RATE = 1e-6  # so small that the weights stay random


@dataclass(frozen=True)
class Model:
    """A diffusers transformer: its published configuration, and what a CPU runs of it."""

    name: str
    build: str  # a class of diffusers, or of the demo
    full: dict[str, Any]
    scaled: dict[str, Any]
    latent: tuple[int, ...]
    scaled_latent: tuple[int, ...]
    objective: str
    note: str


def _published(name: str) -> dict[str, Any]:
    """The arguments of a published model's network."""
    config = dict(PUBLISHED[name].transformer)
    del config["_class_name"]
    return config


MODELS = (
    Model(
        "SD3.5-M",
        "SD3Transformer2DModel",
        _published("sd3_5_medium"),
        {
            "num_attention_heads": 1,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 96,
        },
        (16, 64, 64),
        (16, 32, 32),
        "flow_grpo",
        "all 24 layers",
    ),
    Model(
        "FLUX.1-dev",
        "FluxTransformer2DModel",
        _published("flux1_dev"),
        {
            "num_attention_heads": 1,
            "attention_head_dim": 64,
            "axes_dims_rope": (8, 28, 28),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
        },
        (1024, 64),
        (256, 64),
        "flow_grpo",
        "all 19 + 38 layers",
    ),
    Model(
        "Wan2.1 1.3B",
        "WanTransformer3DModel",
        _published("wan2_1_t2v_1_3b"),
        {
            "num_attention_heads": 1,
            "attention_head_dim": 64,
            "text_dim": 64,
            "ffn_dim": 373,
        },
        (16, 21, 60, 104),
        (16, 3, 16, 26),
        "dance_grpo",
        "all 30 layers",
    ),
    Model(
        "digits MLP (guard-ops demo)",
        "DigitPolicy",
        {},
        {},
        (1, 8, 8),
        (1, 8, 8),
        "article",
        "many small steps: nothing is scaled",
    ),
)
BATCH = {"DigitPolicy": 80}  # a minibatch of the demo
DEFAULT_BATCH = 2

LossOf = Callable[[contenders.Inputs], measure.Call]


def measure_all(
    backend: str, device: torch.device, update: Callable[[int, str], None]
) -> list[Row]:
    """A row for each model; without diffusers a row that says so."""
    rows = []
    for done, model in enumerate(MODELS):
        update(done, model.name)
        try:
            rows.append(measure_share(model, backend, device))
        except ModuleNotFoundError as error:
            rows.append({"model": model.name, "skipped": str(error)})
    update(len(MODELS), "")
    return rows


def measure_share(model: Model, backend: str, device: torch.device) -> Row:
    """Time and peak memory of a step without guard_ops and with it, and of its loss alone.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    whole = device.type == "cuda" or not model.scaled
    network: Any = build(model, whole).to(device)
    if device.type == "cuda":
        network = network.to(torch.bfloat16)
        if model.scaled:
            network.enable_gradient_checkpointing()
    dtype = next(network.parameters()).dtype
    workload = Workload(
        model.name,
        model.name,
        model.latent if whole else model.scaled_latent,
        BATCH.get(model.build, DEFAULT_BATCH),
        1,
        "",
        model.objective,
        "dance_sde" if model.objective == "dance_grpo" else "flow_sde",
    )
    inputs = contenders.make_inputs(workload, dtype, device=device)
    velocity = forward(model, network, inputs.sample[0])
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    losses: dict[str, LossOf] = {
        "before": lambda x: contenders.chain(x, model.objective, kind=workload.kind),
        "after": lambda x: contenders.ours(x, "mean", model.objective, backend),
    }

    def step(loss_of: LossOf) -> measure.Call:
        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            v = velocity()
            leaf = v.detach().unsqueeze(0).requires_grad_()
            loss_of(dataclasses.replace(inputs, model_output=leaf))()
            assert leaf.grad is not None
            v.backward(leaf.grad.squeeze(0))
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    steps = {name: step(loss_of) for name, loss_of in losses.items()}
    parts = {name: loss_of(inputs) for name, loss_of in losses.items()}
    settle = 0 if model.scaled else 0.03  # a step of a second needs none, as it fills every cache
    rounds = ROUNDS if model.scaled else 10
    whole_race = measure.race(
        steps, rounds=rounds, warmup=0, settle=settle, timed=1, repeat="after"
    )
    loss_race = measure.race(parts, rounds=10, warmup=1, settle=0.03, timed=3, repeat="after")
    row: Row = {
        "model": model.name,
        "shape": list(workload.shape),
        "parameters": _parameters(network),
        "full_parameters": _parameters(network) if whole else full_parameters(model),
        "dtype": str(dtype).removeprefix("torch."),
        "note": model.note if whole else _scaled_note(model),
        "noise": round(whole_race.noise, 3),
    }
    for name in losses:
        row[f"step_{name}_ms"] = round(whole_race.median(name) * 1e3, 3)
        row[f"loss_{name}_ms"] = round(loss_race.median(name) * 1e3, 4)
        row[f"peak_{name}_bytes"] = peak_bytes(steps[name], inputs, device)
        row[f"loss_peak_{name}_bytes"] = peak_bytes(parts[name], inputs, device)
    return row


def build(model: Model, whole: bool) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    if model.build == "DigitPolicy":
        from guard_ops.digits.policy import DigitPolicy

        return DigitPolicy()
    network = getattr(require("diffusers", "bench"), model.build)
    built: nn.Module = network(**(model.full if whole else model.full | model.scaled))
    return built


def full_parameters(model: Model) -> int:
    """Parameters of the published configuration; no memory is allocated."""
    with torch.device("meta"):
        return _parameters(build(model, whole=True))


def forward(model: Model, network: nn.Module, sample: Tensor) -> Callable[[], Tensor]:
    """A call for the velocity [B, *latent] of ``sample``, as the model's trainers make it."""
    batch, device, dtype = sample.shape[0], sample.device, sample.dtype
    config: Any = getattr(network, "config", None)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if model.build == "DigitPolicy":
        sigma, labels = torch.full((batch,), 0.5, device=device), torch.arange(batch) % 10
        policy: Any = network
        return lambda: policy.velocity(sample, sigma, {"label": labels.to(device)})
    given: dict[str, Any] = {"hidden_states": sample, "return_dict": False}
    time = torch.full((batch,), 0.5, device=device, dtype=dtype)
    if model.build == "WanTransformer3DModel":
        given |= {
            "timestep": (time * 1000).long(),
            "encoder_hidden_states": randn(batch, TEXT_TOKENS, config.text_dim),
        }
    else:
        given |= {
            "timestep": time if model.build.startswith("Flux") else time * 1000,
            "encoder_hidden_states": randn(batch, TEXT_TOKENS, config.joint_attention_dim),
            "pooled_projections": randn(batch, config.pooled_projection_dim),
        }
    if model.build == "FluxTransformer2DModel":
        side = math.isqrt(sample.shape[1])
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
        given |= {
            "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
            "img_ids": places.to(device, dtype),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device, dtype=dtype),
        }

    def call() -> Tensor:
        velocity: Tensor = network(**given)[0]
        return velocity

    return call


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _scaled_note(model: Model) -> str:
    whole = full_parameters(model)
    return (
        f"{model.note}, scaled to one attention head of 64 and latents {list(model.scaled_latent)} "
        f"of {list(model.latent)}; the full model has {whole / 1e9:.1f} B parameters. The estimate "
        "at full width scales the model's time by the parameters."
    )
