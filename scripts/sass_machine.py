"""What the integers of one lane are while it executes a kernel's machine code: see :mod:`sass`.

What is assumed:

- all lanes go where lane 0 goes, and a shuffle gives a lane its own value;
- a number that is not known (a latent, a coefficient) is neither 0, subnormal nor infinite, and
  equal to no other;
- an atomic operation finds a 0;
- the half of a register that a 16-bit number does not fill is 0 where it is not known.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

MASK = 0xFFFFFFFF
# Where a launch's parameters begin in the constant bank, and the special values before them.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}

JUMPS = 1 << 32  # bank 2 begins here in a machine's memory of constants

Value = int | None


class Instruction(NamedTuple):
    """One line of a disassembly."""

    at: int
    guard: str  # the predicate before it, as @!P0 without the @; "" if there is none
    name: str  # with its modifiers
    operands: tuple[str, ...]


class Launch(NamedTuple):
    """What a warp finds when it starts."""

    parameters: bytes
    blocks: int
    threads: int  # of a block
    jumps: bytes = b""  # the kernel's tables of jumps: constant bank 2


class WalkError(Exception):
    """The way of the warp depends on something that is not known."""


def float_bits(x: float) -> int:
    """Of a number in float32."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


class Machine:
    """The registers and predicates of lane 0, and what it stored in shared memory."""

    def __init__(self, launch: Launch, arch: int, block: int, warp: int) -> None:
        if arch not in PARAMETERS:
            raise ValueError(f"arch is {arch}; it has to be one of {sorted(PARAMETERS)}")
        self.arch = arch
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.shared: dict[int, Value] = {}
        begin = PARAMETERS[arch]
        bank: dict[int, int] = {}
        words = launch.parameters + bytes(-len(launch.parameters) % 4)
        for at in range(0, len(words), 4):
            (bank[begin + at],) = struct.unpack_from("<I", words, at)
        block_at, grid_at = (0x360, 0x370) if arch >= 100 else (0x0, 0xC)
        for n in range(3):
            bank[block_at + 4 * n] = launch.threads if n == 0 else 1
            bank[grid_at + 4 * n] = launch.blocks if n == 0 else 1
        for at in range(0, len(launch.jumps) // 4 * 4, 4):
            (bank[JUMPS + at],) = struct.unpack_from("<I", launch.jumps, at)
        self.bank = bank
        self.special = {
            "SR_TID.X": 32 * warp, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": block,
            "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_LANEID": 0, "SR_NCTAID.X": launch.blocks,
            "SR_CgaCtaId": 0, "SR_NTID.X": launch.threads, "SR_CLUSTERID.X": block,
            "SR_CgaSize": 1, "SR_EQMASK": 1, "SR_LTMASK": 0,
        }  # fmt: skip

    # ---- operands -------------------------------------------------------------------------------

    def predicate(self, name: str) -> bool | None:
        name = name.removesuffix(".reuse")
        inverted, name = name.startswith("!"), name.removeprefix("!")
        x = True if name in ("PT", "UPT") else self.predicates.get(name)
        return None if x is None else x != inverted

    def put_predicate(self, name: str, x: bool | None) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = x

    def constant(self, operand: str) -> int | None:
        """Where in ``bank`` an operand lies, or None where that is not known."""
        found = re.fullmatch(r"c\[(0x[02])\]\[(?:(U?R\d+|RZ)\+?)?(-?0x[0-9a-f]+)?\]", operand)
        if found is None:
            return None
        base = self.value(found[2]) if found[2] else 0
        if base is None:
            return None
        return base + int(found[3] or "0", 16) + (JUMPS if found[1] == "0x2" else 0)

    def value(self, operand: str, high: int = 0) -> Value:
        """32 bits of an operand; ``high``: how many registers after the named one."""
        operand = re.sub(r"\.(reuse|64|U32|S32)\b", "", operand).strip()
        if operand.startswith(("-", "~")) and not operand.startswith("-0x"):
            x = self.value(operand[1:], high)
            if x is None:
                return None
            return (-x if operand[0] == "-" else ~x) & MASK
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        if re.fullmatch(r"U?R\d+", operand):
            prefix = operand.rstrip("0123456789")
            return self.registers.get(f"{prefix}{int(operand[len(prefix) :]) + high}")
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return (int(operand, 16) >> (32 * high)) & MASK
        if operand.startswith("c["):
            at = self.constant(operand)
            return None if at is None else self.bank.get(at + 4 * high)
        if re.fullmatch(r"-?[0-9.]+(e[+-]?\d+)?", operand):
            return float_bits(float(operand)) if high == 0 else 0
        if operand in ("+INF", "INF"):
            return 0x7F800000
        return None

    def wide(self, operand: str) -> Value:
        """64 bits of an operand."""
        negative = operand.startswith("-") and not operand.startswith("-0x")
        operand = operand[1:] if negative else operand
        low, high = self.value(operand), self.value(operand, 1)
        if low is None or high is None:
            return None
        x = low | high << 32
        return -x & (2**64 - 1) if negative else x

    def known(self, x: Instruction, operand: str) -> int:
        value = self.value(operand)
        if value is None:
            raise WalkError(f"{x.at:#x}: {x.name} needs {operand}, which is unknown")
        return value

    def put(self, register: str, value: Value, words: int = 1) -> None:
        register = re.sub(r"\.(64|reuse)\b", "", register)
        if register in ("RZ", "URZ"):
            return
        prefix = register.rstrip("0123456789")
        for n in range(words):
            name = f"{prefix}{int(register[len(prefix) :]) + n}"
            self.registers[name] = None if value is None else (value >> (32 * n)) & MASK

    def forget(self, x: Instruction) -> None:
        """Make what an instruction may write unknown: its registers and predicates."""
        if x.name.split(".")[0] in WRITE_NOTHING:
            return
        written = [o for o in x.operands if re.fullmatch(r"U?R\d+(\.64)?|!?U?P\d", o)]
        for operand in written[:1] + [o for o in written[1:3] if "P" in o]:
            if "P" in operand:
                self.put_predicate(operand, None)
            else:
                self.put(operand, None, width(x.name))

    def jumps(self, x: Instruction) -> bool:
        """Whether a branch whose guard holds is taken; it may have a predicate more."""
        if "DIV" in x.name.split("."):  # lanes of one warp that have come apart
            return False
        for operand in x.operands[:-1]:
            if re.fullmatch(r"!?U?P(\d|T)", operand):
                holds = self.predicate(operand)
                if holds is None:
                    raise WalkError(f"{x.at:#x}: {x.name} {x.operands}: {operand} is unknown")
                if not holds:
                    return False
        return True


WRITE_NOTHING = {
    "ST", "STG", "STS", "BAR", "BSSY", "BSYNC", "LDGSTS", "LDGDEPBAR", "DEPBAR", "NOP", "WARPSYNC",
    "BREAK", "YIELD", "PREEXIT", "ACQBULK", "RED", "MEMBAR", "ERRBAR", "CCTL", "ENDCOLLECTIVE",
}  # fmt: skip


def width(name: str) -> int:
    """How many registers an instruction writes at most."""
    if ".128" in name:
        return 4
    wide = re.match(r"D(ADD|MUL|FMA)|CS2R|F2F\.F64|I2F\.F64|IMAD\.WIDE|UIMAD\.WIDE", name)
    return 2 if wide or ".64" in name else 1
