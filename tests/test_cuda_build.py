"""What the CUDA kernels are compiled to, for every architecture; no GPU is needed, nvcc is.

nvcc takes minutes: ``make test-all``. The build folder is kept (``build/cuda-kernels``), so that a
run compiles what changed. Machine code is read by ``cuobjdump``, of the toolkit or of the
``triton`` package.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow_suite

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda-kernels"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = ("guard_loss", "rows", "sde_step", "sums")
# kernel -> threads of a block and blocks that __launch_bounds__ promises a multiprocessor
LAUNCH_BOUNDS = {
    "sums_of_chunks": (256, 3),
    "sums_of_rows": (256, 1),
    "gradient_of_chunks": (256, 2),
    "step_chunks": (256, 2),
    "squares_of_rows": (256, 1),
    "loss_of_chunks": (256, 3),
    "loss_cooperatively": (512, 1),
    "loss_by_clusters": (256, 1),
    "loss_of_rows": (512, 1),
    "statistics_of_rows": (512, 1),
}
STREAMING = [name for name in LAUNCH_BOUNDS if not name.endswith("_of_rows")]


def _cuobjdump() -> str | None:
    beside = [shutil.which("cuobjdump"), shutil.which("nvcc")]
    spec = importlib.util.find_spec("triton")
    folders = [Path(x).resolve().parent for x in beside if x]
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = (str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists())
    return next(found, None)


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The kernels' object files, each with machine code for every architecture."""
    missing = [tool for tool in ("nvcc", "cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here")
    _run("cmake", "-G", "Ninja", "-S", ".", "-B", str(BUILD), "-DGUARD_OPS_CUDA=ON")
    _run("cmake", "--build", str(BUILD), "--target", "guard_ops_cuda")
    return [BUILD / "cuda" / f"{name}.o" for name in SOURCES]


@pytest.fixture(scope="module")
def cuobjdump(objects) -> str:
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: neither in nvcc's folder nor from the triton package")
    return tool


@pytest.fixture(scope="module")
def resources(objects, cuobjdump) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> what ptxas gave it: REG, STACK, LOCAL, ..."""
    out = {}
    for path in objects:
        architecture = kernel = ""
        for line in _run(cuobjdump, "-res-usage", str(path)).splitlines():
            if found := re.match(r"arch = (\S+)", line):
                architecture = found[1]
            elif found := re.match(r"\s*Function (\S+):", line):
                kernel = next(name for name in LAUNCH_BOUNDS if name in found[1])
            elif "REG:" in line:
                usage = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
                known = out.get((architecture, kernel), usage)  # step_chunks has two variants
                out[architecture, kernel] = {name: max(n, known[name]) for name, n in usage.items()}
    return out


@pytest.fixture(scope="module")
def code(objects, cuobjdump) -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) -> its instructions, predicates left out."""
    out: dict[tuple[str, str], list[str]] = {}
    for path in objects:
        for architecture in ("sm_80", "sm_90", "sm_120"):
            kernel = ""
            text = _run(cuobjdump, "-sass", "-arch", architecture, str(path))
            for line in text.splitlines():
                if "@!PT" in line:  # never done: what nvcc puts before an asynchronous copy
                    continue
                if found := re.match(r"\s*Function : (\S+)", line):
                    kernel = next(name for name in LAUNCH_BOUNDS if name in found[1])
                elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\S+)", line):
                    out.setdefault((architecture, kernel), []).append(found[1])
    return out


def test_every_architecture_is_there_and_ptx_for_those_between_and_after(objects, cuobjdump):
    for path in objects:
        listed = _run(cuobjdump, "-lelf", str(path)) + _run(cuobjdump, "-lptx", str(path))
        assert set(re.findall(r"\.(sm_\d+)\.cubin", listed)) == set(ARCHITECTURES)
        assert set(re.findall(r"\.(sm_\d+)\.ptx", listed)) == {"sm_80", "sm_90", "sm_120"}


def test_no_kernel_spills_or_uses_local_memory(resources):
    assert set(resources) == {(a, kernel) for a in ARCHITECTURES for kernel in LAUNCH_BOUNDS}
    for key, usage in resources.items():
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), (key, usage)


def test_registers_leave_room_for_the_promised_blocks(resources):
    for (architecture, kernel), usage in resources.items():
        threads, blocks = LAUNCH_BOUNDS[kernel]
        if architecture == "sm_120" and kernel.endswith("_of_chunks"):  # tiles.h
            blocks -= 1
        registers = -(-usage["REG"] // 8) * 8  # handed out by eights
        assert registers * threads * blocks <= 65536, (architecture, kernel, usage)


def test_no_instruction_touches_local_memory(code):
    for key, instructions in code.items():
        assert not [x for x in instructions if re.match(r"(LDL|STL)\b", x)], key


def test_latents_move_in_units_of_16_bytes(code):
    for (architecture, kernel), instructions in code.items():
        if kernel not in STREAMING:
            continue
        names = set(instructions)
        assert any(x.startswith("LDGSTS") and x.endswith(".128") for x in names), (
            architecture,
            kernel,
        )
        assert any(x.startswith("LDS") and x.endswith(".128") for x in names), (
            architecture,
            kernel,
        )
        if kernel not in ("sums_of_chunks", "loss_of_chunks"):  # they write no latent
            assert any(x.startswith("STG") and x.endswith(".128") for x in names), (
                architecture,
                kernel,
            )


def test_shared_memory_is_read_and_written_in_vectors(code):
    """Word by word, the lanes of a warp would have the same banks in conflict."""
    for key, instructions in code.items():
        words = [x for x in instructions if x in ("LDS", "STS")]
        assert len(words) <= 20, key  # a block's own words, and rows that are not aligned


def test_no_floating_point_atomics(code):
    atomics = {x for instructions in code.values() for x in instructions if re.match("RED|ATOM", x)}
    atomics = {x for x in atomics if not x.startswith("REDUX")}  # within a warp, integers
    assert atomics, "the blocks count themselves with one"
    assert not [x for x in atomics if re.search(r"F16|F32|F64|BF16", x)], atomics


def test_blocks_meet_as_the_paths_claim(code):
    for (architecture, kernel), instructions in code.items():
        names = {x.split(".")[0] for x in instructions}
        counts = any(x.startswith("ATOM") for x in instructions)
        assert counts == kernel.startswith("loss_"), (architecture, kernel)
        clusters = kernel == "loss_by_clusters" and architecture == "sm_90"
        if architecture in ("sm_80", "sm_90"):
            assert ("UCGABAR_ARV" in names) == clusters, (architecture, kernel)
        first = kernel not in ("loss_cooperatively", "sums_of_rows", "squares_of_rows")
        second = kernel.endswith("_of_rows") or kernel in ("loss_of_chunks", "gradient_of_chunks")
        chained = (first, second) if architecture != "sm_80" else (False, False)
        assert ("PREEXIT" in names, "ACQBULK" in names) == chained, (architecture, kernel)
        if kernel == "loss_cooperatively":  # polls the last block's flag
            assert any(re.match(r"LD\S*\.STRONG\.GPU", x) for x in instructions), architecture
