"""What a compiled program sends between devices, read from its optimized HLO.

    compiled = jax.jit(f).lower(*args).compile()
    collectives(compiled.as_text())

Knows XLA's text and nothing of models. What `jaxserve.step_cost` forecasts is compared with it.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from jaxserve.roofline import Collective, CollectiveKind

_KINDS: dict[str, CollectiveKind] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_CALLED = {"call": "to_apply", "fusion": "calls", "async": "calls", "while": "body"}


def collectives(hlo: str) -> list[Collective]:
    """Every collective that one run of the program carries out, in the order of the text.

    A loop's count as often as it turns. Of a conditional's branches that of a true predicate is taken:
    the engine falls back to the other. Groups of one device send nothing. A fusion's count like
    others: XLA:GPU makes one of an all-reduce that a kernel of its own carries out.

    Raises: AssertionError for a text that is not understood, rather than leave something out.
    """
    program = _Program(hlo)
    sent = program.run(program.entry)
    missed = sorted(program.sending - program.entered)
    assert not missed, f"collectives in computations that nothing known calls: {', '.join(missed)}"
    return sent


def bytes_by_group(sent: Sequence[Collective]) -> dict[tuple[str, int, int], float]:
    """(kind, size, stride) -> bytes that one device sends; what XLA merges or splits stays the same."""
    totals: dict[tuple[str, int, int], float] = {}
    for c in sent:
        key = c.kind, c.size, c.stride
        totals[key] = totals.get(key, 0) + c.count * c.bytes_sent
    return {key: total for key, total in totals.items() if total}


class _Program:
    """The computations of a program's text.

    Attributes:
        entry: the name of the computation that the program begins with.
        sending: names of those that have collectives.
        entered: names of those that `run` has been through.
    """

    def __init__(self, hlo: str):
        self.entry, self._bodies = _computations(hlo)
        match = re.search(r"num_partitions=(\d+)", hlo)
        self._num_devices = int(match[1]) if match else 1
        self.entered: set[str] = set()
        self.sending = {
            name
            for name, body in self._bodies.items()
            if any(operation in _KINDS for _, operation, _, _ in body)
        }

    def run(self, name: str) -> list[Collective]:
        """What one run of a computation sends."""
        self.entered.add(name)
        out: list[Collective] = []
        for shape, operation, starts, line in self._bodies[name]:
            if operation in _KINDS:
                c = _collective(line, shape, _KINDS[operation], starts, self._num_devices)
                out += [c] if c.size > 1 else []
            elif operation in _CALLED:
                inner = self.run(_names(line, _CALLED[operation])[0])
                turns = _turns(line) if inner and operation == "while" else 1
                out += [replace(c, count=c.count * turns) for c in inner]
            elif operation == "conditional":
                out += [self.run(branch) for branch in _branches(line)][-1]
        return out


_Instruction = tuple[str, str, bool, str]
"""Its shape, operation, whether it is only started here (`all-gather-start`), and its line."""


def _computations(hlo: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """The entry's name, and the instructions of every computation by its name."""
    entry, body, bodies = "", [], {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            body = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            shape, opcode = match.groups()
            body.append((shape, opcode.removesuffix("-start"), opcode.endswith("-start"), line))
    assert entry, "no entry computation; is this optimized HLO?"
    return entry, bodies


def _collective(line: str, shape: str, kind: CollectiveKind, starts: bool, num_devices: int) -> Collective:
    size, stride = _group(line, num_devices)
    payload = sum(_array_bytes(_result(shape, kind) if starts else shape))
    payload *= size if kind == "reduce_scatter" else 1
    op_name = re.search(r'op_name="([^"]*)"', line)
    return Collective(op_name[1] if op_name else "", kind, 1, size, stride, payload)


def _result(shape: str, kind: CollectiveKind) -> str:
    """Of the shape of a start, what it will have made.

    XLA:GPU starts any collective as ((operands), result, contexts). Opcodes of their own, which
    XLA had first, have (operand, result, contexts) for an all-gather and a permute, or ((operands),
    (results)) for several, and the result alone for an all-reduce.
    """
    if not shape.startswith("("):
        return shape
    elements = _elements(shape)
    operands_first = elements[0].startswith("(") or kind in ("all_gather", "permute")
    return elements[1] if operands_first else shape


def _elements(shape: str) -> list[str]:
    """Of a tuple's shape."""
    elements, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            elements.append("")
        else:
            elements[-1] += char
    return [element.strip() for element in elements]


def _array_bytes(shape: str) -> Iterator[float]:
    for kind, bits, dims in _ARRAY.findall(shape):
        width = 8 if kind == "pred" else int(bits)
        yield math.prod(int(d) for d in dims.split(",") if d) * width / 8


def _group(line: str, num_devices: int) -> tuple[int, int]:
    """(devices of a group, how far apart its first two lie)."""
    if "source_target_pairs=" in line:
        return 2, 1
    found = re.search(
        r"replica_groups=(mesh\[.*?\] \{.*?\}|\[.*?\]<=\[.*?\](?:T\([\d,]+\))?|\{.*?\}\}|\{\})", line
    )
    assert found, f"no replica groups in: {line.strip()[:200]}"
    text = found[1]
    if text.startswith("mesh"):
        group = _first_of_mesh(text)
    elif text.startswith("["):
        shape, reshaped, *order = (
            [int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)
        )
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        group = ids.transpose(order[0] if order else range(ids.ndim)).reshape(shape)[0]
    else:
        first = re.search(r"\{\{([\d,]+)\}", text)
        group = [int(n) for n in first[1].split(",")] if first else range(num_devices)
    return len(group), int(group[1] - group[0]) if len(group) > 1 else 1


def _first_of_mesh(text: str) -> list[int]:
    """The first group of `mesh['a'=2,'b'=8] {'a','b':(2)4}`: devices along the axes named last, of `b`
    only along the 4 of 8 = 2 * 4 * 1."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    group = [0]
    for name, outer, part in re.findall(r"'(\w+)'(?!=)(?::\((\d+)\)(\d+))?", text):
        size, at = int(part or sizes[name]), list(sizes).index(name)
        apart = math.prod(list(sizes.values())[at:]) // (int(outer or 1) * size)
        group = [device + i * apart for device in group for i in range(size)]
    return group


def _names(line: str, attribute: str) -> list[str]:
    return re.findall(rf"\b{attribute}=%?([\w.\-]+)", line)


def _turns(line: str) -> int:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    assert match, f"a loop of unknown length sends: {line.strip()[:200]}"
    return int(match[1])


def _branches(line: str) -> list[str]:
    """That of a true predicate, which jax turns into the index 1, comes last."""
    match = re.search(r"branch_computations=\{([^}]*)\}", line)
    if match:
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return _names(line, "false_computation") + _names(line, "true_computation")
