"""Single PTX instructions, written by hand, give what the PTX ISA says, at edges that compiled kernels seldom reach."""

from __future__ import annotations

import struct
from ctypes import c_void_p
from pathlib import Path

import numpy as np

from tools import ptx2cpp, simulate

ONES = 0xFFFFFFFF


def f32(x):
    """The bits of a float."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


NAN, INFINITY = f32(float("nan")), f32(float("inf"))
# Instruction, its operands' bits, the result's bits. An "f32" type at the end of the name: operands are floats.
INSTRUCTIONS = [
    ("shl.b32", [1, 31], 1 << 31),
    ("shl.b32", [1, 32], 0),
    ("shr.u32", [ONES, 40], 0),
    ("shr.s32", [1 << 31, 40], ONES),
    ("shr.s32", [1 << 30, 40], 0),
    ("neg.s32", [5], ONES - 4),
    ("abs.s32", [ONES - 4], 5),
    ("not.b32", [1], ONES - 1),
    ("div.s32", [ONES - 6, 2], ONES - 2),
    ("div.u32", [7, 0], ONES),
    ("div.s32", [1 << 31, ONES], 1 << 31),
    ("rem.s32", [ONES - 6, 2], ONES),
    ("rem.s32", [1 << 31, ONES], 0),
    ("rem.u32", [7, 4], 3),
    ("mul.lo.s32", [0x10001, 0x10001], 0x20001),
    ("mul.hi.u32", [ONES, ONES], ONES - 1),
    ("mul.hi.s32", [ONES, ONES], 0),
    ("mad.lo.s32", [3, ONES, 4], 1),
    ("min.s32", [ONES, 1], ONES),
    ("min.u32", [ONES, 1], 1),
    ("max.s32", [ONES, 1], 1),
    ("popc.b32", [0xF0F], 8),
    ("clz.b32", [1], 31),
    ("clz.b32", [0], 32),
    ("brev.b32", [6], 0x60000000),
    ("bfind.shiftamt.u32", [1], 31),
    ("bfind.shiftamt.u32", [0], ONES),
    ("bfi.b32", [0x5, 0xFFFF0000, 4, 3], 0xFFFF0050),
    ("bfi.b32", [1, 0, 31, 1], 1 << 31),
    ("bfe.u32", [0xABCD, 4, 8], 0xBC),
    ("prmt.b32", [0x33221100, 0x77665544, 0x7531], 0x77553311),
    ("prmt.b32", [0x00008000, 0, 0x9990], 0xFFFFFF00),
    ("dp4a.s32.s32", [0xFF02FF02, 0x03030303, 10], 16),
    ("add.f32", [f32(1e30), f32(-1e30)], 0),
    ("fma.rn.f32", [f32(1 + 2**-12), f32(1 - 2**-12), f32(-1)], f32(-(2**-24))),
    ("fma.rm.f32", [f32(1), f32(2**-25), f32(1)], f32(1)),
    ("fma.rm.f32", [f32(-1), f32(2**-25), f32(1)], f32(1 - 2**-24)),
    ("fma.rn.f32", [f32(-1), f32(2**-26), f32(1)], f32(1)),
    ("div.rn.f32", [f32(1), f32(3)], f32(1 / 3)),
    ("sqrt.rn.f32", [f32(2)], f32(2**0.5)),
    ("rcp.rn.f32", [f32(3)], f32(1 / 3)),
    ("min.f32", [NAN, f32(2)], f32(2)),
    ("max.f32", [f32(2), NAN], f32(2)),
    ("ex2.approx.ftz.f32", [f32(-3)], f32(0.125)),
    ("ex2.approx.ftz.f32", [f32(-140)], 0),
    ("cvt.sat.f32.f32", [f32(-3)], 0),
    ("cvt.sat.f32.f32", [f32(0.25)], f32(0.25)),
    ("cvt.sat.f32.f32", [f32(3)], f32(1)),
    ("cvt.sat.f32.f32", [NAN], 0),
    ("cvt.rni.f32.f32", [f32(2.5)], f32(2)),
    ("cvt.rzi.u32.f32", [f32(-5)], 0),
    ("cvt.rzi.u32.f32", [f32(3.9)], 3),
    ("cvt.rzi.u32.f32", [INFINITY], ONES),
    ("cvt.rzi.s32.f32", [f32(-3.9)], ONES - 2),
    ("cvt.rzi.s32.f32", [f32(3e9)], 0x7FFFFFFF),
    ("cvt.rni.s32.f32", [f32(-3.5)], ONES - 3),
    ("cvt.rzi.s32.f32", [NAN], 0),
    ("cvt.rn.f32.s32", [ONES], f32(-1)),
    ("cvt.rn.f32.u32", [ONES], f32(2**32)),
]


def ptx_of(instructions):
    """A kernel that takes operands from its first parameter and writes results to its second, one after another."""
    body, at = [], 0
    for i, (name, operands, _) in enumerate(instructions):
        source = name.split(".")[-1]
        target = name.split(".")[-2] if name.startswith("cvt.") else source
        if name.startswith(("shl", "shr", "bfi", "bfe", "prmt")):
            source = target = "b32"
        registers = [f"%{'f' if source == 'f32' else 'r'}{k + 1}" for k in range(len(operands))]
        kind = "f32" if source == "f32" else "u32"
        for register in registers:
            body.append(f"ld.global.{kind} {register}, [%rd1+{at}];")
            at += 4
        result = "%f0" if target == "f32" else "%r0"
        body.append(f"{name} {result}, {', '.join(registers)};")
        body.append(f"st.global.{'f32' if target == 'f32' else 'u32'} [%rd2+{4 * i}], {result};")
    kernel = "_ZN4pikv5trial19instructions_kernelEPKjPj"
    parameters = ", ".join(f".param .u64 {kernel}_param_{k}" for k in range(2))
    lines = [
        ".reg .b32 %r<8>; .reg .f32 %f<8>; .reg .b64 %rd<3>;",
        *(f"ld.param.u64 %rd{k + 1}, [{kernel}_param_{k}];" for k in range(2)),
        *body,
        "ret;",
    ]
    return f".visible .entry {kernel}({parameters})\n{{\n" + "\n".join(lines) + "\n}\n"


def test_instructions(tmp_path):
    translated = tmp_path / "instructions.cpp"
    translated.write_text(ptx2cpp.translate(ptx_of(INSTRUCTIONS)))
    launcher = Path(__file__).resolve().parent / "instructions.cpp"
    library = simulate.load(simulate.build([launcher, translated], simulator="ptx"))
    operands = np.array([bits for _, given, _ in INSTRUCTIONS for bits in given], np.uint32)
    results = np.zeros(len(INSTRUCTIONS), np.uint32)
    pointers = [array.ctypes.data_as(c_void_p) for array in (operands, results)]
    simulate.check(library, library.trial_instructions(*pointers))
    cases = zip(INSTRUCTIONS, results.tolist(), strict=True)
    wrong = [(name, list(map(hex, given)), hex(got)) for (name, given, bits), got in cases if got != bits]
    assert wrong == []
