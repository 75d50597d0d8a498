"""The source distribution, and the package as a machine without a C++ compiler installs it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

import guard_ops

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


# What a build, its tests and its readers need; what is generated there is not.
PUBLISHED = ("csrc", "docs", "guard_ops", "kernels", "scripts", "tests", "benchmarks")
GENERATED = {".so", ".json", ".pyc"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """(what pip printed, the folder it installed into): from the sdist, offline, no compiler."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v"]
    done = subprocess.run(
        [*pip, "--no-index", "--no-cache-dir", "--target", str(folder), str(sdist)],
        env={**os.environ, "CXX": "no-such-compiler", "GUARD_OPS_CUDA": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr, folder


def test_the_source_distribution_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sdist.name == f"guard_ops-{guard_ops.__version__}.tar.gz"  # fits every torch: no tag
    here = {
        str(path.relative_to(ROOT))
        for folder in PUBLISHED
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in GENERATED and "results" not in path.parts
    }
    roots = {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    assert (here | roots) - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc")) or "/_C.cpy" in name] == []


def test_the_build_says_once_what_is_missing(installed):
    text, folder = installed
    warning = "guard-ops: WARNING: no compiled kernels, no C++ compiler found (no-such-compiler)"
    assert text.count(warning) == 1
    assert [path.name for path in folder.glob("guard_ops/_C*")] == ["_C.pyi"]
    (metadata,) = folder.glob("guard_ops-*.dist-info")
    assert metadata.name == f"guard_ops-{guard_ops.__version__}.dist-info"


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


def test_an_editable_build_without_kernels_leaves_none_of_an_earlier_build(sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    earlier = source / "guard_ops" / f"_C{suffix}"
    earlier.touch()
    earlier.with_suffix(".json").touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        env={**os.environ, "CXX": "no-such-compiler", "GUARD_OPS_CUDA": ""},
        cwd=source,
        capture_output=True,
        check=True,
    )
    assert [path.name for path in (source / "guard_ops").glob("_C*")] == ["_C.pyi"]


@pytest.mark.parametrize("request_", ["12.8", "x"])
def test_a_request_that_does_not_fit_is_refused_before_anything_is_compiled(
    request_, sdist, tmp_path
):
    if request_ == torch.version.cuda:
        pytest.skip(f"torch is built with CUDA {request_}")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-index", "--target", str(tmp_path), str(sdist)],
        env={**os.environ, "GUARD_OPS_CUDA": request_, "CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert f"guard-ops: GUARD_OPS_CUDA={request_}: torch, nvcc" in text or (
        f"guard-ops: GUARD_OPS_CUDA is {request_!r}; it needs a version (13.0) or cpu" in text
    )
    assert "needed: torch built with CUDA 12.8, and nvcc 12.8" in text or request_ == "x"
    assert "cmake" not in text.lower()
    assert list(tmp_path.iterdir()) == []


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
