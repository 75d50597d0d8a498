"""An extension that does not fit the torch that runs: found out before it is loaded."""

import json
import shutil
from pathlib import Path

import fresh
import pytest
import torch

import guard_ops
from guard_ops.extension import mismatch

PACKAGE = Path(guard_ops.__file__).parent
SUFFIX = next(iter(PACKAGE.glob("_C.*.so")), Path("_C.so")).name.removeprefix("_C")
PROBE = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import guard_ops, torch
    from guard_ops import backends
    v = torch.randn(4, 6)
    for _ in range(2):
        out = guard_ops.guard_loss(
            v, advantages=torch.ones(4), coeffs=guard_ops.SdeSchedule([1.0, 0.5, 0.0])[0],
            config=guard_ops.GuardConfig(),
            old_model_output=v, noise=torch.randn(4, 6))
print(json.dumps({
    "file": guard_ops.__file__,
    "loaded": "guard_ops._C" in sys.modules,
    "backends": guard_ops.available_backends(),
    "reason": backends.unavailable_backends().get("cpu"),
    "warnings": [str(w.message) for w in caught if "guard_ops" in str(w.message)],
    "loss": out.loss.item(),
}))
"""


@pytest.mark.parametrize(
    "built, running",
    [
        (("2.14.1+cu130", "13.0"), ("2.14.0", "13.0")),  # a patch release
        (("2.14.1", "13.0"), ("2.14.1", "13.2")),  # libcudart.so.13 both
        (("2.13.0+cpu", None), ("2.13.0", "13.0")),  # CPU kernels, whatever CUDA torch has
    ],
)
def test_what_fits(built, running):
    record = dict(zip(("torch", "cuda"), built, strict=True))
    assert mismatch(record, *running) == ""


@pytest.mark.parametrize(
    "built, running, said",
    [
        (
            ("2.13.0+cpu", None),
            ("2.14.1+cu130", "13.0"),
            "built for torch 2.13.0+cpu without CUDA, this is torch 2.14.1+cu130 with CUDA 13.0",
        ),
        (
            ("2.14.1", "13.0"),
            ("2.14.1+cpu", None),
            "built for torch 2.14.1 with CUDA 13.0, this is torch 2.14.1+cpu without CUDA",
        ),
        (
            ("2.10.0", "12.8"),
            ("2.10.0", "13.0"),
            "built for torch 2.10.0 with CUDA 12.8, this is torch 2.10.0 with CUDA 13.0",
        ),
        (("2.1.0", None), ("2.10.0", None), "built for torch 2.1.0 without CUDA, this is"),
    ],
)
def test_what_does_not_fit_is_named_with_both_versions(built, running, said):
    record = dict(zip(("torch", "cuda"), built, strict=True))
    assert said in mismatch(record, *running)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, without its extension."""
    ignored = shutil.ignore_patterns("_C.*.so", "_C.*.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "guard_ops", ignore=ignored)
    return tmp_path / "guard_ops"


def imported(package):
    """What a fresh interpreter sees of that copy."""
    seen = json.loads(fresh.run(PROBE, str(package.parent), folder=package.parent))
    assert Path(seen["file"]).parent == package
    return seen


def test_an_extension_of_another_torch_is_not_loaded_and_one_warning_says_so(copy):
    # This would kill the interpreter or raise if it were loaded: it is no shared object.
    (copy / f"_C{SUFFIX}").write_bytes(b"\x7fELF of another torch")
    (copy / f"_C{SUFFIX}").with_suffix(".json").write_text(
        '{"torch": "2.1.0+cu121", "cuda": "12.1"}'
    )
    seen = imported(copy)
    assert not seen["loaded"]
    assert seen["backends"][-1] == "reference"
    assert "cpu" not in seen["backends"]
    assert seen["loss"] == pytest.approx(-1.0)  # on policy: r_hat is 1 and the advantage 1
    (warning,) = seen["warnings"]
    assert "built for torch 2.1.0+cu121 with CUDA 12.1, this is" in warning
    assert f"torch {torch.__version__}" in warning
    assert "pip install --no-build-isolation --no-deps --force-reinstall" in warning
    assert warning.endswith("path/to/guard-ops-source")  # a wheel of an index would not fit either
    assert seen["reason"].startswith("the compiled kernels were built for torch 2.1.0")


@pytest.mark.skipif("cpu" not in guard_ops.available_backends(), reason="needs the extension")
def test_no_backend_loads_an_extension_of_another_torch_though_it_could(copy):
    """The loader is no judge: this one loads, and its record alone says that it must not be."""
    (source,) = PACKAGE.glob(f"_C{SUFFIX}")
    shutil.copy2(source, copy)
    (copy / source.name).with_suffix(".json").write_text('{"torch": "2.1.0", "cuda": null}')
    seen = imported(copy)
    assert not seen["loaded"]
    assert not {"cuda", "cpu"} & set(seen["backends"])
    assert len(seen["warnings"]) == 1


def test_an_extension_that_does_not_load_is_one_warning_too(copy):
    path = copy / f"_C{SUFFIX}"
    path.write_bytes(b"\x7fELF cut short")
    record = {"torch": torch.__version__, "cuda": None}
    path.with_suffix(".json").write_text(json.dumps(record))
    seen = imported(copy)
    assert "cpu" not in seen["backends"]
    (warning,) = seen["warnings"]
    assert f"built for torch {torch.__version__} without CUDA, do not load under" in warning
    assert str(path) in warning  # the loader's own words


@pytest.mark.skipif("cpu" not in guard_ops.available_backends(), reason="needs the extension")
def test_an_extension_that_fits_is_used_without_a_word(copy):
    (source,) = PACKAGE.glob(f"_C{SUFFIX}")
    shutil.copy2(source, copy)
    record = {"torch": torch.__version__, "cuda": None}
    (copy / source.name).with_suffix(".json").write_text(json.dumps(record))
    seen = imported(copy)
    assert "cpu" in seen["backends"]
    assert seen["warnings"] == []


@pytest.mark.parametrize(
    "record",
    [
        b'{"torch": "2.1',  # cut off
        b"[]",
        b"null",
        b'{"torch": 2.13, "cuda": null}',
        b'{"torch": "2.13.0"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_one_warning_and_no_load(record, copy):
    path = (copy / f"_C{SUFFIX}").with_suffix(".json")
    (copy / f"_C{SUFFIX}").write_bytes(b"\x7fELF of an unknown torch")
    path.write_bytes(record)
    seen = imported(copy)
    assert not seen["loaded"]
    (warning,) = seen["warnings"]
    assert f"what the compiled kernels were built for cannot be read from {path}" in warning


def test_a_checkout_that_hides_an_installed_copy_says_so(copy, tmp_path):
    """``pip install .``, then Python in the checkout: no compiler is missing."""
    installed = tmp_path / "site" / "guard_ops"
    installed.mkdir(parents=True)
    (installed / f"_C{SUFFIX}").touch()
    program = f"import sys; sys.path.insert(0, sys.argv[2]){PROBE}" + (
        "from guard_ops import doctor\n"
        "print(doctor.advice('cpu', backends.unavailable_backends()['cpu']))"
    )
    text = fresh.run(program, str(copy.parent), str(installed.parent), folder=copy.parent)
    seen, advice = text.splitlines()
    reason = f"{copy} has no C++ kernels and hides the installed {installed}, which has some"
    assert json.loads(seen)["reason"] == reason
    assert advice.startswith("start Python in another folder")
