"""FLUX.1-dev as a flow policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..trainer.policy import Condition
from .pipeline import PipelinePolicy, linspace_sigmas, unpack


class FluxPolicy(PipelinePolicy):
    """Latents are tokens [H W / 256, 64]; the guidance scale is an input of the network."""

    pipeline = "FluxPipeline"
    backbone = "flux"
    guided = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.tokens(), int(self.transformer.config.in_channels))

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=linspace_sigmas(steps), mu=self.shift_of_size(scheduler))

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        prompt = condition["prompt"]
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=self._guidance(latents),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=prompt,
            txt_ids=latents.new_zeros(prompt.shape[1], 3),
            img_ids=self._positions(latents),
            return_dict=False,
        )[0]
        return velocity

    def _guidance(self, latents: Tensor) -> Tensor | None:
        """float32 [B], whatever the latents' dtype; None for a model without that input."""
        if not self.transformer.config.guidance_embeds:
            return None
        scale = self.settings.guidance_scale
        return torch.full((len(latents),), scale, device=latents.device, dtype=torch.float32)

    def _positions(self, like: Tensor) -> Tensor:
        """[tokens, 3]: zero, row and column of each token."""
        rows, columns = self.settings.height // 16, self.settings.width // 16
        ids = like.new_zeros(rows, columns, 3)
        ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
        ids[..., 2] = torch.arange(columns, device=like.device)[None, :]
        return ids.reshape(rows * columns, 3)

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        prompt, pooled, _ = pipe.encode_prompt(
            prompts,
            device=next(pipe.text_encoder.parameters()).device,
            max_sequence_length=self.settings.text_length,
        )
        return {"prompt": prompt.to(self.settings.dtype), "pooled": pooled.to(self.settings.dtype)}

    def decode_latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        image = unpack(latents, self.settings.height // 8, self.settings.width // 8)
        pixels: Tensor = self.vae.decode(
            image / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        return pixels
