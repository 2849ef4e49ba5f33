# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads what a disassembler says of compiled kernels, for test_sass.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
)
_TYPES = {"f": "float", "d": "double", "h": "uint8"}


@dataclass(frozen=True)
class Instruction:
    """One line, like ``@P0 LDG.E.128 R4, desc[UR4][R2.64]``."""

    guard: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without what follows its first dot."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        found = re.search(r"\.L_x_\d+", self.operands)
        return found.group(0) if found and self.name in ("BRA", "BSSY") else None

    @property
    def written(self) -> range:
        """The registers that a load fills."""
        found = re.match(r"R(\d+)", self.operands)
        if found is None:
            return range(0)
        width = re.search(r"\.(64|128)\b", self.opcode)
        first = int(found.group(1))
        return range(first, first + (int(width.group(1)) // 32 if width else 1))

    @property
    def read(self) -> set[int]:
        """The registers in its sources, the first one of those that go together."""
        operands = self.operands
        if not self.name.startswith(("ST", "RED", "ATOM", "BRA")):
            operands = operands.partition(",")[2]
        return {int(n) for n in re.findall(r"\bR(\d+)", operands)}


@dataclass
class Kernel:
    """The instructions of a kernel, in the order of their addresses."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[range]:
        """From the target of each branch that goes back to the branch; none within."""
        spans = set()
        for i, instruction in enumerate(self.code):
            start = self.labels.get(instruction.target or "", i + 1)
            if instruction.name == "BRA" and start < i:  # the last one loops on itself
                spans.add((start, i + 1))
        inner = [
            s
            for s in spans
            if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)
        ]
        return [range(*s) for s in sorted(inner)]

    def within(self, span: range) -> list[Instruction]:
        """The instructions of a loop."""
        return self.code[span.start : span.stop]

    def count(self, opcode: str, span: range | None = None) -> int:
        """How many opcodes a regular expression matches from their beginning."""
        code = self.code if span is None else self.within(span)
        return sum(re.match(opcode, i.opcode) is not None for i in code)

    def before_first(self, opcode: str) -> int:
        """How many instructions precede the first one like this."""
        return next(i for i, at in enumerate(self.code) if re.match(opcode, at.opcode))


def in_flight(code: list[Instruction], opcode: str) -> int:
    """The most loads of a kind that are under way at once.

    A load, and all before it, has come when something reads or overwrites a register
    that it fills.
    """
    under_way: list[range] = []
    most = 0
    for instruction in code:
        touched = instruction.read
        if not instruction.name.startswith(("ST", "RED", "BRA")):
            touched = touched | set(instruction.written)
        for i in reversed(range(len(under_way))):
            if touched & set(under_way[i]):
                del under_way[: i + 1]
                break
        if re.match(opcode, instruction.opcode):
            under_way.append(instruction.written)
            most = max(most, len(under_way))
    return most


def _name_of(symbol: str) -> str:
    """``_ZN…15resident_kernelIfEEv…`` is ``resident<float>``, ``…12alone_kernelE…`` ``alone``."""
    name, template, kind = re.split(r"_kernel([IE])", symbol, maxsplit=1)
    name = re.sub(r".*\d", "", name)
    if template == "E":
        return name
    half = re.search(r"B?Float16", kind)
    return f"{name}<{half.group(0) if half else _TYPES[kind[0]]}>"


def parse(text: str) -> dict[str, Kernel]:
    """The kernels in the output of ``nvdisasm -c``, by their short names."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel("")
    for line in text.splitlines():
        if line.startswith(".text."):
            name = _name_of(line[len(".text.") :].rstrip(":"))
            kernel = kernels.setdefault(name, Kernel(name))
        elif found := re.match(r"(\.L_x_\d+):", line):
            kernel.labels[found.group(1)] = len(kernel.code)
        elif found := _INSTRUCTION.search(line):
            kernel.code.append(Instruction(*found.groups()[1:]))
    return kernels
