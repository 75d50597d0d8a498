"""``--dry-run``: numbers of the published models, without a weight and without a network."""

from __future__ import annotations

import re

import pytest

from guard_ops import cli
from guard_ops.recipes import dry_run, estimate, job
from guard_ops.recipes.resolve import resolve


def number(text: str, name: str) -> float:
    return float(re.search(rf"{name}\s+([\d.,]+)", text)[1].replace(",", ""))


@pytest.mark.parametrize(
    "recipe, frozen, tflop",
    [
        ("sd3_5_medium", 4.18, 2 * 2.25),
        pytest.param("flux1_dev", 22.17, 21.9, marks=pytest.mark.slow_suite),
    ],
)
def test_the_report_of_a_published_recipe(recipe, frozen, tflop, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it asks the network"))
    assert cli.main(["train", recipe, "--dry-run", "--gpus", "8"]) == 0
    text = capsys.readouterr().out

    settings = resolve(recipe, ["prompts=x"])
    assert f"learning_rate: {settings.learning_rate}" in text
    assert number(text, "frozen weights") == pytest.approx(frozen, abs=0.01)
    assert number(text, "samples") == 1152
    assert "1,152 an iteration, 144 a GPU" in text
    assert number(text, "optimizer steps") == 2
    # counted by torch's FlopCounterMode on the same networks before, 2 velocities with guidance
    assert number(text, "forward") == pytest.approx(tflop, rel=0.01)
    parts = re.findall(r"^  (?!total|\()\S.*?([\d.]+)$", text, re.M)
    assert sum(map(float, parts)) == pytest.approx(number(text, "total"), abs=0.06)


@pytest.mark.slow_suite
def test_activations_of_a_block_that_is_recomputed_are_those_measured_before():
    """GiB of one sample of SD3.5-M at 512 px with a LoRA, from the saved tensors of a real pass."""
    settings = resolve("sd3_5_medium", ["prompts=x", "guidance_scale=1"])
    counted = estimate.activations(dry_run._empty(settings))
    assert counted.checkpointed / 2**30 == pytest.approx(0.087, rel=0.1)
    assert counted.peak(checkpointing=True) / 2**30 == pytest.approx(0.17, rel=0.1)
    assert counted.kept / 2**30 == pytest.approx(1.89, rel=0.1)


def test_sharded_full_fine_tuning_is_shared_by_gpus(tiny_words):
    words = tiny_words("flux1_dev", train="full", sharding="fsdp", ema_decay=0.9, dtype="bfloat16")
    settings = resolve("flux1_dev", words)
    one, two = (dry_run.describe(settings, gpus) for gpus in (1, 2))
    assert "trained weights, float32" in one
    policy = dry_run._empty(settings)
    trained, frozen = estimate.parameters(policy)
    assert frozen == 0
    counted = estimate.activations(policy)
    sizes = [
        estimate.memory(
            policy, counted, gpus=gpus, sharded=True, samples=4, steps=4, trained_steps=3,
            micro_batch=1,
        )
        for gpus in (1, 2)
    ]  # fmt: skip
    assert sizes[0].optimizer == 8 * trained
    assert sizes[0].average == 4 * trained
    assert sizes[1].optimizer == 4 * trained
    assert sizes[1].unsharded_blocks > sizes[0].unsharded_blocks == 0
    assert sizes[0].cast_weights > sizes[1].cast_weights == 0
    assert two != one


def test_a_size_that_the_model_lacks_is_an_error(tiny_words, capsys):
    words = tiny_words("sd3_5_medium", height=1024)
    assert cli.main(["train", "sd3_5_medium", "--dry-run", *words]) == 1
    assert "`height` is 1024; this model has positions for 384" in capsys.readouterr().err
    assert cli.main(["train", "sd3_5_medium", "--dry-run", "--gpus", "0"]) == 1
    assert "`--gpus` is 0; it needs >= 1" in capsys.readouterr().err


def test_the_average_is_counted_at_decay_0_where_the_trainer_holds_it_too(tiny_words):
    settings = resolve("sd3_5_medium", tiny_words("sd3_5_medium", ema_decay=0))
    assert "average of the weights, float32" in dry_run.describe(settings, 1)


def test_the_frozen_copy_of_full_fine_tuning_with_a_kl_term_is_counted(tiny_words):
    words = tiny_words("sd3_5_medium", train="full", kl_beta=0.1)
    trained, frozen = estimate.parameters(dry_run._empty(resolve("sd3_5_medium", words)))
    assert frozen == trained


def test_a_sharded_model_keeps_no_frozen_copy(tiny_words):
    words = tiny_words("sd3_5_medium", train="full", sharding="fsdp", kl_beta=0.1)
    settings = resolve("sd3_5_medium", words)
    with pytest.raises(ValueError, match=r"`kl_beta` is 0\.1 with train=full and sharding=fsdp"):
        dry_run.describe(settings, 2)
    with pytest.raises(ValueError, match=r"`kl_beta` is 0\.1 with train=full and sharding=fsdp"):
        job.check(settings, 2)
    job.check(settings, 1)
