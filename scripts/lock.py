"""Pin what CI installs, with hashes: writes .ci/requirements.txt.

    pip install uv
    python scripts/lock.py             # keeps the versions that are pinned and still fit
    python scripts/lock.py --upgrade   # takes the newest of everything

`make test LOCK=.ci/requirements.txt` installs these before anything else, so that pip finds what
pyproject.toml and torch need in place and downloads nothing that is not pinned but torch. torch is
not pinned here, because its file differs with the index and with CUDA; `TORCH` in the Makefile is
its version. The versions fit every Python that is supported.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements.txt"
HEAD = """\
# What CI installs beside torch. Written by `python scripts/lock.py`, from pyproject.toml.
"""
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
        command = ["uv", "pip", "compile", "pyproject.toml", str(beside), "--extra", "dev"]
        command += ["--universal", "--python-version", "3.10", "--generate-hashes"]
        command += ["--override", str(excluded), "--no-emit-package", "torch"]
        command += ["--no-header", "--no-annotate", "--quiet", *upgrade, "--output-file", str(LOCK)]
        subprocess.run(command, cwd=ROOT, check=True)
    LOCK.write_text(HEAD + LOCK.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
