"""Counts what docs/life-of-a-call.md says: the files of a call, and the places of an addition.

    python scripts/life_of_a_call.py           # rewrites the page's counted parts
    python scripts/life_of_a_call.py --check   # fails where they are out of date

A Python file belongs to a call's trip if a function of it is entered by a warm ``guard_loss`` with
its backward, which a profiler sees. A C++ file belongs to it if the operator's implementation
reaches it: by including a header of ours, and from a header to the sources that it is the interface
of. A header and those sources are one file. What a call does not enter is named in ELSEWHERE.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "life-of-a-call.md"
sys.path.insert(0, str(ROOT / "scripts"))
from additions import ADDITIONS, Edit  # noqa: E402

STARTS = {"CPU": "csrc/bindings.cpp", "CUDA": "csrc/bindings_cuda.cpp"}
INTERFACE_OF = {
    "csrc/cuda/kernels.h": ["csrc/cuda/guard_loss.cu"],
    "csrc/cpu/simd.h": ["csrc/cpu/simd_x86.h"],  # a processor's own part of it
}
ELSEWHERE = {
    "csrc/build_info.h": "facts of the build, which no operator reads",
    "csrc/build_info.cpp": "the same",
    "csrc/cpu/simd_neon.h": "another processor",
    "csrc/cpu/philox.h": "noise from a seed: the seeded form alone",
    "csrc/cuda/normals.h": "the same",
    "csrc/cuda/sums.cu": "another operator",
    "csrc/cuda/rows.cu": "another operator",
    "csrc/cuda/sde_step.cu": "another operator",
}
BEFORE = {  # the places and files that an addition took in version 0.1.0's first layout
    "an SDE kind": "schedule.py in 5 places, blocks, four integrations",
    "a `ratio_norm`": "9 files",
    "a number of the objective": "34 places in 11 files",
    "an operand over latents": "35 named places in 7 files, and slices by position",
}


def python_trip() -> list[str]:
    """The files of guard_ops that a call on the CPU enters, in that order."""
    sys.path.insert(0, str(ROOT))
    import torch

    import guard_ops as go

    generator = torch.Generator().manual_seed(0)
    v, x, noise = (torch.randn(3, 4, 32, generator=generator) for _ in range(3))
    coeffs = go.SdeSchedule([0.9, 0.7, 0.4, 0.1])[:]
    step = go.sde_step(v, x, coeffs, noise=noise)
    moved = (v + 0.01 * noise).requires_grad_()
    seen: list[str] = []

    def call() -> None:
        out = go.guard_loss(
            moved, advantages=torch.ones(4), coeffs=coeffs,
            sample=x, prev_sample=step.prev_sample, old_mean=step.mean,
        )  # fmt: skip
        out.loss.backward()

    def enters(frame: object, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)  # type: ignore[attr-defined]
        if event == "call" and path.is_relative_to(ROOT / "guard_ops"):
            name = path.relative_to(ROOT).as_posix()
            if name not in seen:
                seen.append(name)

    with go.use_backend("cpu"):
        call()
        sys.setprofile(enters)
        try:
            call()
        finally:
            sys.setprofile(None)
    return seen


def compiled_trip(device: str) -> list[str]:
    """The files of csrc that an operator of a device reaches; a header stands for its sources."""
    found: list[str] = []
    ahead = [STARTS[device]]
    while ahead:
        path = ahead.pop(0)
        if path in found or path in ELSEWHERE or path.startswith("csrc/tests/"):
            continue
        found.append(path)
        file = ROOT / path
        for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
            included = (file.parent / name).resolve().relative_to(ROOT).as_posix()
            ahead.append(included)
            source = ROOT / included
            ahead += [
                other.relative_to(ROOT).as_posix()
                for suffix in (".cpp", ".cu")
                if (other := source.with_suffix(suffix)).is_file()
                and not other.name.startswith("bindings")  # that is the other device's
            ]
            ahead += INTERFACE_OF.get(included, [])
    return _paired(found)


def _paired(paths: list[str]) -> list[str]:
    """Each header together with the sources whose interface it is."""
    out = []
    for path in paths:
        stem, _, suffix = path.rpartition(".")
        if suffix == "h" and not any(path in parts for parts in INTERFACE_OF.values()):
            sources = [p for p in paths if re.fullmatch(re.escape(stem) + r"(_\w+)?\.(cpp|cu)", p)]
            sources += [p for p in INTERFACE_OF.get(path, [])[:1] if p not in sources]
            out.append(" + ".join([path, *(Path(p).name for p in sources)]))
    paired = " ".join(out)
    out += [p for p in paths if not p.endswith(".h") and Path(p).name not in paired]
    return out


def trip(device: str) -> list[str]:
    return [*python_trip(), *compiled_trip(device)]


def trips() -> str:
    lines = []
    for device in STARTS:
        files = trip(device)
        lines += ["", f"**{device}: {len(files)} files**", ""]
        lines += [f"{n}. `{name}`" for n, name in enumerate(files, 1)]
    return "\n".join(lines[1:])


def table() -> str:
    lines = ["| to add | before | now |", "| --- | --- | --- |"]
    for name, edits in ADDITIONS.items():
        files = {edit.path for edit in edits}
        now = f"{len(edits)} places in {len(files)} file{'s' * (len(files) > 1)}"
        lines.append(f"| {name} | {BEFORE[name]} | {now} |")
    return "\n".join(lines)


def places(name: str) -> str:
    """The places where an addition is written, with a line for each file."""
    by_file: dict[str, list[Edit]] = {}
    for edit in ADDITIONS[name]:
        by_file.setdefault(edit.path, []).append(edit)
    return "\n".join(
        f"- `{path}`: {'; '.join(edit.what for edit in edits)}" for path, edits in by_file.items()
    )


def page() -> str:
    """The page with its counted parts as they are now."""
    parts = {"trips": trips(), "table": table()}
    parts |= {f"places {n}": places(name) for n, name in enumerate(ADDITIONS, 1)}
    text = PAGE.read_text()
    begins = Counter(re.findall(r"<!-- begin:(.+) -->", text))
    if begins != Counter(list(parts)):
        raise SystemExit(f"{PAGE.name} has the parts {sorted(begins)}, not {sorted(parts)}")
    for name, part in parts.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--check", action="store_true", help="fail where they are out of date")
    check = parser.parse_args().check
    text = page()
    if check:
        if text != PAGE.read_text():
            print(f"{PAGE.relative_to(ROOT)} is out of date: python scripts/life_of_a_call.py")
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
