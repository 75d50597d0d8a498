"""Every shipped recipe on a tiny random pipeline, from the command line to a LoRA for diffusers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from guard_ops import cli
from guard_ops.recipes import job
from guard_ops.recipes.resolve import resolve
from guard_ops.trainer.engine import Engine
from guard_ops.trainer.folder import FolderLock
from guard_ops.trainer.judging import Judge
from guard_ops.trainer.metrics import read_metrics

RECIPES = ("sd3_5_medium", "flux1_dev", "wan2_1_t2v_1_3b", "qwen_image")
ALLOWED = {".json", ".jsonl", ".yaml", ".safetensors", ".png", ".gif", ".lock"}


def run(recipe: str, out: Path, words: list[str]) -> None:
    assert cli.main(["train", recipe, f"out={out}", *words]) == 0


def policy_of(recipe: str, words: list[str]):
    settings = resolve(recipe, words)
    return job.load_policy(job.check(settings, 1), torch.device("cpu"), Path(settings.encodings))


def velocity(policy):
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    timestep = policy.schedule(4).timesteps[1:2]
    with torch.no_grad():
        return policy.velocity(latents, timestep, policy.encode(["a red cube"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_its_lora_and_exports_it(recipe, tiny_words, model, tmp_path, monkeypatch):
    out, words = tmp_path / "run", tiny_words(recipe, dtype="float32")
    trained = {}
    original = job._export
    monkeypatch.setattr(
        job, "_export", lambda policy, *a: trained.update(policy=policy) or original(policy, *a)
    )
    run(recipe, out, words)
    policy = trained["policy"]

    lines = read_metrics(out / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["reward"]) for line in lines)
    assert lines[0]["reward"] < 0  # minus a file's size
    assert math.isfinite(lines[1]["evaluation_reward"])

    fresh = policy_of(recipe, words)
    before, after = dict(fresh.named_parameters()), dict(policy.named_parameters())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert changed == {n for n, p in after.items() if p.requires_grad}
    assert all(".lora_" in n for n in changed)

    pipe = diffusers.DiffusionPipeline.from_pretrained(model(recipe))
    pipe.load_lora_weights(out / "lora")
    base = velocity(fresh)
    fresh.transformer = pipe.transformer
    torch.testing.assert_close(velocity(fresh), velocity(policy), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(velocity(fresh), base, rtol=1e-5, atol=1e-6)

    files = [p for p in out.rglob("*") if p.is_file()]
    assert {p.suffix for p in files if "tfevents" not in p.name} <= ALLOWED
    pictures = [p.name for p in (out / "pictures").iterdir()]
    video = recipe == "wan2_1_t2v_1_3b"
    assert pictures == [f"iteration-000002.{'gif' if video else 'png'}"]
    assert any("tfevents" in p.name for p in files)


@pytest.mark.parametrize("objective", ["paper", "flow_grpo", "dance_grpo"])
def test_every_objective_trains_in_bfloat16(objective, tiny_words, tmp_path):
    """With a KL to the base, of samples at steps of their own, with the blocks compiled."""
    words = tiny_words("sd3_5_medium", objective=objective, kl_beta=0.01, iterations=1)
    if objective == "dance_grpo":
        words.append("window_size=2")
    run("sd3_5_medium", tmp_path / "run", words)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert math.isfinite(line["loss"])
    assert sum(line["nonfinite"]) == 0


@pytest.mark.slow_suite
def test_compiled_blocks_train_as_eager_ones_do(tiny_words, tmp_path):
    """Two iterations of float32, whose rounding is all that differs: a part in 1e3 of what they do.

    AdamW turns a gradient's rounding into a part of its step where the gradient is nearly 0.
    """
    lines, moved = {}, {}
    torch.compiler.reset()
    counted = torch._dynamo.utils.counters["stats"]
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        before = counted["unique_graphs"]
        words = tiny_words("sd3_5_medium", dtype="float32", compile=str(compiled).lower())
        run("sd3_5_medium", out, words)
        assert (counted["unique_graphs"] > before) == compiled
        lines[compiled] = read_metrics(out / "metrics.jsonl")
        lora = load_file(next((out / "lora").glob("*.safetensors")))
        moved[compiled] = torch.cat([x.flatten() for n, x in sorted(lora.items()) if "lora_B" in n])
    for eager, compiled in zip(lines[False], lines[True], strict=True):
        for name in ("loss", "grad_norm", "reward"):
            assert compiled[name] == pytest.approx(eager[name], rel=1e-3, abs=1e-6), name
    assert moved[False].norm() > 0  # lora_B begins at 0
    assert (moved[True] - moved[False]).norm() < 1e-3 * moved[False].norm()


def test_full_fine_tuning_with_a_frozen_reference(tiny_words, tmp_path):
    words = tiny_words(
        "flux1_dev", train="full", kl_beta=0.1, iterations=1, ema_decay=0, dtype="float32"
    )
    run("flux1_dev", tmp_path / "run", words)
    folder = tmp_path / "run" / "weights" / "transformer"
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    assert all(p.isfinite().all() for p in loaded.parameters())


def test_full_fine_tuning_of_float32_weights_computes_in_bfloat16(tiny_words, tmp_path):
    words = tiny_words("sd3_5_medium", train="full", iterations=1, evaluation_prompts=0)
    run("sd3_5_medium", tmp_path / "run", words)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["grad_norm"] > 0
    file = tmp_path / "run" / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    trained = load_file(file)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    policy = policy_of("sd3_5_medium", words)
    assert velocity(policy).dtype == torch.bfloat16
    before = dict(policy.transformer.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trained.items() if name in before)


def test_a_run_is_continued_with_its_own_recipe(tiny_words, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("flux1_dev", whole, tiny_words("flux1_dev", dtype="float32"))
    run("flux1_dev", parts, tiny_words("flux1_dev", dtype="float32", iterations=1))
    words = [f"out={parts}", "resume=true", "iterations=2"]
    assert cli.main(["train", str(parts / "recipe.yaml"), *words]) == 0

    for file in ("lora", "lora-average"):
        a, b = (load_file(next((folder / file).glob("*.safetensors"))) for folder in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    monkeypatch.setattr(job, "load_policy", lambda *_: pytest.fail("weights are loaded"))
    others = {
        "learning_rate=1": "`learning_rate` is 1.0",
        "objective=dance_grpo": "`objective` is 'dance_grpo'",
        "lora_rank=5": "`lora_rank` is 5",
        "advantage_clip=2": "`adv_clip` is 2.0",
        f"prompts={tmp_path / 'others.txt'}": "`prompts.count` is 3",
    }
    (tmp_path / "others.txt").write_text("a cat\na dog\na bird\n")
    before = {p: p.stat().st_mtime_ns for p in parts.rglob("*") if p.name != "run.lock"}
    for other, message in others.items():
        words[-1] = other
        assert cli.main(["train", str(parts / "recipe.yaml"), *words]) == 1
        assert f"{message} but the run in `out` was trained with" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in parts.rglob("*") if p.name != "run.lock"}


def test_a_videos_metadata_reach_a_reward_of_yours(tiny_words, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nseen = []\n"
        "def score(pixels, prompts, metadata):\n"
        "    seen.append((tuple(pixels.shape), prompts, metadata))\n"
        "    return pixels.flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lines = [{"prompt": "a dog", "tag": 1}, {"prompt": "a cube", "tag": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = tiny_words("wan2_1_t2v_1_3b", iterations=1, evaluation_prompts=0)
    words += [f"prompts={tmp_path / 'metadata.jsonl'}", "reward=mine:score"]
    run("wan2_1_t2v_1_3b", tmp_path / "run", words)

    import mine

    shape, prompts, metadata = mine.seen[0]
    assert shape == (2, 5, 3, 32, 32)
    assert [{"a dog": 1, "a cube": 2}[p] for p in prompts] == [m["tag"] for m in metadata]


def test_several_rewards_with_advantages_of_each(tiny_words, tmp_path, monkeypatch):
    (tmp_path / "bright.py").write_text(
        "def score(pixels, prompts, metadata):\n    return pixels.flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = tiny_words("sd3_5_medium", dtype="float32", evaluate_every=2)
    words += ["reward=jpeg_size+bright:score", "reward_weights=[0.1,2]"]
    lines = {}
    for how in ("summed", "separate"):
        run("sd3_5_medium", tmp_path / how, [*words, f"reward_advantages={how}"])
        lines[how] = read_metrics(tmp_path / how / "metrics.jsonl")
        for line in lines[how]:
            total = 0.1 * line["reward_jpeg_size"] + 2 * line["reward_bright:score"]
            assert line["reward"] == pytest.approx(total)
        assert "evaluation_reward_bright:score" in lines[how][-1]
    first, other = (lines[how][0] for how in ("summed", "separate"))
    assert first["reward"] == other["reward"]
    assert first["grad_norm"] != other["grad_norm"]


JUDGES = """
import torch

calls = 0  # of gold, 3 a reading


def proxy(pixels, prompts, metadata):
    if "a dog" in prompts or "a blue ball" in prompts:
        return torch.full((len(prompts),), float(calls // 3))
    return pixels.flatten(1).mean(1)


def gold(pixels, prompts, metadata):
    global calls
    calls += 1
    return torch.full((len(prompts),), (0.0, 1.0, 0.5)[(calls - 1) // 3])


def features(images):
    return images.flatten(1)[:, :4], images.flatten(1)[:, 4:7]
"""


@pytest.fixture
def gold(tmp_path, monkeypatch):
    """Words for a monitor whose gold is best after an iteration, while its proxy rises."""
    (tmp_path / "judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judges", raising=False)
    (tmp_path / "held-out.txt").write_text("a blue ball\na dog\n")
    return [
        "reward=judges:proxy", "gold=judges:gold", f"gold_prompts={tmp_path / 'held-out.txt'}",
        "gold_samples=5", "evaluation_prompts=0", "evaluate_every=1", "reward_overlap=false",
    ]  # fmt: skip


def test_the_monitor_reads_gold_and_stops_the_run(gold, tiny_words, tmp_path, capsys):
    words = tiny_words("sd3_5_medium", dtype="float32", iterations=5, checkpoint_every=5)
    words += [*gold, "gold_features=judges:features", "stop_over_optimizing=true"]
    run("sd3_5_medium", tmp_path / "run", words)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["held_out_proxy"], line["gold"]) for line in lines] == [(1, 1), (2, 0.5)]
    assert [line["over_optimizing"] for line in lines] == [0, 1]  # where it ends, of 5
    assert all(line["inception_score"] >= 1 for line in lines)
    said = capsys.readouterr().out
    assert "over-optimizing since iteration 2: gold is 0.5 below its best, of iteration 1" in said
    monitor = (tmp_path / "run" / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in monitor] == [0, 1, 2]
    assert all(len(json.loads(line)["gold"]) == 5 for line in monitor)
    (best,) = (tmp_path / "run" / "best").iterdir()
    assert best.name == "iteration-000001"
    # it is a checkpoint to continue from: here to its end at once, where its weights are exported
    shutil.copytree(best.parent, tmp_path / "best" / "checkpoints")
    again = [f"out={tmp_path / 'best'}", "resume=true", "iterations=1"]
    with pytest.warns(RuntimeWarning, match="metrics.jsonl is gone"):
        assert cli.main(["train", str(tmp_path / "run" / "recipe.yaml"), *again]) == 0
    assert (tmp_path / "best" / "lora").is_dir()


@pytest.mark.parametrize(
    "change, message",
    [
        ("gold_prompts=null", "`gold_prompts` is not given, and `prompts` "),
        ("gold_prompts={prompts}", "has 'a red cube', which `prompts` has too; the monitor needs"),
        ("gold=judges:proxy", "`gold` is 'judges:proxy', which is the `reward` that is trained on"),
        ("gold_samples=1", "`gold_samples` is 1; it needs >= 2"),
        ("gold_features=faces", "`gold_features` is 'faces'; it needs pixels, or a function of"),
        ("gold=text_rendering", "asks for no text; the reward text_rendering needs it in"),
    ],
)
def test_a_monitor_that_cannot_be_is_said_first(
    change, message, gold, tiny_words, prompts, tmp_path, capsys, monkeypatch
):
    if "text_rendering" in change:
        pytest.importorskip("rapidocr", reason="needs guard-ops[rewards]")
    monkeypatch.setattr(job, "load_policy", lambda *_: pytest.fail("weights are loaded"))
    words = [*tiny_words("sd3_5_medium"), *gold, change.format(prompts=prompts)]
    assert cli.main(["train", "sd3_5_medium", f"out={tmp_path / 'out'}", *words]) == 1
    assert message in capsys.readouterr().err


def test_shipped_prompts_are_a_name(tiny_words, tmp_path, capsys):
    words = tiny_words("sd3_5_medium", prompts="geneval", reward="geneval")
    assert cli.main(["train", "sd3_5_medium", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "96 in the file, 2 an iteration" in said
    assert "reward: geneval" in said


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_size": 1}, "`group_size` is 1; it needs >= 2"),
        ({"prompts_per_iteration": 3}, "prompts; `prompts_per_iteration` 3 needs at least"),
        ({"reward": "jpeg"}, "`reward` is 'jpeg'; it needs one of aesthetic, clip_score"),
        ({"reward": "no_such_module:score"}, "which cannot be imported: No module named"),
        ({"reward": "pickscore+jpeg_size", "reward_weights": "[1]"}, "`reward_weights` has 1 num"),
        ({"reward_weights": "[1]"}, "`reward_weights` is [1.0], for the one reward 'jpeg_size'"),
        ({"reward_weights": "[a]"}, "`reward_weights` is ['a']; it needs a list of numbers or"),
        ({"reward_options": "[jpeg_size.q=1]"}, "`reward_options` has jpeg_size.q, but jpeg_size"),
        (
            {"reward": "pickscore", "reward_options": "[pickscore.modle=/m]"},
            "`reward_options` has pickscore.modle; did you mean pickscore.model?",
        ),
        (
            {"reward": "pickscore", "reward_options": "[pickscore.model=/no/folder]"},
            "copy DIR here and give reward_options=[pickscore.model=DIR]",
        ),
        ({"reward": "geneval"}, "GenEval's metadata of 'a red cube' have the \"tag\" None; it"),
        ({"reward_timeout": -1}, "`reward_timeout` is -1.0; it needs > 0 and finite"),
        ({"height": 33}, "`height` is 33; it needs a multiple of 16"),
        ({"steps": 1}, "`window` leaves none of the 1 steps to train"),
        ({"trackers": "[paper]"}, "`trackers` has 'paper'; it needs any of tensorboard, wandb"),
        ({"model": "/no/such/folder"}, "`model` '/no/such/folder' is no folder; it needs one"),
        ({"prompts": "/no/prompts.txt"}, "`prompts` '/no/prompts.txt' cannot be read: No such"),
        ({"kl_beta": -1}, "`kl_beta` is -1.0; it needs >= 0"),
        ({"evaluation_steps": 1}, "`evaluation_steps` is 1; it needs >= 2"),
        ({"evaluation_prompts": -1}, "`evaluation_prompts` is -1; it needs >= 0"),
        ({"guidance_scale": ".nan"}, "`guidance_scale` is nan; it needs >= 0 and finite"),
        ({"guidance_scale": -1}, "`guidance_scale` is -1.0; it needs >= 0 and finite"),
        ({"timeout": 0}, "`timeout` is 0.0; it needs > 0 and finite"),
        ({"lora_rank": 0}, "`lora_rank` is 0; it needs >= 1"),
        ({"lora_alpha": ".inf"}, "`lora_alpha` is inf; it needs a finite number"),
        ({"frames": 5}, "`frames` is 5; StableDiffusion3Pipeline makes images, of 1 frame"),
    ],
)
def test_what_is_wrong_is_said_before_a_weight_is_loaded(
    changes, message, tiny_words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "load_policy", lambda *_: pytest.fail("weights are loaded"))
    words = tiny_words("sd3_5_medium", **changes)
    assert cli.main(["train", "sd3_5_medium", f"out={tmp_path / 'out'}", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_samples_is_said_before_a_weight_is_loaded(
    tiny_words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setattr(job, "load_policy", lambda *_: pytest.fail("weights are loaded"))
    words = tiny_words("sd3_5_medium")
    assert cli.main(["train", "sd3_5_medium", f"out={tmp_path / 'out'}", *words]) == 1
    assert "is 4 samples; 64 ranks with `minibatches` 2 need at least 128" in (
        capsys.readouterr().err
    )


def test_a_folder_that_is_taken_is_refused_before_a_weight_is_loaded(
    tiny_words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "load_policy", lambda *_: pytest.fail("weights are loaded"))
    words = [f"out={tmp_path}", *tiny_words("sd3_5_medium")]
    lock = FolderLock(tmp_path)
    assert cli.main(["train", "sd3_5_medium", *words]) == 1
    assert "is in use by process" in capsys.readouterr().err
    lock.release()
    (tmp_path / "checkpoints" / "iteration-000001").mkdir(parents=True)
    assert cli.main(["train", "sd3_5_medium", *words]) == 1
    assert "which has checkpoints of another run" in capsys.readouterr().err
    assert cli.main(["train", "sd3_5_medium", *words, "resume=true"]) == 1
    assert "no intact checkpoint to resume from: " in capsys.readouterr().err


def test_files_of_others_are_set_aside(tiny_words, tmp_path):
    """The recipe lies in the folder of the run, with an earlier run's LoRA."""
    mine, old = tmp_path / "recipe.yaml", tmp_path / "lora" / "old.safetensors"
    lines = [word.replace("=", ": ", 1) for word in tiny_words("sd3_5_medium", iterations=1)]
    text = "# mine\n" + "\n".join(lines) + f"\nout: {tmp_path}\nminibatches: 1\n"
    mine.write_text(text)
    old.parent.mkdir()
    old.write_text("old")
    with pytest.warns(RuntimeWarning, match="is kept as .*aside: it is not of this run"):
        assert cli.main(["train", str(mine)]) == 0
    assert (tmp_path / "recipe.yaml.aside").read_text() == text
    assert (tmp_path / "lora.aside" / "old.safetensors").read_text() == "old"
    assert [p.name for p in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]

    first = (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    assert cli.main(["train", str(mine), "resume=true", "iterations=2"]) == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() != first
    names = {path.name for path in tmp_path.iterdir()}
    assert {n for n in names if "aside" in n} == {"recipe.yaml.aside", "lora.aside"}
    assert not {n for n in names if "writing" in n or "old" in n}


def test_pictures_are_judged_in_pieces_of_the_decoder(tiny_words, monkeypatch, tmp_path):
    settings = resolve("sd3_5_medium", tiny_words("sd3_5_medium", evaluation_prompts=2))
    settings.decode_batch = 1
    seen = []

    def reward(pixels, prompts, metadata):
        seen.append((len(pixels), prompts))
        return pixels.flatten(1).mean(1)

    checked = job.check(settings, 1)
    evaluation = job.Evaluation(None, checked, Engine(device="cpu"), tmp_path)
    evaluation.recipe.ema_decay = 0.0
    loop = SimpleNamespace(judge=Judge(reward), scores=lambda judging: judging.scores())
    evaluation.trainer = SimpleNamespace(iteration=1, loop=loop)
    pixels = torch.stack([torch.full((3, 4, 4), value) for value in (0.25, 0.75)])
    monkeypatch.setattr(evaluation, "_sample", lambda: pixels)
    assert evaluation() == {"evaluation_reward": 0.5}
    assert seen == [(1, ["a red cube"]), (1, ["the lazy dog"])]
