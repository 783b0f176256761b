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
_CALLED = {"call": "to_apply", "async-start": "calls", "while": "body"}


def collectives(hlo: str) -> list[Collective]:
    """Every collective that one run of the program carries out, in the order of the text.

    A loop's count as often as it turns. Of a conditional's branches the one that sends least is
    taken: the engine's fall back to a dearer path. Groups of one device send nothing.
    """
    entry, bodies = _computations(hlo)
    match = re.search(r"num_partitions=(\d+)", hlo)
    return _run(bodies, entry, int(match[1]) if match else 1)


def bytes_by_group(sent: Sequence[Collective]) -> dict[tuple[str, int, int], float]:
    """(kind, size, stride) -> bytes that one device sends; what XLA merges or splits stays the same."""
    totals: dict[tuple[str, int, int], float] = {}
    for c in sent:
        key = c.kind, c.size, c.stride
        totals[key] = totals.get(key, 0) + c.count * c.bytes_sent
    return {key: total for key, total in totals.items() if total}


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of every computation by its name."""
    entry, lines, bodies = "", [], {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    assert entry, "no entry computation; is this optimized HLO?"
    return entry, bodies


def _run(bodies: dict[str, list[str]], name: str, num_devices: int) -> list[Collective]:
    out: list[Collective] = []
    for line in bodies[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        shape, opcode = match.groups()
        kind = _KINDS.get(opcode.removesuffix("-start"))
        if kind is not None:
            c = _collective(line, shape, kind, opcode.endswith("-start"), num_devices)
            out += [c] if c.size > 1 else []
        elif opcode in _CALLED:
            inner = _run(bodies, _names(line, _CALLED[opcode])[0], num_devices)
            turns = _turns(line) if inner and opcode == "while" else 1
            out += [replace(c, count=c.count * turns) for c in inner]
        elif opcode == "conditional":
            branches = [_run(bodies, branch, num_devices) for branch in _branches(line)]
            out += min(branches, key=lambda sent: sum(c.count * c.bytes_sent for c in sent))
    return out


def _collective(line: str, shape: str, kind: CollectiveKind, starts: bool, num_devices: int) -> Collective:
    arrays = list(_array_bytes(shape))
    if starts and kind in ("all_gather", "permute") and shape.startswith("("):
        arrays = arrays[len(arrays) // 2 :] if kind == "all_gather" else arrays[1:2]  # operands come first
    size, stride = _group(line, num_devices)
    payload = sum(arrays) * (size if kind == "reduce_scatter" else 1)
    op_name = re.search(r'op_name="([^"]*)"', line)
    return Collective(op_name[1] if op_name else "", kind, 1, size, stride, payload)


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
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
        axes = re.findall(r"'(\w+)'(?!=)", text)
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        rest = [i for i, name in enumerate(sizes) if name not in axes]
        group = ids.transpose(rest + [list(sizes).index(axis) for axis in axes]).reshape(
            -1, math.prod(sizes[axis] for axis in axes)
        )[0]
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


def _names(line: str, attribute: str) -> list[str]:
    return re.findall(rf"\b{attribute}=%?([\w.\-]+)", line)


def _turns(line: str) -> int:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    assert match, f"a loop of unknown length sends: {line.strip()[:200]}"
    return int(match[1])


def _branches(line: str) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", line)
    if match:
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return _names(line, "true_computation") + _names(line, "false_computation")
