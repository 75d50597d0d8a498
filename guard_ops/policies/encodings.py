"""Encoded prompts on disk: a text encoder is loaded for those that are new, and then leaves."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..trainer.extras import require
from ..trainer.folder import writing
from .loading import ModelFolder

Encode = Callable[[list[str]], dict[str, Tensor]]

BATCH = 16  # prompts in one call of the text encoders


class Encodings:
    """What prompts are encoded to, one safetensors file a prompt.

    Args:
        root: the folder; several runs and several processes may share it.
        identity: what the values depend on beside the prompt: model, dtype, length.
        load: loads the text encoders; returns what encodes a list of prompts to [P, ...] tensors.
        device: where :meth:`encode` puts the tensors.
    """

    def __init__(
        self, root: Path, identity: str, load: Callable[[], Encode], device: torch.device
    ) -> None:
        self.root, self.identity, self.device = root, identity, device
        self._load = load

    def prepare(self, prompts: Sequence[str]) -> int:
        """Encode those which are not on disk yet; returns how many were new.

        The text encoders are in memory only inside this call, and only if something is new.
        """
        new = [p for p in dict.fromkeys(prompts) if not self._file(p).exists()]
        if not new:
            return 0
        encode = self._load()
        with torch.no_grad():
            for start in range(0, len(new), BATCH):
                batch = new[start : start + BATCH]
                values = encode(batch)
                for row, prompt in enumerate(batch):
                    self._write(prompt, {name: value[row] for name, value in values.items()})
        del encode
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return len(new)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[P, ...] tensors on the device; each different prompt is read once."""
        self.prepare(prompts)
        load_file = require("safetensors.torch", "models").load_file
        different = list(dict.fromkeys(prompts))
        parts = [load_file(self._file(prompt)) for prompt in different]
        rows = torch.tensor([different.index(prompt) for prompt in prompts])
        return {
            name: torch.stack([part[name] for part in parts])[rows].to(self.device)
            for name in parts[0]
        }

    def _file(self, prompt: str) -> Path:
        key = hashlib.sha256(json.dumps([self.identity, prompt]).encode()).hexdigest()
        return self.root / key[:2] / f"{key[2:40]}.safetensors"

    def _write(self, prompt: str, values: Mapping[str, Tensor]) -> None:
        file = self._file(prompt)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            copies = {name: value.cpu().contiguous() for name, value in values.items()}
            require("safetensors.torch", "models").save_file(copies, temporary)
            temporary.replace(file)  # another process may write the same prompt


def identity(folder: ModelFolder, dtype: torch.dtype, length: int) -> str:
    """Of the text encoders of a model: their configurations, and names and sizes of their files.

    Of a model of the hub it is the commit, the configurations and the tokenizers: the weights are
    fetched when something is to be encoded, and the key has to be the same before and after.
    """
    digest = hashlib.sha256()
    local = Path(folder.model).is_dir()
    if not local:
        digest.update(folder.path.name.encode())
    for part in sorted(folder.path.glob("t*")):
        if not part.name.startswith(("text_encoder", "tokenizer")):
            continue
        for file in sorted(part.iterdir()):
            if not (local or file.suffix == ".json" or part.name.startswith("tokenizer")):
                continue
            digest.update(f"{part.name}/{file.name} {file.stat().st_size}\n".encode())
            if file.suffix == ".json":
                digest.update(file.read_bytes())
    return f"{folder.model} {digest.hexdigest()[:16]} {dtype} {length}"
