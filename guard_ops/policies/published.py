"""Configurations of published models: what can be said of them without downloading anything.

They are those of the models' own ``transformer/config.json``; a downloaded or local model is read
instead. With them a run can be estimated, or timed with random weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model of the hub."""

    model: str  # its id
    pipeline: str
    transformer: dict[str, Any]
    scheduler: dict[str, Any]


_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_WAN = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
    "flow_shift": 3.0,
}

PUBLISHED: dict[str, Published] = {
    "sd3_5_medium": Published(
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        {**_FLOW, "shift": 3.0},
    ),
    "flux1_dev": Published(
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        {
            **_FLOW,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    ),
    "wan2_1_t2v_1_3b": Published(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        _UNIPC,
    ),
    "wan2_1_t2v_14b": Published(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanPipeline",
        {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        _UNIPC,
    ),
    "qwen_image": Published(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": False,
        },
        {
            **_FLOW,
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
        },
    ),
}
