"""Pin what CI installs, with hashes: writes build.txt, requirements.txt and docs.txt in .ci.

    pip install uv
    python scripts/lock.py             # keeps the versions that are pinned and still fit
    python scripts/lock.py --upgrade   # takes the newest of everything

`make test LOCKED=1` installs these first, so that pip finds what pyproject.toml and torch need in
place and downloads nothing that is not pinned but torch. torch is not pinned here, because its file
differs with the index and with CUDA; `TORCH` in the Makefile is its version. build.txt is what a
build needs, of the same versions: compilers begin while the rest is installed. docs.txt is what
`make docs LOCKED=1` needs, of the same versions where requirements.txt has one,
on Python 3.11 and newer: for 3.10 there is no Sphinx that allows those. The versions fit
every Python that is supported.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from build_wheels import TOOLS

ROOT = Path(__file__).resolve().parents[1]
BUILD, ALL, DOCS = (ROOT / ".ci" / name for name in ("build.txt", "requirements.txt", "docs.txt"))
HEAD = "# What {0} beside torch. Written by `python scripts/lock.py`, from pyproject.toml.\n"
# What torch itself needs on every platform; the libraries of a CUDA build come with that build.
OF_TORCH = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")
WITHOUT_TORCH = "torch ; sys_platform == 'never'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest of everything")
    options = parser.parse_args()
    upgrade = ["--upgrade"] if options.upgrade else []
    with tempfile.TemporaryDirectory() as temporary:
        beside, excluded = Path(temporary, "torch.in"), Path(temporary, "excluded.txt")
        beside.write_text("\n".join(OF_TORCH) + "\n")
        excluded.write_text(WITHOUT_TORCH + "\n")
        without = ["--override", str(excluded), "--no-emit-package", "torch"]
        compiled(ALL, ["pyproject.toml", str(beside), "--extra", "dev", *without, *upgrade])
        tools = Path(temporary, "build.in")
        tools.write_text("\n".join(TOOLS) + "\n")
        compiled(BUILD, [str(tools), "--constraint", str(ALL), "--upgrade"])
        same = ["--constraint", str(ALL), *without, *upgrade]
        compiled(DOCS, ["pyproject.toml", str(beside), "--extra", "docs", *same], python="3.11")
    ALL.write_text(HEAD.format("CI installs") + ALL.read_text())
    DOCS.write_text(HEAD.format("the site needs") + DOCS.read_text())
    BUILD.write_text(HEAD.format("a build needs") + BUILD.read_text())
    return 0


def compiled(lock: Path, options: list[str], python: str = "3.10") -> None:
    """Lets uv write ``lock``, for ``python`` and newer."""
    command = ["uv", "pip", "compile", *options, "--universal", "--python-version", python]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    subprocess.run([*command, "--output-file", str(lock)], cwd=ROOT, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
