"""Stable Diffusion 3 and 3.5 as a flow policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..trainer.policy import Condition
from .pipeline import PipelinePolicy

CLIP_TOKENS = 77  # they come before the T5's


class SD3Policy(PipelinePolicy):
    """Latents [16, H / 8, W / 8]; two velocities in one doubled call; a timestep is 1000 sigma."""

    pipeline = "StableDiffusion3Pipeline"
    backbone = "sd3"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        s = self.settings
        return (int(self.transformer.config.in_channels), s.height // 8, s.width // 8)

    def _check_size(self) -> None:
        most = 16 * int(self.transformer.config.pos_embed_max_size)
        for name in ("height", "width"):
            if getattr(self.settings, name) > most:
                got = getattr(self.settings, name)
                raise ValueError(f"`{name}` is {got}; this model has positions for {most}")

    def unread(self, name: str) -> bool:
        """The last block keeps nothing of the text, so nobody reads what the text asks for."""
        last = len(self.transformer.transformer_blocks) - 1
        return name.startswith(f"transformer_blocks.{last}.attn.add_q_proj")

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=condition["prompt"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return velocity

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        prompt, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=next(pipe.text_encoder.parameters()).device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.text_length,
        )
        return {"prompt": prompt.to(self.settings.dtype), "pooled": pooled.to(self.settings.dtype)}

    def decode_latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        pixels: Tensor = self.vae.decode(
            latents / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        return pixels
