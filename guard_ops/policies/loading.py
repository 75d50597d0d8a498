"""A diffusers pipeline on disk: looked at whole before the first weight is read.

The weights of the denoiser go from safetensors files straight into the modules that were made
empty, so that there is never a second copy of them, nor one in another dtype.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..trainer.engine import fill
from ..trainer.extras import require

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
_EXTRA = "models"


class ModelError(ValueError):
    """A model folder cannot be trained; says which component and what is wrong with it."""


class ModelFolder(NamedTuple):
    """A pipeline whose parts are all there; nothing of it is loaded yet."""

    model: str  # as it was asked for
    path: Path
    contents: dict[str, Any]  # model_index.json
    transformer: dict[str, Any]  # the denoiser's config.json
    scheduler: dict[str, Any]  # scheduler_config.json

    @property
    def pipeline(self) -> str:
        """The name of its diffusers class."""
        return str(self.contents["_class_name"])

    def fetch(self, part: str) -> Path:
        """The folder of a component with its weights, downloaded for a model of the hub."""
        if not Path(self.model).is_dir():
            hub = require("huggingface_hub", _EXTRA)
            hub.snapshot_download(
                self.model, allow_patterns=[f"{part}/*"], ignore_patterns=["*.bin", "*.msgpack"]
            )
        return self.path / part


def look(model: str, pipelines: Mapping[str, Any]) -> ModelFolder:
    """Read what a pipeline consists of, and check it, without a weight.

    Args:
        model: a folder that diffusers' ``save_pretrained`` wrote, or an id of the hub.
        pipelines: the names of the pipeline classes that can be trained.

    Raises:
        ModelError: no such folder, a missing component, an unsupported pipeline or scheduler.
    """
    path = _locate(model)
    index = _read(path / "model_index.json", "it needs a folder in diffusers' format")
    name = str(index.get("_class_name"))
    if name not in pipelines:
        raise ModelError(
            f"`model` {model!r} is a {name}; this trainer has {', '.join(sorted(pipelines))}"
        )
    folder = ModelFolder(
        model,
        path,
        index,
        _read(path / "transformer" / "config.json", "the transformer is missing"),
        _read(path / "scheduler" / "scheduler_config.json", "the scheduler is missing"),
    )
    for part in _parts(index):
        if not (path / part).is_dir():
            raise ModelError(
                f"`model` {model!r} has no folder {part!r}, which its model_index.json names"
            )
    if Path(model).is_dir():
        for part in ("transformer", "vae"):
            if not list((path / part).glob("*.safetensors")):
                raise ModelError(f"{path / part} has no .safetensors file; no other is read")
    _check_scheduler(folder)
    return folder


def _locate(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"`model` {model!r} is no folder; it needs one, or an id such as owner/name"
        )
    hub = require("huggingface_hub", _EXTRA)
    try:
        return Path(hub.snapshot_download(model, allow_patterns=["*.json", "tokenizer*/*"]))
    except Exception as error:  # every kind of a network's failure
        raise ModelError(
            f"`model` {model!r} is no folder, and the hub does not give it: {error}"
        ) from error


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path} is not there: {otherwise}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; it needs an object")
    return found


def _parts(index: Mapping[str, Any]) -> Iterator[str]:
    """The components that the index says are there: ``"vae": ["diffusers", "AutoencoderKL"]``."""
    for name, kind in index.items():
        if isinstance(kind, list) and len(kind) == 2 and kind[0] is not None:
            yield name


def _check_scheduler(folder: ModelFolder) -> None:
    config, name = folder.scheduler, str(folder.scheduler.get("_class_name"))
    if name not in SCHEDULERS:
        raise ModelError(
            f"`model` {folder.model!r} has a {name}; training samples a flow, with the sigmas of a "
            f"{' or '.join(SCHEDULERS)}"
        )
    if name == "UniPCMultistepScheduler" and not (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    ):
        raise ModelError(
            f"`model` {folder.model!r} has a {name} without use_flow_sigmas and a flow_prediction; "
            "its sigmas are not a flow's"
        )
    for flag in ("invert_sigmas", "stochastic_sampling"):
        if config.get(flag):
            raise ModelError(
                f"`model` {folder.model!r} has a {name} with {flag}; training has decreasing "
                "sigmas and its own noise"
            )


# ------------------------------------------------------------------------------ loading weights


def make_scheduler(folder: ModelFolder) -> Any:
    """The pipeline's own scheduler."""
    kind = getattr(require("diffusers", _EXTRA), str(folder.scheduler["_class_name"]))
    return kind.from_config(folder.scheduler)


def empty_transformer(config: Mapping[str, Any]) -> nn.Module:
    """The denoiser of this configuration, its parameters without values; buffers have theirs."""
    kind = getattr(require("diffusers", _EXTRA), str(config["_class_name"]))
    with require("accelerate", _EXTRA).init_empty_weights(include_buffers=False):
        module: nn.Module = kind.from_config(dict(config))
    return module.eval()


@torch.no_grad()
def fill_transformer(module: nn.Module, folder: ModelFolder, device: torch.device | str) -> None:
    """Read the weights into a denoiser whose parameters have memory, and may be sharded.

    A rank never holds more of the whole than one tensor.

    Raises:
        ModelError: a file lacks a tensor, or has one of another shape.
    """
    expected = {**dict(module.named_parameters()), **module.state_dict(keep_vars=True)}
    for name, tensor in read_weights(folder.fetch("transformer"), device):
        fill(_expected(folder, name, tensor, expected), tensor)
    _nothing_left(folder, expected)


def load_transformer(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The denoiser with its weights on ``device``, read tensor by tensor.

    Parameters are in ``dtype``, but those that diffusers keeps in float32.

    Raises:
        ModelError: a file lacks a tensor, or has one of another shape.
    """
    module = empty_transformer(folder.transformer)
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    expected = dict(module.state_dict())
    for name, tensor in read_weights(folder.fetch("transformer"), device):
        _expected(folder, name, tensor, expected)
        keep = any(part in name.split(".") for part in kept)
        _put(module, name, tensor.to(torch.float32 if keep else dtype))
    _nothing_left(folder, expected)
    return module.to(device)


def _expected(
    folder: ModelFolder, name: str, tensor: Tensor, expected: dict[str, Tensor]
) -> Tensor:
    """What a tensor of a file is for, taken out of ``expected``."""
    wanted = expected.pop(name, None)
    if wanted is None:
        raise ModelError(f"`model` {folder.model!r} has a tensor {name!r}{_near(name, expected)}")
    if wanted.shape != tensor.shape:
        raise ModelError(
            f"`model` {folder.model!r} has {name!r} of shape {tuple(tensor.shape)}, but its "
            f"config.json means {tuple(wanted.shape)}"
        )
    return wanted


def _nothing_left(folder: ModelFolder, expected: Mapping[str, Tensor]) -> None:
    if expected:
        raise ModelError(
            f"`model` {folder.model!r} has no weights for {len(expected)} parameters: "
            f"{', '.join(list(expected)[:3])} ..."
        )


def _near(name: str, expected: Mapping[str, Tensor]) -> str:
    near = difflib.get_close_matches(name, expected, 1)
    return f", which its config.json does not mean{f'; is it {near[0]!r}?' if near else ''}"


def read_weights(folder: Path, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor in a component's safetensors files, one at a time."""
    safetensors = require("safetensors", _EXTRA)
    index = folder / f"{WEIGHTS}.index.json"
    files = [WEIGHTS]
    if index.exists():
        files = sorted(set(_read(index, "the index of the weights is gone")["weight_map"].values()))
    for file in files:
        if not (folder / file).exists():
            raise ModelError(f"{folder / file} is not there; the weights are incomplete")
        with safetensors.safe_open(folder / file, framework="pt", device=str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dictionary)
                yield name, tensors.get_tensor(name)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    holder = module.get_submodule(owner)
    if last in holder._parameters:
        holder._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        holder._buffers[last] = value


def load_vae(folder: ModelFolder, device: torch.device | str) -> Any:
    """The decoder, in float32."""
    kind = getattr(require("diffusers", _EXTRA), folder.contents["vae"][1])
    vae = kind.from_pretrained(folder.fetch("vae"), use_safetensors=True, **in_dtype(torch.float32))
    return vae.to(device).eval().requires_grad_(False)


def load_text_pipeline(
    folder: ModelFolder, transformer: nn.Module, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """The pipeline as far as it encodes text: tokenizers and text encoders, which are loaded."""
    for part in _parts(folder.contents):
        if part.startswith(("text_encoder", "tokenizer")):
            folder.fetch(part)
    kind = getattr(require("diffusers", _EXTRA), folder.pipeline)
    others = {"vae": None, "scheduler": None} | (
        {"image_encoder": None} if "image_encoder" in folder.contents else {}
    )
    pipe = kind.from_pretrained(
        folder.path, transformer=transformer, use_safetensors=True, **in_dtype(dtype), **others
    )
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to(device).eval().requires_grad_(False)
    return pipe


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of diffusers' ``from_pretrained``, which was renamed in 0.42."""
    major, minor = (int(n) for n in require("diffusers", _EXTRA).__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}
