"""Text drawn in a real font is read by the real engine: the right word is high, a wrong one low."""

from __future__ import annotations

import pytest
import torch
from drawn import drawn

from guard_ops.recipes.prompt_sets import prompt_file
from guard_ops.rewards import load_reward
from guard_ops.rewards.ppocr import Line, decoded, in_reading_order, model_in_wheel
from guard_ops.rewards.text_rendering import edit_distance, similarity, text_of
from guard_ops.trainer.prompts import read_prompts


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("onnxruntime", reason="needs guard-ops[rewards]")
    pytest.importorskip("scipy", reason="needs guard-ops[rewards]")
    try:
        model_in_wheel("rec")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return load_reward("text_rendering")


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_line_is_read_at_any_size(reward, size):
    for word in ("hello", "GRPO", "Guard Ops 42", "balance"):
        assert reward.read(drawn(word, size)) == word


def test_the_right_word_is_high_and_a_wrong_one_low(reward):
    pixels = drawn("open late")[None].expand(3, -1, -1, -1)
    prompts = ['a sign that says "Open Late"', 'a sign that says "open gate"', 'a card with "fizz"']
    scores = reward(pixels, prompts, [{}, {}, {}])
    assert scores.total.tolist() == pytest.approx([1, 7 / 8, 0])
    assert scores.parts["exact"].tolist() == [1, 0, 0]


def test_lines_are_found_on_a_page(reward):
    page = drawn("NEXT STOP\nseven hills", 36, (448, 320))
    noise = 0.05 * torch.rand(page.shape, generator=torch.Generator().manual_seed(0))
    assert reward.read(page - noise) == "NEXT STOP seven hills"
    assert reward.read(torch.full((3, 64, 64), 0.7)) == ""
    asked = {"text": "Next stop seven hills"}
    assert float(reward(page[None], ["a bus"], [asked]).total) == 1


def test_a_videos_frames_count_on_average(reward):
    video = torch.stack([drawn("tea", page=(128, 48)), torch.ones(3, 48, 128)])[None]
    scores = reward(video, ['a cup with "tea"'], [{}])
    assert scores.total.tolist() == [0.5]


@pytest.mark.parametrize(
    "prompt, metadata, text",
    [
        ('a mug with "Good morning" on it', {}, "Good morning"),
        ("a mug with “Good morning” on it", {}, "Good morning"),
        ("the baker's sign says 'fresh bread'", {}, "fresh bread"),
        ("a mug", {"text": "tea"}, "tea"),
    ],
)
def test_the_text_asked_for(prompt, metadata, text):
    assert text_of(prompt, metadata) == text


@pytest.mark.parametrize("metadata", [{}, {"text": " "}, {"text": 3}])
def test_a_prompt_without_text_is_named(metadata):
    with pytest.raises(ValueError, match="the prompt 'a mug' asks for no text"):
        text_of("a mug", metadata)


def test_edit_distance_is_levenshteins():
    pairs = {("kitten", "sitting"): 3, ("", "abc"): 3, ("flaw", "lawn"): 2, ("a", "a"): 0}
    for (a, b), distance in pairs.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert similarity("Hel lo", "hello") == 1
    assert similarity("hello hello", "hello") == 0.5  # what is written twice is not right


def test_greedy_decoding_drops_repetitions_and_blanks():
    alphabet = ["", "a", "b", " "]
    assert decoded([0, 1, 1, 0, 1, 2, 2, 3, 3, 0], alphabet) == "aab"


def test_lines_are_read_row_by_row():
    boxes = [(200, 12, 300, 40), (0, 100, 90, 130), (10, 10, 180, 42), (100, 104, 190, 128)]
    ordered = in_reading_order([Line(box, 1.0) for box in boxes])
    assert [line.box for line in ordered] == [boxes[2], boxes[0], boxes[1], boxes[3]]


def test_shipped_prompts_all_ask_for_text():
    for split in ("train", "test"):
        for prompt in read_prompts(prompt_file("text_rendering", split)).texts:
            assert len(text_of(prompt, {})) > 3


@pytest.mark.parametrize(
    "option, message",
    [
        ("detect=maybe", "`detect` of the reward text_rendering is 'maybe'; it needs auto"),
        ("threads=0", "`threads` of the reward text_rendering is 0; it needs >= 1"),
        ("threads=x", "text_rendering.threads=x; it needs int"),
        ("recognition=/no.onnx", "`recognition` of the reward text_rendering is '/no.onnx', which"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        load_reward("text_rendering", [f"text_rendering.{option}"])


def test_without_the_wheel_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"rapidocr.*`pip install .guard-ops\[rewards\]"):
        load_reward("text_rendering")
