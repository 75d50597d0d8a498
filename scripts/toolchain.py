"""What a build here would compile with, and whether torch, nvcc and ``GUARD_OPS_CUDA`` agree.

Nothing is imported from torch: its version, its CUDA and its folders are read from its files, so a
build needs neither the libraries that torch loads nor a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


class ToolchainError(RuntimeError):
    """The build that was asked for cannot be had here; says what was found, and what to do."""


@dataclass(frozen=True)
class Torch:
    version: str  # 2.14.1+cu130
    cuda: str | None  # 13.0
    folder: Path

    @property
    def release(self) -> str:
        """The minor release, such as ``2.14``, within which the C++ interface is the same."""
        return ".".join(self.version.split("+")[0].split(".")[:2])

    def __str__(self) -> str:
        return f"torch {self.version} ({f'CUDA {self.cuda}' if self.cuda else 'no CUDA'})"


@dataclass(frozen=True)
class Nvcc:
    version: str  # 13.0
    path: Path

    def __str__(self) -> str:
        return f"nvcc {self.version} ({self.path})"


@dataclass(frozen=True)
class Toolchain:
    """What will be compiled: CPU kernels if there is ``torch``, and CUDA's if also ``nvcc``."""

    torch: Torch | None
    nvcc: Nvcc | None
    line: str  # the one line that a build prints about it
    architectures: str = ""  # CMake's list for nvcc; empty is the default of cmake/cuda.cmake

    @property
    def local_version(self) -> str:
        """``+cu130torch2.14`` or ``+cputorch2.13``; empty without kernels."""
        if self.torch is None:
            return ""
        device = f"cu{self.nvcc.version.replace('.', '')}" if self.nvcc else "cpu"
        return f"+{device}torch{self.torch.release}"


def choose(environ: Mapping[str, str]) -> Toolchain:
    """The toolchain for ``GUARD_OPS_CUDA``: a CUDA version, ``cpu``, or unset for what fits.

    Unset takes CUDA kernels if torch has CUDA and an nvcc of the same version is here, else CPU
    kernels. A version or ``cpu`` is built exactly or not at all. Only ``GUARD_OPS_PURE=1`` goes
    without kernels: a build that went without them unasked would look like a success.

    Raises:
        ToolchainError: torch, nvcc and the request do not agree, or torch, a compiler or what pip
            can install is missing.
    """
    request = environ.get("GUARD_OPS_CUDA", "").strip()
    if request and request != "cpu" and not re.fullmatch(r"\d+\.\d+", request):
        raise ToolchainError(f"GUARD_OPS_CUDA is {request!r}; it needs a version (13.0) or cpu")
    pure = environ.get("GUARD_OPS_PURE", "").strip()
    if pure not in ("", "0", "1"):
        raise ToolchainError(f"GUARD_OPS_PURE is {pure!r}; it needs 1, or to be unset")
    if pure == "1" and request:
        raise ToolchainError(
            f"GUARD_OPS_PURE=1 asks for no kernels and GUARD_OPS_CUDA={request} for some; unset one"
        )
    if pure == "1":
        return Toolchain(None, None, "no compiled kernels, as asked (GUARD_OPS_PURE=1)")
    torch = find_torch()
    if torch is None:
        raise _incomplete(
            "no torch here to build for. Install torch first, then build next to it with "
            "`pip install --no-build-isolation`, because build isolation hides the torch you have"
        )
    if absent := no_compiler(environ):
        raise _incomplete(
            f"no C++ compiler found ({absent}). Install one for C++20 (`apt-get install g++`), "
            "or name yours in CXX"
        )
    if packages := lacking(environ):
        raise _incomplete(
            f"the build needs {', '.join(packages)} in this environment, next to torch: "
            'pip install "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"'
        )
    found = list(find_nvcc(environ))
    wanted = request or torch.cuda
    nvcc = next((n for n in found if n.version == wanted), None)
    if request == "cpu":
        return Toolchain(torch, None, f"building the CPU kernels for {torch}, as asked")
    if request and (nvcc is None or torch.cuda != request):
        raise ToolchainError(_disagreement(request, torch, found))
    if nvcc:
        listed, left_out = architectures(environ)
        line = f"building the CPU and CUDA kernels for {torch} with {nvcc}"
        if left_out:
            line += f"; TORCH_CUDA_ARCH_LIST without {' '.join(left_out)}: they need 8.0 or newer"
        return Toolchain(torch, nvcc, line, listed)
    why = "this torch has no CUDA"
    if torch.cuda:
        why = f"no nvcc {torch.cuda} here (found: {_listed(found)}); GUARD_OPS_CUDA={torch.cuda} "
        why += "says how to get it"
    return Toolchain(torch, None, f"building the CPU kernels for {torch}: {why}")


def find_program(name: str, environ: Mapping[str, str]) -> str | None:
    """A program on the path, or one that pip has put beside this interpreter."""
    folders = (environ.get("PATH", ""), sysconfig.get_path("scripts"))
    return shutil.which(name, path=os.pathsep.join(folders))


def find_torch() -> Torch | None:
    """The torch of this interpreter, from its ``version.py``."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = runpy.run_path(str(folder / "version.py"))
    return Torch(str(version["__version__"]), version.get("cuda"), folder)


def find_nvcc(environ: Mapping[str, str]) -> Iterator[Nvcc]:
    """Every nvcc here, the preferred one first; only the named one if the environment names one."""
    named = [environ[name] for name in ("CMAKE_CUDA_COMPILER", "CUDACXX") if environ.get(name)]
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    named += [str(Path(home, "bin", "nvcc")) for home in homes]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    candidates = named[:1] or [
        *([on_path] if on_path else []),
        *sorted(map(str, Path("/usr/local").glob("cuda-*/bin/nvcc"))),
        *map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc")),
    ]
    seen = set()
    for candidate in candidates:
        version = _nvcc_version(candidate)
        if version and version not in seen:
            seen.add(version)
            yield Nvcc(version, Path(candidate))


# torch's names for generations, as torch.utils.cpp_extension has them.
GENERATIONS = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0 5.2+PTX",
    "Pascal": "6.0 6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}
EVERY = ("All", "Common")  # torch's CMake files know these; here both are the default


def architectures(environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """CMake's list, which may be empty, and the entries of ``TORCH_CUDA_ARCH_LIST`` left out.

    ``CMAKE_CUDA_ARCHITECTURES`` comes first. Containers set ``TORCH_CUDA_ARCH_LIST`` for every
    package, so its entries that are older than these kernels need are left out, not refused.

    Raises:
        ToolchainError: an entry of ``TORCH_CUDA_ARCH_LIST`` is neither a compute capability nor a
            name, or all of them are too old.
    """
    if explicit := environ.get("CMAKE_CUDA_ARCHITECTURES", "").strip():
        return explicit, []
    given = re.split(r"[\s;]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" \t\n;"))
    entries = [e for name in given if name for e in GENERATIONS.get(name, name).split()]
    with_ptx: dict[str, bool] = {}
    left_out = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match and int(match[1]) < 8:
            left_out.append(entry)
        elif match:
            number = "".join(match.group(1, 2, 3))
            with_ptx[number] = with_ptx.get(number, False) or match[4] is not None
        elif entry not in EVERY:
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; it needs entries such as 9.0, 9.0a, 12.0+PTX"
                f" or torch's names: {', '.join(GENERATIONS)}, {', '.join(EVERY)}"
            )
    if set(entries) & set(EVERY):
        return "", left_out
    if left_out and not with_ptx:
        raise ToolchainError(
            f"TORCH_CUDA_ARCH_LIST has only {' '.join(left_out)}; the CUDA kernels need 8.0 or "
            "newer (GUARD_OPS_CUDA=cpu builds the CPU kernels alone)"
        )
    listed = [number if ptx else f"{number}-real" for number, ptx in with_ptx.items()]
    return ";".join(listed), left_out


def _incomplete(what: str) -> ToolchainError:
    return ToolchainError(
        f"{what}. To install without compiled kernels (GPU tensors run on Triton, CPU tensors on "
        "plain PyTorch, which is many times slower): GUARD_OPS_PURE=1"
    )


def no_compiler(environ: Mapping[str, str]) -> str:
    """The programs of which a build needs one, or all of CXX, where they are not here."""
    path = environ.get("PATH")
    named = environ.get("CXX", "")
    if shutil.which(named, path=path):
        return ""
    # ccache g++ -m64: the options come last
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), named.split()))
    if words:
        return ", ".join(word for word in words if not shutil.which(word, path=path))
    usual = ("c++", "g++", "clang++")
    return "" if any(shutil.which(name, path=path) for name in usual) else ", ".join(usual)


def lacking(environ: Mapping[str, str]) -> list[str]:
    """The packages that a build needs, that pip can install, and that are not here."""
    modules = [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return modules + [name for name in ("cmake", "ninja") if not find_program(name, environ)]


def _nvcc_version(path: str) -> str | None:
    """The version of the nvcc at ``path``, such as ``13.0``; None if there is no such program."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, check=False)
    except OSError:
        return None
    match = re.search(rb"release (\d+\.\d+)", done.stdout)  # bytes: whatever else it prints
    return match[1].decode() if match else None


def _listed(found: list[Nvcc]) -> str:
    return ", ".join(map(str, found)) or "none"


def _disagreement(request: str, torch: Torch, found: list[Nvcc]) -> str:
    """The message on a request for CUDA kernels: what it found, what it needs, how to get that."""
    tag, major = f"cu{request.replace('.', '')}", int(request.split(".")[0])
    how = []
    if torch.cuda != request:
        how.append(
            f"torch: the build called {tag} (pytorch.org/get-started gives the command), or ask "
            + (f"for GUARD_OPS_CUDA={torch.cuda}" if torch.cuda else "for GUARD_OPS_CUDA=cpu")
        )
    if not any(n.version == request for n in found):
        packages = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")
        # For CUDA 12 the index has ptxas and libnvvm, but neither nvcc nor its front end.
        quoted = " ".join(f'"{package}=={request}.*"' for package in packages)
        from_index = f"pip install {quoted}, or "
        how.append(
            f"nvcc: {from_index if major >= 13 else ''}CUDA toolkit {request} from "
            "https://developer.nvidia.com/cuda-toolkit-archive and CUDA_HOME set to its folder"
        )
    return "\n".join(
        [
            f"GUARD_OPS_CUDA={request}: torch, nvcc and the request must be of one CUDA version",
            f"  found:  {torch} in {torch.folder}; nvcc: {_listed(found)}",
            f"  needed: torch built with CUDA {request}, and nvcc {request}",
            *(f"  get it: {line}" for line in how),
        ]
    )


if __name__ == "__main__":
    try:
        print(choose(os.environ).line)
    except ToolchainError as refusal:
        sys.exit(str(refusal))
