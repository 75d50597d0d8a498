"""Prompts by a file's path, by a folder as flow_grpo has it, or by the name of a shipped one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

SHIPPED = Path(__file__).parent / "prompts"
NAMES = ("geneval", "pickscore", "text_rendering")


def prompt_file(prompts: str, split: Literal["train", "test"] = "train") -> str:
    """The file of a set's prompts, which :func:`~guard_ops.trainer.prompts.read_prompts` reads.

    Args:
        prompts: a file, which it is itself; a folder with ``train_metadata.jsonl`` or
            ``train.txt`` (and ``test...``); or one of ``NAMES``.
        split: which of a folder's files.

    Raises:
        ValueError: a folder without either file, or a word that is neither file nor set.
    """
    folder = SHIPPED / prompts if prompts in NAMES and not Path(prompts).exists() else Path(prompts)
    if not folder.is_dir():
        if not folder.exists() and folder.suffix not in (".txt", ".jsonl"):
            raise ValueError(
                f"`prompts` is {prompts!r}, which is no folder, no .txt or .jsonl file, and none "
                f"of {', '.join(NAMES)}, which come with the package"
            )
        return prompts
    files = [folder / f"{split}_metadata.jsonl", folder / f"{split}.txt"]
    for file in files:
        if file.is_file():
            return str(file)
    raise ValueError(
        f"`prompts` is the folder {prompts!r}, which has no {files[0].name} and no {files[1].name}"
    )
