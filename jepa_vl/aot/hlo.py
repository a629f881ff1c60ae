"""What a compiled program does to memory and network, read from its optimised, partitioned text.

XLA's own analysis counts a loop's body once. Here every instruction counts as often as it runs:
a loop's body times its trip count (which XLA states, or the constant that the loop's condition
compares with), a branch of a conditional `branch_share` times.
"""

import dataclasses
import math
import re

import numpy as np

COLLECTIVES = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip

# Neither moves bytes: names for what exists, control flow (its body counts), ends of async pairs.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "opt-barrier", "partition-id", "replica-id", "async-start", "async-update",
}  # fmt: skip
# Custom calls that only name memory: a place for a loop's results, neighbours seen as one array.
_NAMES = ("AllocateBuffer", "ConcatBitcast")
# A collective in pieces (TPU): the mark of each fusion that carries one, its begin and its end.
_CHAIN, _START, _DONE = "chain_id=", '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
_SLICES = ("dynamic-slice", "slice", "gather")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `type` is the result's text, `operands` are names within the computation."""

  name: str
  type: str
  opcode: str
  operands: tuple
  attributes: str
  literal: str  # what stands between the parentheses
  root: bool

  def called(self, key):
    """Names of the computations behind `key=`."""
    found = re.search(key + r"=(\{[^}]*\}|%[\w.\-]+)", self.attributes)
    return _NAME.findall(found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a device: bytes that it gives, group size, and how often it runs per step.

  What TPU slices reduce between them is of kind "send": the hosts do it, out of the program.
  """

  kind: str
  bytes: int
  groups: np.ndarray | None  # (groups, members) of device positions; None: pairs, or all devices
  runs: float


class Program:
  """The computations of a text (`compiled.as_text()`) and how often each runs in one call."""

  def __init__(self, text, *, branch_share=1.0):
    self.computations, entry = _parse(text)
    self.unknown_loops = 0  # loops whose trip count cannot be read count once
    self.runs = {}
    self._fused = set()
    self._branch_share = branch_share
    self._visit(entry, 1.0)

  def _visit(self, name, runs):
    self.runs[name] = self.runs.get(name, 0.0) + runs
    for op in self.computations[name].values():
      if op.opcode == "while":
        trips = self._trips(op)
        self._visit(op.called("body")[0], runs * trips)
      elif op.opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        for branch in (b for key in keys for b in op.called(key)):
          self._visit(branch, runs * self._branch_share)
      elif op.opcode == "call":
        self._visit(op.called("to_apply")[0], runs)
      elif op.opcode in ("fusion", "async-start"):
        for callee in op.called("calls"):
          if op.opcode == "fusion":
            self._fused.add(callee)
          self._visit(callee, runs)

  def _trips(self, op):
    known = re.search(r'known_trip_count\D*(\d+)', op.attributes)
    if known:
      return int(known[1])
    condition = self.computations[op.called("condition")[0]]
    bounds = {
      int(c.literal) for c in condition.values()
      if c.opcode == "constant" and c.type[:3] in ("s32", "u32", "s64")
    }  # fmt: skip
    if len(bounds) == 1:
      return bounds.pop()
    self.unknown_loops += 1
    return 1

  def collectives(self):
    """Every Collective of one device's program, also those inside fusions."""
    found = []
    for name, runs in self.runs.items():
      ops = self.computations[name]
      carried = self._passed_on(name)
      for op in (o for o in ops.values() if o.name not in carried):
        kind = op.opcode.removesuffix("-start")
        between_slices = kind == "send" and "xla_megascale_runtime" in op.attributes
        if kind in COLLECTIVES or between_slices:
          size = sum(_bytes(ops[o].type) for o in op.operands)
          found.append(Collective(kind, size, _groups(op.attributes), runs))
    return found

  def _passed_on(self, name):
    """What a fusion only carries of a collective that another one has started: names, or nothing.

    On TPUs a collective may go on beside other work, a piece in each of the fusions that do that
    work: each then names the collective, its operand and its result, and moves none of them anew.
    """
    ops = self.computations[name].values()
    pieces = {op.name for op in ops if op.opcode in COLLECTIVES and _CHAIN in op.attributes}
    if not pieces or any(_START in op.attributes for op in ops):
      return set()
    carries = lambda op: op.name in pieces or op.opcode == "tuple" or _DONE in op.attributes
    users = lambda o: (op for op in ops if o.name in op.operands)
    parameters = (op for op in ops if op.opcode == "parameter")
    return pieces | {o.name for o in parameters if all(map(carries, users(o)))}

  def hbm_bytes(self, *, on_chip=False):
    """Bytes that one device reads and writes in main memory: the sum of `traffic`."""
    return sum(size for _, size in self.traffic(on_chip=on_chip))

  def traffic(self, *, on_chip=False):
    """Yields every Instruction that moves something, with the bytes it moves in all its runs.

    A fusion or a kernel reads its operands and writes its results once; of an operand that a fusion
    only slices the slice counts, and an update in place counts what is updated. With `on_chip`
    (TPU) memory space 1 is the chip's own vector memory and is free.
    """
    size = lambda type: _bytes(type, without="S(1)" if on_chip else None)
    for name, runs in self.runs.items():
      if name not in self._fused:
        ops = self.computations[name]
        for op in ops.values():
          if moved := self._traffic(op, ops, size):
            yield op, runs * moved

  def _traffic(self, op, ops, size):
    named = op.opcode == "custom-call" and any(name in op.attributes for name in _NAMES)
    if op.opcode in _FREE or op.opcode.endswith("-done") or named:
      return 0
    operands = [size(ops[o].type) for o in op.operands if o in ops]
    if op.opcode in _SLICES:
      return 2 * size(op.type)
    if op.opcode in ("dynamic-update-slice", "scatter"):
      return 2 * sum(operands[1:])
    if op.opcode == "slice-start":
      return _bytes(_result(op.type)) + size(_result(op.type))
    if op.opcode.endswith("-start"):
      return sum(operands) + size(_result(op.type))
    callees = op.called("calls") if op.opcode == "fusion" else ()
    if not callees:
      return sum(operands) + size(op.type)
    inner = callees[0]
    carried = self._passed_on(inner)
    read = sum(
      min(size(ops[o].type), self._read(inner, i, carried))
      for i, o in enumerate(op.operands) if o in ops
    )  # fmt: skip
    results = [m[0] for m in _ARRAY.finditer(op.type)]
    if carried:  # its end has no results of its own: what it names was filled meanwhile
      root = next(o for o in self.computations[inner].values() if o.root)
      names = root.operands if root.opcode == "tuple" else ()
      results = [r for o, r in zip(names, results, strict=False) if o not in carried]
    return read + max(sum(map(size, results)) - self._left_alone(inner, size), 0)

  def _read(self, name, index, carried=()):
    """Bytes that a fusion reads of its operand `index`: all (infinity), or what it slices."""
    inner = self.computations[name]
    parameter = next(
      o for o in inner.values() if o.opcode == "parameter" and int(o.literal) == index
    )
    return 0 if parameter.name in carried else self._read_by_users(inner, parameter.name)

  def _read_by_users(self, ops, name):
    total = 0
    for user in (o for o in ops.values() if name in o.operands):
      if user.opcode in _SLICES and user.operands[0] == name:
        total += _bytes(user.type)
      elif user.opcode == "bitcast":
        total += self._read_by_users(ops, user.name)
      elif user.opcode == "fusion":
        places = [i for i, o in enumerate(user.operands) if o == name]
        total += sum(self._read(user.called("calls")[0], i) for i in places)
      elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
        return math.inf
    return total

  def _left_alone(self, name, size):
    """Bytes of a fusion's results that an update in place does not touch."""
    ops, total = self.computations[name], 0
    for op in ops.values():
      if op.opcode == "dynamic-update-slice":
        total += size(op.type) - _bytes(ops[op.operands[1]].type)
      elif op.opcode == "fusion":
        total += self._left_alone(op.called("calls")[0], size)
    return total


def _result(type):
  # What starts asynchronously is (operand, result, context), or the result alone.
  arrays = [m[0] for m in _ARRAY.finditer(type)]
  return arrays[1] if len(arrays) > 1 else arrays[0]


def _parse(text):
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and " = " not in line.split("(", 1)[0]:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      op = _instruction(found[2], found[3], bool(found[1]))
      if op:
        current[op.name] = op
  if entry is None:
    raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
  return computations, entry


def _instruction(name, rest, root):
  opcode = _OPCODE.search(rest)
  if not opcode:
    return None
  depth, end = 1, opcode.end()
  while depth and end < len(rest):
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  inside = rest[opcode.end() : end - 1]
  return Instruction(
    name, rest[: opcode.start()], opcode[1], tuple(_NAME.findall(inside)), rest[end:], inside, root
  )


def _bytes(type, without=None):
  total = 0
  for element, shape, layout in _ARRAY.findall(type):
    if without and without in layout:
      continue
    bits = 8 if element == "pred" else int((re.search(r"\d+", element) or ["0"])[0])
    total += math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
  return total


def _groups(attributes):
  """replica_groups in any of XLA's three spellings -> (groups, members) or None."""
  found = re.search(r"replica_groups=", attributes)
  if not found:
    return None
  text = attributes[found.end() :]
  if text.startswith("{{"):
    rows = re.findall(r"\{([\d, ]+)\}", text[: text.index("}}") + 1].removeprefix("{"))
    return np.array([_ints(row) for row in rows])
  if text.startswith("["):
    shape, dims, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(order)) if order else ids).reshape(_ints(shape))
  if text.startswith("mesh["):
    return _mesh_groups(text)
  return None


def _mesh_groups(text):
  """mesh['x'=4,'y'=2] {'x'}, also parts of an axis: {'x':(2)2}, two steps of 2 within x."""
  sizes, axes = re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text).groups()
  members = {name: part for name, part in re.findall(r"'(\w+)'(?::(\(\d+\)\d+))?", axes)}
  dims, inner = [], []
  for name, size in re.findall(r"'(\w+)'=(\d+)", sizes):
    size = int(size)
    if members.get(name):
      before, part = map(int, re.match(r"\((\d+)\)(\d+)", members[name]).groups())
      inner.append(len(dims) + 1)
      dims += [before, part, size // (before * part)]
    else:
      if name in members:
        inner.append(len(dims))
      dims.append(size)
  ids = np.arange(math.prod(dims)).reshape(dims)
  outer = [i for i in range(len(dims)) if i not in inner]
  return ids.transpose(outer + inner).reshape(-1, math.prod(dims[i] for i in inner))


def _ints(text):
  return [int(i) for i in text.split(",")]
