"""Who judges the digits: a proxy that training sees, and gold that it never does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..monitor.distances import frechet, moments
from ..trainer.extras import require
from .policy import CLASSES, GOLD_IMAGES, PROXY_IMAGES, Digits

HELD_OUT = PROXY_IMAGES + GOLD_IMAGES  # images from here on were fitted by neither classifier


class ProxyReward:
    """The asked class's logit in a logistic regression that sees the upper half of 200 digits.

    It is made to be hacked: linear, barely trained, and blind to the lower half. Pixels beyond
    black and white are cut off first, here and in :class:`Gold`, so that the hack has to be in the
    picture.
    """

    def __init__(self, digits: Digits) -> None:
        fitted = require("sklearn.linear_model", "demo").LogisticRegression(C=10.0, max_iter=1000)
        x, y = _upper_half(digits.images), digits.labels
        fitted.fit(x[:PROXY_IMAGES].numpy(), y[:PROXY_IMAGES].numpy())
        self.weight = torch.from_numpy(fitted.coef_).float()  # [10, 32]
        self.bias = torch.from_numpy(fitted.intercept_).float()
        guess = F.linear(x[HELD_OUT:], self.weight, self.bias).argmax(1)
        self.accuracy = float((guess == y[HELD_OUT:]).float().mean())

    def __call__(
        self,
        samples: Tensor,  # [B, 1, 8, 8]
        condition: Tensor,  # [B] the classes asked for
    ) -> Tensor:
        """The reward of each sample, [B]."""
        logits = F.linear(_upper_half(samples), self.weight, self.bias)
        return logits.gather(1, condition[:, None])[:, 0]


class Gold:
    """What the samples are worth, by measures that no training step reads.

    ``gold``: the probability of the asked class to an RBF support vector machine fitted on 1,500
    digits (none of them the proxy's). ``distance``: from a sample to the nearest real image of its
    class. ``diversity``: mean distance between two samples of a class. ``frechet``: between
    Gaussians fitted to all samples and to all real images. Distances are in pixels of [-1, 1].
    """

    def __init__(self, digits: Digits) -> None:
        self.digits = digits
        x, y = digits.images.flatten(1).numpy(), digits.labels.numpy()
        svm = require("sklearn.svm", "demo").SVC(C=10.0)
        calibrated = require("sklearn.calibration", "demo").CalibratedClassifierCV
        self._svm = calibrated(svm, ensemble=False)
        self._svm.fit(x[PROXY_IMAGES:HELD_OUT], y[PROXY_IMAGES:HELD_OUT])
        self.accuracy = float((self._svm.predict(x[HELD_OUT:]) == y[HELD_OUT:]).mean())
        self._real = moments(digits.images.flatten(1))

    def probability(
        self,
        samples: Tensor,  # [B, 1, 8, 8]
        condition: Tensor,  # [B] the classes asked for
    ) -> Tensor:
        """That each sample is of the class asked for, [B], float64."""
        x = samples.flatten(1).clamp(-1, 1)
        found = torch.from_numpy(self._svm.predict_proba(x.numpy()))
        return found.gather(1, condition[:, None])[:, 0]

    def __call__(
        self,
        samples: Tensor,  # [B, 1, 8, 8]
        condition: Tensor,  # [B] the classes asked for
        probability: Tensor | None = None,  # [B], if it is known already
    ) -> dict[str, float]:
        if probability is None:
            probability = self.probability(samples, condition)
        x = samples.flatten(1).clamp(-1, 1)
        distance, diversity = [], []
        for label in range(CLASSES):
            own = x[condition == label]
            real = self.digits.images[self.digits.labels == label].flatten(1)
            distance.append(torch.cdist(own, real).amin(1).mean())
            diversity.append(F.pdist(own).mean())
        return {
            "gold": float(probability.mean()),
            "distance": float(torch.stack(distance).mean()),
            "diversity": float(torch.stack(diversity).mean()),
            "frechet": frechet(moments(x), self._real),
        }


def _upper_half(images: Tensor) -> Tensor:
    """The upper four rows of [B, 1, 8, 8] images as [B, 32]."""
    return images[:, :, :4].flatten(1).clamp(-1, 1)
