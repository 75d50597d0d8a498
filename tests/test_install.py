"""The source distribution, the package without compiled kernels, and installs that are refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import fresh
import pytest
import torch

import guard_ops

ROOT = Path(__file__).parents[1]
PROBE = """
import json, os, sys, warnings
# a development install of the same package must not lend its files, nor a checkout on the path
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path = ["", *(folder for folder in sys.path if folder and folder not in others)]
import guard_ops, guard_ops.benchmarks.command, guard_ops.kernels, torch
v = torch.randn(4, 6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = guard_ops.guard_loss(
            v, advantages=torch.ones(4), coeffs=guard_ops.SdeSchedule([1.0, 0.5, 0.0])[0],
            config=guard_ops.GuardConfig(),
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
PUBLISHED = (
    ".ci", "benchmarks", "cmake", "csrc", "docs", "examples", "guard_ops", "kernels", "scripts",
    "tests",
)  # fmt: skip
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
    """(what pip printed, the folder it installed into): from the sdist, offline, as asked: pure."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v"]
    done = subprocess.run(
        [*pip, "--no-index", "--no-cache-dir", "--target", str(folder), str(sdist)],
        env={**os.environ, "CXX": "no-such-compiler", "GUARD_OPS_PURE": "1", "GUARD_OPS_CUDA": ""},
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
        if path.suffix not in GENERATED and not {"results", "__pycache__"} & set(path.parts)
        if path.is_file()
    }
    roots = {
        ".clang-format", ".pre-commit-config.yaml", "CHANGELOG.md", "CMakeLists.txt",
        "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
        "guard_ops_command.py", "pyproject.toml", "setup.py",
    }  # fmt: skip
    assert (here | roots) - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc")) or "/_C.cpy" in name] == []


def test_a_pure_install_has_no_kernels_and_says_so_once(installed):
    text, folder = installed
    assert text.count("guard-ops: no compiled kernels, as asked (GUARD_OPS_PURE=1)") == 1
    assert [path.name for path in folder.glob("guard_ops/_C*")] == ["_C.pyi"]
    (metadata,) = folder.glob("guard_ops-*.dist-info")
    assert metadata.name == f"guard_ops-{guard_ops.__version__}.dist-info"


def test_the_package_works_on_the_reference_and_says_so_once(installed):
    _, folder = installed
    seen = json.loads(fresh.run(PROBE, folder=folder))  # where `python -c` looks first
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
        env={**os.environ, "GUARD_OPS_PURE": "1", "GUARD_OPS_CUDA": ""},
        cwd=source,
        capture_output=True,
        check=True,
    )
    assert [path.name for path in (source / "guard_ops").glob("_C*")] == ["_C.pyi"]


REFUSED = {
    "another CUDA": (
        {"GUARD_OPS_CUDA": "12.8", "CUDA_HOME": "/nowhere"},
        ["GUARD_OPS_CUDA=12.8: torch, nvcc", "needed: torch built with CUDA 12.8, and nvcc 12.8"],
    ),
    "no compiler": (
        {"GUARD_OPS_CUDA": "", "CXX": "no-such-compiler"},
        ["no C++ compiler found (no-such-compiler). Install one", "GUARD_OPS_PURE=1"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_build_that_lacks_something_fails_and_says_what(case, sdist, tmp_path):
    """An install without kernels looks like any other: nobody reads a warning among pip's lines."""
    environment, said = REFUSED[case]
    if environment["GUARD_OPS_CUDA"] == torch.version.cuda:
        pytest.skip(f"torch is built with CUDA {torch.version.cuda}")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-index", "--target", str(tmp_path), str(sdist)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert f"guard-ops: {said[0]}" in text
    assert said[-1] in text
    assert "cmake" not in text.lower()
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_isolation_hides_torch_from_is_refused_with_the_option(sdist, tmp_path):
    """A backend's hooks, as pip calls them in the environment that it makes for a build."""
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    hide = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; "
    hook = [sys.executable, "-c", f"{hide}print(build_meta.get_requires_for_build_wheel())"]
    environment = {**os.environ, "GUARD_OPS_PURE": "", "GUARD_OPS_CUDA": ""}
    run = functools.partial(
        subprocess.run, cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert run(hook).returncode == 0  # pip asks this before it can have made the environment
    build = f"{hide}build_meta.build_wheel({str(tmp_path)!r})"
    done = run([sys.executable, "-c", build])
    assert done.returncode != 0
    assert "guard-ops: no torch here to build for" in done.stderr
    assert "`pip install --no-build-isolation`" in done.stderr
    assert list(tmp_path.glob("*.whl")) == []


def test_the_benchmarks_are_installed_without_pytests_files(installed):
    _, folder = installed
    files = {path.name for path in (folder / "guard_ops" / "benchmarks").glob("*.py")}
    assert {"command.py", "suite.py", "workloads.py"} <= files
    assert not [name for name in files if name.startswith(("test_", "conftest"))]
    assert not (folder / "benchmarks").exists()  # nothing of that name beside other packages


@pytest.mark.slow_suite  # takes ten seconds, to compute what tests/benchmarks test
def test_the_installed_command_benches(installed, tmp_path):
    """On the reference backend, which is what there is without a compiler."""
    _, folder = installed
    program = PROBE.split("import guard_ops,")[0] + (
        "import guard_ops_command\nsys.exit(guard_ops_command.main())"
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
