"""Wan2.1 text to video as a flow policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..trainer.policy import Condition
from .pipeline import PipelinePolicy, channel_statistics


class WanPolicy(PipelinePolicy):
    """Latents [16, (F - 1) / 4 + 1, H / 8, W / 8]; UniPC's timesteps are integers."""

    pipeline = "WanPipeline"
    backbone = "wan"
    video = True

    @property
    def latent_shape(self) -> tuple[int, ...]:
        s = self.settings
        frames = (s.frames - 1) // 4 + 1
        return (int(self.transformer.config.in_channels), frames, s.height // 8, s.width // 8)

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=condition["prompt"],
            return_dict=False,
        )[0]
        return velocity

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        prompt, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.text_length,
            device=next(pipe.text_encoder.parameters()).device,
        )
        return {"prompt": prompt.to(self.settings.dtype)}

    def decode_latents(self, latents: Tensor) -> Tensor:
        mean, std = channel_statistics(self.vae, latents)
        video: Tensor = self.vae.decode(latents * std + mean, return_dict=False)[0]
        return video.transpose(1, 2)  # [B, F, 3, H, W]
