"""The demo end to end, shortened: its files, and the effect on the ratio that it shows."""

import json

import pytest
from tiny import full_disk

from guard_ops.cli import main
from guard_ops.digits import demo as demos
from guard_ops.digits import jobs, plots, tables
from guard_ops.digits.demo import run_demo
from guard_ops.digits.judges import Gold, ProxyReward
from guard_ops.digits.policy import load_digits
from guard_ops.digits.results import Run, SeedResult
from guard_ops.trainer import RunFolderError, Trainer

PICTURES = ("samples.png", "overoptimization.png", "ratio.png", "clip.png")
ITERATIONS = 12


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of 12 iterations on a policy pretrained for 300 steps; takes 15 s on 2 cores."""
    out = tmp_path_factory.mktemp("demo")
    options = ["--out", str(out), "--iterations", str(ITERATIONS), "--pretrain-steps", "300"]
    assert main(["demo", *options, "--report", str(out / "page.md")]) == 0
    return out


@pytest.fixture(scope="module")
def runs(demo):
    """objective -> Run with the demo's lines."""
    runs = {}
    for text in (demo / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        runs.setdefault(line["objective"], Run([], [], None)).lines.append(line)
    return runs


def test_it_writes_all_its_files(demo):
    for name in PICTURES:
        for path in (demo / "seed-0" / name, demo / "page" / name):
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 10_000
    lines = (demo / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 * ITERATIONS
    page = (demo / "page.md").read_text()
    assert "guard-ops demo --seed 0 --iterations 12 --pretrain-steps 300" in page
    for name in PICTURES:
        assert f"(page/{name})" in page


def test_all_objectives_start_from_the_same_samples(runs):
    first = {run.lines[0]["reward"] for run in runs.values()}
    assert len(runs) == 3
    assert len(first) == 1


def test_the_raw_ratio_differs_between_steps_and_drifts_below_one(runs):
    spread = tables.step_means(runs["flow_grpo"], "ratio_std")
    bias = tables.step_means(runs["flow_grpo"], "ratio_bias")
    assert spread[-1] > 10 * spread[0]
    assert bias[-1] < -1e-4


def test_ratio_norm_makes_spread_and_clipping_the_same_at_every_step(runs):
    spread = tables.step_means(runs["article"], "ratio_hat_std")
    # standardized in float64, reported in float32
    assert spread == pytest.approx([1.0] * 9, abs=1e-6)
    flat = tables.step_means(runs["article"], "clip_fraction_high")
    steep = tables.step_means(runs["flow_grpo"], "clip_fraction_high")
    assert max(flat) - min(flat) < 0.1
    assert max(steep) - min(steep) > 0.2


def test_a_demo_that_is_done_is_shown_again_without_work(demo, capsys, monkeypatch):
    before = (demo / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Trainer, "iterate", lambda self: pytest.fail("it trains"))
    monkeypatch.setattr(plots, "draw", lambda *_: None)
    options = ["--out", str(demo), "--iterations", str(ITERATIONS), "--pretrain-steps", "300"]
    assert main(["demo", *options]) == 0
    assert "After 12 iterations" in capsys.readouterr().out
    assert (demo / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--pretrain-steps", "20"], "`--pretrain-steps` is 20 but the demo in `--out` was begun "
                                     "with 300; continue with the same or choose another `--out`"),
        (["--iterations", "40", "--pretrain-steps", "300"], "`--iterations` is 40 but the demo in"),
        (["--report", "{out}"], "`--report` is {out}, which is a folder"),
    ],
)  # fmt: skip
def test_another_demo_is_refused_before_any_work(demo, options, message, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "load_or_pretrain", lambda *_: pytest.fail("it pretrains"))
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.suffix != ".lock"}
    given = ["--out", str(demo), "--iterations", str(ITERATIONS)]
    given += [option.format(out=demo) for option in options]
    assert main(["demo", *given, "--seeds", "3", "0"]) == 1
    assert capsys.readouterr().err.startswith("guard-ops: " + message.format(out=demo))
    after = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.suffix != ".lock"}
    assert after == before


def test_an_interrupted_demo_continues_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "EVALUATION_SAMPLES", 2)
    monkeypatch.setattr(plots, "draw", lambda *_: None)
    digits = load_digits()
    judges = ProxyReward(digits), Gold(digits)
    monkeypatch.setattr(demos, "ProxyReward", lambda _: judges[0])
    monkeypatch.setattr(demos, "Gold", lambda _: judges[1])
    iterate, calls, stops = Trainer.iterate, [], {4, 8}

    def interrupted(trainer):
        calls.append(trainer.loop.guard.ratio_norm)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return iterate(trainer)

    def demo(out):
        return run_demo(out, [0], iterations=3, pretrain_steps=2)

    whole = demo(tmp_path / "whole")
    monkeypatch.setattr(Trainer, "iterate", interrupted)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "parts")
    parts = demo(tmp_path / "parts")
    assert len(calls) == 3 * 3 + len(stops)  # each iteration once, and those interrupted again
    for name, run in whole.seeds[0].runs.items():
        assert run.samples.equal(parts.seeds[0].runs[name].samples)
        assert run.evaluations == parts.seeds[0].runs[name].evaluations
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("text", ["", "[]", '{"iterations": 3}', "[" * 100_000])
def test_a_folder_that_does_not_say_whose_demo_it_is_is_refused(tmp_path, text):
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"demo\.json does not say which settings"):
        run_demo(tmp_path, [0], iterations=3, pretrain_steps=2)


def test_a_disk_that_is_full_at_the_beginning_leaves_no_half_of_its_settings(tmp_path):
    settings = {"iterations": 3, "pretrain_steps": 2}
    with full_disk(4), pytest.raises(RunFolderError, match=r"cannot write .*demo\.json"):
        demos._same_settings(tmp_path / "demo.json", settings)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        demos._same_settings(tmp_path / "demo.json", settings)


def test_tables_compare_the_runs_where_all_reached_the_same_proxy():
    def run(*proxies):
        evaluations = [
            {"iteration": 10.0 * n, "proxy": p, "gold": 1 - p / 10, "distance": 0.0,
             "diversity": 0.0, "frechet": p * n}
            for n, p in enumerate(proxies)
        ]  # fmt: skip
        return Run([], evaluations, None)

    runs = {"flow_grpo": run(1, 5, 9), "paper": run(1, 3, 4), "article": run(1, 2, 3)}
    table = tables.equal_proxy(SeedResult(0, None, runs))
    assert "3.00" in table.title
    assert [row[1] for row in table.rows] == ["5", "10", "20"]
    assert [row[2] for row in table.rows] == ["0.700"] * 3
    assert [row[-1] for row in table.rows] == ["2.5", "3.0", "6.0"]
