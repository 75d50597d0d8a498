"""A wheel where it is to run: a clean environment with its torch, and one with another torch.

``make wheel-check``: builds, makes environments and downloads a torch, so minutes and gigabytes.
``GUARD_OPS_OTHER_TORCH``: the other torch, as a requirement (torch==2.14.1) to install, or as the
path of a Python that has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import guard_ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RELEASE = ".".join(torch.__version__.split(".")[:2])
OTHER = os.environ.get("GUARD_OPS_OTHER_TORCH") or "torch==2.14.1"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
TRAIN = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import guard_ops, torch
    v = torch.randn(4, 6, requires_grad=True)
    for _ in range(2):
        guard_ops.guard_loss(
            v, advantages=torch.ones(4), coeffs=guard_ops.SdeSchedule([1.0, 0.5, 0.0])[0],
            config=guard_ops.GuardConfig(),
            old_model_output=v.detach(), noise=torch.randn(4, 6)).loss.backward()
print(json.dumps({
    "file": guard_ops.__file__,
    "warnings": [str(w.message) for w in caught if "guard_ops" in str(w.message)],
    "gradient": bool(v.grad.isfinite().all()) and float(v.grad.abs().max()) > 0,
}))
"""


def run(*command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        env=CLEAN | environment,
        cwd="/",  # not the checkout, whose guard_ops would be imported instead
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this interpreter's torch, with CPU kernels, built as a user builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pip = [sys.executable, "-m", "pip", "wheel", *options, "-w", folder, ROOT]
    run(*pip, GUARD_OPS_CUDA="cpu", PATH=path)
    (built,) = folder.iterdir()
    return built


@pytest.fixture
def environment(tmp_path):
    """``environment(torch, wheel)``: the Python of a new environment with these two."""

    def make(requirement, wheel):
        run(sys.executable, "-m", "venv", tmp_path / "env")
        python = tmp_path / "env" / "bin" / "python"
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        if Path(requirement).is_file():  # the torch of another Python
            here = Path(run(python, "-c", purelib).strip())
            (here / "other.pth").write_text(run(requirement, "-c", purelib))
        else:
            run(python, "-m", "pip", "install", "--quiet", requirement)
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        return python

    return make


def test_its_name_says_what_it_is_for(wheel):
    expected = f"guard_ops-{guard_ops.__version__}+cputorch{RELEASE}-"
    assert wheel.name.startswith(expected)


def test_with_its_torch_it_imports_reports_its_build_and_is_right(wheel, environment):
    python = environment(f"torch=={torch.__version__}", wheel)
    report = json.loads(run(python, "-m", "guard_ops.doctor", "--json"))
    assert report["compiled_for"] == {"torch": torch.__version__, "cuda": None}
    cpu = next(b for b in report["backends"] if b["name"] == "cpu")
    assert cpu["self_test"] == "ok"
    assert cpu["build"]["torch"] == torch.__version__
    assert cpu["build"]["version"] == f"{guard_ops.__version__}+cputorch{RELEASE}"
    seen = json.loads(run(python, "-c", TRAIN))
    assert Path(seen["file"]).is_relative_to(python.parents[1])
    assert seen["warnings"] == []
    assert seen["gradient"]


def test_with_another_torch_it_warns_once_and_trains_without_its_kernels(wheel, environment):
    python = environment(OTHER, wheel)
    other = run(python, "-c", "import torch; print(torch.__version__)").strip()
    assert ".".join(other.split(".")[:2]) != RELEASE, "GUARD_OPS_OTHER_TORCH is the same torch"
    seen = json.loads(run(python, "-c", TRAIN))
    assert Path(seen["file"]).is_relative_to(python.parents[1])
    (warning,) = seen["warnings"]
    assert f"built for torch {torch.__version__}" in warning
    assert f"this is torch {other}" in warning
    assert warning.endswith("--no-cache-dir path/to/guard-ops-source")
    assert seen["gradient"]
    report = json.loads(run(python, "-m", "guard_ops.doctor", "--json"))
    found = {b["name"]: b for b in report["backends"]}
    assert not found["cpu"]["available"]
    assert "were built for torch" in found["cpu"]["reason"]
    assert "pip install --no-build-isolation" in found["cpu"]["advice"]
    assert found["reference"]["self_test"] == "ok"
