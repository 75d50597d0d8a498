"""Files of prompts: a text a line, or flow_grpo's ``metadata.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Prompts(NamedTuple):
    """P prompts, and what else is known of each."""

    texts: list[str]
    metadata: list[dict[str, Any]]


def read_prompts(path: str | Path) -> Prompts:
    """The prompts of a file; empty lines are left out.

    Args:
        path: ``.txt``: a prompt a line; ``.jsonl``: an object a line, whose "prompt" it is and
            whose other entries are the metadata that rewards are given.

    Raises:
        ValueError: the file cannot be read, or a line is not what it should be; names the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"`prompts` is {str(path)!r}; it needs a .txt or a .jsonl file")
    try:
        # not splitlines(): U+2028 and others are part of a text, and of JSON
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`prompts` {str(path)!r} cannot be read: {reason}") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"`prompts` {str(path)!r} has no prompt in it")
    if path.suffix == ".txt":
        for n, line in numbered:
            if line.startswith("{") and '"prompt"' in line:
                raise ValueError(f"{path}:{n} is JSON; a file of JSON lines is named .jsonl")
        return Prompts([line for _, line in numbered], [{} for _ in numbered])
    rows = [_row(path, n, line) for n, line in numbered]
    return Prompts(
        [row["prompt"] for row in rows],
        [{key: value for key, value in row.items() if key != "prompt"} for row in rows],
    )


def _row(path: Path, n: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{n} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{path}:{n} is a {type(row).__name__}; it needs {{"prompt": "..."}}')
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{path}:{n} has no text as its "prompt"; it has {", ".join(row)}')
    return row
