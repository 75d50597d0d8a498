"""Counts the instructions that one warp executes, by following a kernel's machine code.

:func:`walk` executes what decides where a warp goes (integers, predicates, the parameters of a
launch) for one lane and leaves the rest unknown. Every instruction that the warp issues is counted,
one that a predicate turns off too, as it takes its slot. What is assumed:

- all lanes go where lane 0 goes, and a shuffle gives a lane its own value;
- a number that is not known (a latent, a coefficient) is neither 0, subnormal nor infinite, and
  equal to no other;
- an atomic operation finds a 0.

A branch that depends on anything else that is not known is an error, never a guess.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

MASK = 0xFFFFFFFF
# Where a launch's parameters begin in the constant bank, and the special values before them.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
SHARED_WINDOW = 0x1000000  # its upper half of an address is that of shared memory's window

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


class WalkError(Exception):
    """The way of the warp depends on something that is not known."""


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
    widens = (
        re.match(r"(IMAD\.U32|SHF\.L\.U32|IMAD\.SHL)", x.name)
        and any(o in ("0x10000", "0x10") for o in x.operands)
        or (x.name == "LOP3.LUT" and "0xffff0000" in x.operands)
        or (
            x.name == "PRMT" and x.operands[-2:] and x.operands[2] in ("0x7632", "0x7610", "0x5410")
        )
    )
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
    limit: int = 1_000_000,
) -> Walk:
    """Follow one warp from the kernel's first instruction to its exit."""
    machine = _Machine(launch, arch, block, warp)
    place = {x.at: n for n, x in enumerate(code)}
    issued: Counter[int] = Counter()
    n = 0
    for _ in range(limit):
        x = code[n]
        issued[x.at] += 1
        n += 1
        guard = machine.predicate(x.guard) if x.guard else True
        family = x.name.split(".")[0]
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
            raise WalkError(f"{x.at:#x}: a jump by a table")
        elif guard is None:
            machine.forget(x)
        elif guard:
            machine.execute(x)
    raise WalkError(f"no exit after {limit} instructions")


def _target(operand: str) -> int:
    found = re.search(r"0x([0-9a-f]+)", operand)
    if found is None:
        raise WalkError(f"no address in {operand}")
    return int(found[1], 16)


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _float_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip
_COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip
# Comparisons of such a number.
_ORDINARY = {"EQ": False, "EQU": False, "NE": True, "NEU": True, "NAN": False, "NUM": True}


class _Machine:
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
        dimensions = 0x360 if arch >= 100 else 0
        for n, x in enumerate((launch.threads, 1, 1, launch.blocks, 1, 1)):
            bank[dimensions + 4 * n] = x
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
        """The address in the constant bank, or None where it is another bank's."""
        found = re.fullmatch(
            r"c\[(0x0|URZ|UR\d+)\]\[(?:(U?R\d+|RZ)\+?)?(-?0x[0-9a-f]+)?\]", operand
        )
        if found is None or found[1].startswith("UR"):
            return None
        base = self.value(found[2]) if found[2] else 0
        return None if base is None else base + int(found[3] or "0", 16)

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
            return _float_bits(float(operand)) if high == 0 else 0
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
        if x.name.split(".")[0] in _WRITE_NOTHING:
            return
        written = [o for o in x.operands if re.fullmatch(r"U?R\d+(\.64)?|!?U?P\d", o)]
        for operand in written[:1] + [o for o in written[1:3] if "P" in o]:
            if "P" in operand:
                self.put_predicate(operand, None)
            else:
                self.put(operand, None, _width(x.name))

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

    # ---- instructions ---------------------------------------------------------------------------

    def execute(self, x: Instruction) -> None:
        family, *modifiers = x.name.split(".")
        handler = _HANDLERS.get(family)
        if handler is None or not handler(self, x, set(modifiers)):
            self.forget(x)


_WRITE_NOTHING = {
    "ST", "STG", "STS", "BAR", "BSSY", "BSYNC", "LDGSTS", "LDGDEPBAR", "DEPBAR", "NOP", "WARPSYNC",
    "BREAK", "YIELD", "PREEXIT", "ACQBULK", "RED", "MEMBAR", "ERRBAR", "CCTL", "ENDCOLLECTIVE",
}  # fmt: skip


def _width(name: str) -> int:
    """How many registers an instruction writes at most."""
    if ".128" in name:
        return 4
    wide = re.match(r"D(ADD|MUL|FMA)|CS2R|F2F\.F64|I2F\.F64|IMAD\.WIDE|UIMAD\.WIDE", name)
    return 2 if wide or ".64" in name else 1


def _move(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    words = 2 if "64" in modifiers or (x.name.startswith("CS2R") and "32" not in modifiers) else 1
    source = x.operands[1]
    if source in m.special:
        m.put(x.operands[0], m.special[source], words)
    else:
        m.put(x.operands[0], m.wide(source) if words == 2 else m.value(source), words)
    return True


def _split(x: Instruction) -> tuple[list[str], list[str]]:
    """The operands that are predicates and those that are not, behind the first."""
    flags = [o for o in x.operands[1:] if re.fullmatch(r"!?U?P(\d|T)", o)]
    return flags, [o for o in x.operands[1:] if o not in flags]


def _add(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    bits = 64 if "64" in modifiers else 32
    of = m.wide if bits == 64 else m.value
    flags, sources = _split(x)
    extended = "X" in modifiers
    # carries out come before the summands, carries in after them
    first = next(n for n, o in enumerate(x.operands[1:]) if o in sources)
    outs, ins = flags[:first], flags[first:]
    terms = [of(o) for o in sources]
    total = None
    if None not in terms:
        total = sum(t for t in terms if t is not None)
        # -x is ~x + 1 in a chain of additions, where the 1 comes by the carry
        for o, term in zip(sources, terms, strict=True):
            assert term is not None
            if o.startswith("-") and not o.startswith("-0x") and term == 0:
                total += 1 << bits  # ~0 + 1 carries
        for name in ins if extended else []:
            carry = m.predicate(name)
            total = None if carry is None or total is None else total + carry
    m.put(x.operands[0], total, bits // 32)
    for n, name in enumerate(outs):
        carry = None if total is None else total >> bits > n
        m.put_predicate(name, carry)
    return True


def _multiply(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    flags, sources = _split(x)
    if "MOV" in modifiers and len(sources) == 3:
        m.put(x.operands[0], m.value(sources[2]))
        return True
    unsigned = "U32" in modifiers
    a, b = m.value(sources[0]), m.value(sources[1])
    if "WIDE" in modifiers or "HI" in modifiers:
        product = None
        if a is not None and b is not None:
            product = a * b if unsigned else _signed(a) * _signed(b)
        elif 0 in (a, b):
            product = 0
        c = m.wide(sources[2])
        if product is None or c is None:
            return False
        total = product + c
        if "HI" in modifiers:
            m.put(x.operands[0], total >> 32 & MASK)
        else:
            m.put(x.operands[0], total & (2**64 - 1), 2)
            if flags:
                m.put_predicate(flags[0], total >> 64 != 0)
        return True
    c = m.value(sources[2])
    if 0 in (a, b):
        a, b = 0, 0
    if a is None or b is None or c is None:
        return False
    total = a * b + c
    if "X" in modifiers:
        carry = m.predicate(flags[-1])
        if carry is None:
            return False
        total += carry
    m.put(x.operands[0], total & MASK)
    return True


def _lea(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    flags, sources = _split(x)
    first = next(n for n, o in enumerate(x.operands[1:]) if o in sources)
    outs, ins = flags[:first], flags[first:]
    high = "HI" in modifiers
    a, b = m.value(sources[0]), m.value(sources[1])
    top = m.value(sources[2]) if high and len(sources) == 4 else 0
    shift = m.value(sources[-1])
    if a is None or b is None or shift is None or top is None:
        return False
    value = (a | top << 32) << shift
    shifted = value >> 32 if high else value
    total = (shifted & MASK) + b
    if "X" in modifiers:
        carry = m.predicate(ins[-1]) if ins else False
        if carry is None:
            return False
        total += carry
    m.put(x.operands[0], total & MASK)
    for name in outs:
        m.put_predicate(name, total >> 32 != 0)
    return True


def _logic(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    operands = list(x.operands)
    out: str | None = None
    if re.fullmatch(r"U?P(\d|T)", operands[0]):
        out = operands.pop(0)
    destination, a, b, c, table = operands[:5]
    lut = int(table, 16)
    values = [m.value(o) for o in (a, b, c)]
    total: Value = 0
    for n in range(32):
        # an unknown bit may not matter
        options = {0}
        for k, value in enumerate(values):
            bit = 4 >> k
            choices = (0, 1) if value is None else (value >> n & 1,)
            options = {o | bit * choice for o in options for choice in choices}
        results = {lut >> o & 1 for o in options}
        if len(results) > 1:
            total = None
            break
        total |= results.pop() << n
    m.put(destination, total)
    if out is not None:
        m.put_predicate(out, None if total is None else total != 0)
    return True


def _logic_of_predicates(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    outs, (a, b, c), tables = x.operands[:2], x.operands[2:5], x.operands[5:]
    for out, table in zip(outs, tables, strict=False):
        lut = int(table, 16)
        options = {0}
        for k, name in enumerate((a, b, c)):
            bit, value = 4 >> k, m.predicate(name)
            choices = (0, 1) if value is None else (int(value),)
            options = {o | bit * choice for o in options for choice in choices}
        results = {lut >> o & 1 for o in options}
        m.put_predicate(out, None if len(results) > 1 else results.pop() == 1)
    return True


def _shift(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    low, by, high = (m.value(o) for o in x.operands[1:4])
    if by is None:
        return False
    right, upper = "R" in modifiers, "HI" in modifiers
    if (low is None and not (upper and right and by < 32 and "U32" in modifiers)) or high is None:
        if not (not right and not upper and low is not None):
            return False
    wide = (low or 0) | (high or 0) << 32
    by = min(by, 63 if {"U64", "S64"} & modifiers else 32)
    if right:
        if "U32" in modifiers and upper:  # the high word alone
            result = (high or 0) >> by
        elif "S32" in modifiers and upper:
            result = _signed(high or 0) >> by
        else:
            result = wide >> by >> (32 if upper else 0)
    else:
        result = (wide << by) >> 32 if upper else (low or 0) << by
    m.put(x.operands[0], result & MASK)
    return True


def _compare(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    names = x.name.split(".")[1:]
    test = next(name for name in names if name in _COMPARE)
    combine = next((name for name in names if name in _COMBINE), "AND")
    first, second, a, b, with_ = x.operands[:5]
    bits = 64 if {"U64", "S64"} & modifiers else 32
    of = m.wide if bits == 64 else m.value
    p, q = of(a), of(b)
    result: bool | None = None
    if p is not None and q is not None:
        if not ({"U32", "U64"} & modifiers):
            p, q = _signed(p, bits), _signed(q, bits)
        result = _COMPARE[test](p, q)
        if "EX" in modifiers and p == q:  # the high words; the low ones decide
            result = m.predicate(x.operands[5])
    elif q == 0x727FFFFF and test == "GT":  # a square root asks whether x is subnormal or special
        result = False
    elif "U32" in modifiers and 0 in (p, q) and "EX" not in modifiers:
        known = {"GE": q == 0, "LT": q == 0}.get(test)  # x >= 0 holds, x < 0 does not
        result = None if not known else test == "GE"
    other = m.predicate(with_)
    m.put_predicate(first, _combined(combine, result, other))
    m.put_predicate(second, _combined(combine, None if result is None else not result, other))
    return True


def _combined(how: str, x: bool | None, y: bool | None) -> bool | None:
    if how == "AND" and False in (x, y):
        return False
    if how == "OR" and True in (x, y):
        return True
    return None if x is None or y is None else _COMBINE[how](x, y)


def _compare_floats(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    names = x.name.split(".")[1:]
    combine = next((name for name in names if name in _COMBINE), "AND")
    first, second = x.operands[0], x.operands[1]
    other = m.predicate(x.operands[-1])
    result = next((_ORDINARY[name] for name in names if name in _ORDINARY), None)
    m.put_predicate(first, _combined(combine, result, other))
    m.put_predicate(second, _combined(combine, None if result is None else not result, other))
    return True


def _select(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    holds = m.predicate(x.operands[-1])
    words = 2 if "64" in modifiers else 1
    of = m.wide if words == 2 else m.value
    a, b = of(x.operands[1]), of(x.operands[2])
    if holds is None:
        m.put(x.operands[0], a if a == b else None, words)
    else:
        m.put(x.operands[0], a if holds else b, words)
    return True


def _extreme(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    flags, sources = _split(x)
    values = [m.value(o) for o in sources]
    if None in values:
        return False
    numbers = [v if "U32" in modifiers else _signed(v) for v in values if v is not None]
    if x.name.startswith("VIADDMNMX"):
        numbers = [numbers[0] + numbers[1], numbers[2]]
    holds = m.predicate(flags[-1])
    if holds is None:
        return False
    m.put(x.operands[0], (min if holds else max)(numbers) & MASK)
    return True


def _load_constant(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    operand, words = x.operands[1], 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    at = m.constant(operand)
    if at is None:
        return False
    size = 1 if {"U8", "S8"} & modifiers else 2 if {"U16", "S16"} & modifiers else 4 * words
    value: Value = 0
    for n in range((at % 4 + size + 3) // 4):
        word = m.bank.get(at // 4 * 4 + 4 * n)
        value = None if word is None or value is None else value | word << (32 * n)
    if value is not None:
        value = (value >> (8 * (at % 4))) & ((1 << (8 * size)) - 1)
    m.put(x.operands[0], value, words)
    return True


def _permute(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    a, selector, b = (m.value(o) for o in x.operands[1:4])
    if a is None or b is None or selector is None or modifiers:
        return False
    data = (a | b << 32).to_bytes(8, "little")
    picked = bytes(data[selector >> (4 * n) & 7] for n in range(4))
    m.put(x.operands[0], int.from_bytes(picked, "little"))
    return True


def _to_float(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if value is None or {"F64", "U64", "S64", "F16", "BF16"} & modifiers:
        return False
    m.put(x.operands[0], _float_bits(float(value if "U32" in modifiers else _signed(value))))
    return True


def _to_integer(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if value is None or {"F64", "U64", "S64"} & modifiers or not math.isfinite(_float(value)):
        return False
    m.put(x.operands[0], int(_float(value)) & MASK)
    return True


def _reciprocal(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if modifiers != {"RCP"} or value is None or _float(value) == 0:
        return False
    m.put(x.operands[0], _float_bits(1 / _float(value)))
    return True


def _shuffle(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    m.put_predicate(x.operands[0], True)
    m.put(x.operands[1], m.value(x.operands[2]))
    return True


def _constant_halves(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    """Two float16 numbers, when they are multiplied by 0: a constant that another pipe makes."""
    _, sources = _split(x)
    if sources[:2] not in (["-RZ", "RZ"], ["RZ", "RZ"]) or len(sources) != 4:
        return False
    high, low = (struct.unpack("<H", struct.pack("<e", float(o)))[0] for o in sources[2:])
    m.put(x.operands[0], high << 16 | low)
    return True


def _to_uniform(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    flags, sources = _split(x)
    m.put(x.operands[0], m.value(sources[-1]))
    for name in flags:
        m.put_predicate(name, None)
    return True


def _vote(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    holds = m.predicate(x.operands[-1])
    for operand in x.operands[:-1]:
        if re.fullmatch(r"U?P(\d|T)", operand):
            m.put_predicate(operand, holds)
        else:
            m.put(operand, None if holds is None else MASK if holds else 0)
    return True


def _elect(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    for operand in x.operands:
        if re.fullmatch(r"U?P\d", operand):
            m.put_predicate(operand, True)
    return True


def _shared_address(m: _Machine, operand: str) -> Value:
    found = re.fullmatch(r"\[([^\]]*)\]", operand)
    if found is None:
        return None
    total: Value = 0
    for part in re.sub(r"(?<!^)-", "+-", found[1]).split("+"):
        if not part:
            continue
        scaled = re.fullmatch(r"(U?R\w+)\.X(\d+)", part)
        value = m.value(scaled[1]) if scaled else m.value(part)
        if value is None or total is None:
            return None
        total += value * (int(scaled[2]) if scaled else 1)
    return None if total is None else total & MASK


def _load_shared(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    at = _shared_address(m, x.operands[1])
    words = _width(x.name)
    for n in range(words):
        prefix = x.operands[0].rstrip("0123456789")
        name = f"{prefix}{int(x.operands[0][len(prefix) :]) + n}"
        m.registers[name] = None if at is None else m.shared.get(at + 4 * n)
    return True


def _store_shared(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    at = _shared_address(m, x.operands[0])
    if at is None:
        m.shared.clear()
        return True
    for n in range(_width(x.name)):
        m.shared[at + 4 * n] = m.value(x.operands[1], n)
    return True


def _atomic(m: _Machine, x: Instruction, modifiers: set[str]) -> bool:
    for operand in x.operands[:2]:
        if re.fullmatch(r"P(\d|T)", operand):
            m.put_predicate(operand, None)
        elif re.fullmatch(r"R\d+", operand):
            m.put(operand, 0, _width(x.name))
            break
    return True


_HANDLERS: dict[str, Callable[[_Machine, Instruction, set[str]], bool]] = {
    "MOV": _move, "UMOV": _move, "CS2R": _move, "CS2UR": _move, "S2R": _move, "S2UR": _move,
    "IADD3": _add, "UIADD3": _add, "VIADD": _add, "UVIADD": _add, "IADD": _add, "UIADD": _add,
    "IMAD": _multiply, "UIMAD": _multiply, "LEA": _lea, "ULEA": _lea,
    "LOP3": _logic, "ULOP3": _logic, "PLOP3": _logic_of_predicates, "UPLOP3": _logic_of_predicates,
    "SHF": _shift, "USHF": _shift, "ISETP": _compare, "UISETP": _compare,
    "FSETP": _compare_floats, "DSETP": _compare_floats, "SEL": _select, "USEL": _select,
    "VIMNMX": _extreme, "IMNMX": _extreme, "UIMNMX": _extreme, "UVIMNMX": _extreme,
    "VIADDMNMX": _extreme, "LDC": _load_constant, "ULDC": _load_constant, "LDCU": _load_constant,
    "PRMT": _permute, "UPRMT": _permute, "I2F": _to_float, "I2FP": _to_float, "UI2F": _to_float,
    "F2I": _to_integer, "MUFU": _reciprocal, "SHFL": _shuffle, "R2UR": _to_uniform,
    "HFMA2": _constant_halves, "VOTE": _vote, "VOTEU": _vote, "UVOTE": _vote, "ELECT": _elect,
    "LDS": _load_shared, "STS": _store_shared,
    "ATOM": _atomic, "ATOMG": _atomic, "ATOMS": _atomic,
}  # fmt: skip
