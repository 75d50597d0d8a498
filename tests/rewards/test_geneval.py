"""GenEval's scoring on hand-made detections, for all six tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guard_ops.recipes.prompt_sets import prompt_file
from guard_ops.rewards.colours import COLOURS, crop
from guard_ops.rewards.detector import CLASSES, Detection, detections, prepare
from guard_ops.rewards.geneval import TASKS, GenEval, check_metadata, judge, kept, relations
from guard_ops.trainer.prompts import read_prompts


def at(left, top, score=0.95, size=40):
    return Detection((left, top, left + size, top + size), score)


def no_colours(objects, kind):
    raise AssertionError("no colour is asked for")


def verdict(found, tag, include, exclude=(), colours=no_colours):
    asked = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    check_metadata("a prompt", asked)
    return tuple(judge(kept(found, tag), asked, colours))


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


def test_single_object():
    assert verdict({"dog": [at(0, 0)]}, "single_object", [DOG]) == (1, True, True)
    assert verdict({"dog": [at(0, 0, 0.2)]}, "single_object", [DOG]) == (0, False, False)
    assert verdict({"cat": [at(0, 0)]}, "single_object", [DOG]) == (0, False, False)
    # one too many: right for GenEval, which asks for at least one; not for flow_grpo
    two = {"dog": [at(0, 0), at(60, 0)]}
    assert verdict(two, "single_object", [DOG]) == (0, False, True)


def test_two_objects():
    both = {"dog": [at(0, 0)], "cat": [at(60, 0)]}
    assert verdict(both, "two_object", [DOG, CAT]) == (1, True, True)
    assert verdict({"dog": [at(0, 0)]}, "two_object", [DOG, CAT]) == (0.5, False, False)


@pytest.mark.parametrize(
    "count, expected",
    [(0, (0, False, False)), (2, (2 / 3, False, False)), (3, (1, True, True)),
     (4, (2 / 3, False, False))],
)  # fmt: skip
def test_counting(count, expected):
    found = {"dog": [at(50 * n, 0) for n in range(count)] + [at(0, 60, 0.85)]}  # an unsure one
    include, exclude = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}]
    assert verdict(found, "counting", include, exclude) == pytest.approx(expected)


def named(*colours):
    """Colours by the place from the left."""
    return lambda objects, kind: [colours[int(x.box[0]) // 50] for x in objects]


def test_colours():
    red = [{**DOG, "color": "red"}]
    found = {"dog": [at(0, 0)]}
    assert verdict(found, "colors", red, colours=named("red")) == (1, True, True)
    assert verdict(found, "colors", red, colours=named("blue")) == (0.5, False, False)
    assert verdict({}, "colors", red) == (0, False, False)
    # two dogs of which the surer one is red: what GenEval looks at is right
    two = {"dog": [at(50, 0, 0.9), at(0, 0, 0.99)]}
    assert verdict(two, "colors", red, colours=named("red", "blue")) == (0, False, True)


def test_colours_of_two_objects():
    asked = [{**DOG, "color": "red"}, {**CAT, "color": "blue"}]
    found = {"dog": [at(0, 0)], "cat": [at(50, 0)]}
    assert verdict(found, "color_attr", asked, colours=named("red", "blue")) == (1, True, True)
    swapped = verdict(found, "color_attr", asked, colours=named("blue", "red"))
    assert swapped == (0.5, False, False)


def test_position():
    asked = [DOG, {**CAT, "position": ["left of", 0]}]
    right = {"dog": [at(100, 0)], "cat": [at(0, 0)]}
    assert verdict(right, "position", asked) == (1, True, True)
    wrong = {"dog": [at(0, 0)], "cat": [at(100, 0)]}
    assert verdict(wrong, "position", asked) == (pytest.approx(2 / 3), False, False)
    # no dog to be left of: of dog, cat and position only the cat is there
    alone = {"cat": [at(0, 0)]}
    assert verdict(alone, "position", asked) == (pytest.approx(1 / 3), False, False)


@pytest.mark.parametrize(
    "a, expected",
    [
        ((0, 100), {"left of"}),
        ((200, 100), {"right of"}),
        ((100, 0), {"above"}),
        ((100, 200), {"below"}),
        ((0, 0), {"left of", "above"}),
        ((107, 100), set()),  # by less than a tenth of both widths
        ((130, 100), {"right of"}),
        ((112, 100), set()),  # a third of the distance is left
    ],
)
def test_relations_of_boxes(a, expected):
    left, top = a
    box = (left, top, left + 40, top + 40)
    assert relations(box, (100, 100, 140, 140)) == expected


def test_detections_are_kept_by_class_the_surest_first():
    found = kept({"dog": [at(0, 0, 0.1 + n / 25) for n in range(22)], "cat": [at(0, 0, 0.3)]}, "x")
    assert list(found) == ["dog"]
    scores = [each.score for each in found["dog"]]
    assert len(scores) == 16
    assert scores == sorted(scores, reverse=True)
    assert not kept({"dog": [at(0, 0, 0.9)]}, "counting")


def test_the_reward_is_judged_image_by_image():
    answers = iter([{"dog": [at(0, 0)]}, {}, {"dog": [at(0, 0)]}, {"dog": [at(0, 0)]}])
    reward = GenEval(detect=lambda images: [next(answers) for _ in images])
    row = {"tag": "single_object", "include": [DOG]}
    scores = reward(torch.rand(2, 3, 8, 8), ["a dog", "a dog"], [row, row])
    assert scores.total.tolist() == [1, 0]
    assert scores.parts["single_object"].tolist() == [1, 0]
    assert scores.parts["counting"].isnan().all()
    assert set(TASKS) <= scores.parts.keys()
    video = reward(torch.rand(1, 2, 3, 8, 8), ["a dog"], [row])
    assert video.total.tolist() == [1]


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, 'have the "tag" None; it needs one of single_object'),
        ({"tag": "colors"}, 'have no "include"'),
        ({"tag": "colors", "include": [{"class": "unicorn", "count": 1}]}, r"include\[0\] is"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 0}]}, 'has the "count" 0'),
        ({"tag": "colors", "include": [{**DOG, "color": "mauve"}]}, "'mauve'; it needs one of red"),
        ({"tag": "position", "include": [DOG, {**CAT, "position": ["near", 0]}]}, "include.1."),
        ({"tag": "position", "include": [DOG, {**CAT, "position": ["above", 1]}]}, "before it"),
        ({"tag": "counting", "include": [DOG], "exclude": [{"class": "dog"}]}, r"exclude\[0\]"),
    ],
)
def test_metadata_of_another_form_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        GenEval(detect=lambda images: []).check_prompts(["a photo"], [row])


def test_shipped_prompts_are_in_the_official_format():
    seen = []
    for split in ("train", "test"):
        file = prompt_file("geneval", split)
        prompts = read_prompts(file)
        for prompt, row in zip(*prompts, strict=True):
            check_metadata(prompt, row)
        assert {row["tag"] for row in prompts.metadata} == set(TASKS)
        seen.append(set(prompts.texts))
        first = json.loads(Path(file).read_text().splitlines()[0])
        assert first.keys() == {"tag", "include", "prompt"}
    assert not seen[0] & seen[1]


def test_masks_become_boxes_scores_and_classes():
    """Two queries: a sure dog in the left half, and nothing."""
    classes = torch.full((2, 81), -10.0)
    classes[0, CLASSES.index("dog")], classes[1, 80] = 10, 10
    masks = torch.full((2, 8, 8), -8.0)
    masks[0, 2:6, 0:4] = 8
    # the detector saw 64 x 64 of which 64 x 32 is the image, of 32 x 16 pixels
    found = detections(classes, masks, (64, 64), (64, 32), (32, 16))
    (dog,) = [each for each in found["dog"] if each.score > 0.5]
    assert dog.box == (0, 8, 16, 24)
    assert dog.score == pytest.approx(float(torch.tensor(8.0).sigmoid()), abs=0.05)
    assert dog.mask.shape == (32, 16)
    assert all(each.score < 0.1 for kind in found for each in found[kind] if each is not dog)


def test_the_detectors_input_is_800_by_at_most_1333():
    pixels, mask, inside = prepare(torch.rand(1, 3, 60, 80))
    assert inside == (800, 1067)
    assert pixels.shape == (1, 3, 800, 1088)
    assert mask.sum() == 800 * 1067
    assert not pixels[..., 1067:].any()
    assert prepare(torch.rand(1, 3, 20, 100))[2] == (267, 1333)


@pytest.mark.slow_suite
def test_a_tiny_mask2former_in_the_real_format(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs guard-ops[rewards]")
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_labels=80, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=5,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    found = GenEval(model=str(tmp_path))._detect(torch.rand(2, 3, 32, 48))
    assert len(found) == 2
    for each in found:
        for kind, objects in each.items():
            assert kind in CLASSES
            for box, score, mask in objects:
                assert 0 <= box[0] < box[2] <= 48
                assert 0 <= box[1] < box[3] <= 32
                assert 0 <= score <= 1
                assert mask.shape == (32, 48)


def test_a_crop_has_a_grey_background():
    image = torch.zeros(3, 10, 12)
    image[0, 2:6, 3:9] = 1
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2:6, 3:6] = True
    cut = crop(image, Detection((3, 2, 9, 6), 1.0, mask))
    assert cut.shape == (3, 4, 6)
    assert cut[:, :, :3].unique().tolist() == [0, 1]
    torch.testing.assert_close(cut[:, :, 3:], torch.full((3, 4, 3), 0.6))
    assert crop(image, Detection((11.9, 9.9, 12, 10), 1.0)).shape == (3, 1, 1)
    assert len(COLOURS) == 10
