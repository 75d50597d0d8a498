"""What the backbones have in common: a diffusers pipeline as a flow policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..trainer.extras import require
from ..trainer.policy import Condition, Schedule
from . import loading, lora
from .encodings import Encode, Encodings, identity
from .loading import ModelError, ModelFolder

GuidanceGradient = Literal["both", "conditional"]

PURE_NOISE = 1 - 1e-5  # a sigma from here on is 1, from which UniPC keeps 1e-6 away


@dataclass(frozen=True)
class PolicySettings:
    """How a pipeline is sampled and trained.

    Args:
        height, width: of an image, in pixels.
        frames: of a video; 1 for an image.
        guidance_scale: of classifier-free guidance (none at 1), or what a distilled model is told.
        guidance_gradient: whether gradients reach "both" velocities of classifier-free guidance,
            or only the "conditional" one: then the update keeps half the activations.
        negative_prompt: what guidance leads away from.
        text_length: tokens of an encoded prompt; longer ones are cut, shorter ones padded.
        dtype: what the denoiser computes in.
        checkpointing: recompute the activations of a block in the backward pass.
        decode_batch: samples that the decoder has in hand at a time.

    Raises:
        ValueError: the message names the argument, what it got and what it needs.
    """

    height: int
    width: int
    frames: int = 1
    guidance_scale: float = 1.0
    guidance_gradient: GuidanceGradient = "both"
    negative_prompt: str = ""
    text_length: int = 256
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    decode_batch: int = 2

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % 16 or value <= 0:
                raise ValueError(f"`{name}` is {value}; it needs a multiple of 16")
        if self.frames < 1 or (self.frames - 1) % 4:
            raise ValueError(f"`frames` is {self.frames}; it needs 1, 5, 9 ... (4 n + 1)")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}; it needs >= 0 and finite")
        for name in ("text_length", "decode_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it needs >= 1")


class PipelinePolicy(nn.Module):
    """A :class:`~guard_ops.trainer.FlowPolicy` around the transformer of a diffusers pipeline.

    A backbone says how its transformer is called, in what shape a latent is, and how the pipeline's
    scheduler is asked for its sigmas. Text encoders and decoder are no part of the module: they
    have no parameters to train, average or save.
    """

    pipeline: ClassVar[str]  # the name of its diffusers class
    backbone: ClassVar[str]  # of lora.TARGETS
    vae: Any
    transformer: Any
    video: ClassVar[bool] = False  # whether there may be more than one frame
    guided: ClassVar[bool] = True  # by two velocities; else the scale is an input of the network

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        settings: PolicySettings,
        *,
        vae: Any = None,
        encodings: Encodings | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.frozen: Any = None  # the reference of a full fine-tuning; see keep_reference
        self.settings, self.scheduler = settings, scheduler
        self.__dict__["vae"] = vae  # not a submodule
        self.encodings = encodings
        self._negative: dict[str, Tensor] | None = None
        self._source: tuple[ModelFolder, torch.device] | None = None
        self._float32_weights = False  # whatever `settings.dtype` is
        self._check_size()
        if settings.checkpointing:
            transformer.enable_gradient_checkpointing()

    # --- what a backbone says

    @property
    def latent_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """One call of the transformer, as the pipeline makes it; ``latents`` are in its dtype."""
        raise NotImplementedError

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``pipe.encode_prompt`` at the length of the settings."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """What the decoder makes of them, within [-1, 1]."""
        raise NotImplementedError

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Asks as the pipeline does; with a shift that depends on the size, if it has one."""
        dynamic = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(steps, **({"mu": self.shift_of_size(scheduler)} if dynamic else {}))

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """``uncond + scale (cond - uncond)``, in one operator."""
        return torch.lerp(uncond, cond, self.settings.guidance_scale)

    # --- the protocol

    def schedule(self, steps: int) -> Schedule:
        """The noise levels and timesteps at which the pipeline calls its transformer."""
        scheduler = copy.deepcopy(self.scheduler)
        self.set_timesteps(scheduler, steps)
        sigmas = [float(s) for s in scheduler.sigmas]
        if not all(map(math.isfinite, sigmas)):
            raise ValueError(f"`steps` is {steps}, for which the scheduler's sigmas are {sigmas}")
        if sigmas[-1] != 0:
            raise ModelError(
                f"the scheduler's last sigma is {sigmas[-1]}; training samples to 0 "
                '(final_sigmas_type "zero")'
            )
        snapped = (1.0 if s >= PURE_NOISE else s for s in sigmas)
        return Schedule(tuple(snapped), scheduler.timesteps.clone())

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[P, ...] of fixed length; from the disk, where they were encoded before."""
        if self.encodings is None:
            raise RuntimeError("this policy was made without text encoders")
        return self.encodings.encode(prompts)

    def velocity(
        self,
        latents: Tensor,  # [B, *latent]
        timestep: Tensor,  # [B] of schedule().timesteps
        condition: Condition,  # of encode
    ) -> Tensor:
        """What the pipeline hands its scheduler; guidance is two rows of one call."""
        with self._computing_in_dtype(latents.device.type):
            return self._guided_velocity(latents.to(self.settings.dtype), timestep, condition)

    def _computing_in_dtype(self, device: str) -> AbstractContextManager[Any]:
        """Autocast for float32 weights in full fine-tuning, which FSDP2 casts by itself.

        Casts are not cached: with checkpointing, those of one block are alive at a time.
        """
        if not self._float32_weights or isinstance(self, FSDPModule):
            return nullcontext()
        return torch.autocast(device, dtype=self.settings.dtype, cache_enabled=False)

    def _guided_velocity(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        if not self.guided or self.settings.guidance_scale == 1:
            return self.predict(x, timestep, condition)
        negative = self._negative_for(condition, len(x))
        if torch.is_grad_enabled() and self.settings.guidance_gradient == "conditional":
            with torch.no_grad():
                uncond = self.predict(x, timestep, negative)
            return self.combine(uncond, self.predict(x, timestep, condition))
        both = {name: torch.cat([negative[name], value]) for name, value in condition.items()}
        pair = self.predict(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        return self.combine(*pair.chunk(2))

    def forward(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self.velocity(latents, timestep, condition)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], float32, [B, 3, H, W] or [B, F, 3, H, W]."""
        parts = latents.float().split(self.settings.decode_batch)
        pixels = torch.cat([self.decode_latents(part).float() for part in parts])
        return (pixels / 2 + 0.5).clamp(0, 1)

    def reference(self) -> AbstractContextManager[None]:
        """The policy before training: its LoRA switched off, or the frozen copy."""
        if self.has_lora:
            return lora.without_lora(self.transformer)
        return self._with_frozen()

    # --- around it

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] | None = None) -> None:
        """Train adapters instead of the weights; default targets: the published recipes'.

        Adapters on what the velocity does not depend on stay as they are: they would never have a
        gradient, which data parallelism waits for.
        """
        lora.add_lora(self.transformer, rank, alpha, targets or lora.TARGETS[self.backbone])
        for name, parameter in self.transformer.named_parameters():
            if self.unread(name):
                parameter.requires_grad_(False)

    def unread(self, name: str) -> bool:
        """Whether the velocity does not depend on the parameter of this name."""
        return False

    def keep_reference(self) -> None:
        """Keep a copy of the weights as they are, for a KL term in full fine-tuning."""
        self.frozen = copy.deepcopy(self.transformer).requires_grad_(False)

    @contextmanager
    def _with_frozen(self) -> Iterator[None]:
        if self.frozen is None:
            raise RuntimeError(
                "the policy has neither a LoRA nor a reference; keep_reference() first"
            )
        trained, self.transformer = self.transformer, self.frozen
        try:
            yield
        finally:
            self.transformer = trained

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's repeated blocks: what is sharded, checkpointed and compiled as one."""
        names = set(self.transformer._no_split_modules)
        return [m for m in self.transformer.modules() if type(m).__name__ in names]

    def compile_blocks(self) -> None:
        """``torch.compile`` each block, which is compiled once for all that are alike."""
        for block in self.blocks:
            block.compile()

    @property
    def has_lora(self) -> bool:
        return lora.has_lora(self.transformer)

    def export(self, folder: Path, *, write: bool = True) -> None:
        """The LoRA for ``load_lora_weights``, or the whole transformer for ``from_pretrained``.

        Args:
            write: False on all ranks but one; sharded weights are gathered by all of them.
        """
        if self.has_lora:
            state = lora.state_of(self.transformer, keep=write)
            if write:
                lora.export_lora(self.transformer, state, self.pipeline, folder)
            return
        weights = {}
        for name, value in self.transformer.state_dict().items():
            full = lora.whole(value, keep=write)
            if full is not None:
                weights[name] = full
        if write:
            where = folder / "transformer"
            self.transformer.save_config(where)
            save_file = require("safetensors.torch", "models").save_file
            save_file(weights, where / loading.WEIGHTS, metadata={"format": "pt"})

    def _negative_for(self, condition: Condition, batch: int) -> dict[str, Tensor]:
        if self._negative is None:
            self._negative = self.encode([self.settings.negative_prompt])
        return {
            name: self._negative[name].expand(batch, *v.shape[1:]) for name, v in condition.items()
        }

    def load_weights(self) -> None:
        """Read the weights of a policy that was made empty; the engine calls it."""
        assert self._source is not None
        loading.fill_transformer(self.transformer, *self._source)

    def set_negative(self, negative: Mapping[str, Tensor]) -> None:
        """Give the encoded negative prompt, [1, ...], where there is no text encoder."""
        self._negative = dict(negative)

    def shift_of_size(self, scheduler: Any) -> float:
        """mu: linear in the number of tokens, as the pipelines of dynamic shifts have it."""
        config = scheduler.config
        small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (large - small)
        return float(self.tokens() * slope + low - slope * small)

    def tokens(self) -> int:
        """Of one image or video, after patches."""
        s = self.settings
        frames = (s.frames - 1) // 4 + 1
        return frames * (s.height // 16) * (s.width // 16)

    def _check_size(self) -> None:
        """Raises ValueError for a size that the model does not have."""

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        settings: PolicySettings,
        *,
        encodings: Path,
        device: torch.device | str = "cpu",
        trained_dtype: torch.dtype | None = None,
        empty: bool = False,
    ) -> PipelinePolicy:
        """The policy with its weights on ``device``.

        Args:
            encodings: folder of encoded prompts.
            trained_dtype: of the transformer's parameters; default ``settings.dtype``.
            empty: leave the parameters on "meta"; :meth:`load_weights` reads them when they have
                been sharded. They are in float32 then.
        """
        where = torch.device(device)
        if empty:
            transformer = loading.empty_transformer(folder.transformer)
            for module in transformer.modules():
                module._buffers = {
                    n: b if b is None else b.to(where) for n, b in module._buffers.items()
                }
        else:
            transformer = loading.load_transformer(folder, trained_dtype or settings.dtype, where)
        scheduler = loading.make_scheduler(folder)
        vae = loading.load_vae(folder, where)
        policy = cls(transformer, scheduler, settings, vae=vae)
        policy._source = folder, where
        held = torch.float32 if empty else trained_dtype or settings.dtype
        policy._float32_weights = held == torch.float32 != settings.dtype

        def load_text() -> Encode:
            pipe = loading.load_text_pipeline(folder, transformer, settings.dtype, where)
            return lambda prompts: policy.encode_text(pipe, prompts)

        key = identity(folder, settings.dtype, settings.text_length)
        policy.encodings = Encodings(encodings, key, load_text, where)
        return policy


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] as tokens [B, h w / 4, 4 C]: the patches of FLUX and Qwen-Image."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(latents: Tensor, h: int, w: int) -> Tensor:
    """[B, h w / 4, 4 C] as [B, C, h, w]."""
    b, _, c = latents.shape
    patches = latents.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, h, w)


def linspace_sigmas(steps: int) -> list[float]:
    """What the pipelines of FLUX and Qwen-Image hand their scheduler before its shift."""
    return [1 - k * (1 - 1 / steps) / max(steps - 1, 1) for k in range(steps)]


def channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each latent channel [1, C, 1, 1, 1], of the decoders of Wan and Qwen."""
    shape = (1, math.prod((vae.config.z_dim,)), 1, 1, 1)
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return (
        torch.tensor(mean, device=like.device, dtype=like.dtype).reshape(shape),
        torch.tensor(std, device=like.device, dtype=like.dtype).reshape(shape),
    )
