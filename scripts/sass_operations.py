"""What each instruction does to the registers of :class:`sass_machine.Machine`.

A handler returns False where it does not know the result, which is forgotten then.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable

from sass_machine import MASK, Instruction, Machine, Value, float_bits, width


def execute(machine: Machine, x: Instruction) -> None:
    """Execute an instruction that does not jump."""
    family, *modifiers = x.name.split(".")
    handler = _HANDLERS.get(family)
    if handler is None or not handler(machine, x, set(modifiers)):
        machine.forget(x)


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b, "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip
_COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip
# Comparisons of such a number.
_ORDINARY = {"EQ": False, "EQU": False, "NE": True, "NEU": True, "NAN": False, "NUM": True}


def _move(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _add(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _multiply(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _lea(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _logic(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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
        total = (total or 0) | results.pop() << n
    m.put(destination, total)
    if out is not None:
        m.put_predicate(out, None if total is None else total != 0)
    return True


def _logic_of_predicates(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _shift(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    low, by, high = (m.value(o) for o in x.operands[1:4])
    right, upper = "R" in modifiers, "HI" in modifiers
    if by is None or (low is None and right != upper) or (low is None and not right):
        return False
    if high is None and (right or upper):
        return False
    low, high = low or 0, high or 0
    if right and upper:  # of the high word alone
        result = _signed(high) >> by if "S32" in modifiers else high >> by
    else:
        wide = low | high << 32
        result = wide >> by if right else (wide << by) >> (32 if upper else 0)
    m.put(x.operands[0], result & MASK)
    return True


def _compare(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _compare_floats(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    names = x.name.split(".")[1:]
    combine = next((name for name in names if name in _COMBINE), "AND")
    first, second = x.operands[0], x.operands[1]
    other = m.predicate(x.operands[-1])
    result = next((_ORDINARY[name] for name in names if name in _ORDINARY), None)
    m.put_predicate(first, _combined(combine, result, other))
    m.put_predicate(second, _combined(combine, None if result is None else not result, other))
    return True


def _select(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    holds = m.predicate(x.operands[-1])
    words = 2 if "64" in modifiers else 1
    of = m.wide if words == 2 else m.value
    a, b = of(x.operands[1]), of(x.operands[2])
    if holds is None:
        m.put(x.operands[0], a if a == b else None, words)
    else:
        m.put(x.operands[0], a if holds else b, words)
    return True


def _extreme(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
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


def _load_constant(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    operand, words = x.operands[1], 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    at = m.constant(operand)
    if at is None:
        return False
    size = 1 if {"U8", "S8"} & modifiers else 2 if {"U16", "S16"} & modifiers else 4 * words
    value: Value = 0
    for n in range((at % 4 + size + 3) // 4):
        word = m.bank.get(at // 4 * 4 + 4 * n)
        value = None if word is None or value is None else value | (word << (32 * n))
    if value is not None:
        value = (value >> (8 * (at % 4))) & ((1 << (8 * size)) - 1)
    m.put(x.operands[0], value, words)
    return True


def _permute(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    a, selector, b = (m.value(o) for o in x.operands[1:4])
    if selector is None or modifiers:
        return False
    if a is None or b is None:
        # 16 bits are put into a register, and its others, which nobody reads, are not known
        needed = (selector & 7, selector >> 4 & 7)
        if (a is None and min(needed) < 4) or (b is None and max(needed) >= 4):
            return False
    data = (a or 0) | (b or 0) << 32
    picked = bytes(data >> 8 * (selector >> (4 * n) & 7) & 0xFF for n in range(4))
    m.put(x.operands[0], int.from_bytes(picked, "little"))
    return True


def _to_float(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if value is None or {"F64", "U64", "S64", "F16", "BF16"} & modifiers:
        return False
    m.put(x.operands[0], float_bits(float(value if "U32" in modifiers else _signed(value))))
    return True


def _to_integer(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if value is None or {"F64", "U64", "S64"} & modifiers or not math.isfinite(_float(value)):
        return False
    m.put(x.operands[0], int(_float(value)) & MASK)
    return True


def _reciprocal(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    value = m.value(x.operands[1])
    if modifiers != {"RCP"} or value is None or _float(value) == 0:
        return False
    m.put(x.operands[0], float_bits(1 / _float(value)))
    return True


def _shuffle(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    m.put_predicate(x.operands[0], True)
    m.put(x.operands[1], m.value(x.operands[2]))
    return True


def _constant_halves(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    """Two float16 numbers, when they are multiplied by 0: a constant that another pipe makes."""
    _, sources = _split(x)
    if sources[:2] not in (["-RZ", "RZ"], ["RZ", "RZ"]) or len(sources) != 4:
        return False
    high, low = (struct.unpack("<H", struct.pack("<e", float(o)))[0] for o in sources[2:])
    m.put(x.operands[0], high << 16 | low)
    return True


def _to_uniform(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    flags, sources = _split(x)
    m.put(x.operands[0], m.value(sources[-1]))
    for name in flags:
        m.put_predicate(name, None)
    return True


def _predicates_of_bits(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    register, _, byte = x.operands[1].partition(".B")
    value, mask = m.value(register), m.known(x, x.operands[2])
    for n in range(8):
        if mask >> n & 1:
            bit = None if value is None else value >> (8 * int(byte or "0") + n) & 1
            m.put_predicate(f"P{n}", None if bit is None else bit == 1)
    return True


def _vote(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    holds = m.predicate(x.operands[-1])
    for operand in x.operands[:-1]:
        if re.fullmatch(r"U?P(\d|T)", operand):
            m.put_predicate(operand, holds)
        else:
            m.put(operand, None if holds is None else MASK if holds else 0)
    return True


def _elect(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    for operand in x.operands:
        if re.fullmatch(r"U?P\d", operand):
            m.put_predicate(operand, True)
    return True


def _shared_address(m: Machine, operand: str) -> Value:
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


def _load_shared(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    at = _shared_address(m, x.operands[1])
    words = width(x.name)
    for n in range(words):
        prefix = x.operands[0].rstrip("0123456789")
        name = f"{prefix}{int(x.operands[0][len(prefix) :]) + n}"
        m.registers[name] = None if at is None else m.shared.get(at + 4 * n)
    return True


def _store_shared(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    at = _shared_address(m, x.operands[0])
    if at is None:
        m.shared.clear()
        return True
    for n in range(width(x.name)):
        m.shared[at + 4 * n] = m.value(x.operands[1], n)
    return True


def _atomic(m: Machine, x: Instruction, modifiers: set[str]) -> bool:
    for operand in x.operands[:2]:
        if re.fullmatch(r"P(\d|T)", operand):
            m.put_predicate(operand, None)
        elif re.fullmatch(r"R\d+", operand):
            m.put(operand, 0, width(x.name))
            break
    return True


_HANDLERS: dict[str, Callable[[Machine, Instruction, set[str]], bool]] = {
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
    "R2P": _predicates_of_bits, "LDS": _load_shared, "STS": _store_shared,
    "ATOM": _atomic, "ATOMG": _atomic, "ATOMS": _atomic,
}  # fmt: skip
