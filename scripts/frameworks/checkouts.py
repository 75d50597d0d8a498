"""The frameworks' checkouts: where they lie, and the modules that have their steps."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .stubs import Stubs, bare_package


@dataclass(frozen=True)
class Checkout:
    """A framework, as ``apply`` names it."""

    framework: str
    folder: str  # in the folder of all checkouts
    package: str
    modules: tuple[str, ...]
    source: str = "."  # what goes on sys.path
    bare: tuple[str, ...] = ()  # packages whose __init__ imports every model there is

    def path(self, root: Path) -> Path:
        """Of its Python files."""
        return root / self.folder / self.source

    def commit(self, root: Path) -> str:
        """The commit that is checked out, and its date."""
        command = ["git", "-C", str(root / self.folder), "log", "-1", "--format=%h of %cs"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


CHECKOUTS = (
    Checkout(
        "flow_grpo",
        "flow_grpo",
        "flow_grpo",
        (
            "flow_grpo.diffusers_patch.sd3_sde_with_logprob",
            "flow_grpo.diffusers_patch.wan_pipeline_with_logprob",
            "flow_grpo.bagel.modeling.bagel.bagel",
        ),
    ),
    Checkout(
        "dance_grpo",
        "DanceGRPO",
        "fastvideo",
        tuple(
            f"fastvideo.train_grpo_{name}"
            for name in (
                "flux",
                "flux_lora",
                "hunyuan",
                "qwenimage",
                "qwenimage_edit",
                "skyreels_i2v",
                "wan_2_1",
            )
        ),
    ),
    Checkout(
        "verl_omni",
        "verl-omni",
        "verl_omni",
        (
            "verl_omni.pipelines.schedulers.flow_match_sde",
            "verl_omni.trainer.diffusion.diffusion_algos",
        ),
        bare=(
            "verl_omni",
            "verl_omni.pipelines",
            "verl_omni.trainer",
            "verl_omni.trainer.diffusion",
            "verl_omni.workers",
        ),
    ),
    Checkout(
        "flow_factory",
        "Flow-Factory",
        "flow_factory",
        ("flow_factory.scheduler",),
        source="src",
    ),
    Checkout(
        "unirl",
        "UniRL",
        "unirl",
        ("unirl.sde.kernels", "unirl.algorithms.flowdppo", "unirl.algorithms.flowgrpo"),
    ),
)


def load(root: Path, checkout: Checkout, stubs: Stubs) -> list[ModuleType]:
    """Import a framework's modules; one that cannot be imported is said and left out."""
    sys.path.insert(0, str(checkout.path(root)))
    for name in checkout.bare:
        bare_package(name, checkout.path(root) / name.replace(".", "/"))
    found = []
    for name in checkout.modules:
        made = len(stubs.made)
        try:
            found.append(importlib.import_module(name))
        except Exception as error:  # whatever a framework's module raises
            print(f"  {name} cannot be imported: {type(error).__name__}: {error}")
        if stubs.made[made:]:
            tops = dict.fromkeys(each.partition(".")[0] for each in stubs.made[made:])
            print(f"  {name}: stood in for {', '.join(tops)}")
    for name in checkout.bare:
        print(f"  {name}: its __init__ was not run")
    return found
