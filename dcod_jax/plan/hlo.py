"""Reads a compiled program's HLO text: cycles over the loops, collectives, kernels.

libtpu writes "estimated_cycles" beside each operation of the optimised HLO. The text holds a
scanned body once, so the sums here multiply by trip counts. The estimate leaves out Pallas kernels
and collectives; both are counted apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
# Between slices libtpu sends through the hosts: a "send" is all that is left of a collective.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: %name = shape opcode(rest."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        names = _CALLED.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            names += _OPERAND.findall(group)
        return names


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program, as often as the loops run it."""

    kind: str
    size: int  # bytes of the whole array on one device (gathered, or before it is scattered)
    times: int  # executions a step
    groups: tuple[tuple[int, ...], ...]  # positions of the devices in the mesh; () is all of them
    overlapped: bool  # started and awaited apart, or fused with compute
    between_slices: bool = False  # one device of each slice; groups is () then


def array_bytes(shape: str) -> int:
    """Bytes of a shape as HLO writes it; a tuple's add up. "bf16[4,8]{1,0}" -> 64."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        if kind in BYTES:
            total += BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: its instructions} and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            if header:
                current = found.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match:
            current.append(Instruction(*match.groups()))
    return found, entry


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def replica_groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Groups of device positions of a collective; () when it names none (all devices).

    All three forms: {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), which is iota(4) reshaped, transposed,
    reshaped; mesh['a'=2,'b'=2] {'a'}, axes of a mesh, whose devices may have an order of their own
    (device_ids=([2,2]T(1,0))). Raises ValueError for another form.
    """
    if mesh := _MESH.search(rest):
        return _mesh_groups(mesh[1], mesh[4], _iota(mesh[2], mesh[3]) if mesh[2] else None)
    if iota := _IOTA.search(rest):
        ids = _iota(iota[2], iota[3]).reshape(_numbers(iota[1])[0], -1)
        return tuple(tuple(int(i) for i in row) for row in ids)
    listed = _GROUPS.search(rest) or _PAIRS.search(rest)
    if not listed:
        if re.search(r"replica_groups=(?!\{\})", rest):
            raise ValueError(f"replica groups in an unknown form: {rest[:300]}")
        return ()
    return tuple(_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", listed[1]) if group)


def _iota(shape: str, order: str | None) -> np.ndarray:
    """("2,4", "1,0") -> iota(8) as [2, 4], transposed."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _mesh_groups(sizes: str, axes: str, devices: np.ndarray | None) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh: ("'a'=2,'b'=3", "'b'") -> (0,1,2), (3,4,5).

    devices: the mesh's devices in its order; None: 0, 1, 2, ...
    """
    named = re.fullmatch(r"(?:'[^']*'=\d+,?)+", sizes)
    used = re.findall(r"'([^']*)'", axes)
    if not named or re.sub(r"'[^']*'|[, ]", "", axes):
        raise ValueError(f"replica groups in an unknown form: mesh[{sizes}] {{{axes}}}")
    shape = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", sizes)}
    order = [name for name in shape if name not in used] + used
    ids = np.arange(math.prod(shape.values())) if devices is None else devices
    ids = ids.reshape(tuple(shape.values()))
    ids = ids.transpose([list(shape).index(name) for name in order])
    width = math.prod(shape[name] for name in used)
    return tuple(tuple(int(i) for i in row) for row in ids.reshape(-1, width))


def trip_count(loop: Instruction, found: Mapping[str, list[Instruction]]) -> int:
    """Iterations of a while loop: what the compiler knows, else the constant of its condition."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = found.get(condition[1], []) if condition else []
    bounds = {
        int(match[1])
        for step in body
        if step.opcode == "constant" and "[]" in step.shape
        for match in [re.match(r"(\d+)\)", step.rest)]
        if match
    }
    if len(bounds) != 1:
        raise ValueError(f"no trip count for {loop.name}: its condition holds constants {bounds}")
    return bounds.pop()


def _size(step: Instruction, kind: str, sizes: Mapping[str, int]) -> int:
    """Bytes of the array a collective moves: its larger end."""
    operands = [sizes.get(name, 0) for name in _OPERAND.findall(step.rest.split(")")[0])]
    given = sum(operands)
    if step.opcode.endswith("-start"):  # a tuple of operand, result and context
        shapes = [array_bytes(m[0]) for m in re.finditer(_ARRAY, step.shape)]
        return max([given, *shapes])
    made = array_bytes(step.shape)
    return made if kind == "all-reduce" else max(given, made)


class Summary:
    """A compiled program in numbers, for one device and one step, from its optimised HLO text.

    cycles is libtpu's estimate, loops multiplied (0 where the compiler gives none); kernels counts
    executions of Pallas kernels, windowed the matrix products turned into loops over shards.
    """

    def __init__(self, text: str):
        self._found, entry = computations(text)
        steps = (step for body in self._found.values() for step in body)
        self._sizes = {step.name: array_bytes(step.shape) for step in steps}
        # A collective that libtpu spreads over several fusions is listed in each of them, under one
        # channel of one loop body.
        self._collectives: dict[tuple[str, str], Collective] = {}
        self.kernels = self.cycles = 0
        self.windowed = text.count("windowed_dot_general")
        self._walk(entry, 1)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the program."""
        return list(self._collectives.values())

    def _walk(self, name: str, times: int) -> None:
        """Add up what a computation and everything it calls does."""
        for step in self._found.get(name, []):
            if step.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", step.rest)
                assert body is not None
                self._walk(body[1], times * trip_count(step, self._found))
            elif step.opcode in ("call", "conditional"):
                for inner in step.called:
                    self._walk(inner, times)
            else:
                self._collect(step, name, times, overlapped=False, nested=False)
            cycles = _CYCLES.search(step.rest)
            self.cycles += times * int(cycles[1]) if cycles else 0
            self.kernels += times * ('custom_call_target="tpu_custom_call"' in step.rest)

    def _collect(
        self, step: Instruction, body: str, times: int, *, overlapped: bool, nested: bool
    ) -> None:
        """Note a collective, or those inside a fusion or an asynchronous wrapper."""
        kind = step.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = _CHANNEL.search(step.rest) if nested else None
            key = (body, f"{kind} {channel[1]}" if channel else step.name)
            before = self._collectives.get(key)
            overlapped = overlapped or step.opcode.endswith("-start")
            overlapped = overlapped or (before is not None and before.overlapped)
            size, groups = _size(step, kind, self._sizes), replica_groups(step.rest)
            self._collectives[key] = Collective(kind, size, times, groups, overlapped)
        elif kind == "send" and (transfer := _BETWEEN_SLICES.search(step.rest)):
            size = max(array_bytes(m[0]) for m in re.finditer(_ARRAY, step.shape))
            name = transfer[1].lower().replace("_", "-")
            one = Collective(name, size, times, (), overlapped=True, between_slices=True)
            self._collectives[body, step.name] = one
        elif step.opcode in ("fusion", "async-start"):
            for inner in step.called:
                apart = overlapped or step.opcode == "async-start" or inner.startswith("async")
                for one in self._found.get(inner, []):
                    # A reduce-scatter that libtpu pads first: the same emitter runs both forms.
                    if inner.startswith("all-reduce-scatter") and one.opcode == "all-reduce":
                        one = dataclasses.replace(one, opcode="reduce-scatter")
                    self._collect(one, body, times, overlapped=apart, nested=True)


def bytes_by_kind(
    summary: Summary, *, slice_of: Sequence[int]
) -> dict[tuple[str, str], dict[str, float]]:
    """{(kind, network): {"count", "bytes", "overlapped"}} a device and step.

    slice_of names the slice of each position in the mesh. network is "dcn" for groups that cross
    slices, else "ici"; bytes are those received on a ring; overlapped is the share of them that
    runs beside compute.
    """
    table: dict[tuple[str, str], dict[str, float]] = {}
    for one in summary.collectives:
        groups = one.groups or (tuple(range(len(slice_of))),)
        n = len(set(slice_of)) if one.between_slices else len(groups[0])
        crosses = any(len({slice_of[i] for i in group}) > 1 for group in groups)
        network = "dcn" if one.between_slices or crosses else "ici"
        share = {"collective-permute": 1.0, "all-reduce": 2 * (n - 1) / n}
        received = one.times * one.size * share.get(one.kind, (n - 1) / n)
        row = table.setdefault((one.kind, network), {"count": 0.0, "bytes": 0.0, "overlapped": 0.0})
        row["count"] += one.times
        row["bytes"] += received
        row["overlapped"] += received * one.overlapped
    for row in table.values():
        row["overlapped"] = row["overlapped"] / row["bytes"] if row["bytes"] else 0.0
    return table
