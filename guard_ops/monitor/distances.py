"""How samples change over training, in a space of features: Frechet, Inception score, diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Features: TypeAlias = Callable[[Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""Of images [N, 3, H, W] in [0, 1]: features [N, D], or these and a classifier's logits [N, C]."""

_NEAR = 0.5  # of the start's median distance to the nearest sample: a near-duplicate


class Reference(NamedTuple):
    """What samples are compared with: those of the start, or real images."""

    mean: Tensor  # [D], float64
    covariance: Tensor  # [D, D]
    nearest: float  # median distance of a sample to its nearest other one

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """Of features [N, D], N >= 2."""
        mean, covariance = moments(features)
        return cls(mean, covariance, float(nearest(features).median()))


class Change(NamedTuple):
    """How N samples differ from a reference."""

    frechet: float  # FID, if the features are Inception's
    diversity: float  # mean distance of two samples of a prompt
    duplicates: float  # share of samples with another one nearer than half of what was usual
    inception_score: float | None = None  # None without logits

    @classmethod
    def of(
        cls,
        features: Tensor,  # [N, D]
        prompts: Sequence[str],
        reference: Reference,
        logits: Tensor | None = None,  # [N, C]
    ) -> Change:
        return cls(
            frechet(moments(features), (reference.mean, reference.covariance)),
            diversity(features, prompts),
            float((nearest(features) < _NEAR * reference.nearest).double().mean()),
            None if logits is None else inception_score(logits),
        )


def pixels(images: Tensor) -> Tensor:
    """Features without a model: the image at 8 x 8, [N, 192], for what is seen from afar."""
    return F.interpolate(images.float(), (8, 8), mode="area").flatten(1)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the rows of ``x``, in float64."""
    return x.double().mean(0), x.double().T.cov()


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` of two Gaussians' :func:`moments`.

    With fewer samples than features the covariances are those of a subspace and the distance is too
    large; it is then for comparing evaluations of as many samples with each other.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def inception_score(logits: Tensor) -> float:
    """``exp(mean KL(p(c | image) || p(c)))`` of a classifier's logits [N, C]; 1 to C."""
    log_p = logits.double().log_softmax(1)
    marginal = log_p.exp().mean(0, keepdim=True)
    return float((log_p.exp() * (log_p - marginal.log())).sum(1).mean().exp())


def diversity(features: Tensor, prompts: Sequence[str]) -> float:
    """Mean distance of two samples of the same prompt; of any two where none has two."""
    names = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    of = torch.tensor([names[prompt] for prompt in prompts], device=features.device)
    distances = torch.cdist(features.double(), features.double())
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    same = (of[:, None] == of) & others
    pairs = same if bool(same.any()) else others
    return float(distances[pairs].mean())


def nearest(features: Tensor) -> Tensor:
    """Distance of each sample to the nearest other one, [N]."""
    distances = torch.cdist(features.double(), features.double())
    return distances.fill_diagonal_(torch.inf).amin(1)
