"""Checks the integrations on the frameworks' real code: ``check_frameworks.py DIR [NAME ...]``.

DIR has the checkouts ``flow_grpo``, ``DanceGRPO``, ``verl-omni``, ``Flow-Factory`` and ``UniRL``;
one that is missing is left out. For each: what ``apply`` proves and leaves alone, each training
script's loss and gradient against its own lines, 20 training steps (original; step swapped; step
and loss), and at the end the table of docs/swap-in.md. Nothing is installed or written; what is not
installed here is stood in for, and said. Runs on the CPU, in two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import torch
from frameworks import checkouts, coverage, training
from frameworks.checkouts import CHECKOUTS, Checkout
from frameworks.stubs import Stubs

import guard_ops.integrations

LOSS, GRADIENT, WEIGHTS = 1e-5, 1e-4, 1e-5  # of a loss of order 1; of the norm; of a weight


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("only", nargs="*", metavar="NAME", help="only these frameworks")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    stubs = Stubs(tuple(each.package for each in CHECKOUTS))
    sys.meta_path.append(stubs)
    failures = 0
    for checkout in CHECKOUTS:
        if arguments.only and checkout.framework not in arguments.only:
            continue
        if not checkout.path(arguments.folder).exists():
            print(f"{checkout.framework}: {checkout.folder} is not in {arguments.folder}")
            continue
        print(f"\n{checkout.framework}: {checkout.folder} {checkout.commit(arguments.folder)}")
        failures += check(arguments.folder, checkout, stubs)
    if not arguments.only:
        print(f"\n{coverage.table(coverage.rows(arguments.folder))}")
    print(f"\n{failures} failures")
    return int(failures > 0)


def check(root: Path, checkout: Checkout, stubs: Stubs) -> int:
    """One framework; returns how many checks failed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        checkouts.load(root, checkout, stubs)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("  ")]
    print("\n".join(lines))
    try:
        with guard_ops.integrations.apply(checkout.framework) as patch:
            print("  " + str(patch).replace("\n", "\n  "))
    except (ValueError, ImportError) as error:
        print(f"  REFUSED: {error}")
        return 1
    failures = 0
    print("  20 training steps; differences from the original's (weights: of how far they moved)")
    for loop in training.LOOPS:
        if loop.framework == checkout.framework:
            failures += compare(checkout.path(root), loop)
    return failures


def compare(path: Path, loop: training.Loop) -> int:
    """A loop's original against the swapped step, and against each of our losses on top."""
    torch.manual_seed(3)
    network = training.Velocity(loop.latent[0])
    rollout = training.Rollout(loop, network)
    own = training.source(path, loop.tail)
    moved = training.Velocity(loop.latent[0])
    with torch.no_grad():
        for p, q in zip(moved.parameters(), network.parameters(), strict=True):
            p.copy_(q + 0.01 * torch.randn_like(q))
    base, grad = training.train(rollout, network, own), training.gradient(rollout, moved, own)
    with guard_ops.integrations.apply(loop.framework):
        results = {
            name: (training.train(rollout, network, ours), training.gradient(rollout, moved, ours))
            for name, ours in {"": own, **loop.tail.ours}.items()
        }
    failed = 0
    for name, (got, ours) in results.items():
        loss = float((ours[0] - grad[0]).abs())
        gradient = float((ours[1:] - grad[1:]).norm() / grad[1:].norm())
        weight = float((got.weights - base.weights).abs().max())
        bad = not (loss < LOSS and gradient < GRADIENT and weight < WEIGHTS)
        failed += bad
        print(
            f"    {loop.name + ': step' + (name and f', {name}'):66} loss {loss:.1e} "
            f"gradient {gradient:.1e} weights {weight:.1e} of {base.moved:.1e}"
            f"{'  FAILED' if bad else ''}"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
