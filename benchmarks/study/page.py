"""The study as a page: docs/study.md, whose measured numbers come from the JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from guard_ops.trainer.folder import write_whole

from . import analysis, plots
from .advice import ABLATIONS_SAY, ADVICE, CAVEATS, SAID
from .analysis import GUARDS, SETTINGS, Alarm, Interval, Run, Seeds
from .runs import ABLATIONS, OBJECTIVES, READ, SAMPLERS
from .tasks import TASKS

Rows = list[list[str]]
_BEGIN, _END = "<!-- begin:study-monitor -->", "<!-- end:study-monitor -->"


def save(results: Path | None, docs: Path, *, check: bool = False) -> int:
    """Keep the runs of ``results`` in ``docs``, and write the page, its figures, and the monitor's.

    With ``check`` nothing is written; returns 1 if a page is not what the kept runs say.
    """
    folder = docs / "study"
    if results is not None and not check:
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*-s*.json"):
            path.unlink()
        for path in sorted(results.glob("*-s*.json")):
            kept = json.dumps(_kept(json.loads(path.read_text())), separators=(",", ":"))
            write_whole(folder / path.name, kept.encode() + b"\n")
    runs = analysis.load(folder)
    if not runs:
        raise ValueError(f"`results` has no run to write {docs / 'study.md'} from")
    monitor = docs / "monitor.md"
    wanted = {docs / "study.md": page(runs), monitor: _between(monitor.read_text(), runs)}
    if check:
        return int(any(not p.exists() or p.read_text() != text for p, text in wanted.items()))
    for path, text in wanted.items():
        write_whole(path, text.encode())
    plots.draw(runs, folder)
    return 0


def _kept(run: Run) -> Run:
    """A run without what no page shows: it is kept for good."""
    dropped = {"gold_each"} if run["objective"] in ABLATIONS else set()
    kept = {name: value for name, value in run.items() if name not in dropped}
    steps = {name: rows for name, rows in run["steps"].items() if name != "clip_fraction"}
    return kept | {"steps": {name: [_short(row) for row in x] for name, x in steps.items()}}


def _short(row: Sequence[float]) -> list[float]:
    """To three digits."""
    return [float(f"{x:.3g}") for x in row]


def _between(text: str, runs: Sequence[Run]) -> str:
    """docs/monitor.md with today's table of the study's runs."""
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return f"{head}{_BEGIN}\n{monitor_table(runs)}\n{_END}{tail}"


def page(runs: Sequence[Run]) -> str:
    """The Markdown."""
    places = {setting: analysis.seeds_of(runs, *setting) for setting in SETTINGS}
    places = {setting: seeds for setting, seeds in places.items() if seeds}
    parts = [
        _head(runs, places),
        "## What holds",
        _verdicts(places),
        _ratios(places),
        _clips(places),
        _judged(places),
        _ablations(runs),
        _monitor(runs),
        "## What we advise",
        ADVICE,
        "## What this is not",
        CAVEATS,
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _head(runs: Sequence[Run], places: dict[tuple[str, str], Seeds]) -> str:
    minutes = sum(run["cpu_seconds"] for run in runs) / 60
    numbers = ", ".join(f"{len(s)} for {plots.TITLES[p]}" for p, s in places.items())
    rows = []
    for name, task in TASKS.items():
        t = task.training
        rows.append(
            [
                name, str(t["iterations"]), f"{t['prompts_per_iteration']} x {t['group_size']}",
                f"{t['learning_rate']:g}", f"{task.clips['plain']:g}", f"{task.clips['paper']:g}",
                f"{task.pretrain_steps:,}", str(task.per_prompt * len(task.prompts)),
            ]
        )  # fmt: skip
    head = ("task", "iterations", "prompts x group", "AdamW at", "clip, plain", "clip, paper",
            "pretraining", "samples judged")  # fmt: skip
    samplers = "; ".join(f"{s['sde']} at {s['noise_level']:g}" for s in SAMPLERS.values())
    return f"""# The study

What of GRPO-Guard's claims holds in our own measurements, where it does not, and what follows for
a user. `make study` makes the runs, and writes this page: nothing measured is typed by hand. The
{len(runs)} runs are kept as JSON in `docs/study`; they took {minutes:.0f} CPU minutes, without
pretraining.

Two tasks, each with a reward that can be gamed and a judge that training never sees:

- **digits**: a flow of 0.6 M parameters on 8x8 digits. Proxy: a logistic regression that sees the
  upper half of a picture. Gold: the probability of the asked class to a support vector machine that
  sees all of it. It is the task of [the demo](demo.md).
- **text**: a flow that draws 20 three-letter words, 12 x 36 pixels, in DejaVu Sans Bold. Proxy: a
  logistic regression fitted on three pictures of each word. Gold: PP-OCR reads the sample; 1 less
  the edit distance over the length.

Two samplers, Flow-GRPO's and DanceGRPO's ({samplers}), of 10 steps, the last
of which is not trained. Three objectives: **plain** (raw ratio, clipped, as both publish it),
**paper** (`closed_form`, `inverse_dt`) and **article** (`standardize`, `inverse_ratio`, clip 0.2),
from the same weights and with the same noise. Two epochs of two minibatches an iteration, gradient
norm 1, no KL term. Samples are judged with the sampler that training uses.

{_table(head, rows)}

Seeds: {numbers}.
A seed is other weights from the start, and other noise. Intervals are 95 % t intervals over seeds,
of the paired difference to plain where two objectives are compared. A claim
**holds** where all of the interval is on its side, **fails** where all of it is on the other, and
is **open** where 0 is inside; then in brackets how many seeds are on its side. Flat is within a
tenth, from the smallest to the largest."""


def _verdicts(places: dict[tuple[str, str], Seeds]) -> str:
    """A row for each claim, a column for each setting."""
    end, equal = _gain, _gain_equal
    claims: list[tuple[str, Callable[[Seeds, str], str]]] = [
        ("raw ratio's mean is below 1", lambda s, o: _says(_each(s, o, analysis.last_bias), -1)),
        ("its spread grows over the steps", _grows),
        ("normalized mean is nearer to 1", _nearer),
        ("normalized spread is flat over steps", lambda s, o: _flat(s, o, analysis.growth)),
        ("and through training", lambda s, o: _flat(s, o, analysis.growth_in_training)),
        ("clip shares are alike at all steps",
         lambda s, o: _says(analysis.gain(s, o, analysis.clip_range), -1)),
        ("gold is higher at equal proxy", lambda s, o: _says(equal(s, o, "gold"), 1)),
        ("gold is higher at the end", lambda s, o: _says(end(s, o, "gold"), 1)),
        ("proxy is higher at the end", lambda s, o: _says(end(s, o, "proxy"), 1)),
        ("Fréchet is lower at equal proxy", lambda s, o: _says(equal(s, o, "frechet"), -1)),
        ("Fréchet is lower at the end", lambda s, o: _says(end(s, o, "frechet"), -1)),
        ("diversity is higher at equal proxy", lambda s, o: _says(equal(s, o, "diversity"), 1)),
        ("diversity is higher at the end", lambda s, o: _says(end(s, o, "diversity"), 1)),
    ]  # fmt: skip
    rows = []
    for claim, say in claims:
        raw = claim.startswith(("raw", "its"))
        for n, objective in enumerate(OBJECTIVES if raw else GUARDS):
            cells = [say(seeds, objective) for seeds in places.values()]
            rows.append(["" if n else claim, objective, *cells])
    head = ("claim", "objective", *(plots.TITLES[p] for p in places))
    return f"""{_table(head, rows)}

{SAID}"""


def _ratios(places: dict[tuple[str, str], Seeds]) -> str:
    rows = []
    for place, seeds in places.items():
        for objective in OBJECTIVES:
            guarded = objective != "plain"
            of = [
                _number(_each(seeds, objective, analysis.last_bias)),
                _times(_each(seeds, objective, analysis.growth("ratio_std"))),
                _number(_each(seeds, objective, analysis.last_hat_bias)) if guarded else "",
                _times(_each(seeds, objective, analysis.growth("ratio_hat_std")))
                if guarded else "",
                _times(_each(seeds, objective, analysis.growth_in_training("ratio_hat_std")))
                if guarded else "",
            ]  # fmt: skip
            rows.append([plots.TITLES[place] if objective == "plain" else "", objective, *of])
    head = ("", "objective", "raw mean - 1, in spreads", "raw spread, largest / smallest step",
            "normalized mean - 1, in spreads", "normalized spread, over steps",
            "normalized spread, over training")  # fmt: skip
    return f"""## The ratio

At the last trained step, where it is widest, the ratio's mean less 1 in units of its own spread;
and by what factor the spread differs between steps, and at that step between the quarters of
training.

{_table(head, rows)}

![the ratio's mean and spread at each step, before and after RatioNorm](study/ratio.png)"""


def _clips(places: dict[tuple[str, str], Seeds]) -> str:
    rows = []
    for place, seeds in places.items():
        cells = []
        for objective in OBJECTIVES:
            shares = [
                analysis.per_step(by[objective], "clip_fraction_high") for by in seeds.values()
            ]
            mean = [sum(x) / len(x) for x in zip(*shares, strict=True)]
            cells.append(f"{100 * min(mean):.0f} to {100 * max(mean):.0f} %")
        rows.append([plots.TITLES[place], *cells])
    return f"""## Clipping

Share of samples above the clip range, whatever their advantage: from the step with the fewest to
the one with the most.

{_table(("", *OBJECTIVES), rows)}

![share of samples past the clip at each step](study/clip.png)"""


_NAMES = {"proxy": "proxy", "gold": "gold", "frechet": "Fréchet", "diversity": "diversity"}


def _judged(places: dict[tuple[str, str], Seeds]) -> str:
    ends, gains = [], []
    for place, seeds in places.items():
        title = plots.TITLES[place]
        start = [
            Interval.of([by["plain"]["evaluations"][0][n] for by in seeds.values()])
            for n in _NAMES
        ]  # fmt: skip
        ends.append([title, "before", *map(_number, start)])
        for objective in OBJECTIVES:
            cells = [_number(_each(seeds, objective, analysis.at_end(n))) for n in _NAMES]
            ends.append(["", objective, *cells])
        for objective in GUARDS:
            cells = [_number(_gain(seeds, objective, n)) for n in _NAMES]
            gains.append([title if objective == "paper" else "", objective, "the end", *cells])
            equal = [_number(_gain_equal(seeds, objective, n)) for n in list(_NAMES)[1:]]
            gains.append(["", "", "equal proxy", "", *equal])
    return f"""## What the proxy costs

Before training and after it:

{_table(("", "objective", *_NAMES.values()), ends)}

Less plain's, seed by seed: at the end, and where each of the two first reached the proxy that both
reached.

{_table(("", "objective", "at", *_NAMES.values()), gains)}

Mean over seeds, and each of them:

![proxy, gold, Fréchet and diversity over training](study/training.png)

The same over the proxy, a line a run: what is to the right has gained more, and what is above has
paid less in gold and diversity, or more in Fréchet.

![gold, Fréchet and diversity over the proxy](study/paid.png)

The first seed's words, before and after, from the same noise:

![samples of ten words](study/words.png)"""


def _ablations(runs: Sequence[Run]) -> str:
    found = {run["objective"]: run for run in runs if run["objective"] in ABLATIONS}
    if not found:
        return ""
    seed = next(iter(found.values()))["seed"]
    whole = analysis.seeds_of(runs, "digits", "flow").get(seed, {})
    rows = []
    for name in (*OBJECTIVES, *ABLATIONS):
        run = found.get(name) or whole.get(name)
        if run is not None:
            end, norm = run["evaluations"][-1], run["grad_norm"]
            rows.append(
                [name, *(_plain(end[n]) for n in _NAMES), _plain(norm[0]), _plain(norm[-1])]
            )
    head = ("", *_NAMES.values(), "gradient norm, first quarter", "last quarter")
    return f"""## Ablations

Digits with Flow-GRPO's sampler, seed {seed} alone: no interval, so a small difference says nothing.
The gradient's norm is the mean of an iteration's, before `max_grad_norm` scales it down.

{_table(head, rows)}

{ABLATIONS_SAY}"""


def _monitor(runs: Sequence[Run]) -> str:
    return f"""## The monitor on these runs

[The monitor](monitor.md) with its defaults, on {READ} samples at every evaluation. Its thresholds
were set on runs of other seeds and lengths.

{monitor_table(runs)}"""


def monitor_table(runs: Sequence[Run]) -> str:
    """How often the monitor was right on the study's runs, and where it was not."""
    found = analysis.alarms(runs)
    steady, fallen = analysis.false_alarms(found), analysis.missed(found)
    between = [x for x in found if x not in steady.runs and x not in fallen.runs]
    kinds = (
        ("ends within 2 standard errors of its start", steady.runs),
        ("ends 5 or more below its start", fallen.runs),
        ("ends otherwise", between),
    )
    rows = [
        [name, str(len(some)), str(sum(x.verdict.since is not None for x in some)),
         str(sum(x.verdict.warned is not None for x in some))]
        for name, some in kinds
    ]  # fmt: skip
    table = _table(("a run whose gold", "runs", "alarms", "diversity warnings"), rows)
    said = []
    if steady.wrong:
        said.append("An alarm although gold ended where it began: " + _listed(steady.wrong) + ".")
    if fallen.wrong:
        said.append("No alarm although gold fell: " + _listed(fallen.wrong) + ".")
    if not said:
        said.append(
            "No alarm in a run whose gold ended where it began, and an alarm in each whose gold "
            "fell."
        )
    return table + "\n\n" + "\n".join(said)


def _listed(some: Sequence[Alarm]) -> str:
    names = []
    for x in some:
        r = x.run
        drop = "never" if x.verdict.since is None else f"from iteration {x.verdict.since}"
        best = f"best at {x.verdict.best}"
        names.append(
            f"{plots.TITLES[r['task'], r['sampler']]}, {r['objective']}, seed {r['seed']} "
            f"({drop}; {best}; {x.errors:+.1f} standard errors at the end)"
        )
    return "; ".join(names)


def _each(seeds: Seeds, objective: str, number: Callable[[Run], float]) -> Interval:
    return analysis.over_seeds(seeds, objective, number)


def _gain(seeds: Seeds, objective: str, name: str) -> Interval:
    return analysis.gain(seeds, objective, analysis.at_end(name))


def _gain_equal(seeds: Seeds, objective: str, name: str) -> Interval:
    return analysis.gain_at_equal_proxy(seeds, objective, name)


def _grows(seeds: Seeds, objective: str) -> str:
    factor = analysis.growth("ratio_std")
    return _says(Interval.of([factor(by[objective]) - 1 for by in seeds.values()]), 1)


def _nearer(seeds: Seeds, objective: str) -> str:
    """Against its own raw ratio: |mean - 1| in spreads."""
    differences = [
        abs(analysis.last_bias(by[objective])) - abs(analysis.last_hat_bias(by[objective]))
        for by in seeds.values()
    ]
    return _says(Interval.of(differences), 1)


def _flat(seeds: Seeds, objective: str, growth: Callable[[str], Callable[[Run], float]]) -> str:
    """Flat is within a tenth."""
    factor = _each(seeds, objective, growth("ratio_hat_std"))
    return "**holds**" if factor.mean < 1.1 else f"fails ({_times(factor)})"


def _says(interval: Interval, wanted: int) -> str:
    sign = interval.sign * wanted
    right = interval.above if wanted > 0 else interval.below
    return {1: "**holds**", -1: "fails", 0: f"open ({right} of {interval.n})"}[sign]


def _number(x: Interval) -> str:
    """Mean and half width, the mean to the half width's second digit."""
    if abs(x.mean) < 1e-6 and x.half < 1e-6:  # rounding of what is exactly 0
        return "0"
    if x.half == 0 or math.isinf(x.half):
        return _plain(x.mean)
    digits = max(0, 1 - math.floor(math.log10(x.half)))
    return f"{x.mean:.{min(digits, 4)}f} ± {x.half:.{min(digits, 4)}f}"


def _times(x: Interval) -> str:
    return f"{x.mean:.2f}x" if x.mean < 9.95 else f"{x.mean:.0f}x"


def _plain(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 1 else f"{x:.4g}"


def _table(head: Sequence[str], rows: Rows) -> str:
    ruled = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled)
