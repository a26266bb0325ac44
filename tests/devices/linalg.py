"""What the Linalg of a kernel tells about how it will run on Ascend: slow code in its loops, and how much of the unified buffer is live.

`slow_code` names what the vector cores do element by element: stores of single elements inside a loop, integers compared or computed as
64 bits by lanes, loads of single elements of a whole tile. Fine are: a loop that copies a row (`memref.copy`) for each index of a tile,
and one that loads one number for each row of it.

`peak_bytes` counts buffers between the first and the last line that needs them, as the compiler that follows may lay them out: a result
takes the buffer of its destination where nobody reads that later. It double-buffers what is moved, so half of the buffer is the limit.
"""

import re
from dataclasses import dataclass, field
from math import prod

__all__ = ["BUFFER_BYTES", "LIMIT_BYTES", "narrow_rows", "peak_bytes", "slow_code"]

BUFFER_BYTES = 192 << 10
LIMIT_BYTES = BUFFER_BYTES // 2
BLOCK_BYTES = 32
ELEMENT_BYTES = {"i1": 1, "i8": 1, "ui8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8, "index": 8}
NAME = re.compile(r"%[\w#@-]+")
RESULT = re.compile(r"^(%[\w@-]+)(?::\d+)?(?:, %[\w@-]+)* = (.*)$")
SHAPED = re.compile(r"(tensor|memref)<((?:\d+x)*)(\w+)(?:, [^>]*(?:<[^>]*>)?[^>]*)?>")
# Another name for what the first operand holds.
VIEWS = ("bufferization.to_tensor", "memref.subview", "memref.reinterpret_cast", "memref.collapse_shape", "memref.expand_shape")
VIEWS += ("tensor.extract_slice", "tensor.collapse_shape", "tensor.expand_shape", "tensor.cast", "memref.cast", "bufferization.to_memref")
# Lanes: what stands in the body of a linalg operation is done for every element of its tensors.
INTEGER_COMPARE = re.compile(r"arith\.cmpi .*: i(?:8|16|32|64)$")
WIDE_INTEGER = re.compile(r"arith\.(?:addi|subi|muli|divsi|remsi|cmpi|maxsi|minsi|shli|shrsi|shrui|andi|ori|xori|extsi|extui)\b.*\bi64$")


@dataclass
class _Line:
    """One operation. loops: numbers of the lines that open the loops around it; in_lanes: it is in the body of a linalg operation."""

    text: str
    result: str | None
    loops: tuple[int, ...]
    in_lanes: bool
    end: int = 0
    names: list[str] = field(default_factory=list)


def slow_code(linalg: str, *, wide: bool = False) -> list[str]:
    """Kinds of slow code in a kernel's loops; `wide`: its addresses need 64 bits, so that these are not counted."""
    found = []
    lines = _lines(linalg)
    for line in lines:
        if not line.loops:
            continue
        if "memref.store" in line.text:
            found.append(f"stores single elements in a loop: {line.text}")
        elif line.in_lanes and INTEGER_COMPARE.search(line.text):
            found.append(f"compares integers by lanes: {line.text}")
        elif not wide and WIDE_INTEGER.search(line.text) and (line.in_lanes or _element_loops(lines, line) == 1):
            found.append(f"computes with 64-bit integers: {line.text}")
        elif (row_bytes := _row_bytes(lines, line)) and row_bytes % BLOCK_BYTES == 0:
            found.append(f"loads a tile element by element: {line.text}")
    return sorted({re.sub(r"%[\w#@-]+", "%", text) for text in found})


def narrow_rows(linalg: str) -> bool:
    """Whether a row of a tile is loaded element by element because its bytes are no multiple of what one copy moves."""
    lines = _lines(linalg)
    return any(_row_bytes(lines, line) % BLOCK_BYTES for line in lines)


def _row_bytes(lines: list[_Line], line: _Line) -> int:
    """Bytes of a row of the tile that this line puts one element in, in a loop over its columns; 0 for any other line."""
    shape = SHAPED.search(line.text.partition(" into ")[2])
    if "tensor.insert" not in line.text or shape is None or _element_loops(lines, line) < 2:
        return 0
    columns = int(shape[2].split("x")[-2])
    return columns * ELEMENT_BYTES[shape[3]]


def _element_loops(lines: list[_Line], line: _Line) -> int:
    """Loops around a line that run over the rows or columns of a tile: what the adapter makes of scattered addresses."""
    return sum("ExtractedLoadOrStore" in lines[lines[start].end].text for start in line.loops)


def _lines(linalg: str) -> list[_Line]:
    """Operations with their nesting; braces that open and close on one line cancel out.

    Names are made unique (`%25` becomes `%25@57`, by its line): regions beside each other use the same ones.
    """
    lines: list[_Line] = []
    scopes: list[dict[str, str]] = [{}]
    regions: list[tuple[int, bool, bool]] = []  # line that opened it, whether it is a loop, whether it is a body of lanes
    for raw in linalg.splitlines():
        text = raw.strip()
        closes = re.match(r"^\}+", text)
        for _ in closes.group() if closes else "":
            opened = regions.pop()
            scopes.pop()
            lines[opened[0]].end = len(lines)
        state = {name: f"{name}@{len(lines)}" for name in re.findall(r"(%[\w-]+) = %", text.partition("iter_args")[2])}
        made = re.match(r"^(%[\w-]+)", text) if " = " in text else None
        known = {name: unique for scope in scopes for name, unique in scope.items()} | state
        head, sign, body = text.partition(" = ") if made else ("", "", text)
        if made:
            head = f"{made[1]}@{len(lines)}" + head[made.end() :]
        body = re.sub(r"%[\w-]+", lambda name, known=known: known.get(name[0], name[0]), body)
        text = f"{head}{sign}{body}"
        if made:
            scopes[-1][made[1]] = f"{made[1]}@{len(lines)}"
        match = RESULT.match(text)
        loops = tuple(number for number, is_loop, _ in regions if is_loop)
        line = _Line(text, match[1] if match else None, loops, any(lanes for *_, lanes in regions), len(lines))
        line.names = NAME.findall(match[2] if match else text)
        lines.append(line)
        depth = text.count("{") - text.count("}") + (len(closes.group()) if closes else 0)
        body = match[2] if match else text
        for _ in range(max(depth, 0)):
            is_lanes = body.startswith(("linalg.", "("))
            scopes.append(dict(state))
            regions.append((len(lines) - 1, body.startswith(("scf.for", "scf.while")), is_lanes))
    return lines


def peak_bytes(linalg: str) -> int:
    """Largest number of bytes that are live at once in the unified buffer."""
    lines = _lines(linalg)
    buffers = _Buffers()
    last_use = _last_uses(lines)
    for number, line in enumerate(lines):
        if line.result is not None and not line.in_lanes:
            buffers.define(line, number, last_use)
    points = [0] * (len(lines) + 1)
    for buffer, (size, first) in buffers.sizes.items():
        last = max((last_use.get(name, first) for name, held in buffers.held_by.items() if held == buffer), default=first)
        for number in range(first, last + 1):
            points[number] += size
    return max(points)


class _Buffers:
    """Which buffer each value lies in."""

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}  # bytes, first line
        self.held_by: dict[str, str] = {}
        self.is_empty: set[str] = set()

    def define(self, line: _Line, number: int, last_use: dict[str, int]) -> None:
        assert line.result is not None
        body = line.text.partition(" = ")[2]
        operation = body.split(" ", 1)[0]
        sources = [name for name in line.names if name in self.held_by]
        if operation in VIEWS:
            if sources and line.names[0] in self.held_by:
                self.held_by[line.result] = self.held_by[line.names[0]]
            return
        size = _result_bytes(body)
        if operation == "tensor.empty":
            self.is_empty.add(line.result)
            return
        if operation == "scf.for":
            # Its state lies where the start values lie; a start value that is read again is copied.
            starts = re.findall(r"(%[\w@-]+) = (%[\w#@-]+)", body.partition("iter_args")[2])
            for position, (inside, start) in enumerate(starts):
                name = f"{line.result}#{position}" if len(starts) > 1 else line.result
                held = self.held_by.get(start)
                if held is None or last_use.get(start, 0) > number:
                    shape = SHAPED.findall(body.rpartition("->")[2])
                    held = self._new(inside, _bytes(shape[position]) if position < len(shape) else 0, number)
                self.held_by[inside] = self.held_by[name] = held
            return
        if not size or operation.startswith(("arith.constant", "memref.load", "tensor.extract")):
            return
        destination = re.search(r"outs\((%[\w#@-]+)", body)
        if operation == "tensor.insert":
            destination = re.search(r"into (%[\w#@-]+)", body)
        taken = destination[1] if destination else None
        reuses = taken in self.held_by and last_use.get(str(taken), 0) <= number
        self.held_by[line.result] = self.held_by[str(taken)] if reuses else self._new(line.result, size, number)

    def _new(self, name: str, size: int, number: int) -> str:
        self.sizes[name] = (size, number)
        self.held_by[name] = name
        return name


def _last_uses(lines: list[_Line]) -> dict[str, int]:
    """Last line that needs each value; one from outside a loop that a loop reads is needed until the loop's end."""
    defined: dict[str, tuple[int, ...]] = {}
    last: dict[str, int] = {}
    for number, line in enumerate(lines):
        for name in line.names:
            outside = [start for start in line.loops if start not in defined.get(name, ())]
            # The line that opens a loop names its state, which is inside.
            until = max([number, *(lines[start].end for start in outside if name in defined)])
            last[name] = max(last.get(name, 0), until)
        if line.result is not None:
            defined[line.result] = line.loops
            last[line.result] = max(last.get(line.result, 0), number)
        for inside in re.findall(r"(%[\w@-]+) = %", line.text.partition("iter_args")[2]):
            defined[inside] = (*line.loops, number)
    return last


def _result_bytes(body: str) -> int:
    """Bytes of the last type that an operation names, which is its result's; 0 for a number."""
    types = body.rpartition("->")[2] if "->" in body else body.rpartition(" : ")[2]
    shapes = SHAPED.findall(types)
    return _bytes(shapes[-1]) if shapes else 0


def _bytes(shape: tuple[str, str, str]) -> int:
    return prod(int(size) for size in shape[1].split("x") if size) * ELEMENT_BYTES.get(shape[2], 0) if shape[1] else 0
