"""Follow a warp through a kernel's machine code, and count the instructions that it issues.

:func:`walk` executes what decides where a warp goes (integers, predicates, the parameters of a
launch) for one lane and leaves the rest unknown: :mod:`sass_machine` says what is assumed. Every
instruction that the warp issues is counted, one that a predicate turns off too, as it takes its
slot. A branch that depends on what is not known is an error, never a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from sass_machine import Instruction, Launch, Machine, WalkError
from sass_operations import execute

__all__ = [
    "KINDS",
    "Instruction",
    "Launch",
    "Walk",
    "WalkError",
    "jump_tables",
    "kind_of",
    "parse",
    "walk",
]


def parse(text: str) -> dict[str, list[Instruction]]:
    """``cuobjdump -sass`` of one architecture: mangled name of a kernel -> its instructions."""
    out: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            code = out.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+) )?\s*([A-Z]\S*)(.*?);", line):
            # a comma inside brackets does not occur
            operands = tuple(x.strip() for x in found[4].split(",") if x.strip())
            code.append(Instruction(int(found[1], 16), found[2] or "", found[3], operands))
    return out


def jump_tables(text: str) -> dict[str, bytes]:
    """``cuobjdump -elf`` of one architecture: mangled name of a kernel -> its tables of jumps."""
    out: dict[str, bytes] = {}
    section = r"^\.nv\.constant2\.(\S+)\n((?:(?:0x[0-9a-f]{8}\s*)+\n)*)"
    for found in re.finditer(section, text, re.MULTILINE):
        words = (int(word, 16) for word in found[2].split())
        out[found[1]] = b"".join(word.to_bytes(4, "little") for word in words)
    return out


KINDS = ("address", "copies", "loads", "conversion", "arithmetic", "stores", "control")
_BY_NAME = (
    ("copies", r"LDGSTS|LDGDEPBAR|DEPBAR|UBLKCP|SYNCS|ARRIVES"),
    ("loads", r"LD|ULDC|LDCU"),
    ("stores", r"ST[GS]?\b|RED|ATOM"),
    ("conversion", r"F2F|I2F|F2I|HADD2\.F32|FRND"),
    ("arithmetic", r"F(ADD|MUL|FMA|SEL|MNMX|CHK)|D(ADD|MUL|FMA)|MUFU|H?FMA2|HMUL2|HADD2|SHFL"),
    ("control", r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|WARPSYNC|BAR|[UFD]?I?SETP|U?PLOP3|VOTE"
     r"|NOP|YIELD|PREEXIT|ACQBULK|ERRBAR|CCTL|MEMBAR|FSETP|DSETP|UISETP|CREDUX|UCGABAR|FENCE"),
)  # fmt: skip


def kind_of(x: Instruction) -> str:
    """What an instruction is for; whatever is nothing else computes an address."""
    if x.name.startswith("HFMA2") and "RZ" in x.operands:  # a constant is put into a register
        return "address"
    moved = re.match(r"IMAD\.U32|SHF\.L\.U32|IMAD\.SHL", x.name)
    if x.name in ("LOP3.LUT", "PRMT"):
        widens = bool({"0xffff0000", "0x7632", "0x7610", "0x5410"} & set(x.operands))
    else:
        widens = moved is not None and bool({"0x10000", "0x10"} & set(x.operands))
    if widens:
        return "conversion"
    return next((kind for kind, names in _BY_NAME if re.match(names, x.name)), "address")


class Walk(NamedTuple):
    """How often each instruction was issued."""

    code: list[Instruction]
    issued: Counter[int]  # address -> times

    def total(self) -> int:
        """Of all instructions."""
        return sum(self.issued.values())

    def kinds(self) -> Counter[str]:
        """Of each kind."""
        out: Counter[str] = Counter()
        for x in self.code:
            out[kind_of(x)] += self.issued[x.at]
        return out


def walk(
    code: list[Instruction],
    launch: Launch,
    arch: int,
    block: int = 0,
    warp: int = 0,
    limit: int = 200_000,
    leaves: bool = False,
) -> Walk:
    """Follow one warp from the kernel's first instruction to its exit.

    ``leaves``: it takes an exit of which it is not known whether it is taken, as all blocks do but
    the one that arrives last.
    """
    machine = Machine(launch, arch, block, warp)
    place = {x.at: n for n, x in enumerate(code)}
    issued: Counter[int] = Counter()
    n = 0
    for _ in range(limit):
        x = code[n]
        issued[x.at] += 1
        n += 1
        guard = machine.predicate(x.guard) if x.guard else True
        family = x.name.split(".")[0]
        if family == "EXIT" and guard is None and leaves:
            return Walk(code, issued)
        if family in ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP") and guard is None:
            raise WalkError(f"{x.at:#x}: {x.guard} {x.name} {x.operands}: the predicate is unknown")
        if family == "EXIT":
            if guard:
                return Walk(code, issued)
        elif family in ("BRA", "CALL", "JMP"):
            if guard and machine.jumps(x):
                n = place[_target(x.operands[-1])]
        elif family == "RET":
            if guard:
                n = place[machine.known(x, x.operands[0].split()[0])]
        elif family == "BRX":
            if guard:
                register, offset = x.operands[0].split()
                n = place[machine.known(x, register) + int(offset, 16) + x.at + 16]
        elif guard is None:
            machine.forget(x)
        elif guard:
            execute(machine, x)
    raise WalkError(f"no exit after {limit} instructions")


def _target(operand: str) -> int:
    found = re.search(r"0x([0-9a-f]+)", operand)
    if found is None:
        raise WalkError(f"no address in {operand}")
    return int(found[1], 16)
