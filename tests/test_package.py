"""The package as it is imported: its names, its backends, its neighbours."""

import inspect
import os
from pathlib import Path

import fresh
import pytest
import torch

import guard_ops as go
from guard_ops import backends

ROOT = Path(go.__file__).resolve().parents[1]


def python(program, **environment):
    """Run ``program`` in a fresh interpreter; its standard output."""
    return fresh.run(program, environment=os.environ | environment)


PUBLIC = {
    "GuardConfig",
    "GuardLossOutput",
    "LogRatio",
    "LossAndGrad",
    "Metrics",
    "RatioStatistics",
    "SdeSchedule",
    "SdeStep",
    "StepCoefficients",
    "available_backends",
    "balance_weights",
    "clipped_surrogate",
    "group_advantages",
    "guard_loss",
    "guard_loss_and_grad",
    "log_prob",
    "log_ratio",
    "philox_seed",
    "rank_weight",
    "ratio_norm",
    "sde_step",
    "use_backend",
}
FORM = ["sample", "prev_sample", "old_mean", "old_model_output", "noise", "seed", "old_log_prob"]
GUIDANCE = ["model_output_uncond", "guidance_scale"]
SHARD = ["latent_group", "latent_offset"]
LOSS = [
    "model_output",
    "advantages",
    "coeffs",
    "config",
    *FORM,
    "ref_model_output",
    *GUIDANCE,
    "mask",
    *SHARD,
    "step_weights",
    "statistics",
    "process_group",
]
SIGNATURES = {
    "SdeSchedule": ["sigmas", "noise_level", "kind", "device"],
    "SdeSchedule.from_scheduler": ["scheduler", "noise_level", "kind", "device"],
    "sde_step": [
        "model_output",
        "sample",
        "coeffs",
        "generator",
        "noise",
        "seed",
        *GUIDANCE,
        "mask",
        *SHARD,
        "reduction",
    ],
    "guard_loss": LOSS,
    "guard_loss_and_grad": LOSS,
    "log_ratio": ["model_output", "coeffs", *FORM, *GUIDANCE, "mask", *SHARD, "reduction"],
    "log_prob": [
        "model_output",
        "sample",
        "prev_sample",
        "coeffs",
        "mask",
        "latent_group",
        "reduction",
    ],
    "ratio_norm": ["log_ratio", "config", "coeffs", "kl_old", "statistics"],
    "balance_weights": ["excess", "config", "coeffs"],
    "clipped_surrogate": ["excess", "advantages", "config"],
    "group_advantages": ["rewards", "groups", "scale", "eps", "without_spread", "process_group"],
    "rank_weight": ["samples", "process_group", "device"],
    "philox_seed": ["seed", "shape", "device"],
    "use_backend": ["name"],
}
RESULTS = {
    "SdeStep": ["prev_sample", "mean", "log_prob", "noise"],
    "LogRatio": ["log_ratio", "kl_old"],
    "GuardLossOutput": ["loss", "log_ratio", "excess", "weights", "kl", "metrics"],
    "LossAndGrad": ["loss", "grad", "log_ratio", "excess", "weights", "kl", "metrics"],
    "Metrics": [
        "ratio_bias",
        "ratio_std",
        "ratio_hat_bias",
        "ratio_hat_std",
        "clip_fraction",
        "clip_fraction_high",
        "clip_fraction_low",
        "kl_old",
        "grad_weight",
        "nonfinite",
        "degenerate",
    ],
}


def test_the_public_surface_is_fixed():
    assert sorted(go.__all__) == go.__all__
    assert set(go.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(go, name).__doc__, name


@pytest.mark.parametrize("name", SIGNATURES)
def test_argument_names_are_fixed(name):
    target = go
    for part in name.split("."):
        target = getattr(target, part)
    assert list(inspect.signature(target).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", RESULTS)
def test_result_names_are_fixed(name):
    assert list(getattr(go, name)._fields) == RESULTS[name]


def test_star_import_and_version():
    program = "from guard_ops import *; import guard_ops; print(guard_ops.__version__, guard_loss)"
    assert python(program).startswith(go.__version__)


# ---- kernels/ -----------------------------------------------------------------------------------


def test_guard_ops_kernels_is_the_repositorys_folder():
    import guard_ops.kernels

    (path,) = {Path(p).resolve() for p in guard_ops.kernels.__path__}
    assert (path / "README.md").is_file()
    if (ROOT / "guard_ops" / "kernels").is_symlink():  # an sdist has a copy
        assert path == ROOT / "kernels"


def test_the_repository_root_on_the_path_hides_no_other_kernels_package():
    """diffusers and transformers import Hugging Face's ``kernels``."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels, guard_ops.kernels
print(kernels.__file__)
print(kernels.get_kernel)
"""
    path = Path(python(program).splitlines()[0])
    assert path.parent.parent.name == "site-packages"


# ---- backends -----------------------------------------------------------------------------------


def in_use():
    return backends.select(torch.device("cpu")).NAME


def test_reference_is_always_there_and_comes_last():
    assert go.available_backends()[-1] == "reference"
    assert set(go.available_backends()) | set(backends.unavailable_backends()) == set(
        backends.ORDER
    )


def test_use_backend_for_a_block_and_for_good():
    try:
        go.use_backend("reference")
        assert in_use() == "reference"
        for name in go.available_backends():
            with go.use_backend(name):
                assert in_use() == name
            assert in_use() == "reference"
        with pytest.raises(KeyError), go.use_backend(go.available_backends()[0]):
            raise KeyError
        assert in_use() == "reference"
    finally:
        go.use_backend(None)
    assert in_use() == go.available_backends()[0]


def test_an_unknown_backend_is_named_with_what_there_is():
    with pytest.raises(ValueError, match="`name` is 'cuba': there is no such backend; available: "):
        go.use_backend("cuba")
    assert in_use() == go.available_backends()[0]


def test_a_backend_is_not_used_for_a_device_it_does_not_run_on():
    for name in go.available_backends():
        if name == "reference":
            continue
        with (
            go.use_backend(name),
            pytest.raises(ValueError, match=f"'{name}' does not run on meta"),
        ):
            backends.select(torch.device("meta"))


def test_the_environment_variable_chooses_at_import():
    program = """
import torch
from guard_ops import backends
print(backends.select(torch.device("cpu")).NAME)
"""
    for name in ("reference", "REFERENCE", " reference "):
        assert python(program, GUARD_OPS_BACKEND=name).strip() == "reference"
    assert python(program, GUARD_OPS_BACKEND="").strip() == go.available_backends()[0]


def test_an_unknown_name_in_the_environment_is_refused_by_the_first_op():
    """Not at import: ``guard-ops doctor`` has to start, to say what is wrong."""
    program = """
import torch
import guard_ops as go
from guard_ops import doctor
x = torch.zeros(1, 2)
try:
    go.sde_step(x, x, go.SdeSchedule([1.0, 0.5, 0.0])[0], noise=x)
except ValueError as error:
    print(error)
with go.use_backend("reference"):
    go.sde_step(x, x, go.SdeSchedule([1.0, 0.5, 0.0])[0], noise=x)
"""
    message = "GUARD_OPS_BACKEND is 'fast': there is no such backend; available: "
    assert python(program, GUARD_OPS_BACKEND="fast").startswith(message)


def test_a_package_that_breaks_as_it_is_imported_is_a_reason():
    program = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "guard_ops.kernels.launch":
            raise AttributeError("module 'triton' has no attribute 'jit'")
sys.meta_path.insert(0, Broken())
from guard_ops import backends
print(backends.unavailable_backends()["triton"])
"""
    assert python(program) == "AttributeError: module 'triton' has no attribute 'jit'\n"


def test_more_memory_than_there_is_may_be_kept():
    program = "from guard_ops import backends; print(backends.unavailable_backends().get('cpu'))"
    reason = None if "cpu" in go.available_backends() else backends._unavailable["cpu"]
    assert python(program, GUARD_OPS_CPU_CACHE_MB="9" * 30) == f"{reason}\n"


NEEDED = """
import sys
optional = {"numpy", "rich", "safetensors", "tensorboard", "matplotlib", "sklearn", "diffusers"}
for name in [*optional, *(n for n in sys.modules if n.partition(".")[0] in optional)]:
    sys.modules[name] = None
import torch
torch.cuda.device_count = lambda: 1
from guard_ops import backends, doctor, selftest
import guard_ops.benchmarks.command, guard_ops.integrations, guard_ops.trainer
print(*backends.available_backends())
torch.cuda.device_count = lambda: 0
print(*(selftest.self_test(name) for name in ("cpu", "reference") if name in backends._loaded))
"""


def test_nothing_optional_is_imported_on_the_way_to_a_kernel():
    """torch brings Triton and no numpy; a GPU user without it would run on ``reference``."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    available, tested = fresh.run(NEEDED, environment=environment, imported="torch").splitlines()
    assert "triton" in available.split()
    assert set(tested.split()) == {"ok"}


def test_without_the_extension_the_reference_runs_and_one_warning_says_so():
    program = """
import sys, warnings
sys.modules["guard_ops._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import guard_ops as go
    assert go.available_backends() == ("reference",), go.available_backends()
    v = torch.randn(2, 4, 6)
    given = {"coeffs": go.SdeSchedule([1.0, 0.5, 0.2])[:], "noise": torch.randn(2, 4, 6)}
    for _ in range(3):
        t = go.log_ratio(v, old_model_output=v, **given)
        go.guard_loss(v, old_model_output=v, advantages=torch.randn(4), **given)
    assert torch.equal(t.log_ratio, torch.zeros(2, 4))
ours = [w for w in caught if "guard_ops" in str(w.message)]
print(len(ours), ours[0].category.__name__)
print(ours[0].message)
try:
    go.use_backend("cpu")
except ValueError as error:
    print(error)
"""
    count, warning, refusal = python(program, GUARD_OPS_BACKEND="").splitlines()
    assert count == "1 RuntimeWarning"
    assert warning.startswith(
        "guard_ops: no fused backend for cpu tensors, using the plain PyTorch"
    )
    assert "cpu: the C++ kernels were not built" in warning
    assert refusal.startswith("`name` is 'cpu': the C++ kernels were not built")
