"""The command line, which is read without importing torch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .version import __version__

_NO_OPTIONS = {"run", "given"}  # of the namespace: the command's function, and its arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs the command; returns the exit status."""
    return run(parse(arguments))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for.

    Raises:
        SystemExit: it asks for help or the version, which are printed, or has a mistake.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(given, argparse.Namespace(given=given))
    if rest and (options.run is not _train or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no more words once an option came between them
        options.settings += rest
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the command that ``options`` name; returns the exit status."""
    try:
        return int(options.run(options) or 0)
    except (ValueError, ModuleNotFoundError, FloatingPointError) as error:
        return _fail(error, options)
    except RuntimeError as error:
        from .trainer.folder import RunFolderError
        from .trainer.judging import RewardError

        if isinstance(error, RunFolderError | RewardError):
            return _fail(error, options)
        raise
    except KeyboardInterrupt:
        if options.run in (_demo, _train):
            out = getattr(options, "out", None)  # a recipe's is known when it is read
            said = _how_to_continue(out, options.given) if out else "interrupted"
            print(f"guard-ops: {said}", file=sys.stderr)
        return 130


def _fail(error: Exception, options: argparse.Namespace) -> int:
    print(f"guard-ops: {_in_words_of(options, str(error))}", file=sys.stderr)
    return 1


def _in_words_of(options: argparse.Namespace, message: str) -> str:
    """``message`` with `config.learning_rate` as the command line has it.

    That is `--learning-rate` where it is an option, and `learning_rate` for a recipe's key.
    """
    if options.run is _train:
        message = re.sub(r"`(?:config|recipe|guard)\.(\w+)`", r"`\1`", message)
        return message.replace("`resume=True`", "`resume=true`")
    names = vars(options).keys() - _NO_OPTIONS

    def option(name: re.Match[str]) -> str:
        return f"`--{name[1].replace('_', '-')}`" if name[1] in names else name[0]

    return re.sub(r"`(?:config\.|recipe\.)?(\w+)(?:=True)?`", option, message)


def _how_to_continue(out: Path, given: Sequence[str]) -> str:
    """What an interrupted command has saved, and the command that goes on from there."""
    # A checkpoint that was set aside, as iteration-000120.corrupt-2, is nothing to continue from.
    # One in best/ is none either: it is of an iteration before.
    names = (p for p in out.rglob("iteration-*") if p.parent.name != "best")
    checkpoints = (p for p in names if re.fullmatch(r"iteration-\d+", p.name))
    found = [*checkpoints, *out.rglob("pretrained.safetensors")]
    if not found:
        return "interrupted; nothing was saved yet"
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    words = [word for word in given if not word.startswith("resume=")]
    resume = ["resume=true"] if given[0] == "train" else []
    command = shlex.join(["guard-ops", *words, *resume])
    return f"interrupted; saved until now: {newest}. To continue from there:\n  {command}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-ops", description="Fused GRPO ops for flow models, at work, timed and checked."
    )
    parser.add_argument("--version", action="version", version=f"guard-ops {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="demo | train | report | bench | doctor"
    )

    demo = commands.add_parser(
        "demo",
        help="fine-tune a digits flow with three objectives",
        description="Pretrain a flow on handwritten digits, fine-tune it with Flow-GRPO and with "
        "GRPO-Guard's two objectives, and show what each one costs: tables and pictures.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for everything; default: runs/demo",
    )
    demo.add_argument(
        "--seed", "--seeds", type=int, nargs="+", default=[0], help="one or more; default: 0"
    )
    _add_lengths(demo)
    demo.add_argument("--report", type=Path, help="also write the results as this Markdown page")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="fine-tune a model with a recipe",
        description="Fine-tune a flow model. RECIPE is a YAML file, or the name of one that comes "
        "with the package: digits, flux1_dev, qwen_image, sd3_5_medium, wan2_1_t2v_1_3b.",
    )
    train.add_argument("recipe", metavar="RECIPE", help="a name, or a .yaml file")
    train.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],  # without one, argparse asks for it where RECIPE is missing
        help="instead of the recipe's; docs/trainer.md says which there are",
    )
    train.add_argument("--dry-run", action="store_true", help="say what it comes to, and end")
    train.add_argument("--gpus", type=int, help="of the dry run; default: 1")
    train.set_defaults(run=_train)

    report = commands.add_parser(
        "report",
        help="a page that shows one or several runs",
        description="Write one HTML file that shows a run of `guard-ops train`, or compares "
        "several; it needs nothing beside it.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    report.add_argument("--out", type=Path, help="the page; default: report.html in the only run")
    report.set_defaults(run=_report)

    bench = commands.add_parser(
        "bench",
        help="time the kernels against plain PyTorch",
        description="Time every op on this machine's backends against plain PyTorch, "
        "torch.compile and a memory copy, and compare its digits with float64's.",
    )
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser(
        "doctor",
        help="what this installation can do, and why not more",
        description="Test every backend that is here, and say what each missing one needs.",
    )
    doctor.add_argument("--json", action="store_true", help="the same for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, default=120, help="of a run; default: 120")
    parser.add_argument(
        "--pretrain-steps", type=int, default=3000, help="before fine-tuning; default: 3000"
    )


def _demo(options: argparse.Namespace) -> None:
    from .digits.demo import run_demo
    from .digits.report import show, write_page

    if options.report is not None and options.report.is_dir():
        raise ValueError(f"`report` is {options.report}, which is a folder; it needs a file's name")
    result = run_demo(options.out, options.seed, options.iterations, options.pretrain_steps)
    show(result, options.out)
    if options.report is not None:
        write_page(result, options.out, options.report)
        print(f"{options.report}")


def _train(options: argparse.Namespace) -> None:
    from .recipes.config import DigitsRecipe
    from .recipes.resolve import as_yaml, resolve

    if options.gpus is not None and not options.dry_run:
        raise ValueError(
            "`--gpus` is what `--dry-run` plans for; to train on several, start the command with "
            "torchrun --nproc-per-node"
        )
    settings = resolve(options.recipe, options.settings, needed=not options.dry_run)
    options.out = Path(settings.out)
    if isinstance(settings, DigitsRecipe):
        from .digits.jobs import train_recipe

        if options.dry_run:
            print(as_yaml(settings), end="")
            return
        train_recipe(settings)
        if os.environ.get("RANK", "0") == "0":
            print(f"metrics, TensorBoard files and checkpoints: {options.out}")
        return
    if options.dry_run:
        from .recipes.dry_run import describe

        gpus = 1 if options.gpus is None else options.gpus
        if gpus < 1:
            raise ValueError(f"`--gpus` is {gpus}; it needs >= 1")
        print(describe(settings, gpus))
        return
    from .recipes.job import train

    train(settings)


def _report(options: argparse.Namespace) -> None:
    from .report.page import write_report

    runs = options.runs
    if options.out is None and len(runs) > 1:
        raise ValueError("`out` is not given; a report of several runs needs a file's name")
    print(write_report(runs, options.out or runs[0] / "report.html"))


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    from .benchmarks.options import add_arguments

    add_arguments(parser)


def _bench(options: argparse.Namespace) -> int:
    from .benchmarks.command import run

    return run(options)


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(["--json"] if options.json else [])
