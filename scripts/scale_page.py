"""Writes docs/scale.md: memory and time on 1 to 512 GPUs, from what is counted on the networks.

    python scripts/scale_page.py            # writes the page
    python scripts/scale_page.py --check    # fails if the page is not what this would write
    python scripts/scale_page.py --count    # counts activations and operations again

Nothing here was measured on a GPU. Parameters are counted when the page is written, on networks
without values of the published configurations (guard_ops/policies/published.py) with the recipes'
LoRA. Activations and operations take minutes to count, so the table has them; the rest is
arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
GIB = 2**30
GPUS = (1, 8, 64, 512)
TFLOPS = 400.0  # assumed, bfloat16, of a GPU whose peak is 990
GPU_GIB = 80
GIGABYTES_A_SECOND = 50.0  # assumed, of a ring between GPUs, each way


class Counts(NamedTuple):
    """Parameters of a network."""

    whole: int
    lora: int  # trained, of the recipe
    block: int  # of the largest block


@functools.cache
def counts(recipe: str, published: str) -> Counts:
    """Of a published model's network, with a recipe's LoRA, without values."""
    sys.path.insert(0, str(ROOT))
    from guard_ops.policies.published import PUBLISHED
    from guard_ops.recipes import dry_run
    from guard_ops.recipes.resolve import resolve

    words = ["prompts=x", f"model={PUBLISHED[published].model}"]
    policy = dry_run._empty(resolve(recipe, words))

    def size(module: Any, *, adapters: bool = False) -> int:
        found = module.named_parameters()
        return sum(p.numel() for n, p in found if (".lora_" in n) == adapters == p.requires_grad)

    largest = max(map(size, policy.blocks))
    return Counts(size(policy), size(policy, adapters=True), largest)


class Model(NamedTuple):
    """One velocity of one sample; activations in GiB with flash attention in bfloat16."""

    name: str
    size: str
    recipe: str
    published: str
    latent: int  # elements
    text: float  # MiB of an encoded prompt
    guidance: int  # velocities a step: 2 with classifier-free guidance
    tflop: float
    full: float  # kept with checkpointing, and one block, in full fine-tuning
    adapters: float  # the same with a LoRA
    samples: int  # an iteration
    steps: int
    trained: int

    @property
    def parameters(self) -> int:
        return counts(self.recipe, self.published).whole

    @property
    def lora(self) -> int:
        return counts(self.recipe, self.published).lora

    @property
    def block(self) -> int:
        return counts(self.recipe, self.published).block


MODELS = (
    Model("SD3.5-M", "512 px", "sd3_5_medium", "sd3_5_medium", 65_536, 1.6, 2,
          2.25, 0.22, 0.17, 1152, 10, 9),
    Model("FLUX.1-dev", "512 px", "flux1_dev", "flux1_dev", 65_536, 4.0, 1,
          21.9, 0.76, 0.65, 1152, 6, 5),
    Model("Wan2.1-1.3B", "240x416, 33 frames", "wan2_1_t2v_1_3b", "wan2_1_t2v_1_3b", 224_640, 4.0,
          2, 11.7, 0.83, 0.59, 128, 20, 19),
    Model("Wan2.1-14B", "240x416, 33 frames", "wan2_1_t2v_1_3b", "wan2_1_t2v_14b", 224_640, 4.0,
          2, 98.8, 2.9, 2.2, 128, 20, 19),
    Model("Qwen-Image", "512 px", "qwen_image", "qwen_image", 65_536, 1.8, 2,
          19.2, 0.67, 0.61, 512, 10, 2),
)  # fmt: skip


def enough(model: Model, gpus: int) -> bool:
    """Whether each of two minibatches has a sample for every GPU."""
    return model.samples >= 2 * gpus


def state(model: Model, gpus: int, *, full: bool, sharded: bool) -> float:
    """Weights, gradients, AdamW and an average of the weights, GiB a GPU."""
    trained = model.parameters if full else model.lora
    frozen = 0 if full else model.parameters
    share = gpus if sharded else 1
    blocks = 2 * 2 * model.block if sharded and gpus > 1 else 0
    return ((20 * trained + 2 * frozen) / share + blocks) / GIB


def rollout(model: Model, gpus: int) -> float:
    """Latents in float32, velocities, gradients of the trained ones, prompts, GiB a GPU."""
    mine = -(-model.samples // gpus)
    elements = 4 * (model.steps + 1) + 2 * model.steps + 4 * model.trained
    return mine * (model.latent * elements + model.text * 2**20) / GIB


def activations(model: Model, *, full: bool) -> float:
    """Of a micro-batch of one sample at one step, GiB."""
    return model.guidance * (model.full if full else model.adapters)


def total(model: Model, gpus: int, *, full: bool, sharded: bool) -> float:
    return (
        state(model, gpus, full=full, sharded=sharded)
        + activations(model, full=full)
        + rollout(model, gpus)
    )


def sharding(model: Model, gpus: int, *, full: bool) -> str:
    """What to choose: replicated weights as long as they fit with room to spare."""
    limit = 0.8 * GPU_GIB
    if not full and total(model, gpus, full=False, sharded=False) <= limit:
        return "ddp"
    if total(model, gpus, full=full, sharded=True) <= limit:
        return "fsdp" if gpus > 1 or full else "ddp"
    return "more GPUs"


def tflop(model: Model, *, full: bool) -> float:
    """Of an iteration of two updates: rollout, updates with recomputation, the second's pass 1."""
    backward = 4 if full else 3
    calls = model.steps + backward * model.trained + 0.5 * model.trained
    return model.guidance * model.tflop * model.samples * calls


def seconds(model: Model, gpus: int, *, full: bool) -> float:
    """At the assumed speed, if samples divide evenly."""
    return tflop(model, full=full) / TFLOPS / gpus


def gradient_seconds(model: Model, gpus: int, *, full: bool) -> float:
    """To average gradients once, in float32, by a ring."""
    size = 4 * (model.parameters if full else model.lora)
    return 0.0 if gpus == 1 else 2 * size * (gpus - 1) / gpus / (GIGABYTES_A_SECOND * 1e9)


def page() -> str:
    lines = [
        "# Scale",
        "",
        "*Written by `scripts/scale_page.py`; `guard-ops train RECIPE --dry-run "
        "--gpus N` works out the same for your settings.*",
        "",
        "**Counted**: parameters, on the networks themselves without values; the tensors that a "
        "backward keeps, from the networks' own graph with flash attention and a recomputation of "
        "each block; operations of a forward. **Computed** from them: everything else here. "
        f"**Assumed**: {TFLOPS:.0f} TFLOP/s a GPU in bfloat16, {GPU_GIB} GiB, "
        f"{GIGABYTES_A_SECOND:.0f} GB/s between GPUs. **Measured on a GPU: nothing yet**; "
        "`make gpu-scale` measures an iteration of SD3.5-M and FLUX.1-dev on yours.",
        "",
        "## What was counted",
        "",
        "| model | size | parameters | LoRA | TFLOP a velocity | velocities a step "
        "| kept, full, GiB | kept, LoRA, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m.name} | {m.size} | {m.parameters:,} | {m.lora:,} | {m.tflop:g} | {m.guidance} "
        f"| {m.full:g} | {m.adapters:g} |"
        for m in MODELS
    ]
    lines += [
        "",
        "A LoRA is that of the recipe, for Wan2.1-14B that of Wan2.1-1.3B; what is kept is of "
        "one velocity of a sample, its blocks recomputed one at a time. An iteration has the "
        "samples and steps of the recipe: "
        + "; ".join(
            f"{m.name} {m.samples} samples, {m.trained} of {m.steps} steps trained" for m in MODELS
        )
        + ".",
        "",
        "## Memory",
        "",
        "GiB a GPU at the peak of an update, `micro_batch` 1: weights, gradients, AdamW and an "
        "average of the weights (20 bytes a trained parameter, 2 a frozen one), two unsharded "
        "blocks where weights are sharded, activations, and its own samples (latents, velocities, "
        "gradients, prompts). Not in it: CUDA's context, fragments, the decoder while it decodes "
        "(about 1 to 3 GiB).",
    ]
    for full in (False, True):
        how = "Full fine-tuning" if full else "LoRA"
        lines += [
            "",
            f"### {how}",
            "",
            "| model | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in GPUS) + " |",
            "|---|" + "---|" * len(GPUS),
        ]
        for m in MODELS:
            cells = []
            for n in GPUS:
                if not enough(m, n):
                    cells.append("too few samples")
                    continue
                choice = sharding(m, n, full=full)
                size = total(m, n, full=full, sharded=choice != "ddp")
                cells.append(f"{size:.1f} {choice}" if choice != "more GPUs" else f"{size:.0f}: no")
            lines.append(f"| {m.name} | {' | '.join(cells)} |")
    lines += [
        "",
        f'"no" is more than four fifths of {GPU_GIB} GiB. What is chosen:',
        "",
        "- **LoRA: `sharding=ddp`.** The base is replicated in bfloat16 and only the adapters' "
        "gradients travel. Every base here fits; sharding it would gather all of it in every "
        "velocity.",
        "- **Full: `sharding=fsdp`.** Weights, gradients and optimizer are sharded, in float32, "
        "and gathered in bfloat16 block by block; gradients are reduced in each backward, since "
        "unsharded ones would cost 4 bytes a parameter "
        f"({4 * MODELS[1].parameters / GIB:.0f} GiB of FLUX).",
        "- More GPUs than samples would idle: an iteration needs at least one sample of each "
        "minibatch a rank, and says so.",
        "",
        "## Time",
        "",
        f"Seconds of an iteration's rollout and update at the assumed {TFLOPS:.0f} TFLOP/s, and of "
        "one average of the gradients. Rewards, decoding and waiting are not in it.",
        "",
        "| model, LoRA | TFLOP | " + " | ".join(str(n) for n in GPUS) + " | gradients, 512 |",
        "|---|---|" + "---|" * len(GPUS) + "---|",
    ]
    for full in (False, True):
        if full:
            lines += [
                "",
                "| model, full | TFLOP | " + " | ".join(map(str, GPUS)) + " | gradients, 512 |",
                "|---|---|" + "---|" * len(GPUS) + "---|",
            ]
        for m in MODELS:
            times = " | ".join(
                f"{seconds(m, n, full=full):,.0f}" if enough(m, n) else "too few samples"
                for n in GPUS
            )
            sync = gradient_seconds(m, GPUS[-1], full=full)
            lines.append(f"| {m.name} | {tflop(m, full=full):,.0f} | {times} | {sync:.2f} |")
    lines += [
        "",
        "An iteration is, a sample: N velocities of the rollout; for each trained step a forward, "
        "its recomputation and a backward (one forward's work for a LoRA, two in full "
        "fine-tuning); and in the second of two updates one velocity more, since the first has the "
        "rollout's. So exactness costs "
        f"{0.5 / 3.5:.0%} of a LoRA's updates and {0.5 / 4.5:.0%} of full fine-tuning's.",
        "",
        "Beyond about a hundred GPUs an iteration of these sizes is a few seconds, and what a "
        "recipe lacks is samples: raise `prompts_per_iteration` before the number of GPUs.",
        "",
        "## What RatioNorm sends",
        "",
        "`standardize` needs each step's mean and spread over the whole batch: a count, a mean, "
        "the root of a sum of squares, and two numbers of which `std_floor` comes, for each of K "
        "trained steps in float64, 40 K bytes a rank and update "
        f"({40 * 9} bytes at K = 9), whatever the model, the batch and the number of samples. "
        "Advantages need the rewards of all ranks, 4 bytes a sample. `closed_form` and `none` "
        "send nothing. A LoRA's gradients, beside it, are "
        f"{4 * MODELS[0].lora / 2**20:.0f} MiB (SD3.5-M) to {4 * MODELS[-1].lora / GIB:.1f} GiB "
        "(Qwen-Image).",
        "",
    ]
    return "\n".join(map(_wrapped, lines))


def _wrapped(line: str) -> str:
    """A paragraph in lines of 100; tables and headings as they are."""
    if line.startswith(("|", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 100, subsequent_indent=indent, break_on_hyphens=False)


def count() -> None:
    """Counts the shipped recipes again, as the dry run does."""
    sys.path.insert(0, str(ROOT))
    from guard_ops.recipes import dry_run, estimate
    from guard_ops.recipes.resolve import resolve

    for recipe in ("sd3_5_medium", "flux1_dev", "wan2_1_t2v_1_3b", "qwen_image"):
        for kind in ("lora", "full"):
            words = ["prompts=x", "guidance_scale=1", f"train={kind}"]
            policy = dry_run._empty(resolve(recipe, words))
            counted = estimate.activations(policy)
            print(
                f"{recipe} {kind}: {counted.flops / 1e12:.2f} TFLOP, "
                f"{counted.peak(checkpointing=True) / GIB:.2f} GiB",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is another")
    parser.add_argument("--count", action="store_true", help="count the table again")
    options = parser.parse_args()
    if options.count:
        count()
        return 0
    if options.check:
        return 0 if PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
