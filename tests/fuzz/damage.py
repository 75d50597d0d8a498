"""What disks, copies and hands do to files: drawn damages, done to a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

BYTES = ("flip", "truncate", "append", "zero", "empty", "delete", "folder", "link", "swap")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 0.5, float("nan"), float("inf"), "", "x", "../x", [], {}, [None],
)  # fmt: skip
DEEP = "[" * 100_000
JSON = ("value", "remove", "rename", "deep", "not utf-8")


@st.composite
def damages(draw: st.DrawFn, kinds: tuple[str, ...] = BYTES + JSON) -> tuple[Any, ...]:
    """Kind, which file, which other file, where in it, and a value."""
    number = st.integers(0, 2**30)
    kind = draw(st.sampled_from(kinds))
    return kind, draw(number), draw(number), draw(number), draw(st.sampled_from(VALUES))


def do(folder: Path, damage: tuple[Any, ...]) -> str:
    """Damages a file of ``folder``; returns what was done to which, "" if nothing was."""
    kind, which, other, where, value = damage
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if kind in JSON:
        files = [p for p in files if p.suffix in (".json", ".jsonl")]
    if not files:
        return ""
    path, second = files[which % len(files)], files[other % len(files)]
    before = path.read_bytes()
    if kind == "swap":
        changed = second.read_bytes() != before
        path.write_bytes(second.read_bytes())
        second.write_bytes(before)
        return f"{path} and {second} change places" if changed else ""
    if kind in ("delete", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to(second if second != path else folder)
        return f"{path}: {kind}"
    after = _json(before, kind, where, value) if kind in JSON else _bytes(before, kind, where)
    path.write_bytes(after)
    return f"{path}: {kind} at {where}" if after != before else ""


def _bytes(data: bytes, kind: str, where: int) -> bytes:
    if kind == "empty" or not data:
        return b""
    at = where % len(data)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << where % 8]) + data[at + 1 :]
    if kind == "truncate":
        return data[:at]
    if kind == "append":
        return data + data[at:]
    return bytes(len(data))  # zero: what a file has whose blocks were never written


def _json(data: bytes, kind: str, where: int, value: Any) -> bytes:
    if kind == "deep":
        return DEEP.encode()
    if kind == "not utf-8":
        return b"\xff" + data
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):  # several lines, or damaged before
        return data
    places = list(_places(whole))
    if not places:
        return data
    parent, key = places[where % len(places)]
    if kind == "value":
        parent[key] = value
    elif kind == "remove" or isinstance(parent, list):
        del parent[key]
    else:
        parent[f"{key}_"] = parent.pop(key)
    return json.dumps(whole, indent=1).encode() + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside, as its container and key."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def copy(folder: Path, to: Path) -> Path:
    """``folder`` again at ``to``, whatever was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
