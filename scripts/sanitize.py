"""The CUDA kernels under compute-sanitizer: ``python scripts/sanitize.py``.

Runs memcheck, racecheck, initcheck and synccheck over one small call of every op by every path.
Without a GPU, or without the tool, it says so and exits with 0; a finding exits with 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def calls() -> None:
    """What is run under the tools."""
    import torch

    import guard_ops as go
    from guard_ops import _C

    generator = torch.Generator("cuda").manual_seed(0)
    schedule = go.SdeSchedule([1.0, 0.8, 0.5, 0.2, 0.0], noise_level=0.7).to("cuda")
    article, paper = go.GuardConfig.article(), go.GuardConfig.paper()
    for numel, dtype in ((601, torch.float32), (2048, torch.bfloat16)):

        def latents(numel: int = numel, dtype: torch.dtype = dtype) -> torch.Tensor:
            wide = torch.randn(2, 3, numel, device="cuda", generator=generator)
            return wide.to(dtype)

        coeffs, x, old = schedule[1:3], latents(), latents()
        seeds = go.philox_seed(7, (2, 3), "cuda")
        steps = [go.sde_step(old[k], x[k], schedule[1 + k], seed=seeds[k]) for k in range(2)]
        y = torch.stack([step.prev_sample for step in steps])
        v = (old + 0.1 * latents()).requires_grad_()
        forms = (
            {"sample": x, "prev_sample": y, "old_mean": torch.stack([s.mean for s in steps])},
            {"sample": x, "prev_sample": y, "old_model_output": old},
            {"old_model_output": old, "noise": latents()},
            {"old_model_output": old, "seed": seeds},
        )
        advantages = torch.tensor([1.0, -0.5, 0.2], device="cuda")
        for form in forms:
            t = go.log_ratio(v, coeffs=coeffs, **form)
            t.log_ratio.sum().backward()
            for path in ("two_launches", "cooperative", "cluster"):
                config = paper if path == "cluster" else article
                _C.force_cuda_path(path)
                out = go.guard_loss(v, advantages=advantages, coeffs=coeffs, config=config, **form)
                (3 * out.loss).backward()
            _C.force_cuda_path("automatic")
    torch.cuda.synchronize()


def main() -> int:
    """Exit status."""
    import guard_ops as go

    tool = shutil.which("compute-sanitizer")
    if "cuda" not in go.available_backends():
        print("sanitize: nothing was run, the cuda backend is not available here")
        return 0
    if tool is None:
        print("sanitize: nothing was run, compute-sanitizer is not on PATH")
        return 0
    failed = []
    for name in TOOLS:
        print(f"sanitize: {name}", flush=True)
        options = ["--tool", name, "--error-exitcode", "1", "--kernel-name", "kns=guard_ops"]
        environment = {
            **os.environ,
            "GUARD_OPS_BACKEND": "cuda",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        command = [tool, *options, sys.executable, __file__, "--calls"]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(name)
    print(f"sanitize: {'failed: ' + ', '.join(failed) if failed else 'clean'}")
    return 1 if failed else 0


if __name__ == "__main__":
    if "--calls" in sys.argv:
        calls()
    else:
        sys.exit(main())
