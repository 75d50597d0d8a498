"""The study: its tasks are what the page says, its arithmetic, and that the page is current."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.study import __main__ as command
from benchmarks.study import analysis, page, runs, words
from benchmarks.study.analysis import Interval
from benchmarks.study.runs import Spec
from benchmarks.study.tasks import TASKS, DigitsTask, TextTask
from guard_ops import GuardConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_page_is_what_the_kept_runs_say():
    assert page.save(None, DOCS, check=True) == 0


def test_the_monitor_is_right_on_the_kept_runs():
    """No alarm where gold ends where it began, one wherever it ends 5 standard errors below."""
    found = analysis.alarms(analysis.load(DOCS / "study"))
    steady, fallen = analysis.false_alarms(found), analysis.missed(found)
    assert len(steady.runs) >= 5
    assert len(fallen.runs) >= 5
    assert steady.wrong == []
    assert fallen.wrong == []


def test_the_kept_runs_are_three_seeds_or_more_of_everything():
    kept = analysis.load(DOCS / "study")
    for setting in analysis.SETTINGS:
        assert len(analysis.seeds_of(kept, *setting)) >= 3
    for run in kept:  # with the settings of today
        spec = Spec(*(run[name] for name in Spec._fields))
        assert run["settings"] == spec.settings()


@pytest.fixture(scope="module")
def tasks():
    """By name; their judges are fitted once."""
    return functools.cache(lambda name: TASKS[name]())


def test_drawn_words_are_read_and_the_proxy_is_weak():
    drawn = words.draw_words(1, 5)
    assert drawn.images.shape == (20, 1, 12, 36)
    assert words.draw_words(1, 5).images.equal(drawn.images)
    gold, proxy = words.WordGold(), words.WordProxy()
    right = gold(drawn.images, drawn.labels)
    assert right.mean() > 0.95
    assert gold(drawn.images, drawn.labels.roll(1)).mean() < 0.3
    noise = torch.randn(4, *words.SHAPE, generator=torch.Generator().manual_seed(0))
    assert gold(noise, torch.arange(4)).mean() < 0.3
    assert 0.5 < proxy.accuracy < 0.9
    assert proxy(drawn.images, drawn.labels).shape == (20,)
    # pixels beyond black and white count as these
    assert proxy(9 * drawn.images, drawn.labels).equal(
        proxy((9 * drawn.images).clamp(-1, 1), drawn.labels)
    )


def test_the_word_policy_predicts_the_picture():
    policy = words.WordPolicy()
    torch.nn.init.zeros_(policy.out.bias)  # as the weight is: the picture is grey
    x, sigma = torch.randn(3, *words.SHAPE), torch.tensor([1.0, 0.5, 0.05])
    velocity = policy.velocity(x, sigma, policy.encode(["CAT", "TOY", "CAT"]))
    assert torch.allclose(velocity, x / torch.tensor([1.0, 0.5, 0.1]).reshape(3, 1, 1, 1))
    assert policy.encode(["CAT", "TOY"])["label"].tolist() == [0, 19]
    assert policy.decode(x).shape == (3, 3, 12, 36)
    assert policy.schedule(10).sigmas[0] == 1


def test_pretraining_learns_to_denoise():
    drawn = words.draw_words(2, 1)
    sigma, level = torch.full((40,), 0.3), 0.3
    noise = torch.randn(drawn.images.shape, generator=torch.Generator().manual_seed(0))
    x = (1 - level) * drawn.images + level * noise

    def error(policy):
        with torch.no_grad():
            velocity = policy.velocity(x, sigma, {"label": drawn.labels})
        return float((x - level * velocity - drawn.images).square().mean())

    before, after = (words.pretrain_words(0, steps, 32, per_word=4) for steps in (1, 40))
    assert error(after) < 0.5 * error(before)


@pytest.fixture
def small(monkeypatch, tasks):
    """Runs of two iterations, from weights that were hardly pretrained."""
    monkeypatch.setattr(command, "_task", tasks)
    monkeypatch.setattr(command, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(
        "benchmarks.study.tasks.pretrain_words",
        functools.partial(words.pretrain_words, batch=8, per_word=2),
    )
    for task in (DigitsTask, TextTask):
        few = {"iterations": 2, "evaluate_every": 2, "prompts_per_iteration": 2, "group_size": 4}
        monkeypatch.setattr(task, "training", {**task.training, **few})
        monkeypatch.setattr(task, "pretrain_steps", 3)
    monkeypatch.setattr(runs, "READ", 20)
    monkeypatch.setattr(DigitsTask, "per_prompt", 2)
    monkeypatch.setattr(TextTask, "per_prompt", 2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("task", ["digits", pytest.param("text", marks=pytest.mark.slow_suite)])
def test_a_run_is_kept_whole_and_made_once(task, tasks, tmp_path, monkeypatch):
    made = tasks(task)
    spec = Spec(task, "dance", "article", runs.FIRST_SEED)
    assert not runs.finished(spec, tmp_path)
    runs.perform(spec, made, tmp_path / "pretrained", tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert path.stem == f"{task}-dance-article-s3"
    run = json.loads(path.read_text())
    assert [e["iteration"] for e in run["evaluations"]] == [0, 2]
    assert len(run["steps"]["ratio_std"][0]) == 9  # the last step is not trained
    # standardized, but in each epoch's first update of the rollout's own ratio
    assert min(run["steps"]["ratio_hat_std"][-1]) > 0.9
    for reading, gold in zip(run["evaluations"], runs.golds(run), strict=True):
        assert len(gold) == 20
        assert all(0 <= x <= 1 for x in gold)
        if task == "digits":  # of all samples: kept to 8 bits
            assert sum(gold) / 20 == pytest.approx(reading["gold"], abs=1 / 510 + 1e-4)
    pixels = {"digits": 64, "text": 12 * 36}[task]
    assert len(runs.unpacked(run["samples"][1])) == 10 * pixels
    assert runs.finished(spec, tmp_path)
    monkeypatch.setattr(type(made), "per_prompt", 3)
    assert not runs.finished(spec, tmp_path)  # another study's


@pytest.mark.usefixtures("small")
def test_runs_that_are_there_are_not_made_again(tasks, tmp_path, monkeypatch, capsys):
    wanted = [Spec("digits", "flow", name, 3) for name in runs.OBJECTIVES]
    monkeypatch.setattr(command, "specs", lambda seeds: wanted)
    monkeypatch.setattr(runs, "OBJECTIVES", ())  # keeps no pictures
    done = wanted[0]
    runs.perform(done, tasks("digits"), tmp_path / "pretrained", tmp_path)
    before = (tmp_path / f"{done.name}.json").stat().st_mtime_ns
    command.make_runs(tmp_path, 1, 1)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [spec.name for spec in wanted[1:]]
    assert (tmp_path / f"{done.name}.json").stat().st_mtime_ns == before
    assert all(runs.finished(spec, tmp_path) for spec in wanted)


def test_three_seeds_come_before_the_ablations_and_these_before_more():
    order = runs.specs(range(3, 8))
    assert len(order) == 5 * 12 + len(runs.ABLATIONS)
    assert {spec.seed for spec in order[:36]} == {3, 4, 5}
    assert [spec.objective for spec in order[36:43]] == list(runs.ABLATIONS)
    assert {spec.seed for spec in order[43:]} == {6, 7}
    assert len({spec.name for spec in order}) == len(order)


def test_an_ablation_changes_what_its_name_says():
    def of(name):
        return Spec("digits", "flow", name, 3)

    article = of("article")
    assert article.guard() == GuardConfig.article()
    assert of("paper").guard() == GuardConfig.paper(clip_low=1e-4, clip_high=1e-4)
    assert of("article, RatioNorm alone").guard() == GuardConfig.article(balance="none")
    balanced = of("article, balancing alone").guard()
    assert (balanced.ratio_norm, balanced.balance) == ("none", "inverse_ratio")
    bounded = of("article, max_grad_norm 0.01")
    assert bounded.guard() == article.guard()
    training = article.settings()["training"]
    assert bounded.settings()["training"] == {**training, "max_grad_norm": 0.01}
    assert not of("article, detach_stats=False").guard().detach_stats


def test_intervals_are_student_t():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert found.sign == 0
    assert Interval.of([2.0, 2.1, 2.2]).sign == 1
    assert Interval.of([-2.0, -2.1, -2.2]).sign == -1
    assert Interval.of([5.0]).sign == 0  # one seed says nothing


def made_run(objective, proxies, golds, seed=3, change=(0.0, 0.01)):
    evaluations = [
        {"iteration": 10 * n, "proxy": p, "gold": g, "diversity": 1.0, "frechet": p}
        for n, (p, g) in enumerate(zip(proxies, golds, strict=True))
    ]
    each = [runs._packed(torch.tensor([g - 0.05, g, g + 0.05])) for g in golds]
    steps = {name: [[1.0, 2.0]] * 4 for name in runs.STEPS}
    return {
        "task": "digits", "sampler": "flow", "objective": objective, "seed": seed,
        "evaluations": evaluations, "gold_each": each, "gold_change": list(change), "steps": steps,
    }  # fmt: skip


def test_runs_are_compared_where_both_reached_the_same_proxy():
    seeds = {
        s: {
            "plain": made_run("plain", (0, 2, 4), (0.9, 0.7, 0.5), s),
            "paper": made_run("paper", (0, 1, 2), (0.9, 0.85, 0.8), s),
            "article": made_run("article", (0, 1, 1), (0.9, 0.9, 0.9), s),
        }
        for s in (3, 4)
    }
    assert analysis.gain_at_equal_proxy(seeds, "paper", "gold").mean == pytest.approx(0.1)
    assert analysis.gain(seeds, "paper", analysis.at_end("gold")).mean == pytest.approx(0.3)
    assert analysis.gain_at_equal_proxy(seeds, "article", "gold").mean == pytest.approx(0.1)
    assert analysis.growth("ratio_std")(seeds[3]["plain"]) == 2
    assert analysis.growth_in_training("ratio_std")(seeds[3]["plain"]) == 1
    listed = [run for by in seeds.values() for run in by.values()]
    assert list(analysis.seeds_of(listed, "digits", "flow")) == [3, 4]
    assert list(analysis.seeds_of(listed[:-1], "digits", "flow")) == [3]  # 4 has no article


def test_the_monitors_faults_are_counted():
    steady = made_run("plain", (0, 1), (0.9, 0.9))
    alarmed = made_run("paper", (0, 1), (0.9, 0.5))
    fallen = made_run("plain", (0, 1), (0.9, 0.5), change=(-0.4, 0.01))
    missed = made_run("article", (1, 0), (0.9, 0.5), change=(-0.4, 0.01))  # no proxy was gained
    found = analysis.alarms([steady, alarmed, fallen, missed])
    false, lost = analysis.false_alarms(found), analysis.missed(found)
    assert (len(false.runs), len(lost.runs)) == (2, 2)
    assert [x.run for x in false.wrong] == [alarmed]
    assert [x.run for x in lost.wrong] == [missed]
    text = page.monitor_table([steady, alarmed, fallen, missed])
    assert "No alarm although gold fell: digits, Flow-GRPO, article, seed 3" in text
    assert "gold ended where it began: digits, Flow-GRPO, paper" in text
