"""What ``guard-ops doctor`` finds, says and advises."""

import io
import json
import os
import sys

import fresh
import pytest
import torch
from problems import problem, run

import guard_ops as go
from guard_ops import backends, doctor, extension, selftest


def test_every_available_backend_passes_its_self_test():
    for name in go.available_backends():
        assert doctor.self_test(name) == "ok"


def test_doctor_reports_for_people(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"guard-ops {go.__version__}, Python ")
    assert f"torch {torch.__version__}" in text
    for name in go.available_backends():
        assert f"{name}: available, self-test ok" in text


def test_doctor_reports_for_programs(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["guard_ops"] == go.__version__
    assert report["torch"] == torch.__version__
    found = {b["name"]: b for b in report["backends"]}
    assert set(found) == set(backends.ORDER)
    for name in go.available_backends():
        assert found[name]["available"]
        assert found[name]["self_test"] == "ok"
    if "cpu" in found and found["cpu"]["available"]:
        build = found["cpu"]["build"]
        assert build["cpu_isa"] in build["cpu_isa_built"].split()


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
@pytest.mark.parametrize("error", [1e-6, float("nan")])
def test_doctor_finds_a_backend_that_computes_wrongly(error, monkeypatch, capsys):
    right = backends.cpu.sums
    monkeypatch.setattr(backends.cpu, "sums", lambda t: right(t) * (1 + error))
    assert doctor.self_test("cpu").startswith("off by ")
    assert doctor.main([]) == 1
    assert "cpu: available, self-test off by " in capsys.readouterr().out


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
def test_doctor_finds_a_backend_that_fails(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(backends.cpu, "guard_loss", fail)
    assert doctor.self_test("cpu") == "failed: illegal instruction"
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["backends"][0]["self_test"] == "failed: illegal instruction"


def test_doctor_explains_what_is_missing(monkeypatch, capsys):
    if "cpu" in backends._loaded:
        monkeypatch.delitem(backends._loaded, "cpu")
    monkeypatch.setitem(backends._unavailable, "cpu", "no module named _C")
    assert doctor.main([]) == 0  # a missing backend is not a broken one
    text = capsys.readouterr().out
    assert "cpu: not available: no module named _C" in text
    assert "install a C++20 compiler" in text


def test_doctor_leaves_the_backend_in_use_alone(backend):
    doctor.examine()
    assert backend == backends.select(torch.device("cpu")).NAME
    run(problem("noise"))


def test_it_runs_as_a_module_of_its_own():
    program = """
import runpy, sys, warnings
warnings.simplefilter("error", RuntimeWarning)  # of a module that is there before it is run
sys.argv = ["guard_ops.doctor", "--json"]
try:
    runpy.run_module("guard_ops.doctor", run_name="__main__", alter_sys=True)  # python -m
except SystemExit as stop:
    assert stop.code == 0
"""
    report = json.loads(fresh.run(program))
    assert report["guard_ops"] == go.__version__
    assert set(report["driver"]) == {"release", "cuda"}
    assert set(report["compilers"]) >= {"nvcc", "cmake", "ninja"}


@pytest.mark.parametrize("name", [n for n in go.available_backends() if n != "triton"])
def test_the_self_test_in_single_precision(name, monkeypatch):
    """What a GPU backend is held to, within its tolerance with room to spare."""
    monkeypatch.setattr(selftest, "_where", lambda _: (torch.device("cpu"), torch.float32))
    assert selftest.self_test(name) == "ok"
    monkeypatch.setitem(selftest.TOLERANCE, torch.float32, 1e-6)
    assert selftest.self_test(name) == "ok"
    monkeypatch.setitem(selftest.TOLERANCE, torch.float32, 1e-9)
    assert selftest.self_test(name).startswith("off by ")


NO_KERNELS = "this build of guard-ops has no CUDA kernels"


@pytest.mark.parametrize(
    "backend, reason, cuda, gpus, said",
    [
        ("cpu", extension.NOT_BUILT, None, 0, "--no-build-isolation"),
        ("triton", "torch sees no GPU", None, 0, "this torch has no CUDA"),
        ("triton", "torch sees no GPU", "13.0", 0, "see `nvidia-smi`"),
        ("triton", "triton is not installed", "13.0", 1, "pip install triton, of the version"),
        ("triton", "No module named 'numpy'", "13.0", 1, "pip install numpy"),
        ("triton", "No module named 'numpy'", None, 0, "pip install numpy"),
        ("triton", "libtriton.so: file too short", "13.0", 1, "--force-reinstall triton"),
        ("cuda", NO_KERNELS, None, 0, "this torch has no CUDA"),
        ("cuda", NO_KERNELS, "13.0", 1, "GUARD_OPS_CUDA=13.0 pip install"),
        ("cuda", NO_KERNELS, "13.0", 0, "GUARD_OPS_CUDA=13.0 pip install"),
        ("cuda", "no CUDA device", "13.0", 0, "torch sees no GPU: see `nvidia-smi`"),
    ],
)
def test_advice_is_for_the_reason(backend, reason, cuda, gpus, said, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert said in doctor.advice(backend, reason)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_torch_for_other_gpus_is_not_told_to_get_cuda(backend, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "CUDA build of torch" not in doctor.advice(backend, "triton is not installed")


def test_what_the_kernels_were_compiled_for_is_said(monkeypatch, capsys):
    record = {"torch": "2.14.1", "cuda": "13.0"}
    monkeypatch.setattr(extension, "build_record", lambda: record)
    assert doctor.main([]) == 0
    assert "compiled kernels: CPU and CUDA 13.0, for torch 2.14.1" in capsys.readouterr().out


def test_a_driver_and_its_devices_are_said(monkeypatch, capsys):
    report = doctor.examine()
    report["driver"] = {"release": "580.65", "cuda": "13.0"}
    report["devices"] = [{"name": "H100", "architecture": "sm_90", "memory_gib": 79.1}]
    monkeypatch.setattr(doctor, "examine", lambda: report)
    doctor.main([])
    text = capsys.readouterr().out
    assert "driver: 580.65, up to CUDA 13.0" in text
    assert "device: H100, sm_90, 79.1 GiB" in text


def test_a_program_that_hangs_or_fails_is_not_waited_for(monkeypatch, tmp_path, capsys):
    """A sick driver hangs nvidia-smi; a broken installation exits with an error."""
    for name, body in (("nvidia-smi", "exec sleep 60"), ("nvcc", "exit 3")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    report = doctor.examine()
    assert report["driver"]["release"] is None
    assert report["compilers"]["nvcc"] == "found, and does not say its version"
    assert doctor.main([]) == 0
    assert "nvcc: found, and does not say its version" in capsys.readouterr().out


def test_a_program_may_print_what_is_no_text(monkeypatch, tmp_path, capsys):
    program = tmp_path / "nvcc"
    program.write_bytes(b"#!/bin/sh\nprintf 'release 13.0 \\344\\n'\n")  # latin-1
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.main([]) == 0
    assert r"nvcc: release 13.0 \xe4" in capsys.readouterr().out


def test_letters_that_the_terminal_lacks_are_spelled(monkeypatch):
    report = doctor.examine() | {"platform": "Linux-\u017b"}
    monkeypatch.setattr(doctor, "examine", lambda: report)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert doctor.main([]) == 0
    terminal.flush()
    assert rb"Linux-\u017b" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    "words, found", [("ccache g++", True), ("no-such-cache g++", False), (" ", False)]
)
def test_a_compiler_of_several_words_is_found(words, found, monkeypatch, tmp_path):
    cache = tmp_path / "ccache"
    cache.write_text('#!/bin/sh\necho "$@ 12.2"\n')
    cache.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", words)
    assert doctor.examine()["compilers"][words] == ("g++ --version 12.2" if found else None)


@pytest.mark.parametrize("name", ["tpu", "triton"])
def test_a_backend_that_the_environment_cannot_have_is_said(name, monkeypatch, capsys):
    if name in backends._loaded:
        monkeypatch.delitem(backends._loaded, name)
    monkeypatch.setenv("GUARD_OPS_BACKEND", name)
    assert doctor.main([]) == 1
    assert f"GUARD_OPS_BACKEND: {name}\n  every op refuses to run: " in capsys.readouterr().out
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["forced_backend"] == name
    assert report["forced_backend_refused"] == backends.why_not(name)


def test_a_device_that_does_not_start_is_named_with_its_error(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("CUDA error: an uncorrectable ECC error\nand advice for developers")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    doctor.main([])
    assert "device: device 0, CUDA error: an uncorrectable ECC error\n" in capsys.readouterr().out
