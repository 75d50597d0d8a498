"""docs/life-of-a-call.md: its counts, and that its lists of places are whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

import guard_ops as go
from guard_ops import extension

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import additions  # noqa: E402
import life_of_a_call  # noqa: E402

# Run in a copy that has all four additions: each backend against reference, and reference against
# what the additions are defined to be.
USED = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [".", "tests"]
import torch
if sys.argv[1] == "triton":
    import interpreter
    interpreter.prepare()
if sys.argv[1] == "cuda":
    import emulated
    emulated.prepare()
import guard_ops as go
from problems import problem, relative, run

assert go.available_backends(), go.backends.unavailable_backends()
coeffs = go.SdeSchedule([0.9, 0.6, 0.2], noise_level=0.5, kind="linear_sde")[:]
assert torch.allclose(coeffs.s, 0.5 * torch.tensor([0.9, 0.6]).double() * (-coeffs.dt).sqrt())
given = problem("velocity", steps=2, dtype=torch.float32, latent=(40, 11), kind="linear_sde")
given["weight"] = (torch.rand_like(given["sample"]) < 0.7).float()
robust = go.GuardConfig("robust", clip_low=9.0, clip_high=9.0)
configs = [robust, go.GuardConfig.article(adv_scale=0.5), go.GuardConfig.paper(adv_scale=3.0)]
configs.append(go.GuardConfig("robust", detach_stats=False, clip_low=9.0, clip_high=9.0))
with go.use_backend("reference"):
    expected = [run(given, config) for config in configs]
    out, grad = expected[0]
    u = torch.expm1(out.log_ratio.double())
    std = u.std(1, keepdim=True, correction=0)
    assert torch.allclose(out.excess.double(), (u - u.mean(1, keepdim=True)) / (1 + std), atol=1e-8)
    assert (grad[given["weight"] == 0] == 0).all() and (grad[given["weight"] == 1] != 0).all()
    plain, _ = run({**given, "weight": None}, robust)
    assert not torch.equal(plain.log_ratio, out.log_ratio)
    twice = go.GuardConfig("robust", adv_scale=2.0, clip_low=9.0, clip_high=9.0)
    scaled, scaled_grad = run(given, twice)
    assert relative(scaled_grad, 2 * grad) < 1e-6
with go.use_backend(sys.argv[1]):
    for config, (out, grad) in zip(configs, expected):
        got, got_grad = run(given, config)
        assert relative(got.excess, out.excess) < 1e-4, config
        assert relative(got_grad, grad) < 1e-4, config
        assert relative(got.loss, out.loss) < 1e-4, config
"""


def test_the_page_says_what_is_counted():
    if "cpu" not in go.available_backends():
        pytest.skip("needs the compiled extension")
    page = life_of_a_call.page()
    assert page == life_of_a_call.PAGE.read_text(), "run python scripts/life_of_a_call.py"


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
@pytest.mark.parametrize("device, most", [("CPU", 12), ("CUDA", 14)])
def test_a_call_crosses_few_files(device, most):
    assert len(life_of_a_call.trip(device)) <= most


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tree with every addition, not compiled."""
    root = tmp_path_factory.mktemp("added") / "tree"
    made = (".git", "build", "dist", ".venv", ".*_cache", "__pycache__", "results")
    ignored = shutil.ignore_patterns(*made, "_C.*.so", "_C.*.json")
    shutil.copytree(ROOT, root, symlinks=True, ignore=ignored)
    for edits in additions.ADDITIONS.values():
        for edit in edits:
            edit.apply(root)
    return root


def use(root: Path, backend: str, **environment: str) -> None:
    fresh.run(USED, backend, environment=os.environ | environment, folder=root)


def test_the_lists_of_places_are_whole_in_python(copy):
    use(copy, "reference")


@pytest.mark.skipif("triton" not in go.available_backends(), reason="needs TRITON_INTERPRET=1")
def test_the_lists_of_places_are_whole_in_triton(copy):
    use(copy, "triton", TRITON_INTERPRET="1")


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
def test_an_extension_with_other_lists_is_not_loaded(copy):
    """One that is called by position would read one number as another."""
    compiled = extension.load()
    built = [Path(compiled.__file__), Path(compiled.__file__).with_suffix(".json")]
    found = [shutil.copy2(file, copy / "guard_ops") for file in built if file.is_file()]
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from guard_ops import backends as b; print(b._unavailable)"
    )
    printed = fresh.run(program, folder=copy)
    for file in found:
        Path(file).unlink()
    assert "the compiled kernels are those of another version of guard-ops" in printed


@pytest.mark.slow_suite  # compiles the extension
@pytest.mark.skipif("cpu" not in go.available_backends(), reason="there is no compiler")
def test_the_lists_of_places_are_whole_in_cpp(copy):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for more in ([], ["--emulated"]):
        command = [sys.executable, "scripts/compiling.py", *more]
        subprocess.run(command, cwd=copy, env={**os.environ, "PATH": path}, check=True)
    use(copy, "cpu")
    use(copy, "cuda", GUARD_OPS_EMULATED="1")
