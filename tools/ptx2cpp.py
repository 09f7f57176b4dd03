"""Translates nvcc's PTX to C++ that runs on the simulator (csrc/sim/ptx.h): the instructions nvcc chose are executed.

What it does not know is an error that names the instruction and its line; nothing is skipped but directives that
change no result. Shared memory is dynamic only, as csrc/include/pikv/portable.cuh has it.

    python -m tools.ptx2cpp kernels.ptx > kernels.cpp
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools import ptx_instructions
from tools.ptx_instructions import CPP_TYPES

SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"thread_index().{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"block_size().{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"block_index().{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"grid_size().{axis}" for axis in "xyz"},
    "%laneid": "static_cast<uint32_t>(lane())",
}
CACHING = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate"}  # hints on loads and stores
DIRECTIVES = {".pragma", ".loc"}


class TranslationError(ValueError):
    """PTX that is not understood; the message names the instruction and its line."""


class Statement(NamedTuple):
    """One statement of a kernel's body: a label ("name:"), a brace, or an instruction without its semicolon."""

    text: str
    line: int


def translate(ptx: str) -> str:
    """C++ of a PTX module's kernels."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    if re.search(r"\.func\b", ptx):
        raise TranslationError(".func: functions that are called are not understood, only kernels")
    static = re.search(r"^\s*\.shared\b.*", ptx, re.M)
    if static:
        raise TranslationError(f"{static[0].strip()!r}: shared memory is dynamic only")
    dynamic = set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", ptx))
    parts = ['#include "ptx.h"\n\nnamespace pikv::sim {\nnamespace {\n']
    entries = re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx)
    for count, entry in enumerate(entries):
        end = _closing_brace(ptx, entry.end())
        first_line = ptx.count("\n", 0, entry.end()) + 1
        kernel = Kernel(entry[1], entry[2], ptx[entry.end() : end], first_line, dynamic)
        parts.append(kernel.translate(f"kernel_{count}"))
    return "\n".join([*parts, "}  // namespace\n}  // namespace pikv::sim\n"])


class Kernel:
    """One .entry and its translation."""

    def __init__(self, symbol: str, parameters: str, body: str, first_line: int, dynamic: set[str]) -> None:
        self.symbol = symbol
        self.body = body
        self.first_line = first_line
        self.dynamic = dynamic  # names of the block's dynamic shared memory
        self.registers: dict[str, str] = {}  # PTX's name, or its prefix before <count>: type
        self.parameters: dict[str, int] = {}
        self.parameter_bytes = self._lay_out(parameters)

    def translate(self, name: str) -> str:
        """The kernel as a C++ function `name` and its registration."""
        lines = [self._statement(statement) for statement in statements(self.body, self.first_line)]
        return "\n".join(
            [
                f"// {self.symbol}",
                f"void {name}([[maybe_unused]] const void* parameters) {{",
                *lines,
                "}",
                f'const PtxRegistration {name}_registration({{"{self.symbol}", {name}, {self.parameter_bytes}}});\n',
            ]
        )

    def _lay_out(self, parameters: str) -> int:
        """Where each parameter is; the bytes of all."""
        at = 0
        for text in filter(None, map(str.strip, parameters.split(","))):
            found = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
            if not found or found[2] not in CPP_TYPES:
                raise TranslationError(f"parameter {text!r} of {self.symbol} is not understood")
            size = _bytes(found[2])
            alignment = int(found[1] or size)
            at = (at + alignment - 1) // alignment * alignment
            self.parameters[found[3]] = at
            at += size * int(found[4] or 1)
        return at

    def _statement(self, statement: Statement) -> str:
        text = statement.text
        if text in "{}":
            return text
        if text.endswith(":"):
            return f"{_label(text[:-1])}:;"
        if text.startswith("."):
            return self._directive(statement)
        guard = re.match(r"@(!?)(%[\w$]+)\s+", text)
        condition = f"if ({guard[1]}{_variable(guard[2])}) " if guard else ""
        text = text[guard.end() :] if guard else text
        name, _, rest = text.partition(" ")
        try:
            code = self._instruction(name, _operands(rest), statement.line)
        except (IndexError, KeyError, ValueError) as error:
            raise TranslationError(f"line {statement.line}: {text!r} is not understood: {error!r}") from error
        if code is None:
            raise TranslationError(f"line {statement.line}: instruction {name} is not understood: {text!r}")
        return f"{condition}{{ {code} }}"

    def _directive(self, statement: Statement) -> str:
        name, _, rest = statement.text.partition(" ")
        if name in DIRECTIVES:
            return ""
        found = re.fullmatch(r"\.(\w+)\s+(.*)", rest)
        if name != ".reg" or not found or found[1] not in CPP_TYPES:
            raise TranslationError(f"line {statement.line}: directive {statement.text!r} is not understood")
        names: list[str] = []
        for item in found[2].split(","):
            several = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", item)
            prefix = several[1] if several else item.strip()
            self.registers[prefix] = found[1]
            names += [f"{prefix}{i}" for i in range(int(several[2]))] if several else [prefix]
        return f"{CPP_TYPES[found[1]]} {', '.join(map(_variable, names))};"

    def _register_type(self, register: str) -> str:
        kind = self.registers.get(register) or self.registers.get(re.sub(r"\d+$", "", register))
        if kind is None:
            raise ValueError(f"{register} is not declared")
        return CPP_TYPES[kind]

    def _read(self, operand: str, kind: str) -> str:
        """An operand as an expression of the type `kind`."""
        wanted = CPP_TYPES[kind]
        if operand in SPECIAL_REGISTERS:
            return f"static_cast<{wanted}>({SPECIAL_REGISTERS[operand]})"
        if re.fullmatch(r"%[\w$]+", operand) or operand in self.registers:
            return _converted(_variable(operand), self._register_type(operand), wanted)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return f"std::bit_cast<{wanted}>(0x{operand[2:]}u)"
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", operand):
            if wanted == "float":
                raise ValueError(f"literal {operand} where a float is due")
            return f"static_cast<{wanted}>({int(operand, 0) & (2**64 - 1)}ull)"
        return f"static_cast<{wanted}>({self._symbol(operand)})"

    def _symbol(self, name: str) -> int:
        """The address of a parameter or of shared memory, each counted from its own beginning."""
        if name in self.parameters:
            return self.parameters[name]
        if name in self.dynamic:
            return 0
        raise ValueError(f"{name} is neither a register nor a parameter")

    def _address(self, operand: str) -> str:
        found = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand)
        if not found:
            raise ValueError(f"address {operand}")
        offset = int(found[2] or 0) & (2**64 - 1)
        return f"{self._read(found[1], 'u64')} + {offset}ull"

    def _write(self, register: str, value: str, kind: str) -> str:
        """Puts a value of C++ type `kind` into a register; what is narrower is extended as its sign has it."""
        if register == "_":
            return f"(void)({value});"
        return f"{_variable(register)} = {_converted(f'({value})', kind, self._register_type(register))};"

    def _instruction(self, name: str, operands: list[str], line: int) -> str | None:
        """C++ of one instruction; None: unknown."""
        parts = name.split(".")
        if parts[0] in ("ld", "st"):
            return self._memory(name, operands)
        if parts[0] in ("atom", "red"):
            return self._atomic(parts, operands)
        if name.startswith("cp.async"):
            return self._copy(name, operands)
        site = f'Site{{"PTX", {line}}}'
        match parts:
            case ["bra"] | ["bra", "uni"]:
                return f"goto {_label(operands[0])};"
            case ["ret"] | ["exit"]:
                return "return;"
            case ["trap"]:
                return 'fail("trap");'
            case ["bar", "sync"] if operands == ["0"]:
                return f"block_barrier({site});"
            case ["bar", "warp", "sync"]:
                return f"warp_barrier({self._read(operands[0], 'u32')}, {site});"
            case ["shfl", "sync", ("up" | "down" | "bfly" | "idx") as mode, "b32"]:
                target, _, predicate = operands[0].partition("|")
                value, by, clamp, mask = (self._read(operand, "u32") for operand in operands[1:])
                code = f"const auto got = ptx::shuffle_{mode}({value}, {by}, {clamp}, {mask}, {site});"
                code += self._write(target, "got.value", "uint32_t")
                return code + (self._write(predicate, "got.in_range", "bool") if predicate else "")
            case ["vote", "sync", ("ballot" | "any" | "all") as mode, _]:
                mask = self._read(operands[2], "u32")
                votes = f"ballot({mask}, {self._read(operands[1], 'pred')}, {site})"
                test = {"ballot": votes, "any": f"{votes} != 0", "all": f"{votes} == {mask}"}
                return self._write(operands[0], test[mode], "uint32_t" if mode == "ballot" else "bool")
            case ["prefetch", "global", "L2"]:
                return f"(void)({self._address(operands[0])});"
        expression = ptx_instructions.find(name)
        if expression is None or len(operands) != 1 + len(expression.operands):
            return None
        pairs = zip(operands[1:], expression.operands, strict=True)
        code = expression.code.format(*(self._read(operand, kind) for operand, kind in pairs))
        result = CPP_TYPES[expression.result]
        return self._write(operands[0], f"static_cast<{result}>({code})", result)

    def _memory(self, name: str, operands: list[str]) -> str | None:
        """ld and st of param, global and shared, of one number or a vector of them."""
        operation, space, *rest = [part for part in name.split(".") if part not in CACHING]
        count = {"v2": 2, "v4": 4}.get(rest[0], 1)
        if space not in ("param", "global", "shared") or len(rest) != (1 if count == 1 else 2):
            return None
        kind = CPP_TYPES[rest[-1]]
        address, values = (operands[1], operands[0]) if operation == "ld" else (operands[0], operands[1])
        registers = [value.strip() for value in values.strip("{}").split(",")]
        if len(registers) != count:
            return None
        if space == "param":
            pointer = f"ptx::parameter<{kind}>(parameters, {self._address(address)})"
        else:
            pointer = f'ptx::{space}<{kind}, {count}>({self._address(address)}, "{name}")'
        code = f"auto* const at = {pointer};"
        for i, register in enumerate(registers):
            if operation == "ld":
                code += " " + self._write(register, f"at[{i}]", kind)
            else:
                code += f" at[{i}] = {self._read(register, rest[-1])};"
        return code

    def _atomic(self, parts: list[str], operands: list[str]) -> str | None:
        """atom and red: additions to global and shared memory."""
        if parts[1] not in ("global", "shared") or parts[2] != "add" or parts[3] not in ("u32", "s32", "f32"):
            return None
        kind = CPP_TYPES[parts[3]]
        target, (address, value) = ("_", operands) if parts[0] == "red" else (operands[0], operands[1:])
        pointer = f'ptx::{parts[1]}<{kind}, 1>({self._address(address)}, "{".".join(parts)}")'
        return self._write(target, f"ptx::atomic_add({pointer}, {self._read(value, parts[3])})", kind)

    def _copy(self, name: str, operands: list[str]) -> str | None:
        """cp.async and the groups of it."""
        if name == "cp.async.commit_group":
            return "copy_async_commit();"
        if name == "cp.async.wait_group":
            return f"copy_async_wait({int(operands[0])});"
        if name not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global") or len(operands) != 3:
            return None
        to, source, size = self._address(operands[0]), self._address(operands[1]), int(operands[2])
        return f"copy_async(shared_memory() + ({to}), reinterpret_cast<const void*>({source}), {size});"


def statements(body: str, first_line: int) -> Iterator[Statement]:
    """A body's statements in order."""
    pattern = re.compile(r"\s*(?:([{}])|([$\w]+:)|([^;{}]+(?:\{[^{}]*\}[^;{}]*)*);)")
    at = 0
    while body[at:].strip():
        found = pattern.match(body, at)
        line = first_line + body.count("\n", 0, at + len(body[at:]) - len(body[at:].lstrip()))
        if not found:
            raise TranslationError(f"line {line}: {body[at : at + 80].strip()!r} is not understood")
        at = found.end()
        yield Statement(" ".join((found[1] or found[2] or found[3]).split()), line)


def _operands(text: str) -> list[str]:
    """Operands apart, vectors {a, b} as one."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{}])+", text) if part.strip()]


def _closing_brace(text: str, at: int) -> int:
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise TranslationError("a kernel's body does not end")


def _converted(value: str, kind: str, wanted: str) -> str:
    """A C++ value of type `kind` as a `wanted`: between float and integer its bits, else as C++ converts."""
    if kind == wanted:
        return value
    if "float" in (kind, wanted):
        return f"std::bit_cast<{wanted}>({value})"
    return f"static_cast<{wanted}>({value})"


def _bytes(kind: str) -> int:
    return int(kind[1:]) // 8


def _variable(register: str) -> str:
    return "v_" + register.lstrip("%").replace("$", "_")


def _label(name: str) -> str:
    return "L" + name.replace("$", "_")


if __name__ == "__main__":
    print(translate(Path(sys.argv[1]).read_text()))
