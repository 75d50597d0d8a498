"""The matrix of wheels: what can be had, and what the table says of each."""

import argparse
import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch):
    """``scripts(name)``: the module scripts/name.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("toolchain", "build_wheels", "inspect_wheel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("toolchain", "build_wheels", "inspect_wheel"):
        sys.modules.pop(name, None)


@pytest.fixture
def builder(scripts):
    return scripts("build_wheels")


def test_a_cell_is_a_device_and_a_torch(builder):
    assert builder.Cell.parse("cu130:2.14.1").cuda == "13.0"
    assert builder.Cell.parse("cpu:2.13.0").cuda is None
    assert str(builder.Cell.parse("cu128:2.9.1")) == "cu128:2.9.1"
    for text in ("cu13:2.14.1", "cpu", "rocm:2.9.1", "cpu:2.9"):
        with pytest.raises(argparse.ArgumentTypeError, match="a cell is such as cpu"):
            builder.Cell.parse(text)


def index(builder, monkeypatch, version, requires):
    """A package index whose torch is that."""

    def run(*command, **_):
        (report,) = (word for word in command if isinstance(word, Path))
        metadata = {"version": version, "requires_dist": requires}
        report.write_text(json.dumps({"install": [{"metadata": metadata}]}))

    monkeypatch.setattr(builder, "run", run)


CUDA13 = ["filelock", 'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"']
CUDA12 = ['nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"']


@pytest.mark.parametrize(
    "cell, requires", [("cu130:2.14.1", CUDA13), ("cu128:2.9.1", CUDA12), ("cpu:2.14.1", CUDA13)]
)
def test_a_torch_of_that_cuda_will_do(cell, requires, builder, monkeypatch):
    index(builder, monkeypatch, cell.split(":")[1], requires)
    builder.check_torch(builder.Cell.parse(cell))


@pytest.mark.parametrize(
    "requires, said",
    [(CUDA12, "built with CUDA 12.8"), (CUDA13, ""), ([], "built without CUDA")],
)
def test_a_torch_of_another_cuda_is_not_to_be_had(requires, said, builder, monkeypatch):
    index(builder, monkeypatch, "2.11.0", requires)
    cell = builder.Cell.parse("cu130:2.11.0")
    if not said:
        return builder.check_torch(cell)
    with pytest.raises(builder.NotToBeHad, match=f"torch 2.11.0 of the index is {said}"):
        builder.check_torch(cell)
    return None


def test_a_torch_that_the_index_lacks_is_not_to_be_had(builder, monkeypatch):
    def run(*command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(builder, "run", run)
    with pytest.raises(builder.NotToBeHad, match=r"no torch 2\.14\.9 for this Python in the index"):
        builder.check_torch(builder.Cell.parse("cpu:2.14.9"))


def test_compilers_come_from_the_machine_or_the_index_or_not_at_all(builder, monkeypatch):
    def machine(*versions):
        nvccs = [builder.toolchain.Nvcc(v, Path("/cuda/bin/nvcc")) for v in versions]
        monkeypatch.setattr(builder.toolchain, "find_nvcc", lambda _: iter(nvccs))

    cu128, cu130 = map(builder.Cell.parse, ("cu128:2.9.1", "cu130:2.14.1"))
    machine()
    assert builder.compiler_packages(builder.Cell.parse("cpu:2.9.1")) == []
    assert "nvidia-cuda-nvcc==13.0.*" in builder.compiler_packages(cu130)
    with pytest.raises(builder.NotToBeHad, match=r"no nvcc 12\.8: .* .found: none"):
        builder.compiler_packages(cu128)
    machine("13.0")
    assert builder.compiler_packages(cu130) == ["nvidia-cuda-runtime==13.0.*"]
    with pytest.raises(builder.NotToBeHad, match=r"found: nvcc 13\.0 .* set CUDA_HOME"):
        builder.compiler_packages(cu128)
    machine("12.8")
    assert builder.compiler_packages(cu128) == ["nvidia-cuda-runtime-cu12==12.8.*"]


def test_the_table_has_a_row_for_each_cell_and_a_reason_for_each_gap(builder):
    cpu, cu128 = map(builder.Cell.parse, ("cpu:2.13.0", "cu128:2.9.1"))
    wheel = builder.Row(cpu, "a.whl", "0.5 MB", "no CUDA", "manylinux_2_34_x86_64", "61 s")
    text = builder.table([wheel, builder.Row(cu128, reason="no nvcc 12.8")])
    assert text.splitlines() == [
        "| cell | file | size | architectures | glibc | build time |",
        "|---|---|---|---|---|---|",
        "| cpu:2.13.0 | a.whl | 0.5 MB | no CUDA | manylinux_2_34_x86_64 | 61 s |",
        "| cu128:2.9.1 | not to be had |  |  |  |  |",
        "",
        "- cu128:2.9.1: no nvcc 12.8",
    ]


def test_a_wheel_is_read_with_cuobjdump(scripts, tmp_path, monkeypatch):
    inspect_wheel = scripts("inspect_wheel")
    cuobjdump = tmp_path / "cuobjdump"
    cuobjdump.write_text(
        "#!/bin/sh\n"
        "case $1 in\n"
        "--list-elf) echo 'ELF file    1: sums.1.sm_120.cubin'\n"
        "            echo 'ELF file    2: sums.2.sm_80.cubin'\n"
        "            echo 'ELF file    3: gradient.1.sm_80.cubin';;\n"
        "--list-ptx) echo 'PTX file    1: sums.1.sm_120.ptx';;\n"
        "esac\n"
    )
    cuobjdump.chmod(0o755)
    monkeypatch.setattr(inspect_wheel, "glibc", lambda _: "manylinux_2_34_x86_64")
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("guard_ops/_C.so", "")
    found = inspect_wheel.inspect(wheel, str(cuobjdump))
    assert found.architectures == ("sm_80", "sm_120", "compute_120")
    assert found.size == wheel.stat().st_size
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("guard_ops/__init__.py", "")
    with pytest.raises(RuntimeError, match=r"a\.whl has 0 extensions; it needs one"):
        inspect_wheel.inspect(wheel, str(cuobjdump))


def test_a_wheel_for_cuda_without_device_code_is_a_failure(builder, monkeypatch, tmp_path, capsys):
    def run(*command, **_):
        if "wheel" in command:
            folder = next(w for w in command if isinstance(w, Path) and w.name == "wheel")
            folder.mkdir()
            (folder / "a.whl").touch()
        return "a.whl: 0.5 MB, no CUDA, manylinux_2_34_x86_64\n"

    monkeypatch.setattr(builder, "run", run)
    monkeypatch.setattr(builder, "check_torch", lambda _: None)
    monkeypatch.setattr(builder, "compiler_packages", lambda _: [])
    monkeypatch.setattr(builder, "environment", lambda *_: Path("/env/bin/python"))
    monkeypatch.setattr(builder, "unpacked_sdist", lambda *_: tmp_path)
    with pytest.raises(builder.BuildError, match=r"for cu130:2\.14\.1 and has no device code"):
        builder.build(builder.Cell.parse("cu130:2.14.1"), tmp_path)
    cells = ["cpu:2.13.0", "cu130:2.14.1"]
    monkeypatch.setattr(sys, "argv", ["build_wheels.py", *cells, "--out", str(tmp_path)])
    assert builder.main() == 1
    rows = capsys.readouterr().out.splitlines()  # the table is printed all the same
    assert rows[2].startswith("| cpu:2.13.0 | a.whl | 0.5 MB | no CUDA |")
    assert rows[3].startswith("| cu130:2.14.1 | FAILED |")
