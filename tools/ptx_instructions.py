"""PTX's arithmetic as C++ expressions: one table, looked up by an instruction's name without its type.

An expression's {0}, {1}, ... are operands of the type that the entry says ("t": the instruction's own), {T} is that
type in C++. Memory, control flow and what threads do together are in ptx2cpp.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CPP_TYPES = {
    "pred": "bool",
    **{f"b{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f16": "uint16_t",
    "f32": "float",
    "f64": "double",
}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "hi": ">", "hs": ">="}
COMPARISONS["ls"] = "<="
ROUND = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


class Expression(NamedTuple):
    """C++ of type `result`, from operands of the types `operands`."""

    code: str
    operands: tuple[str, ...]
    result: str


# Whole numbers: "u" stands for the unsigned type of the same width, in which sums and products wrap.
INTEGERS = {
    "add": ("{0} + {1}", "uu"),
    "sub": ("{0} - {1}", "uu"),
    "mul.lo": ("{0} * {1}", "uu"),
    "mul.hi": ("ptx::multiply_high({0}, {1})", "tt"),
    "mad.lo": ("{0} * {1} + {2}", "uuu"),
    "neg": ("-{0}", "u"),
    "abs": ("{0} < 0 ? -{0} : {0}", "t"),
    "div": ("ptx::divide({0}, {1})", "tt"),
    "rem": ("ptx::remainder({0}, {1})", "tt"),
    "min": ("{0} < {1} ? {0} : {1}", "tt"),
    "max": ("{0} > {1} ? {0} : {1}", "tt"),
    "and": ("{0} & {1}", "tt"),
    "or": ("{0} | {1}", "tt"),
    "xor": ("{0} ^ {1}", "tt"),
    "not": ("~{0}", "t"),
    "shl": ("ptx::shift_left({0}, {1})", "ti"),
    "shr": ("ptx::shift_right({0}, {1})", "ti"),
    "mov": ("{0}", "t"),
    "cvta.to.global": ("{0}", "t"),
    "cvta.global": ("{0}", "t"),
}
BITS = {
    "popc.b32": Expression("__popc({0})", ("b32",), "u32"),
    "clz.b32": Expression("__clz({0})", ("s32",), "u32"),
    "brev.b32": Expression("ptx::reverse_bits({0})", ("b32",), "b32"),
    "bfind.shiftamt.u32": Expression("ptx::find_highest_shift({0})", ("u32",), "u32"),
    "bfi.b32": Expression("ptx::insert_field({0}, {1}, {2}, {3})", ("b32", "b32", "u32", "u32"), "b32"),
    "bfe.u32": Expression("ptx::extract_field({0}, {1}, {2})", ("u32", "u32", "u32"), "u32"),
    "prmt.b32": Expression("__byte_perm({0}, {1}, {2})", ("b32", "b32", "b32"), "b32"),
    "dp4a.s32.s32": Expression("__dp4a({0}, {1}, {2})", ("s32", "s32", "s32"), "s32"),
    "not.pred": Expression("!{0}", ("pred",), "pred"),
}
FLOATS = {
    "add": "{0} + {1}",
    "add.rn": "{0} + {1}",
    "sub": "{0} - {1}",
    "sub.rn": "{0} - {1}",
    "mul": "{0} * {1}",
    "mul.rn": "{0} * {1}",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "fma.rm": "ptx::fma_down({0}, {1}, {2})",
    "div.rn": "{0} / {1}",
    "rcp.rn": "1.0f / {0}",
    "sqrt.rn": "std::sqrt({0})",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "min": "std::fmin({0}, {1})",
    "max": "std::fmax({0}, {1})",
    "mov": "{0}",
    "ex2.approx.ftz": "ptx::flush(std::exp2(ptx::flush({0})))",
    "lg2.approx.ftz": "std::log2(ptx::flush({0}))",
}


def find(name: str) -> Expression | None:
    """The expression for an instruction's full name, such as "mad.lo.s32"; None: unknown."""
    if name in BITS:
        return BITS[name]
    stem, _, kind = name.rpartition(".")
    if stem.startswith("setp."):
        return _comparison(stem.removeprefix("setp."), kind)
    if stem.startswith("cvt."):
        return _conversion(stem.removeprefix("cvt.").split("."), kind)
    if stem == "selp" and kind in CPP_TYPES:
        return Expression("{2} ? {0} : {1}", (kind, kind, "pred"), kind)
    if stem in ("mul.wide", "mad.wide") and kind in WIDER:
        wide = WIDER[kind]
        product = f"static_cast<{CPP_TYPES[wide]}>({{0}}) * {{1}}"
        if stem == "mul.wide":
            return Expression(product, (kind, kind), wide)
        return Expression(product + " + {2}", (kind, kind, wide), wide)
    if kind == "f32" and stem in FLOATS:
        code = FLOATS[stem]
        return Expression(code, ("f32",) * (1 + max(map(int, re.findall(r"\{(\d)\}", code)))), "f32")
    if kind != "f32" and kind in CPP_TYPES and stem in INTEGERS:
        code, operands = INTEGERS[stem]
        types = {"t": kind, "u": "u" + kind[1:], "i": "u32"}
        return Expression(code, tuple(types[operand] for operand in operands), kind)
    return None


def _comparison(relation: str, kind: str) -> Expression | None:
    if kind not in CPP_TYPES:
        return None
    if relation in COMPARISONS:
        ordered = " && {0} == {0} && {1} == {1}" if relation == "ne" and kind == "f32" else ""
        return Expression(f"{{0}} {COMPARISONS[relation]} {{1}}{ordered}", (kind, kind), "pred")
    if kind == "f32" and relation.removesuffix("u") in COMPARISONS:  # true of NaN too
        code = f"{{0}} {COMPARISONS[relation.removesuffix('u')]} {{1}} || {{0}} != {{0}} || {{1}} != {{1}}"
        return Expression(code, (kind, kind), "pred")
    if kind == "f32" and relation in ("num", "nan"):
        code = "{0} == {0} && {1} == {1}" if relation == "num" else "{0} != {0} || {1} != {1}"
        return Expression(code, (kind, kind), "pred")
    return None


def _conversion(modes: list[str], source: str) -> Expression | None:
    """cvt{.rounding}{.sat}.target.source, `modes` being all but the source."""
    *modes, target = modes
    integers = {kind for kind in CPP_TYPES if kind[0] in "us"}
    code = None
    if target in integers and source in integers and not modes:
        code = f"static_cast<{CPP_TYPES[target]}>({{0}})"
    elif target in integers and source == "f32" and len(modes) == 1 and modes[0] in ROUND:
        code = f"ptx::to_integer<{CPP_TYPES[target]}>({ROUND[modes[0]]}({{0}}))"
    elif target == "f32" and source in integers and modes == ["rn"]:
        code = "static_cast<float>({0})"
    elif target == source == "f32" and len(modes) == 1 and modes[0] in ROUND:
        code = f"{ROUND[modes[0]]}({{0}})"
    elif target == source == "f32" and modes == ["sat"]:
        code = "ptx::saturate({0})"
    elif target == "f32" and source == "f16" and not modes:
        code = "half_to_float({0})"
    elif target == "f16" and source == "f32" and modes in (["rn"], ["rm"], ["rp"]):
        rounding = {"rn": "kNearest", "rm": "kDown", "rp": "kUp"}[modes[0]]
        code = f"float_to_half({{0}}, Rounding::{rounding})"
    return Expression(code, (source,), target) if code else None
