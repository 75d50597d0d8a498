"""Text rendering at small scale: a flow draws three-letter words, a real OCR engine reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guard_ops.digits.policy import sigmas
from guard_ops.rewards.ppocr import Recognizer, model_in_wheel
from guard_ops.rewards.text_rendering import similarity
from guard_ops.trainer.extras import require
from guard_ops.trainer.policy import Condition, Schedule

WORDS = (
    "CAT", "DOG", "SUN", "BOX", "RED", "FLY", "KEY", "JAM", "HUT", "PEN", "VAN", "WEB", "ZIP",
    "QUA", "OAK", "ICE", "GAS", "LIP", "MUD", "TOY",
)  # fmt: skip
SHAPE = (1, 12, 36)
_FINER = 4  # a word is drawn so much larger, then averaged over areas
_SEED_PROXY, _SEED_HELD_OUT = 12345, 12346  # of pictures
_LOWEST = 0.1  # sigma, of what is trained


class Words(NamedTuple):
    """Pictures of words."""

    images: Tensor  # [n, 1, 12, 36] float32 in [-1, 1], white on black
    labels: Tensor  # [n] int64, of WORDS


def draw_words(per_word: int, seed: int) -> Words:
    """DejaVu Sans Bold as matplotlib ships it, 10 to 12 px; size, place and angle are random."""
    dice: Any = require("numpy.random", "study").default_rng(seed)
    images = [_draw(word, dice) for word in WORDS for _ in range(per_word)]
    labels = torch.arange(len(WORDS)).repeat_interleave(per_word)
    return Words(torch.stack(images), labels)


def _draw(word: str, dice: Any) -> Tensor:
    """[1, 12, 36]."""
    pillow, numpy = require("PIL.Image", "study"), require("numpy", "study")
    folder = Path(require("matplotlib", "study").get_data_path()) / "fonts" / "ttf"
    size = round(dice.uniform(10.0, 12.0) * _FINER)
    font = require("PIL.ImageFont", "study").truetype(str(folder / "DejaVuSans-Bold.ttf"), size)
    left, top, right, bottom = font.getbbox(word)
    _, height, width = SHAPE
    page = pillow.new("L", (width * _FINER, height * _FINER), 0)
    x = (page.width - (right - left)) / 2 + dice.uniform(-1.5, 1.5) * _FINER - left
    y = (page.height - (bottom - top)) / 2 + dice.uniform(-0.75, 0.75) * _FINER - top
    require("PIL.ImageDraw", "study").Draw(page).text((x, y), word, font=font, fill=255)
    page = page.rotate(dice.uniform(-3, 3), pillow.Resampling.BICUBIC)
    small = page.resize((width, height), pillow.Resampling.BOX)
    return torch.from_numpy(numpy.asarray(small, dtype="float32") / 127.5 - 1)[None]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = h + self.down(F.silu(self.up(self.norm(h) + condition)))
        return out


class WordPolicy(nn.Module):
    """A residual MLP that predicts the picture; a :class:`~guard_ops.trainer.FlowPolicy`.

    Its velocity is ``(x - picture) / sigma``: the noise of 432 pixels need not pass a width of 256.
    """

    latent_shape = SHAPE

    def __init__(self, width: int = 256, blocks: int = 4) -> None:
        super().__init__()
        pixels = math.prod(SHAPE)
        self.image, self.time = nn.Linear(pixels, width), nn.Linear(32, width)
        self.label = nn.Embedding(len(WORDS), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, pixels)
        nn.init.zeros_(self.out.weight)
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.linspace(0, 8, 16), persistent=False)

    def velocity(
        self,
        latents: Tensor,  # [B, 1, 12, 36]
        timestep: Tensor,  # [B], which is sigma
        condition: Condition,  # "label": [B] int64
    ) -> Tensor:
        angles = timestep[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        context = F.silu(time + self.label(condition["label"]))
        h = self.image(latents.flatten(1)) + context
        for block in self.blocks:
            h = block(h, context)
        picture = self.out(self.norm(h)).reshape(latents.shape)
        out: Tensor = (latents - picture) / timestep.clamp(min=_LOWEST).reshape(-1, 1, 1, 1)
        return out

    def schedule(self, steps: int) -> Schedule:
        levels = sigmas(steps)
        return Schedule(tuple(levels), torch.tensor(levels[:-1]))

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """A prompt is a word."""
        return {"label": torch.tensor([WORDS.index(prompt) for prompt in prompts])}

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, 12, 36], grey."""
        return ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def reference(self) -> AbstractContextManager[None]:
        raise NotImplementedError("the word policy keeps no reference; `kl_beta` needs to be 0")


def pretrain_words(seed: int, steps: int, batch: int = 128, per_word: int = 200) -> WordPolicy:
    """Flow matching on drawn words: AdamW 2e-3 to 1e-5, sigma in [0.1, 1], loss times sigma."""
    words = draw_words(per_word, 0)
    dice = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = WordPolicy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        rows = torch.randint(len(words.labels), (batch,), generator=dice)
        image, sigma = (
            words.images[rows],
            _LOWEST + (1 - _LOWEST) * torch.rand(batch, generator=dice),
        )
        noise, level = torch.randn(image.shape, generator=dice), sigma.reshape(-1, 1, 1, 1)
        condition = {"label": words.labels[rows]}
        velocity = policy.velocity((1 - level) * image + level * noise, sigma, condition)
        loss = ((velocity - (noise - image)).square() * level).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


class WordProxy:
    """The asked word's logit in a logistic regression fitted on three pictures of each word.

    It is made to be hacked.
    """

    def __init__(self) -> None:
        words, others = draw_words(3, _SEED_PROXY), draw_words(10, _SEED_HELD_OUT)
        fitted = require("sklearn.linear_model", "study").LogisticRegression(C=10.0, max_iter=1000)
        fitted.fit(_flat(words.images).numpy(), words.labels.numpy())
        self.weight = torch.from_numpy(fitted.coef_).float()  # [20, 432]
        self.bias = torch.from_numpy(fitted.intercept_).float()
        guess = F.linear(_flat(others.images), self.weight, self.bias).argmax(1)
        self.accuracy = float((guess == others.labels).float().mean())

    def __call__(
        self,
        samples: Tensor,  # [B, 1, 12, 36]
        labels: Tensor,  # [B] the words asked for
    ) -> Tensor:
        """The reward of each sample, [B]."""
        return F.linear(_flat(samples), self.weight, self.bias).gather(1, labels[:, None])[:, 0]


class WordGold:
    """What PP-OCR reads in a sample, compared with the word asked for."""

    def __init__(self) -> None:
        # every picture is as wide: padding would cost three quarters of the time
        self._read = Recognizer(model_in_wheel("rec"), narrowest=1)

    def __call__(
        self,
        samples: Tensor,  # [B, 1, 12, 36]
        labels: Tensor,  # [B] the words asked for
    ) -> Tensor:
        """``1 - edit distance / longest`` of what is read and what was asked for, [B]."""
        pairs = zip(enlarged(samples), labels.tolist(), strict=True)
        return torch.tensor([similarity(self._read(image), WORDS[n]) for image, n in pairs])


def enlarged(samples: Tensor) -> Tensor:
    """[B, 3, 64, 176] in [0, 1]: black on white, four times as large, with a border."""
    ink = F.interpolate(samples.clamp(-1, 1), scale_factor=4, mode="bicubic")
    return F.pad(((1 - ink) / 2).clamp(0, 1), (16, 16, 8, 8), value=1.0).expand(-1, 3, -1, -1)


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).clamp(-1, 1)
