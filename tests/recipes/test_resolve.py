"""Settings: what overrides what, and what a mistake is answered with."""

from __future__ import annotations

import pytest

pytest.importorskip("omegaconf")

from guard_ops import cli
from guard_ops.recipes.config import DigitsRecipe, Recipe
from guard_ops.recipes.resolve import as_yaml, resolve, shipped

MODELS = ("flux1_dev", "qwen_image", "sd3_5_medium", "wan2_1_t2v_1_3b")
FLAT = (
    "model", "out", "iterations", "seed", "resume", "objective", "reward", "prompts",
    "prompts_per_iteration", "group_size", "micro_batch", "steps", "height", "width", "frames",
)  # fmt: skip


def test_recipes_that_come_with_the_package():
    assert shipped() == ["digits", *MODELS]
    assert isinstance(resolve("digits"), DigitsRecipe)


@pytest.mark.parametrize("objective", ["article", "paper", "flow_grpo", "dance_grpo"])
@pytest.mark.parametrize("recipe", MODELS)
def test_every_recipe_has_every_objective(recipe, objective):
    from guard_ops.recipes.job import guard_config, train_config

    settings = resolve(recipe, [f"objective={objective}", "prompts=p.txt"])

    assert isinstance(settings, Recipe)
    assert settings.out == f"runs/{recipe}-{objective}"
    assert all(hasattr(settings, key) for key in FLAT)
    config, guard = train_config(settings), guard_config(settings)
    assert config.window.steps(config.steps)
    norm = {"article": "standardize", "paper": "closed_form"}.get(objective, "none")
    assert guard.ratio_norm == norm
    clips = {"article": 0.2, "paper": 2e-6, "dance_grpo": 1e-4}
    clips["flow_grpo"] = 1e-3 if recipe.startswith("wan") else 1e-4
    assert guard.clip_low == guard.clip_high == clips[objective]


def test_words_override_the_objective_which_overrides_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: m\nprompts: p.txt\nsteps: 7\nseed: 1\nlearning_rate: 2\n"
        "objectives: {paper: {seed: 2, learning_rate: 3.5}}\n"
    )
    settings = resolve(str(file), ["objective=paper", "learning_rate=4e-5"])
    assert (settings.steps, settings.seed, settings.learning_rate) == (7, 2, 4e-5)
    assert settings.out == "runs/mine-paper"
    assert resolve(str(file)).learning_rate == 2.0


def test_settings_written_and_read_again_are_the_same(tmp_path):
    for name in shipped():
        settings = resolve(name, [] if name == "digits" else ["prompts=p.txt", "micro_batch=null"])
        (tmp_path / "again.yaml").write_text(as_yaml(settings))
        assert resolve(str(tmp_path / "again.yaml")) == settings


@pytest.mark.parametrize(
    "words, message",
    [
        (["promts=x"], r"there is no key `promts`; did you mean prompts\?; keys are model, "),
        (["learning-rate=1"], r"'learning-rate=1' is no setting; it needs key=value"),
        (["steps"], r"'steps' is no setting; it needs key=value"),
        (["steps=ten"], r"`steps` is 'ten'; it needs an int"),
        (["steps=2.5"], r"`steps` is 2.5; it needs an int"),
        (["learning_rate=fast"], r"`learning_rate` is 'fast'; it needs a number"),
        (["micro_batch=x"], r"`micro_batch` is 'x'; it needs an int or null"),
        (["dtype=float16"], r"`dtype` is 'float16'; it needs one of bfloat16, float32"),
        (["out=${x}"], r"`out` is '\$\{x\}'; it needs a value, as `\$\{...\}` is not looked up"),
        (["trackers=[${x}]"], r"'trackers=\[\$\{x\}\]' is no setting; its value is no YAML"),
        (["resume=maybe"], r"`resume` is 'maybe'; it needs true or false"),
        (["objective=artcle"], r"`objective` is 'artcle'; it needs one of article, paper, flow"),
        ([], r"`prompts` is not given; it needs a .txt file with a prompt a line"),
    ],
)
def test_a_mistake_names_the_key(words, message):
    with pytest.raises(ValueError, match=message):
        resolve("sd3_5_medium", words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepps: 3", r"mine.yaml: there is no key `stepps`; did you mean steps\?"),
        ("steps: [", r"mine.yaml is no YAML"),
        ("- 3", r"mine.yaml holds a list; it needs keys and values"),
        ("kind: video", r"mine.yaml: `kind` is 'video'; it needs one of pipeline, digits"),
        ("objectives: {article: {stepps: 3}}", r"objectives.article: there is no key `stepps`"),
        ("objectives: 3", r"mine.yaml: `objectives` is 3; it needs the keys of each objective"),
        ("objectives: {papr: {}}", r"no objective `papr`; did you mean paper\?; there are article"),
        ("objectives: {paper: {stepps: 3}}", r"objectives.paper: there is no key `stepps`"),
        ("objectives: {paper: {steps: x}}", r"objectives.paper: `steps` is 'x'; it needs an int"),
        ("objectives: {paper: 3}", r"objectives.paper: it needs keys and values, and is 3"),
        ("objectives: {paper: {objective: article}}", r"`objective` is what these keys are of"),
        ("out: runs/${seed}", r"mine.yaml: `out` is 'runs/\$\{seed\}'; it needs a value, as"),
        ("seed: x", r"mine.yaml: `seed` is 'x'; it needs an int"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve(str(tmp_path / "mine.yaml"), ["prompts=p.txt", "model=m"])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match=r"no recipe 'flux_dev'; did you mean flux1_dev\?; there"):
        resolve("flux_dev")
    with pytest.raises(ValueError, match=r"there is no recipe missing.yaml"):
        resolve("missing.yaml")


def test_a_home_is_found_in_the_names_of_files(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    words = ["model=~/m", "prompts=~/p.txt", "out=~/runs", "encodings=~/e"]
    settings = resolve("sd3_5_medium", words)
    found = settings.model, settings.prompts, settings.out, settings.encodings
    assert found == ("/home/ada/m", "/home/ada/p.txt", "/home/ada/runs", "/home/ada/e")


def test_gpus_are_for_a_dry_run(capsys):
    assert cli.main(["train", "digits", "--gpus", "8"]) == 1
    assert "`--gpus` is what `--dry-run` plans for" in capsys.readouterr().err


def test_the_published_noise_of_wan_and_the_norm_of_dance_grpos_gradients():
    wan = resolve("wan2_1_t2v_1_3b", ["prompts=p.txt", "objective=flow_grpo"])
    assert (wan.sde, wan.noise_level) == ("wan_sde", 1.0)
    for name in MODELS:
        dance = resolve(name, ["prompts=p.txt", "objective=dance_grpo"])
        assert dance.max_grad_norm == 0.01
