"""What setup.py asks CMake for, on a simulated machine: a torch, an nvcc and a CMake of paper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def program(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def configured(folder, **environment):
    """The definitions that CMake was given for torch 2.14.1 with CUDA 13.0."""
    torch = folder / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise RuntimeError('a build imports no torch')\n")
    (torch / "version.py").write_text("__version__, cuda = '2.14.1+paper', '13.0'\n")
    program(folder / "cmake", f'printf "%s\\n" "$@" > {folder}/asked; exit 1')
    nvcc = program(folder / "nvcc", "echo release 13.0, V13.0.88")
    kept = {"CMAKE_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH"}
    clean = {name: value for name, value in os.environ.items() if name not in kept}
    build = [sys.executable, str(ROOT / "setup.py"), "build_ext"]
    options = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        [*build, *options],
        cwd=ROOT,
        env=clean
        | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
        | {"GUARD_OPS_CUDA": "13.0", "CMAKE_CUDA_COMPILER": str(nvcc)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "asked").is_file(), done.stderr
    asked = (folder / "asked").read_text().splitlines()
    return dict(word[2:].split("=", 1) for word in asked if word.startswith("-D"))


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"TORCH_CUDA_ARCH_LIST": "7.5 9.0 12.0+PTX"}, "90-real;120"),
        ({"CMAKE_CUDA_ARCHITECTURES": "80", "TORCH_CUDA_ARCH_LIST": "9.0"}, "80"),
        # Said, not left out: the build folder is kept, and CMake would remember the last choice.
        ({}, ""),
    ],
)
def test_architectures_reach_cmake(environment, expected, tmp_path):
    asked = configured(tmp_path, **environment)
    assert asked["CMAKE_CUDA_ARCHITECTURES"] == expected
    assert asked["GUARD_OPS_CUDA"] == "ON"
    assert asked["GUARD_OPS_CUDA_VERSION"] == "13.0"
    assert asked["CMAKE_CUDA_COMPILER"] == str(tmp_path / "nvcc")
    assert asked["GUARD_OPS_VERSION"].endswith("+cu130torch2.14")
    assert asked["GUARD_OPS_TORCH_INCLUDES"].startswith(str(tmp_path / "torch" / "include"))
