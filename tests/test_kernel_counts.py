"""Machine code is followed as a warp would: scripts/sass.py, and the floors of kernel_counts.py."""

import shutil
import struct
import sys
from pathlib import Path
from unittest import mock

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
kernel_counts = pytest.importorskip("kernel_counts")
import sass  # noqa: E402
import sass_machine  # noqa: E402


def code(text, name="kernel"):
    """Instructions one a line, 16 bytes apart, as cuobjdump prints them."""
    lines = [line.strip() for line in text.strip().splitlines()]
    listed = [f"        /*{16 * n:04x}*/  {line} ;   /* 0x0 */" for n, line in enumerate(lines)]
    return sass.parse("\n".join([f"\t\tFunction : {name}", *listed]))[name]


def walk(text, parameters=(), arch=90, blocks=4, threads=64, **where):
    packed = b"".join(struct.pack("<I", x & 0xFFFFFFFF) for x in parameters)
    return sass.walk(code(text), sass.Launch(packed, blocks, threads), arch, **where)


def test_parse_tells_guards_operands_and_functions():
    text = """
		Function : first
        /*0000*/              @!P0 BRA 0x30 ;        /* 0x0000000000108947 */
                                                     /* 0x000fea0003800000 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R45+0x200], desc[UR6][R46.64] ;   /* 0x0 */
		Function : second
        /*0000*/                   EXIT ;            /* 0x0 */
    """
    first, second = sass.parse(text).values()
    assert first[0] == sass.Instruction(0, "!P0", "BRA", ("0x30",))
    assert first[1].operands == ("[R45+0x200]", "desc[UR6][R46.64]")
    assert second == [sass.Instruction(0, "", "EXIT", ())]


LOOP = """
    LDC R1, c[0x0][0x210]
    MOV R0, RZ
    IADD3 R0, R0, 0x1, RZ
    @P3 LDG.E R5, desc[UR4][R2.64]
    ISETP.GE.U32.AND P0, PT, R0, R1, PT
    @!P0 BRA 0x20
    EXIT
"""


@pytest.mark.parametrize("turns", [1, 5])
def test_a_loop_is_counted_as_often_as_its_parameter_says(turns):
    got = walk(LOOP, [turns])
    assert got.issued[0x20] == got.issued[0x50] == turns
    assert got.total() == 3 + 4 * turns


def test_an_instruction_that_its_predicate_turns_off_takes_its_slot():
    assert walk(LOOP, [3]).kinds()["loads"] == 1 + 3  # LDC, and LDG whose predicate nobody set


def test_a_branch_on_what_is_not_known_is_an_error():
    text = """
        LDG.E R0, desc[UR4][R2.64]
        ISETP.GT.AND P0, PT, R0, RZ, PT
        @P0 BRA 0x30
        EXIT
    """
    with pytest.raises(sass.WalkError, match="0x20: P0 BRA"):
        walk(text)


def test_no_exit_is_an_error():
    with pytest.raises(sass.WalkError, match="no exit after 100"):
        sass.walk(code("BRA 0x0"), sass.Launch(b"", 1, 32), 90, limit=100)


def test_an_architecture_without_a_layout_of_parameters_is_refused():
    with pytest.raises(ValueError, match="arch is 75"):
        walk("EXIT", arch=75)


def ends_at(text, register, arch=90, **kwargs):
    """What a register holds at the end, told by how often a loop of that many turns runs."""
    lines = [line.strip() for line in text.strip().splitlines()]
    at = 16 * len(lines)
    lines += [
        f"ISETP.EQ.AND P6, PT, {register}, RZ, PT",
        f"@P6 BRA {at + 64:#x}",
        f"IADD3 {register}, {register}, -0x1, RZ",
        f"BRA {at:#x}",
        "EXIT",
    ]
    got = walk("\n".join(lines), arch=arch, **kwargs)
    return got.issued[at + 32]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("MOV R0, 0x7", 7),
        ("UMOV UR4, 0x7\nMOV R0, UR4", 7),
        ("IMAD.MOV.U32 R0, RZ, RZ, 0x7", 7),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", 1),  # half a word: the bits 1
        ("MOV R1, 0x3\nIMAD R0, R1.reuse, 0x4, R1", 15),
        ("MOV R1, 0x80000000\nIMAD.WIDE.U32 R2, R1, 0x10, RZ\nMOV R0, R3", 8),
        ("MOV R1, 0x80000000\nIMAD.HI.U32 R0, R1, 0x10, RZ", 8),
        ("MOV R1, 0xff\nLOP3.LUT R0, R1, 0xf, RZ, 0xc0, !PT", 15),
        ("MOV R1, 0x50\nSHF.R.U32.HI R0, RZ, 0x4, R1", 5),
        ("MOV R1, 0x5\nSHF.L.U32 R0, R1, 0x1, RZ", 10),
        ("MOV R1, 0x3\nLEA R0, R1, 0x5, 0x2", 17),
        ("MOV R1, 0x60\nLEA.HI R0, R1, 0x5, RZ, 0x1b", 8),
        ("MOV R1, 0xffffffff\nIADD3 R2, P0, R1, 0x1, RZ\nIADD3.X R0, RZ, 0x4, RZ, P0, !PT", 5),
        ("MOV R1, 0x9\nIADD3 R0, R1, -0x4, RZ", 5),
        ("MOV R1, 0x4\nIADD3 R0, -R1, 0x9, RZ", 5),
        ("ISETP.NE.AND P0, PT, RZ, 0x1, PT\nSEL R0, RZ, 0x6, !P0", 6),
        ("ISETP.EQ.AND P0, P1, RZ, 0x1, PT\nSEL R0, RZ, 0x6, !P1", 6),
        ("MOV R1, 0x20\nR2P PR, R1, 0x60\nSEL R2, RZ, 0x4, !P5\nSEL R0, R2, 0x1, !P6", 4),
        ("MOV R1, 0x100\nR2P PR, R1.B1, 0x1\nSEL R0, RZ, 0x6, !P0", 6),
        ("MOV R1, 0x5\nVIMNMX R0, R1, 0x3, PT", 3),
        ("S2R R0, SR_TID.X", 32),  # of the block's second warp
        ("S2UR UR4, SR_CTAID.X\nMOV R0, UR4", 2),
        ("LDC R0, c[0x0][0x0]", 64),
        ("LDC R0, c[0x0][0xc]", 4),
        ("MOV R1, 0x20\nMOV R2, 0x9\nSTS [R1+0x4], R2\nLDS R0, [0x24]", 9),
        ("MOV R1, 0x9\nSHFL.BFLY PT, R0, R1, 0x10, 0x1f", 9),
        ("ATOMG.E.ADD.STRONG.GPU PT, R0, desc[UR4][R2.64], R1", 0),
        ("MOV R1, 0x4030201\nPRMT R0, R1, 0x4442, RZ", 3),
        ("MOV R1, 0xa\nI2F.U32.RP R2, R1\nMUFU.RCP R3, R2\nMOV R0, 0x2", 2),
        # x / 3 as the compiler does it, by a reciprocal in float32
        ("MOV R1, 0x3\nI2F.U32.RP R2, R1\nMUFU.RCP R2, R2\nIADD3 R2, R2, 0xffffffe, RZ\n"
         "F2I.FTZ.U32.TRUNC.NTZ R3, R2\nIADD3 R4, RZ, -R1, RZ\nIMAD R4, R4, R3, RZ\nMOV R2, RZ\n"
         "IMAD.HI.U32 R3, R3, R4, R2\nMOV R5, 0xe\nIMAD.HI.U32 R0, R3, R5, RZ", 4),
    ],
)  # fmt: skip
def test_integers_are_those_of_the_device(text, value):
    assert ends_at(text, "R0", block=2, warp=1) == value


def test_parameters_lie_where_the_architecture_has_them():
    for arch, begin in sass_machine.PARAMETERS.items():
        if arch < 100:
            assert ends_at(f"LDC R0, c[0x0][{begin + 4:#x}]", "R0", arch, parameters=[1, 3]) == 3
        else:
            assert ends_at(f"LDCU UR4, c[0x0][{begin + 4:#x}]\nMOV R0, UR4", "R0", arch,
                           parameters=[1, 3]) == 3  # fmt: skip


def test_an_unknown_number_is_an_ordinary_one():
    text = """
        LDG.E.64 R2, desc[UR4][R8.64]
        DSETP.NEU.AND P0, PT, R2, RZ, PT
        @P0 BRA 0x40
        BRA 0x30
        DSETP.NAN.AND P1, PT, R2, R2, PT
        @P1 BRA 0x30
        EXIT
    """
    assert walk(text).total() == 6


def test_calls_return_to_where_they_came_from():
    text = """
        MOV R2, 0x20
        CALL.REL.NOINC 0x40
        EXIT
        NOP
        IADD3 R3, R3, 0x1, RZ
        RET.REL.NODEC R2 0x0
    """
    got = walk(text)
    assert (got.total(), got.issued[0x30]) == (5, 0)


def test_a_jump_by_a_table_goes_where_the_table_says():
    text = """
        MOV R4, 0x4
        LDC R2, c[0x2][R4]
        BRX R2 -0x30
        NOP
        EXIT
    """
    listed = """
.nv.constant2.kernel
0x00000030 0x00000040

.text.kernel
"""
    jumps = sass.jump_tables(listed)["kernel"]
    got = sass.walk(code(text), sass.Launch(b"", 1, 32, jumps), 80)
    assert (got.total(), got.issued[0x30]) == (4, 0)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR6][R2.64]", "copies"),
        ("LDGDEPBAR", "copies"),
        ("LDS.64 R0, [R1]", "loads"),
        ("STG.E.64 desc[UR6][R2.64], R4", "stores"),
        ("IMAD.U32 R0, R1.reuse, 0x10000, RZ", "conversion"),
        ("SHF.L.U32 R0, R1, 0x10, RZ", "conversion"),
        ("LOP3.LUT R0, R1, 0xffff0000, RZ, 0xc0, !PT", "conversion"),
        ("F2FP.BF16.F32.PACK_AB R0, R1, R2", "conversion"),
        ("FFMA R0, R1, R2, R3", "arithmetic"),
        ("DADD R0, R2, R4", "arithmetic"),
        ("SHFL.BFLY PT, R0, R1, 0x10, 0x1f", "arithmetic"),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 0", "address"),
        ("IMAD.WIDE.U32 R0, R1, 0x200, R2", "address"),
        ("ISETP.NE.AND P0, PT, R0, RZ, PT", "control"),
        ("BSSY B0, 0x10", "control"),
    ],
)
def test_every_instruction_has_one_kind(line, kind):
    (found,) = code(line)
    assert sass.kind_of(found) == kind


def test_a_broken_floor_names_kernel_and_numbers():
    count = kernel_counts.Count("sums", "mean", "bfloat16", 90, 181.0, 250.0, {})
    assert count.broken() == [
        "sums (mean, bfloat16, sm_90) issues 181.0 instructions per 256 elements in chunks of 4, "
        "more than 180"
    ]
    assert not count._replace(long=180.0).broken()


@pytest.mark.slow_suite
@pytest.mark.parametrize("kernel", kernel_counts.KERNELS)
def test_the_floors_hold_on_sm_90(kernel):
    if shutil.which("nvcc") is None or kernel_counts.find_cuobjdump() is None:
        pytest.skip("no nvcc, or no cuobjdump")
    machine_code = kernel_counts.machine_code(kernel, 90)
    assert not [x.name for x in machine_code.instructions if x.name.startswith(("LDL", "STL"))]
    for name, form, dtype in kernel_counts.FLOORS:
        if name == kernel:
            assert not kernel_counts.count(machine_code, kernel, form, dtype, 90).broken()


@pytest.mark.slow_suite
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kernel", kernel_counts.KERNELS)
def test_a_cuda_warp_issues_no_more_than_triton(kernel, arch):
    triton_counts = pytest.importorskip("triton_counts", exc_type=ImportError)
    if shutil.which("nvcc") is None or kernel_counts.find_cuobjdump() is None:
        pytest.skip("no nvcc, or no cuobjdump")
    machine_code = kernel_counts.machine_code(kernel, arch)
    for form in triton_counts.FORMS:
        for dtype in triton_counts.DTYPES:
            own = kernel_counts.count(machine_code, kernel, form, dtype, arch).long
            assert own <= triton_counts.count(kernel, form, dtype, arch), (form, dtype)


def test_parameters_of_a_triton_kernel_lie_at_multiples_of_their_size():
    triton_counts = pytest.importorskip("triton_counts", exc_type=ImportError)
    signature = {
        "t": ("*bf16", "constexpr"), "n": "i32", "of": ("i32", "i32"), "scale": "fp64",
        "T": "constexpr",
    }  # fmt: skip
    kernel = mock.Mock(**{"src.signature": signature})
    arguments = [("a pointer", None), 7, (8, 9), 1.5, "a type"]
    found = triton_counts.parameters(triton_counts.Compiled(kernel, arguments, 1))
    assert struct.unpack_from("<iii", found, 8) == (7, 8, 9)
    assert struct.unpack_from("<d", found, 24) == (1.5,)
    assert len(found) == 32 + 16  # two pointers of Triton's own


def test_an_exit_that_only_some_blocks_take_ends_the_walk_where_asked():
    text = """
        LDG.E R0, desc[UR4][R2.64]
        ISETP.GE.U32.AND P0, PT, R0, 0x7, PT
        @P0 EXIT
        EXIT
    """
    with pytest.raises(sass.WalkError, match="predicate is unknown"):
        walk(text)
    assert walk(text, leaves=True).total() == 3
