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
    with pytest.raises(
        toolchain.ToolchainError, match=r'pip install "nvidia-cuda-nvcc==13\.0\.\*" '
    ):
        toolchain.choose(environ)


@pytest.mark.parametrize("request_", ["", "cpu", "13.0"])
def test_a_build_never_becomes_less_than_was_asked_for(request_, toolchain, machine):
    environ = {**machine(nvccs=["13.0"]), "CXX": "no-such-compiler", "GUARD_OPS_CUDA": request_}
    with pytest.raises(toolchain.ToolchainError) as refusal:
        toolchain.choose(environ)
    assert str(refusal.value).startswith("no C++ compiler found (no-such-compiler). Install one")
    assert str(refusal.value).endswith("GUARD_OPS_PURE=1")


def test_without_torch_the_way_around_build_isolation_is_said(toolchain, monkeypatch):
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    with pytest.raises(toolchain.ToolchainError) as refusal:
        toolchain.choose({"PATH": "/usr/bin"})
    assert "`pip install --no-build-isolation`, because build isolation hides" in str(refusal.value)
    assert str(refusal.value).endswith("GUARD_OPS_PURE=1")


def test_no_kernels_are_to_be_asked_for(toolchain, monkeypatch):
    """Whatever is missing: neither torch nor a compiler is looked for."""
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    pure = toolchain.choose({"GUARD_OPS_PURE": "1", "CXX": "no-such-compiler"})
    assert (pure.torch, pure.nvcc, pure.local_version) == (None, None, "")
    assert pure.line == "no compiled kernels, as asked (GUARD_OPS_PURE=1)"
    with pytest.raises(toolchain.ToolchainError, match="no torch here"):
        toolchain.choose({"GUARD_OPS_PURE": "0"})
    with pytest.raises(toolchain.ToolchainError, match="GUARD_OPS_PURE is 'yes'; it needs 1"):
        toolchain.choose({"GUARD_OPS_PURE": "yes"})
    with pytest.raises(toolchain.ToolchainError, match=r"GUARD_OPS_CUDA=cpu for some; unset one"):
        toolchain.choose({"GUARD_OPS_PURE": "1", "GUARD_OPS_CUDA": "cpu"})


@pytest.mark.parametrize(
    "words, missing",
    [
        ("cache compiler", ""),
        ("cache compiler -m64 -pipe", ""),
        ("compiler -m64", ""),
        ("cache no-such", "no-such"),
        ("no-such compiler", "no-such"),
        ("my compiler", ""),  # one file, as CMake takes it too
        ("", "c++, g++, clang++"),
    ],
)
def test_every_program_in_the_compilers_name_is_looked_for(words, missing, toolchain, tmp_path):
    for name in ("cache", "compiler", "my compiler"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert toolchain.no_compiler({"PATH": str(tmp_path), "CXX": words}) == missing


def test_an_nvcc_that_prints_no_text_has_a_version(toolchain, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_bytes(b"#!/bin/sh\nprintf '\\344 release 13.0, V13.0.88\\n'\n")
    nvcc.chmod(0o755)
    (found,) = toolchain.find_nvcc({"CUDACXX": str(nvcc)})
    assert found.version == "13.0"


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


CONTAINER = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"  # as NVIDIA's containers set it


@pytest.mark.parametrize(
    "listed, expected, left_out",
    [
        ("", "", []),
        (" ; ", "", []),
        ("8.0 9.0a;12.0+PTX", "80-real;90a-real;120", []),
        (CONTAINER, "80-real;86-real;90-real;100-real;120", ["7.5"]),
        ("5.2;7.0+PTX;9.0", "90-real", ["5.2", "7.0+PTX"]),
        ("Ampere", "80-real;86", []),
        ("Ampere;8.6;Hopper", "80-real;86;90", []),  # each architecture once
        ("Turing Ada", "89", ["7.5+PTX"]),
        ("Blackwell", "100-real;103-real;120-real;121", []),
        ("Blackwell+Tegra", "110-real", []),
        ("All", "", []),  # the default of cmake/cuda.cmake
        ("Common 7.5", "", ["7.5"]),
    ],
)
def test_architectures(listed, expected, left_out, toolchain):
    assert toolchain.architectures({"TORCH_CUDA_ARCH_LIST": listed}) == (expected, left_out)


def test_cmakes_list_comes_before_torchs(toolchain):
    environ = {"CMAKE_CUDA_ARCHITECTURES": "90-real", "TORCH_CUDA_ARCH_LIST": "8.0"}
    assert toolchain.architectures(environ) == ("90-real", [])


def test_what_is_left_out_is_said_in_the_builds_one_line(toolchain, machine):
    chosen = toolchain.choose({**machine(nvccs=["13.0"]), "TORCH_CUDA_ARCH_LIST": CONTAINER})
    assert chosen.architectures == "80-real;86-real;90-real;100-real;120"
    assert chosen.line.endswith("; TORCH_CUDA_ARCH_LIST without 7.5: they need 8.0 or newer")
    assert "\n" not in chosen.line


@pytest.mark.parametrize("entry", ["hopper", "9", "sm_90", "native", "9.0+ptx"])
def test_an_architecture_that_is_none_is_refused(entry, toolchain):
    with pytest.raises(toolchain.ToolchainError) as refusal:
        toolchain.architectures({"TORCH_CUDA_ARCH_LIST": f"8.0;{entry}"})
    assert str(refusal.value).startswith(f"TORCH_CUDA_ARCH_LIST has {entry!r}; it needs entries")


def test_architectures_that_are_all_too_old_are_refused(toolchain, machine):
    environ = {**machine(nvccs=["13.0"]), "TORCH_CUDA_ARCH_LIST": "7.0;Turing"}
    with pytest.raises(toolchain.ToolchainError, match=r"has only 7\.0 7\.5\+PTX; the CUDA"):
        toolchain.choose(environ)


@pytest.mark.parametrize("asked", [{"GUARD_OPS_CUDA": "cpu"}, {"GUARD_OPS_PURE": "1"}, {}])
def test_architectures_are_nothing_to_a_build_without_cuda(asked, toolchain, machine):
    environ = {**machine(cuda=None), "TORCH_CUDA_ARCH_LIST": "hopper", **asked}
    assert toolchain.choose(environ).nvcc is None
    assert "hopper" not in toolchain.choose(environ).line
