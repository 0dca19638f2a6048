"""Reads the text of an optimised XLA program: which instruction computes what."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

# An instruction is of the first of these kinds of which it holds an operation.
KINDS = {
    "convolution": {"convolution"},
    "dot": {"dot"},
    "reduction": {"reduce", "reduce-window", "select-and-scatter", "scatter"},
}
ELEMENTWISE, MOVEMENT = "elementwise", "movement"
MOVES = frozenset(
    "bitcast bitcast-convert broadcast call concatenate constant convert copy dynamic-slice "
    "dynamic-update-slice fusion gather get-tuple-element iota pad parameter reshape reverse slice "
    "transpose tuple".split()
)

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
_DIMENSIONS = re.compile(r"\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `size` is the number of elements it gives, of a tuple's largest part."""

    name: str
    opcode: str
    size: int
    called: str | None  # the computation that it runs


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations by name, and which of them the program starts with."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads what `jax.stages.Compiled.as_text` gives."""
        computations: dict[str, list[Instruction]] = {}
        entry = current = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                called = _CALLED.search(line)
                sizes = [
                    math.prod(map(int, filter(None, dimensions.split(","))))
                    for dimensions in _DIMENSIONS.findall(found[2])
                ]
                computations[current].append(
                    Instruction(
                        name=found[1],
                        opcode=found[3],
                        size=max(sizes, default=0),
                        called=called and called[1],
                    )
                )
        return cls(computations, entry)

    def kinds(self) -> dict[str, str]:
        """Returns the kind of each instruction that the program starts with, by name."""
        kinds = {}
        for instruction in self.computations[self.entry]:
            opcodes = set(self._opcodes(instruction))
            other = MOVEMENT if opcodes <= MOVES else ELEMENTWISE
            kind = next((kind for kind, ops in KINDS.items() if ops & opcodes), other)
            kinds[instruction.name] = kind
        return kinds

    def counts(self, *, at_least: int = 0) -> Counter:
        """Returns how often each opcode stands anywhere, on arrays of so many elements or more."""
        return Counter(
            instruction.opcode
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.size >= at_least
        )

    def _opcodes(self, instruction: Instruction) -> Iterator[str]:
        """Of the instruction, and of all in the computations that it runs."""
        yield instruction.opcode
        for each in self.computations.get(instruction.called or "", []):
            yield from self._opcodes(each)
