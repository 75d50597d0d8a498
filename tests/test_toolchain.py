"""What a build decides before it compiles: torch, nvcc and the request against each other."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toolchain(monkeypatch):
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "scripts" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toolchain", module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(toolchain, tmp_path, monkeypatch):
    """``machine(torch, cuda, nvcc...)``: the environment of a machine that has just these."""

    def make(torch="2.14.1", cuda="13.0", nvccs=()):
        folder = tmp_path / "torch"
        folder.mkdir()
        (folder / "version.py").write_text(
            f"__version__ = {torch!r}\ncuda = {cuda!r}\nhip = None\n"
        )
        spec = importlib.util.spec_from_loader("torch", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *_: spec if name == "torch" else find(name)
        )
        monkeypatch.setattr(toolchain.Path, "glob", lambda *_: iter(()))  # no /usr/local/cuda-*
        for version in nvccs:
            nvcc = tmp_path / f"cuda-{version}" / "bin" / "nvcc"
            nvcc.parent.mkdir(parents=True)
            nvcc.write_text(
                f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n"
            )
            nvcc.chmod(0o755)
        path = [str(tmp_path / f"cuda-{version}" / "bin") for version in nvccs]
        return {"PATH": ":".join([*path, "/usr/bin", "/bin"]), "CXX": sys.executable}

    return make


def test_unset_takes_cuda_where_torch_and_nvcc_agree(toolchain, machine):
    chosen = toolchain.choose(machine(nvccs=["13.0"]))
    assert chosen.nvcc.version == "13.0"
    assert chosen.local_version == "+cu130torch2.14"
    assert chosen.line.startswith("building the CPU and CUDA kernels for torch 2.14.1 (CUDA 13.0)")


@pytest.mark.parametrize(
    "cuda, nvccs, said",
    [
        (None, ["13.0"], "this torch has no CUDA"),
        ("13.0", [], "no nvcc 13.0 here (found: none)"),
        ("13.0", ["12.8"], "no nvcc 13.0 here (found: nvcc 12.8 ("),
    ],
)
def test_unset_builds_cpu_kernels_otherwise_and_says_why(cuda, nvccs, said, toolchain, machine):
    chosen = toolchain.choose(machine(cuda=cuda, nvccs=nvccs))
    assert chosen.nvcc is None
    assert chosen.local_version == "+cputorch2.14"
    assert said in chosen.line
    assert "\n" not in chosen.line


def test_what_pip_can_install_is_asked_for(toolchain, machine, tmp_path, monkeypatch):
    environ = {**machine(cuda=None), "PATH": str(tmp_path)}
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(toolchain.ToolchainError, match=r"needs cmake, ninja in this environment"):
        toolchain.choose(environ)
    for name in ("cmake", "ninja"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)  # beside the interpreter, whatever the path
    assert toolchain.choose({**environ, "PATH": "/nowhere"}).local_version == "+cputorch2.14"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "pybind11" else find(name)
    )
    with pytest.raises(toolchain.ToolchainError, match=r"needs pybind11 .*pip install"):
        toolchain.choose(environ)


def test_cpu_is_cpu_whatever_is_there(toolchain, machine):
    chosen = toolchain.choose({**machine(nvccs=["13.0"]), "GUARD_OPS_CUDA": "cpu"})
    assert chosen.nvcc is None
    assert chosen.local_version == "+cputorch2.14"


def test_a_version_is_built_where_all_three_agree(toolchain, machine):
    environ = {**machine("2.10.0+cu128", "12.8", ["12.8"]), "GUARD_OPS_CUDA": "12.8"}
    assert toolchain.choose(environ).local_version == "+cu128torch2.10"


@pytest.mark.parametrize(
    "cuda, nvccs, said",
    [
        (
            "13.0",
            ["13.0"],
            [
                "torch 2.14.1 (CUDA 13.0)",
                "nvcc: nvcc 13.0",
                "torch: the build called cu128",
                "nvcc: CUDA",
            ],
        ),
        ("12.8", [], ["nvcc: none", "cuda-toolkit-archive"]),
        (
            None,
            ["12.8"],
            ["torch 2.14.1 (no CUDA)", "torch: the build called cu128", "GUARD_OPS_CUDA=cpu"],
        ),
    ],
)
def test_a_version_that_does_not_fit_is_refused_with_what_is_there_and_how(
    cuda, nvccs, said, toolchain, machine
):
    environ = {**machine(cuda=cuda, nvccs=nvccs), "GUARD_OPS_CUDA": "12.8"}
    with pytest.raises(toolchain.ToolchainError) as refusal:
        toolchain.choose(environ)
    text = str(refusal.value)
    assert text.startswith("GUARD_OPS_CUDA=12.8: torch, nvcc and the request must be of one CUDA")
    assert "needed: torch built with CUDA 12.8, and nvcc 12.8" in text
    for words in said:
        assert words in text


def test_an_nvcc_that_the_index_has_is_named(toolchain, machine):
    environ = {**machine(), "GUARD_OPS_CUDA": "13.0"}
    with pytest.raises(toolchain.ToolchainError, match=r"pip install nvidia-cuda-nvcc==13\.0\.\* "):
        toolchain.choose(environ)


def test_an_explicit_request_never_becomes_less(toolchain, machine):
    environ = {**machine(), "CXX": "no-such-compiler"}
    assert toolchain.choose(environ).torch is None
    with pytest.raises(
        toolchain.ToolchainError, match=r"no C\+\+ compiler found \(no-such-compiler"
    ):
        toolchain.choose({**environ, "GUARD_OPS_CUDA": "cpu"})


def test_a_word_that_is_no_version_is_refused(toolchain, machine):
    with pytest.raises(toolchain.ToolchainError, match="GUARD_OPS_CUDA is 'cu130'; it needs"):
        toolchain.choose({**machine(), "GUARD_OPS_CUDA": "cu130"})


def test_the_nvcc_that_the_environment_names_is_the_only_one(toolchain, machine, tmp_path):
    environ = machine(nvccs=["13.0", "12.8"])
    assert [n.version for n in toolchain.find_nvcc(environ)] == ["13.0"]  # the first on the path
    environ["CUDA_HOME"] = str(tmp_path / "cuda-12.8")
    assert [n.version for n in toolchain.find_nvcc(environ)] == ["12.8"]
    environ["CUDACXX"] = str(tmp_path / "nowhere" / "nvcc")
    assert list(toolchain.find_nvcc(environ)) == []


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, ""),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a;12.0+PTX"}, "80-real;90a-real;120"),
        ({"CMAKE_CUDA_ARCHITECTURES": "90-real", "TORCH_CUDA_ARCH_LIST": "8.0"}, "90-real"),
    ],
)
def test_architectures(environ, expected, toolchain):
    assert toolchain.architectures(environ) == expected


def test_an_architecture_that_is_none_is_refused(toolchain):
    with pytest.raises(
        toolchain.ToolchainError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; it needs"
    ):
        toolchain.architectures({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"})
