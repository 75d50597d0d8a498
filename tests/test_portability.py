"""A wheel runs on any x86-64: what is newer than that stays in the kernels that ask first.

An inline function compiled with ``-mavx512f`` can be the copy that the linker keeps for everyone,
and the process then dies on an older processor. So the finished extension is read, all of it.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import guard_ops

EXTENSION = next(iter(Path(guard_ops.__file__).parent.glob("_C.*.so")), None)
# The namespaces of csrc/cpu/kernels.cpp that driver.cpp enters by what the processor has.
DISPATCHED = re.compile(r"guard_ops3cpu(4avx2|6avx512)")
FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:")
# VEX and EVEX instructions all begin with v; the others are of SSE3 to SSE4.2, BMI and FMA4.
NEWER = re.compile(
    r"\t(v[a-z]\w+|k(?:mov|or|and|not|xor|test|unpck|shift)\w*|pshufb|palign\w*|pmulld|pmov[sz]x\w+"
    r"|p(?:ins|ext)r[bdq]|p(?:min|max)(?:s[bd]|u[dw])|ptest|round[sp][sd]|blendv?p[sd]|pblend\w+"
    r"|h(?:add|sub)p[sd]|addsubp[sd]|mov(?:s[lh]|d)dup|lddqu|crc32\w?|popcnt|lzcnt|andn|bextr"
    r"|bls[ri]|blsmsk|bzhi|mulx|pdep|pext|rorx|s(?:ar|hl|hr)x|movbe)\b"
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64"),
    pytest.mark.skipif(EXTENSION is None, reason="needs the compiled extension"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]


def newer_than_x86_64(extension):
    """Function -> an instruction in it that not every x86-64 has."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(extension)]
    found, function = {}, ""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if name := FUNCTION.fullmatch(line):
            function = name[1]
        elif instruction := NEWER.search(line):
            found.setdefault(function, instruction[1])
    return found


def test_only_dispatched_kernels_have_newer_instructions():
    found = newer_than_x86_64(EXTENSION)
    kernels = {name for name in found if DISPATCHED.search(name)}
    # Otherwise nothing was read: without names (stripped), or without the kernels.
    assert {DISPATCHED.search(name)[1] for name in kernels} == {"4avx2", "6avx512"}
    assert {name: found[name] for name in found.keys() - kernels} == {}


def test_the_reader_sees_an_inline_function_compiled_for_a_newer_processor(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "shared.cpp"
    source.write_text(
        "inline double twice(double x) { return __builtin_fma(x, 2.0, x); }\n"
        "double (*kept)(double) = twice;\n"
    )
    built = tmp_path / "shared.so"
    options = ["-O2", "-mavx2", "-mfma", "-shared", "-fPIC", "-o", str(built)]
    subprocess.run([compiler, *options, str(source)], check=True)
    (function,) = newer_than_x86_64(built)
    assert "twice" in function
    assert not DISPATCHED.search(function)
