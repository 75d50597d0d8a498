"""Run the Python tests under the oldest and the newest supported torch and Triton.

    python scripts/test_versions.py                                   # the oldest and the newest
    python scripts/test_versions.py "torch==2.10.* triton==3.6.*"     # some pairs, each one word
    python scripts/test_versions.py oldest -- tests/test_schedule.py  # what follows is pytest's

Each pair gets a copy of the checkout and an environment of its own, in which the extension is built
for that torch; both are thrown away. The oldest are what pyproject.toml asks for at least. Ends
with a table, and with what failed above it; the exit status is 1 if anything did. Torch and what it
brings are gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from build_wheels import TOOLS

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = (".git", ".venv", "build", "dist", "runs", "__pycache__", ".*_cache", "_C.*.so")
RESULTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
INSTALLED = "import torch, triton; print(torch.__version__, triton.__version__)"


@dataclass(frozen=True)
class Row:
    """What the table says of a pair."""

    pair: str
    installed: str  # 2.9.1+cpu, 3.5.1
    results: str  # 812 passed, 3 skipped; or what did not even start
    seconds: float
    ok: bool


def pairs(names: list[str]) -> list[str]:
    """The requirements that each name stands for."""
    text = (ROOT / "pyproject.toml").read_text()
    least = {name: re.search(rf'"{name}>=([\d.]+)', text) for name in ("torch", "triton")}
    oldest = " ".join(f"{name}=={found[1]}.*" for name, found in least.items() if found)
    known = {"oldest": oldest, "newest": "torch triton"}
    return [known.get(name, name) for name in names]


def check(pair: str, tests: list[str]) -> Row:
    """Builds for the pair and runs the tests."""
    start = time.monotonic()
    installed = ""
    with tempfile.TemporaryDirectory(prefix="guard-ops-versions-") as temporary:
        folder, python = Path(temporary, "checkout"), Path(temporary, "env", "bin", "python")
        ignored = shutil.ignore_patterns(*LEFT_BEHIND)
        shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
        environ = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
        environ["PATH"] = f"{python.parent}{os.pathsep}{environ['PATH']}"

        def run(*command: object) -> subprocess.CompletedProcess[str]:
            words = [str(word) for word in command]
            return subprocess.run(
                words, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", check=False,
            )  # fmt: skip

        pip = [python, "-m", "pip", "install", "--quiet"]
        for step in (
            [sys.executable, "-m", "venv", python.parents[1]],
            [*pip, *TOOLS, *pair.split()],
            # with the pair once more, so that no requirement of the others moves it
            [*pip, "--no-build-isolation", "-e", ".[dev]", *pair.split()],
        ):
            if (done := run(*step)).returncode:
                print(done.stdout[-4000:], file=sys.stderr)
                return Row(pair, installed, "not installed", time.monotonic() - start, False)
        installed = ", ".join(run(python, "-c", INSTALLED).stdout.split()[-2:])
        done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        if done.returncode:
            print(done.stdout[-8000:], file=sys.stderr)
        last = done.stdout.rstrip().splitlines()[-1:]
        found = ", ".join(map(" ".join, RESULTS.findall(last[0] if last else "")))
        results = found or f"pytest ended with {done.returncode}"
        return Row(pair, installed, results, time.monotonic() - start, done.returncode == 0)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| asked for | torch, Triton | tests | time |", "|---|---|---|---|"]
    for row in rows:
        verdict = row.results if row.ok else f"FAILED: {row.results}"
        lines.append(f"| {row.pair} | {row.installed} | {verdict} | {row.seconds:.0f} s |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    tests = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", nargs="*", help="oldest, newest, or requirements as one word")
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    rows = []
    for pair in pairs(options.pairs or ["oldest", "newest"]):
        print(f"== {pair}", file=sys.stderr, flush=True)
        rows.append(check(pair, tests))
    print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
