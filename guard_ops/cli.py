"""``guard-ops demo | train | bench | doctor``: the command line is read without importing torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .version import __version__

OBJECTIVES = ("article", "paper", "flow_grpo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs the command; returns the exit status."""
    return run(parse(arguments))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for.

    Raises:
        SystemExit: it asks for help or the version, which are printed, or has a mistake.
    """
    return _parser().parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Runs the command that ``options`` name; returns the exit status."""
    try:
        return int(options.run(options) or 0)
    except (ValueError, ModuleNotFoundError, FloatingPointError) as error:
        return _fail(error)
    except RuntimeError as error:
        from .trainer.checkpoint import CheckpointError

        if isinstance(error, CheckpointError):
            return _fail(error)
        raise
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception) -> int:
    print(f"guard-ops: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-ops", description="Fused GRPO ops for flow models, at work, timed and checked."
    )
    parser.add_argument("--version", action="version", version=f"guard-ops {__version__}")
    commands = parser.add_subparsers(required=True, metavar="demo | train | bench | doctor")

    demo = commands.add_parser("demo", help="fine-tune a digits flow with three objectives")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    demo.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], help="one or more")
    _add_lengths(demo)
    demo.add_argument("--report", type=Path, help="also write the results as this Markdown page")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="fine-tune a digits flow with one objective")
    train.add_argument("--out", type=Path, default=Path("runs/train"), help="folder for everything")
    train.add_argument(
        "--objective", choices=OBJECTIVES, default="article", help="default: article"
    )
    train.add_argument("--seed", type=int, default=0, help="of everything drawn; default: 0")
    train.add_argument("--learning-rate", type=float, default=4e-4, help="default: 4e-4")
    train.add_argument("--checkpoint-every", type=int, default=10, help="iterations; default: 10")
    train.add_argument("--evaluate-every", type=int, default=10, help="iterations; default: 10")
    _add_lengths(train)
    train.add_argument("--resume", action="store_true", help="from the newest intact checkpoint")
    train.set_defaults(run=_train)

    bench = commands.add_parser("bench", help="time the kernels against plain PyTorch")
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this installation can do, and why not more")
    doctor.add_argument("--json", action="store_true", help="the same for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, default=120, help="of a run; default: 120")
    parser.add_argument(
        "--pretrain-steps", type=int, default=3000, help="before fine-tuning; default: 3000"
    )


def _demo(options: argparse.Namespace) -> None:
    from .trainer.demo import run_demo
    from .trainer.report import show, write_page

    result = run_demo(options.out, options.seed, options.iterations, options.pretrain_steps)
    show(result, options.out)
    if options.report is not None:
        write_page(result, options.out, options.report)
        print(f"{options.report}")


def _train(options: argparse.Namespace) -> None:
    from .trainer.config import TrainConfig
    from .trainer.digits import load_digits, load_or_pretrain
    from .trainer.jobs import digits_trainer
    from .trainer.judges import Gold, ProxyReward
    from .trainer.progress import progress_bar

    config = TrainConfig(
        iterations=options.iterations,
        learning_rate=options.learning_rate,
        seed=options.seed,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=options.evaluate_every,
    )
    digits = load_digits()
    with progress_bar("pretraining", options.pretrain_steps) as bar:
        policy = load_or_pretrain(
            options.out / "pretrained.safetensors",
            options.seed,
            options.pretrain_steps,
            lambda n: bar(n, ""),
        )
        bar(options.pretrain_steps, "")
    judges = ProxyReward(digits), Gold(digits)
    trainer = digits_trainer(
        policy, options.objective, config, options.out, judges, resume=options.resume
    )
    if trainer.iteration:
        print(f"resuming after iteration {trainer.iteration}")
    trainer.fit(title=options.objective)
    trainer.close()
    print(f"metrics, TensorBoard files and checkpoints: {options.out}")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    from .benchmarks.options import add_arguments

    add_arguments(parser)


def _bench(options: argparse.Namespace) -> int:
    from .benchmarks.command import run

    return run(options)


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(["--json"] if options.json else [])
