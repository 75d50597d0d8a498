"""Shows a demo's result: in the terminal, and as the page ``docs/demo.md``."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..trainer.extras import require
from . import tables
from .jobs import CLIPS
from .results import DemoResult, SeedResult
from .tables import Table

PICTURES = ("samples.png", "overoptimization.png", "ratio.png", "clip.png")


def show(result: DemoResult, out: Path) -> None:
    """Print the tables, and where everything is."""
    console = require("rich.console", "train").Console()
    for seed in result.seeds:
        console.rule(f"seed {seed.seed}")
        for objective, run in seed.runs.items():
            _print(console, tables.per_step(run, objective))
        for table in (tables.effect(seed), tables.outcome(seed), tables.equal_proxy(seed)):
            _print(console, table)
    console.print(f"Done in {result.seconds:.0f} s.")
    console.print(f"Every number of every iteration: {out / 'metrics.jsonl'}", soft_wrap=True)
    for seed in result.seeds:
        for name in PICTURES:
            console.print(f"  {out / f'seed-{seed.seed}' / name}", soft_wrap=True)


def write_page(result: DemoResult, out: Path, page: Path) -> None:
    """Write ``page`` and, in a folder named after it, the pictures of the first seed."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        shutil.copyfile(out / f"seed-{result.seeds[0].seed}" / name, folder / name)
    page.write_text(_page(result, folder.name) + "\n")


def _print(console: object, table: Table) -> None:
    rich = require("rich.table", "train")
    box = require("rich.box", "train").SIMPLE_HEAD
    grid = rich.Table(title=table.title, title_justify="left", title_style="bold", box=box)
    grid.pad_edge = False
    grid.show_header = any(table.head)
    for n, head in enumerate(table.head):
        grid.add_column(head, justify="left" if n == 0 else "right", no_wrap=n == 0)
    for row in table.rows:
        grid.add_row(*row)
    console.print(grid)  # type: ignore[attr-defined]


def _page(result: DemoResult, folder: str) -> str:
    seeds = " ".join(str(seed.seed) for seed in result.seeds)
    c = result.config
    parts = [
        f"""# The demo's results

This page is written by the command that makes the numbers:

    guard-ops demo --seed {seeds} --iterations {c.iterations} \
--pretrain-steps {result.pretrain_steps} --report docs/demo.md

A class-conditional flow of 0.6 M parameters is pretrained on scikit-learn's 1,797 handwritten
digits (8x8), then fine-tuned three times from the same weights and with the same seeds:
{c.iterations} iterations of {c.prompts_per_iteration} classes x {c.group_size} samples, \
{c.inner_epochs} epochs x {c.minibatches} minibatches, AdamW at {c.learning_rate:g}, gradient norm
{c.max_grad_norm:g}, 10 Flow-SDE steps, the last of which is not trained.

| objective | ratio | clip | balance |
| --- | --- | --- | --- |
| Flow-GRPO | raw | 1e-3 | none |
| GRPO-Guard, paper | closed_form | 1e-4 | inverse_dt |
| GRPO-Guard, article | standardize | 0.2 | inverse_ratio |

{CLIPS}

**Proxy**, what training maximizes: the asked class's logit in a logistic regression that sees the
upper half of 200 digits ({100 * result.proxy_accuracy:.0f} % right on 97 held-out ones). \
**Gold**, which training never sees: the
probability of the asked class to an RBF SVM fitted on 1,500 other digits
({100 * result.gold_accuracy:.0f} % right). **Distance**: to the nearest real image of the class. \
**Diversity**: mean
distance between two samples of a class. **Fréchet**: between Gaussians fitted to the pixels of
1,000 samples and of all real digits. All samples are made by the sampler that training uses, whose
last step adds noise.
""",
        _summary(result.seeds),
        f"""
## Seed {result.seeds[0].seed} in pictures

Samples from the same noise before and after, a class a row:

![samples]({folder}/samples.png)

Training maximizes the proxy; the other three are what it costs:

![proxy and gold over training]({folder}/overoptimization.png)

Each denoising step's ratio, averaged over training, before and after RatioNorm:

![ratio per step]({folder}/ratio.png)

How many samples lie above the clip range, whatever their advantage:

![share above the clip]({folder}/clip.png)
""",
        *(_seed(seed) for seed in result.seeds),
    ]
    return "\n".join(parts).rstrip()


def _summary(seeds: list[SeedResult]) -> str:
    """All seeds' outcome in one table."""
    rows = [
        [str(seed.seed) if n == 0 else "", *row]
        for seed in seeds
        for n, row in enumerate(tables.outcome(seed).rows)
    ]
    head = ("seed", "objective", *tables.outcome(seeds[0]).head[1:])
    blocks = ["## Outcome", tables.markdown(Table("", head, rows)), _caution(seeds)]
    return "\n\n".join(blocks)


def _caution(seeds: list[SeedResult]) -> str:
    """How often a guard was better than Flow-GRPO: after all iterations, and at equal proxy."""
    rows = []
    for name in ("paper", "article"):
        ends = [{n: run.evaluations[-1] for n, run in seed.runs.items()} for seed in seeds]
        readings = [{n: run.evaluations for n, run in seed.runs.items()} for seed in seeds]
        equal = [tables.at_equal_proxy(runs)[1] for runs in readings]
        cells = []
        for paid in (ends, equal):
            gold = sum(p[name]["gold"] > p["flow_grpo"]["gold"] for p in paid)
            frechet = sum(p[name]["frechet"] < p["flow_grpo"]["frechet"] for p in paid)
            cells += [f"{gold} of {len(seeds)}", f"{frechet} of {len(seeds)}"]
        rows.append([tables.LABELS[name], *cells])
    first, second, *_ = next(iter(seeds[0].runs.values())).evaluations
    every = second["iteration"] - first["iteration"]
    head = ("", "gold, at the end", "Fréchet, at the end", "gold, equal proxy",
            "Fréchet, equal proxy")  # fmt: skip
    return (
        "Part of holding up is moving less: a run that gains less proxy has less to pay for. So "
        "the seeds\nbelow also compare the runs at the moment when each first reached the proxy "
        "that all three reached,\n"
        f"interpolated between evaluations, every {every:.0f} iterations.\n"
        "How often a guard was better than Flow-GRPO:\n\n" + tables.markdown(Table("", head, rows))
    )


def _seed(seed: SeedResult) -> str:
    """One seed's tables."""
    paid = tables.equal_proxy(seed)
    blocks = [
        f"## Seed {seed.seed}",
        tables.markdown(tables.effect(seed)),
        f"{paid.title}:",
        tables.markdown(paid),
    ]
    for objective, run in seed.runs.items():
        table = tables.per_step(run, objective)
        blocks += [f"{table.title} (mean over training):", tables.markdown(table)]
    return "\n\n".join(blocks) + "\n"
