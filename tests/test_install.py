"""The package as a machine without a C++ compiler installs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import json, sys, warnings
# a development install of the same package must not lend its files
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import guard_ops, guard_ops.benchmarks.command, guard_ops.kernels, torch
v = torch.randn(4, 6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = guard_ops.guard_loss(
            v, advantages=torch.ones(4), coeffs=guard_ops.SdeSchedule([1.0, 0.5, 0.0])[0],
            old_model_output=v, noise=torch.randn(4, 6))
print(json.dumps({
    "file": guard_ops.__file__,
    "kernels": list(guard_ops.kernels.__path__),
    "benchmarks": guard_ops.benchmarks.command.__file__,
    "backends": guard_ops.available_backends(),
    "warnings": [str(w.message) for w in caught],
    "loss": out.loss.item(),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(what pip printed, the folder it installed into) of an install without a compiler."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v"]
    done = subprocess.run(
        [*pip, "--target", str(folder), str(ROOT)],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr, folder


def test_the_build_says_once_what_is_missing(installed):
    text, folder = installed
    warning = "guard-ops: WARNING: no compiled kernels, no C++ compiler found (no-such-compiler)"
    assert text.count(warning) == 1
    assert not list(folder.glob("guard_ops/_C*.so"))


def test_the_package_works_on_the_reference_and_says_so_once(installed):
    _, folder = installed
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert Path(seen["file"]).parent == folder / "guard_ops"
    assert seen["kernels"] == [str(folder / "guard_ops" / "kernels")]
    assert Path(seen["benchmarks"]).parent == folder / "guard_ops" / "benchmarks"
    assert seen["backends"] == ["reference"]
    assert seen["loss"] == pytest.approx(-1.0)  # on policy: r_hat is 1 and the advantage 1
    (warning,) = seen["warnings"]
    assert "no fused backend for cpu tensors" in warning
    assert "not built" in warning


def test_the_benchmarks_are_installed_without_pytests_files(installed):
    _, folder = installed
    files = {path.name for path in (folder / "guard_ops" / "benchmarks").glob("*.py")}
    assert {"command.py", "suite.py", "workloads.py"} <= files
    assert not [name for name in files if name.startswith(("test_", "conftest"))]
    assert not (folder / "benchmarks").exists()  # nothing of that name beside other packages


def test_the_installed_command_benches(installed, tmp_path):
    """On the reference backend, which is what there is without a compiler."""
    _, folder = installed
    program = PROBE.split("import guard_ops,")[0] + (
        "from guard_ops import benchmarks, cli\nsys.exit(cli.main(sys.argv[1:]))"
    )
    numbers = tmp_path / "numbers.json"
    options = ["--workload", "flux_512", "--elements", "1", "--suite", "accuracy"]
    subprocess.run(
        [sys.executable, "-c", program, "bench", *options, "--json", str(numbers)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        check=True,
        capture_output=True,
    )
    saved = json.loads(numbers.read_text())["accuracy"]
    assert saved["environment"]["commit"] == "unknown"  # not a checkout, whatever is around it
    assert len(saved["rows"]) == 2 * 5 * 4
