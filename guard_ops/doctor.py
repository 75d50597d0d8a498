"""``guard-ops doctor``: what this installation can do, checked, and why not more."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from . import GuardConfig, SdeSchedule, __version__, guard_loss_and_grad, log_ratio
from .backends import available_backends, select, unavailable_backends, use_backend

ADVICE = {
    "triton": "for a GPU: a torch built for it (it brings Triton); on another platform, "
    "pip install triton",
    "cpu": "install a C++20 compiler and reinstall next to this torch: "
    "pip install --no-build-isolation --force-reinstall --no-deps guard-ops",
}
TOLERANCE = 1e-9  # of float64 results against reference, relative


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report (``--json``: for programs); 0 when every available backend is right."""
    parser = argparse.ArgumentParser(prog="guard-ops doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    report = examine()
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
    else:
        print(_text(report))
    return 0 if all(b["self_test"] == "ok" for b in report["backends"] if b["available"]) else 1


def examine() -> dict[str, Any]:
    """Versions, devices, compilers, and per backend: availability, reason, advice, self-test."""
    backends: list[dict[str, Any]] = [
        {"name": name, "available": True, "self_test": self_test(name), **_build(name)}
        for name in available_backends()
    ]
    for name, reason in unavailable_backends().items():
        backends.append(
            {"name": name, "available": False, "reason": reason, "advice": ADVICE.get(name, "")}
        )
    return {
        "guard_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compilers": {
            name: _version(name) for name in (os.environ.get("CXX", "c++"), "nvcc", "cmake")
        },
        "forced_backend": os.environ.get("GUARD_OPS_BACKEND"),
        "backends": backends,
    }


def self_test(backend: str) -> str:
    """``ok``, or by how much float64 results differ from what they should be.

    ``reference`` is held against torch.distributions, every other backend against ``reference``.
    """
    try:
        with use_backend(backend):
            device = _device()
            ours = [_log_ratio(device)]
            ours += _losses(device) if backend != "reference" else []
        with use_backend("reference"):
            if backend == "reference":
                truth = [_density_ratio()]
            else:
                truth = [_log_ratio(device), *_losses(device)]
    except (RuntimeError, ValueError, OSError) as error:
        return f"failed: {error}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True))
    return "ok" if worst <= TOLERANCE else f"off by {worst:.1e} (relative)"


def _device() -> torch.device:
    """One that the backend in use runs on: the CPU if it does."""
    try:
        select(torch.device("cpu"))
    except ValueError:
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def _case(device: torch.device) -> dict[str, Any]:
    """Three steps of four small latents, in the noise form."""
    generator = torch.Generator().manual_seed(0)

    def latents() -> Tensor:
        values = torch.randn(3, 4, 4, 33, dtype=torch.float64, generator=generator)
        return values.to(device)

    old = latents()
    return {
        "model_output": old + 1e-3 * latents(),
        "old_model_output": old,
        "noise": latents(),
        "coeffs": SdeSchedule([1.0, 0.9, 0.6, 0.2, 0.0], device=device)[:3],
    }


def _log_ratio(device: torch.device) -> Tensor:
    return log_ratio(**_case(device)).log_ratio


def _losses(device: torch.device) -> list[Tensor]:
    """Loss and gradient of both kinds of GRPO-Guard."""
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64, device=device)
    out: list[Any] = []
    for config in (GuardConfig.article(), GuardConfig.paper()):
        out += guard_loss_and_grad(**_case(device), advantages=advantages, config=config)
    return out


def _density_ratio() -> Any:
    """``log r`` as the difference of two log-densities, which float64 can afford."""
    case = _case(torch.device("cpu"))
    x = torch.zeros_like(case["noise"])  # cancels
    a, b, s = (c.reshape(3, 1, 1, 1) for c in case["coeffs"].table[:3])
    old, new = a * x + b * case["old_model_output"], a * x + b * case["model_output"]
    y = old + s * case["noise"]
    difference = Normal(new, s).log_prob(y) - Normal(old, s).log_prob(y)
    return difference.flatten(2).mean(-1)


def _build(name: str) -> dict[str, Any]:
    if name == "triton":
        import triton

        return {"build": {"triton": triton.__version__}}
    if name != "cpu":
        return {}
    from .backends import cpu

    return {"build": cpu.build_info()}


def _version(command: str) -> str | None:
    """The line of ``command --version`` that names one, or None without the command."""
    path = shutil.which(command)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if any(c.isdigit() for c in line)]
    release = [line for line in lines if "release" in line]
    return (release or lines or [""])[0].strip()


def _text(report: dict[str, Any]) -> str:
    cuda = f"CUDA {report['torch_cuda']}" if report["torch_cuda"] else "no CUDA"
    lines = [
        f"guard-ops {report['guard_ops']}, Python {report['python']}, {report['platform']}",
        f"torch {report['torch']} ({cuda}), {report['threads']} threads",
        f"devices: {', '.join(report['devices']) or 'CPU only'}",
    ]
    for name, version in report["compilers"].items():
        lines.append(f"{name}: {version or 'not found'}")
    lines.append("")
    for backend in report["backends"]:
        if not backend["available"]:
            lines += [f"{backend['name']}: not available: {backend['reason']}"]
            lines += [f"  {backend['advice']}"] if backend["advice"] else []
            continue
        lines.append(f"{backend['name']}: available, self-test {backend['self_test']}")
        lines += [f"  {key}: {value}" for key, value in backend.get("build", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
