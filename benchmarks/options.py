"""The options of ``guard-ops bench``, which are read without importing torch."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .workloads import WORKLOADS

SUITES = ("workloads", "ops", "accuracy", "share")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds them to ``parser``."""
    many: Any = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--workload", **many, help=f"any of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--backend", **many, help="default: all that this machine has")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=SUITES, help="default: all")
    parser.add_argument("--elements", type=int, help="shrink workloads to this many elements")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write PNG and SVG plots")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="a file of --json: say what is slower since; exit status 1 if anything is",
    )
