"""What of each framework's training scripts is fused: the table of docs/swap-in.md.

The verdict on a script is read from its text (which step it imports or defines, whether it forms a
ratio); :data:`REASONS` says why one is not covered.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

REASONS = {
    "train_prior_policy.py": "advantage-weighted regression of a prior; no step of an SDE",
    "train_prior_dit.py": "flow matching of a prior; no step of an SDE",
    "train_sd3_dpo.py": "DPO: its loss compares velocities, without a ratio",
    "train_sd3_sft.py": "supervised: its loss is flow matching's, without a ratio",
    "train_grpo_sd.py": "DDIM of Stable Diffusion 1.4, a diffusion and no flow",
    "awm": "its log-prob is a flow-matching loss, and no step's",
    "crd": "its loss is of velocities, without a step of an SDE",
    "dgpo": "its ratio is of flow-matching losses, and no step's",
    "dpo": "its loss compares velocities, without a ratio",
    "nft": "its loss is of velocities, without a ratio",
    "diffusion_nft": "its loss is of velocities, without a ratio",
    "kl": "a distance to a reference, without a ratio",
    "distill_kl": "distillation, without a ratio",
    "distill_fm_mse": "distillation, without a ratio",
    "flow_dppo": "its mask is no clip: its own loss; examples/objectives.py has it on our sums",
    "gspo": "a language model's loss",
}
UNIRL = {
    "FlowGRPO": ("yes", "nothing left", "it computes on the [B, S] log-probs of the step"),
    "FlowDPPO": ("yes", "yes: `_flowdppo_kl_adv_loss`", ""),
    "DRPO": ("no", "no", "a language model's loss, over tokens"),
    "DiffusionNFT": ("no", "no", "its loss is of velocities, without a ratio or an SDE"),
    "GRPO": ("no", "no", "a language model's loss, over tokens"),
}


class Row(NamedTuple):
    """A training script, or what stands for one."""

    framework: str
    script: str
    step: str
    loss: str
    why: str = ""


def rows(root: Path) -> list[Row]:
    """Of every framework."""
    each = (_flow_grpo, _dance_grpo, _verl_omni, _flow_factory, _unirl)
    return [row for of in each for row in of(root)]


def _flow_grpo(root: Path) -> list[Row]:
    found = []
    for path in sorted((root / "flow_grpo" / "scripts").glob("train_*.py")):
        text, name = path.read_text(), path.name
        reason = REASONS.get(name, "")
        if reason:
            samples = "sde_step_with_logprob" in text or "pipeline_with_logprob" in text
            step = "yes, when it samples" if samples else "no"
            found.append(Row("flow_grpo", name, step, "no", reason))
        elif name == "train_bagel.py":
            why = "the loss is in Bagel's own method, of one sample a call"
            found.append(Row("flow_grpo", name, "yes (method)", "by hand", why))
        elif "Guard" in name:
            found.append(Row("flow_grpo", name, "yes", "yes: `flow_grpo` tail, GRPO-Guard"))
        elif re.search(r"ratio = torch\.exp", text):
            wan = "wan_pipeline_with_logprob" in text
            step, tail = ("yes (its own)", "flow_grpo_wan") if wan else ("yes", "flow_grpo")
            found.append(Row("flow_grpo", name, step, f"yes: `{tail}` tail"))
        else:
            found.append(Row("flow_grpo", name, "no", "no", "not known"))
    return found


def _dance_grpo(root: Path) -> list[Row]:
    found = []
    for path in sorted((root / "DanceGRPO" / "fastvideo").glob("train_grpo_*.py")):
        defines = "def flux_step" in path.read_text()
        found.append(
            Row(
                "DanceGRPO",
                path.name,
                "yes" if defines else "no",
                "yes: `dance_grpo` tail" if defines else "no",
                REASONS.get(path.name, ""),
            )
        )
    return found


def _verl_omni(root: Path) -> list[Row]:
    algorithms = root / "verl-omni" / "verl_omni" / "trainer" / "diffusion" / "diffusion_algos.py"
    found = []
    for name in re.findall(r'register_diffusion_loss\("(\w+)"\)', algorithms.read_text()):
        fused = {"flow_grpo": "flow_grpo_fused", "dance_grpo": "flow_grpo_fused"}
        fused["grpo_guard"] = "grpo_guard_fused"
        on_policy = name in fused or name == "flow_dppo"
        loss = f"yes: `{fused[name]}`" if name in fused else "no"
        found.append(
            Row(
                "verl-omni",
                f"loss_mode={name}",
                "yes" if on_policy else "no",
                loss,
                REASONS.get(name, ""),
            )
        )
    return found


def _flow_factory(root: Path) -> list[Row]:
    found = []
    folder = root / "Flow-Factory" / "src" / "flow_factory" / "trainers"
    for path in sorted(folder.glob("*.py")):
        for name in re.findall(r"^class (\w+Trainer)\(", path.read_text(), re.MULTILINE):
            if name == "BaseTrainer":
                continue
            reason = REASONS.get(path.stem, "")
            loss = "no" if reason else "yes: `flow_factory` tail"
            step = "when it samples" if reason else "yes (Euler, UniPC)"
            found.append(Row("Flow-Factory", f"{path.name}: {name}", step, loss, reason))
    return found


def _unirl(root: Path) -> list[Row]:
    found = []
    for path in sorted((root / "UniRL" / "unirl" / "algorithms").glob("*.py")):
        for name in re.findall(r"^class (\w+)\(StageAlgorithm\)", path.read_text(), re.MULTILINE):
            known = UNIRL.get(name, ("no", "no", "not known"))
            found.append(Row("UniRL", f"{path.name}: {name}", *known))
    return found


def table(found: list[Row]) -> str:
    """In Markdown."""
    lines = ["| framework | script | step | loss | why not |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join((r.framework, f'`{r.script}`', *r[2:]))} |" for r in found]
    return "\n".join(lines)
