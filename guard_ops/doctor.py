"""``guard-ops doctor``: what this installation can do, checked, and why not more."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, extension
from .backends import asked_for, available_backends, unavailable_backends, why_not
from .selftest import self_test

PATIENCE = 20.0  # seconds that a program has to print its version


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report (``--json``: for programs); return the exit status.

    It is 0 if every available backend is right, and the one that the environment asks for is there.
    """
    parser = argparse.ArgumentParser(prog="guard-ops doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        encoding = sys.stdout.encoding or "utf-8"  # a path may have letters that it lacks
        print(_text(report).encode(encoding, "backslashreplace").decode(encoding))
    works = all(b["self_test"] == "ok" for b in report["backends"] if b["available"])
    return 0 if works and not report["forced_backend_refused"] else 1


def examine() -> dict[str, Any]:
    """Versions, devices, compilers, and per backend: availability, reason, advice, self-test."""
    backends: list[dict[str, Any]] = [
        {"name": name, "available": True, "self_test": self_test(name), **_build(name)}
        for name in available_backends()
    ]
    for name, reason in unavailable_backends().items():
        backends.append(
            {"name": name, "available": False, "reason": reason, "advice": advice(name, reason)}
        )
    asked = asked_for()
    refused = why_not(asked) if asked and asked not in available_backends() else None
    return {
        "guard_ops": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "glibc": platform.libc_ver()[1],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "driver": _driver(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "compilers": {
            name: _version(name)
            for name in (os.environ.get("CXX") or "c++", "nvcc", "cmake", "ninja")
        },
        "compiled_for": _compiled_for(),
        "forced_backend": asked,
        "forced_backend_refused": refused,
        "backends": backends,
    }


def advice(backend: str, reason: str) -> str:
    """What the user can do to get a backend that is not available for that ``reason``."""
    if missing := re.match(r"No module named '(\w+)", reason):
        return f"pip install {missing[1]}"
    if extension.HIDES in reason:
        return "start Python in another folder, or compile here: python scripts/compiling.py"
    if backend == "cpu":
        return f"install a C++20 compiler and build next to this torch: {extension.REBUILD}"
    cuda, gpus = torch.version.cuda, torch.cuda.device_count() + torch.xpu.device_count()
    if not (cuda or torch.version.hip or torch.version.xpu):
        return "this torch has no CUDA: for GPU tensors, install a CUDA build of torch first"
    look = "torch sees no GPU: see `nvidia-smi`, its driver's version, CUDA_VISIBLE_DEVICES"
    if backend == "triton":
        if reason.startswith("torch sees no GPU"):
            return look
        again = "" if reason == "triton is not installed" else " --force-reinstall"
        return f"pip install{again} triton, of the version that this torch names"
    if not cuda:
        return "nothing to do: CUDA kernels are for NVIDIA GPUs, this torch is for others"
    if reason == "no CUDA device":
        return look
    build = f"build the CUDA kernels next to this torch: GUARD_OPS_CUDA={cuda} {extension.REBUILD}"
    return build if gpus else f"{build}; {look}"


def _compiled_for() -> dict[str, Any] | None:
    try:
        return extension.build_record()
    except ValueError:  # damaged: the reason of every backend that would need it says so
        return None


def _build(name: str) -> dict[str, Any]:
    if name == "triton":
        import triton

        return {"build": {"triton": triton.__version__}}
    return {"build": extension.load().build_info()} if name in ("cpu", "cuda") else {}


def _driver() -> dict[str, str | None]:
    """The NVIDIA driver's release and the newest CUDA that it runs, each None if unknown."""
    release = None
    if shutil.which("nvidia-smi"):
        lines = _lines("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        release = lines[0].strip() if lines else None
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        failed = 1
    cuda = None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {"release": release, "cuda": cuda}


def _device(index: int) -> dict[str, Any]:
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:  # the driver counts a device that does not start
        return {"name": f"device {index}", "error": str(error).splitlines()[0]}
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _size(device: dict[str, Any]) -> str:
    return f"{device['architecture']}, {device['memory_gib']} GiB"


def _version(command: str) -> str | None:
    """The line of ``command --version`` that names the version; None if there is no command.

    ``command`` may be several words, such as ``ccache g++``.
    """
    words = command.split() if shutil.which(command) is None else [command]
    if not words or shutil.which(words[0]) is None:
        return None
    lines = [line for line in _lines(*words, "--version") if any(c.isdigit() for c in line)]
    release = [line for line in lines if "release" in line]
    return (release or lines or ["found, and does not say its version"])[0].strip()


def _lines(*command: str) -> list[str]:
    """The lines that a program prints; none if it fails or hangs (nvidia-smi, on a sick driver)."""
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.decode(errors="backslashreplace").splitlines()  # whatever its encoding is


def _text(report: dict[str, Any]) -> str:
    cuda = f"CUDA {report['torch_cuda']}" if report["torch_cuda"] else "no CUDA"
    driver, record = report["driver"], report["compiled_for"]
    lines = [
        f"guard-ops {report['guard_ops']}, Python {report['python']}, {report['platform']}",
        f"torch {report['torch']} ({cuda}), {report['threads']} threads",
        f"driver: {driver['release'] or 'release unknown'}, up to CUDA {driver['cuda']}"
        if driver["cuda"]
        else "driver: no NVIDIA driver found",
        *(f"device: {d['name']}, {d.get('error') or _size(d)}" for d in report["devices"]),
        *([] if report["devices"] else ["devices: CPU only"]),
        *(f"{name}: {version or 'not found'}" for name, version in report["compilers"].items()),
    ]
    if record:
        kernels = f"CPU and CUDA {record['cuda']}" if record["cuda"] else "CPU"
        lines.append(f"compiled kernels: {kernels}, for torch {record['torch']}")
    if report["forced_backend"]:
        lines.append(f"GUARD_OPS_BACKEND: {report['forced_backend']}")
        if report["forced_backend_refused"]:
            lines.append(f"  every op refuses to run: {report['forced_backend_refused']}")
    lines.append("")
    for backend in report["backends"]:
        if not backend["available"]:
            lines += [f"{backend['name']}: not available: {backend['reason']}"]
            lines += [f"  {backend['advice']}"]
            continue
        lines.append(f"{backend['name']}: available, self-test {backend['self_test']}")
        lines += [f"  {key}: {value}" for key, value in backend.get("build", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
