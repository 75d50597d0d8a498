"""Tiny pipelines with random weights in the folder format of diffusers, made offline from nothing.

The tokenizers are files of the real formats (vocab.json + merges.txt, spiece.model), so that the
code which loads them is the one that loads the real ones.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

# ---------------------------------------------------------------------------- tokenizers


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, as CLIP's and Qwen2's vocabularies have them."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(256 + n) for n in range(len(other))]


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>", length: int = 77) -> int:
    """vocab.json and merges.txt of a CLIP tokenizer without merges: a token a byte (512 + 2).

    SD3's tokenizer_2 pads with "!" (token 0), its tokenizer with <|endoftext|>.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_alphabet()
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            special
            | {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": length,
                "do_lower_case": True,
                "add_prefix_space": False,
                "errors": "replace",
            }
        )
    )
    return len(tokens)


def t5_tokenizer(folder: Path, length: int = 512, extra_ids: int = 0) -> int:
    """spiece.model (unigram, byte fallback off) of a T5 / UMT5 tokenizer. Deterministic."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    corpus = [
        "the quick brown fox jumps over the lazy dog",
        "a photo of a red cube on a blue table",
        "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
        "0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ' \" ( ) -",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=128,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        character_coverage=1.0,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            special
            | {
                "tokenizer_class": "T5Tokenizer",
                "model_max_length": length,
                "extra_ids": extra_ids,
                "legacy": True,
            }
        )
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_template() -> str:
    """The prompt template that the installed QwenImagePipeline wraps prompts in."""
    import inspect
    import re

    from diffusers import QwenImagePipeline

    found = re.search(
        r'self\.prompt_template_encode = "((?:[^"\\]|\\.)*)"',
        inspect.getsource(QwenImagePipeline.__init__),
    )
    return found.group(1).encode().decode("unicode_escape")


def qwen_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt of a Qwen2 tokenizer that knows the words of the template.

    The pipeline drops the template's first 34 tokens, so it has to have as many here.
    """
    import re

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {t: i for i, t in enumerate(byte_alphabet())}
    merges: list[str] = []
    text = re.sub(r"<\|[a-z_]+\|>", "\x00", qwen_template().replace("{}", ""))
    for word in re.findall(r" ?[A-Za-z]+", text):
        left = "\u0120" if word[0] == " " else word[0]
        for letter in word[1:]:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append(f"{left} {letter}")
            left += letter
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges))
    base = len(vocab)
    added = {
        str(base + n): {
            "content": t,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for n, t in enumerate(QWEN_SPECIAL)
    }
    (folder / "added_tokens.json").write_text(
        json.dumps({t: base + n for n, t in enumerate(QWEN_SPECIAL)})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "model_max_length": 131072,
                "pad_token": "<|endoftext|>",
                "eos_token": "<|im_end|>",
                "unk_token": None,
                "bos_token": None,
                "errors": "replace",
                "added_tokens_decoder": added,
                "additional_special_tokens": QWEN_SPECIAL[1:],
                "padding_side": "right",
            }
        )
    )
    return base + len(QWEN_SPECIAL)


# ---------------------------------------------------------------------------- text encoders


def clip(vocab: int, width: int, kind, length: int = 77):
    from transformers import CLIPTextConfig

    return kind(
        CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=length,
            hidden_act="gelu",
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    ).eval()


def t5(kind, vocab: int, width: int):
    from transformers import T5Config, UMT5Config

    config = UMT5Config if kind.__name__.startswith("UMT5") else T5Config
    return kind(
        config(
            vocab_size=vocab,
            d_model=width,
            d_ff=2 * width,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    ).eval()


def qwen_vl(vocab: int, width: int):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {t: vocab - len(QWEN_SPECIAL) + n for n, t in enumerate(QWEN_SPECIAL)}
    heads = 2
    text = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "mrope",
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // heads // 2 - 4, 2, 2],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    ).eval()


# ---------------------------------------------------------------------------- pipelines


def tokenizer(cls: str, folder: Path):
    import transformers

    return getattr(transformers, cls).from_pretrained(folder)


def image_vae():
    """16 latent channels, 8x, no quant convolutions: SD3's and FLUX's VAE but for its widths."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5305,
        sample_size=64,
        force_upcast=True,
    ).eval()


def sd3(folder: Path, layers: int = 2, width: int = 32):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    scratch = folder.parent / (folder.name + "-tokenizers")
    vocab = clip_tokenizer(scratch / "1")
    clip_tokenizer(scratch / "2", pad="!")
    t5_vocab = t5_tokenizer(scratch / "3", length=256)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        joint_attention_dim=48,
        caption_projection_dim=width,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip(vocab, 16, CLIPTextModelWithProjection),
        text_encoder_2=clip(vocab, 24, CLIPTextModelWithProjection),
        text_encoder_3=t5(T5EncoderModel, t5_vocab, 48),
        tokenizer=tokenizer("CLIPTokenizer", scratch / "1"),
        tokenizer_2=tokenizer("CLIPTokenizer", scratch / "2"),
        tokenizer_3=tokenizer("T5TokenizerFast", scratch / "3"),
    )


def flux(folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    scratch = folder.parent / (folder.name + "-tokenizers")
    vocab, t5_vocab = clip_tokenizer(scratch / "1"), t5_tokenizer(scratch / "2")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=image_vae(),
        text_encoder=clip(vocab, 16, CLIPTextModel),
        text_encoder_2=t5(T5EncoderModel, t5_vocab, 48),
        tokenizer=tokenizer("CLIPTokenizer", scratch / "1"),
        tokenizer_2=tokenizer("T5TokenizerFast", scratch / "2"),
    )


def wan(folder: Path):
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5EncoderModel

    scratch = folder.parent / (folder.name + "-tokenizers")
    vocab = t5_tokenizer(scratch / "1")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=48,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    return WanPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5(UMT5EncoderModel, vocab, 48),
        tokenizer=tokenizer("T5TokenizerFast", scratch / "1"),
    )


def qwen(folder: Path):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    scratch = folder.parent / (folder.name + "-tokenizers")
    vocab = qwen_tokenizer(scratch / "1")
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=qwen_vl(vocab, 32),
        tokenizer=tokenizer("Qwen2Tokenizer", scratch / "1"),
    )


BUILDERS = {"sd3": sd3, "flux": flux, "wan": wan, "qwen": qwen}


@torch.no_grad()
def perturb(model: torch.nn.Module, generator: torch.Generator, scale: float = 0.2) -> None:
    """Make all weights alive: adaptive norms start at zero, and then nothing reaches the output."""
    for p in model.parameters():
        p.add_(
            torch.randn(p.shape, generator=generator)
            * (scale / max(p.shape[-1], 1) ** 0.5 if p.ndim > 1 else 0.05)
        )


def build(root: Path, name: str, seed: int = 0) -> Path:
    import shutil

    torch.manual_seed(seed)
    folder = root / name
    pipe = BUILDERS[name](folder)
    perturb(pipe.transformer, torch.Generator().manual_seed(seed))
    pipe.save_pretrained(folder)
    shutil.rmtree(root / f"{name}-tokenizers")
    return folder


def built(root: Path, name: str) -> Path:
    """The folder of a tiny pipeline under ``root``, made where it is not there yet."""
    return root / name if (root / name / "model_index.json").exists() else build(root, name)
