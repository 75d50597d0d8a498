"""Qwen-Image as a flow policy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..trainer.policy import Condition
from .pipeline import PipelinePolicy, channel_statistics, linspace_sigmas, unpack


class QwenImagePolicy(PipelinePolicy):
    """Latents are tokens [H W / 256, 64]; guidance keeps the length of each token's velocity."""

    pipeline = "QwenImagePipeline"
    backbone = "qwen_image"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.tokens(), int(self.transformer.config.in_channels))

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=linspace_sigmas(steps), mu=self.shift_of_size(scheduler))

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        rows, columns = self.settings.height // 16, self.settings.width // 16
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep.to(latents.dtype) / 1000,
            encoder_hidden_states=condition["prompt"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, rows, columns)]] * len(latents),
            return_dict=False,
        )[0]
        return velocity

    def unread(self, name: str) -> bool:
        """Nobody reads the text that the last block makes."""
        last = f"transformer_blocks.{len(self.transformer.transformer_blocks) - 1}."
        text = ("txt_mlp", "attn.to_add_out", "attn.add_q_proj")
        return name.startswith(tuple(last + part for part in text))

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        guided = super().combine(uncond, cond)
        length = torch.linalg.vector_norm(cond, dim=-1, keepdim=True)
        result: Tensor = guided * (length / torch.linalg.vector_norm(guided, dim=-1, keepdim=True))
        return result

    def encode_text(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        length = self.settings.text_length
        prompt, mask = pipe.encode_prompt(
            prompts,
            device=next(pipe.text_encoder.parameters()).device,
            max_sequence_length=length,
        )
        if mask is None:  # all prompts of the call have the same length
            mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        missing = length - prompt.shape[1]
        return {
            "prompt": F.pad(prompt.to(self.settings.dtype), (0, 0, 0, missing)),
            "mask": F.pad(mask.bool(), (0, missing)),
        }

    def decode_latents(self, latents: Tensor) -> Tensor:
        image = unpack(latents, self.settings.height // 8, self.settings.width // 8).unsqueeze(2)
        mean, std = channel_statistics(self.vae, image)
        pixels: Tensor = self.vae.decode(image * std + mean, return_dict=False)[0]
        return pixels[:, :, 0]
