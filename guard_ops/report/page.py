"""The report as one HTML file: no network, light and dark, from a telephone to a wide screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from ..trainer.folder import write_whole
from ..version import __version__
from . import figures
from .figures import Figure
from .runs import Group, Run, groups_of, read_run

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --paper: #fbfbf9; --card: #fff; --ink: #1d2126; --soft: #5d6670; --line: #dfe2e5;
  --grid: #e6e8ea; --good: #1d7a4f; --bad: #b3261e; --warn: #8a5a00; --accent: #3b7dd8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14171a; --card: #1c2024; --ink: #e4e7ea;
  --soft: #9aa4ae; --line: #32383e; --grid: #31363c; --good: #5cc492; --bad: #ff8a80;
  --warn: #e6b450; }} }}
* {{ box-sizing: border-box; }}
[hidden] {{ display: none !important; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1.2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .4rem 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .3rem; }}
h3 {{ font-size: 1rem; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .2rem 0 .8rem; max-width: 46rem; }}
.soft, figcaption {{ color: var(--soft); font-size: .88rem; }}
.cards {{ display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }}
figure, .card {{ margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; min-width: 0; }}
figure svg {{ display: block; width: 100%; height: auto; margin-top: .4rem; }}
.card {{ border-left: .35rem solid var(--accent); }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }} .warn {{ color: var(--warn); }}
.verdict {{ font-weight: 600; margin: .3rem 0; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: .4rem 0 0; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
.film img {{ width: 100%; max-width: 40rem; image-rendering: pixelated; display: block;
  border-radius: .3rem; }}
.film label {{ display: block; }}
input[type=range] {{ display: block; width: 100%; max-width: 40rem; height: 2rem;
  accent-color: var(--accent); }}
pre {{ overflow-x: auto; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font-size: .82rem; }}
summary {{ cursor: pointer; padding: .4rem 0; }}
</style></head><body>
"""
_SCRIPT = """<script>
for (const film of document.querySelectorAll('.film')) {
  const frames = [...film.querySelectorAll('[data-iteration]')];
  const slider = film.querySelector('input'), said = film.querySelector('output');
  const show = () => {
    frames.forEach((frame, n) => { frame.hidden = n !== Number(slider.value); });
    said.textContent = 'iteration ' + frames[slider.value].dataset.iteration;
  };
  slider.max = frames.length - 1;
  slider.value = frames.length - 1;
  slider.addEventListener('input', show);
  slider.closest('label').hidden = frames.length < 2;
  show();
}
document.documentElement.dataset.ready = 'yes';
</script>
</body></html>
"""


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs in ``paths`` to ``out``.

    Raises:
        ValueError: a folder is no run, or is given twice; ``out`` is a folder.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("`run` has a folder twice; each is to be given once")
    if out.is_dir():
        raise ValueError(f"`out` is {str(out)!r}, which is a folder; it needs a file's name")
    text = page([read_run(path) for path in paths])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode())
    return out


def page(runs: Sequence[Run]) -> str:
    """The HTML of the report."""
    groups = groups_of(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [_HEAD.format(title=html.escape(f"Guard Ops: {title}"))]
    parts += [f"<h1>{html.escape(title)}</h1>", '<div class="cards">']
    parts += [_card(run) for run in runs]
    parts += ["</div>", *_curves(groups)]
    parts += [_pictures(run) for run in runs if run.pictures]
    parts += [
        *_figures(
            "Clipping and spread by step",
            "A step that is never clipped is not guarded; one that always is does not learn.",
            figures.clips(groups),
        )
    ]
    parts += [_ratios(run) for run in runs if run.ratios]
    parts += [_settings(run) for run in runs]
    parts += [f'<p class="soft">guard-ops {__version__}</p>', _SCRIPT]
    return "\n".join(parts)


def _card(run: Run) -> str:
    said, last = run.verdict, run.lines[-1]
    rows = {"iterations": str(last["iteration"]), "reward": _number(last.get("reward"))}
    if said is None:
        verdict = '<p class="soft">No monitor: gold=... turns it on.</p>'
    else:
        kind = "good" if said.warned is None else "warn"
        kind = "bad" if said.since is not None else kind
        verdict = f'<p class="verdict {kind}">{html.escape(_sentence(str(said)))}</p>'
        best = next(r for r in run.readings if r.iteration == said.best)
        rows["gold now"] = _number(run.readings[-1].mean)
        rows["gold at its best"] = f"{_number(best.mean)}, iteration {said.best}"
        rows["gold's samples"] = str(len(best.gold))
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return (
        f'<div class="card"><h3>{html.escape(run.name)}</h3>{verdict}'
        f'<dl>{listed}</dl><p class="soft">{html.escape(str(run.path))}</p></div>'
    )


def _curves(groups: Sequence[Group]) -> list[str]:
    several = any(len(group.runs) > 1 for group in groups)
    text = (
        "A dotted line is where the monitor raised its alarm; the band of one run's gold is 1.96 "
        "standard errors of its samples."
    )
    if several:
        text = f"Over seeds: mean and 95 % t interval. {text}"
    return _figures("Over training", text, figures.curves(groups))


def _figures(title: str, text: str, drawn: Sequence[Figure]) -> list[str]:
    if not drawn:
        return []
    parts = [f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>", '<div class="cards">']
    return [*parts, *map(_figure, drawn), "</div>"]


def _figure(figure: Figure) -> str:
    return (
        f"<figure><h3>{html.escape(figure.title)}</h3>"
        f"<figcaption>{html.escape(figure.text)}</figcaption>{figure.svg}</figure>"
    )


def _pictures(run: Run) -> str:
    frames = []
    for iteration, path in run.pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        kind = path.suffix[1:]
        frames.append(
            f'<img data-iteration="{iteration}" alt="samples after iteration {iteration}" '
            f'src="data:image/{kind};base64,{data}">'
        )
    return _film(
        f"Samples: {run.name}", "The same prompts from the same noise, as training goes on.", frames
    )


def _ratios(run: Run) -> str:
    frames = [
        f'<div class="cards" data-iteration="{iteration}">{"".join(map(_figure, drawn))}</div>'
        for iteration, drawn in figures.ratios(run)
    ]
    text = "Of the last update of an iteration; every histogram is scaled to its own peak."
    return _film(f"Ratios by step: {run.name}", text, frames)


def _film(title: str, text: str, frames: Sequence[str]) -> str:
    return (
        f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
        f'<div class="film"><label><output class="soft"></output>'
        f'<input type="range" min="0" value="0" aria-label="{html.escape(title)}, iteration">'
        f"</label>{''.join(frames)}</div>"
    )


def _settings(run: Run) -> str:
    again = f"<p>To make it again:</p><pre>{html.escape(run.command)}</pre>" if run.command else ""
    settings = html.escape(run.settings) or "The folder does not say."
    return (
        f"<h2>Settings: {html.escape(run.name)}</h2>{again}"
        f"<details><summary>All settings</summary><pre>{settings}</pre></details>"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
