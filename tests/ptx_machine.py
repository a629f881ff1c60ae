"""Runs PTX on a CPU, slowly: what the compiler made of a kernel for a GPU that is not here.

It knows what the kernels' PTX has. A block's threads take every instruction together, so it does
not see a missing barrier, and approximate instructions (ex2, rcp, rsqrt, div) are exact. It does
see reads and writes outside of an array or off its alignment, copies to shared memory that nobody
waited for, and what nobody wrote: that is NaN.
"""

import itertools
import operator
import re

import ml_dtypes
import numpy as np

KINDS = {
  "f32": np.float32, "b16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
  "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
WARP = 32
LANE = np.arange(WARP)
SHARED = 228 * 1024  # bytes, as an H200 has
ADDRESS = 40  # bits; those above say which array, from 1


def _tiny_to_zero(f):
  flush = lambda x: np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
  return lambda x: flush(f(flush(x)))


def _field(x, start, count):
  """Bits of x, with the sign of the highest where x has signs."""
  rest = (x.itemsize * 8 - start - count).astype(x.dtype)
  return (x << rest) >> (rest + start.astype(x.dtype))


FUNCTIONS = {
  "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
  "neg": operator.neg, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
  "min": np.fmin, "max": np.fmax, "bfe": _field, "mad": lambda x, y, z: x * y + z,
  "shl": lambda x, y: x << y.astype(x.dtype), "shr": lambda x, y: x >> y.astype(x.dtype),
  "fma": lambda x, y, z: (np.float64(x) * y + z).astype(np.float32),
  "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "rcp": lambda x: 1 / x,
}  # fmt: skip


class Machine:
  """A kernel's PTX; `entry` is its name."""

  def __init__(self, ptx):
    ptx = re.sub(r"//.*", "", ptx)
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)\s*\.reqntid (\d+), 1, 1\s*\{(.*)\}", ptx, re.S)
    self.entry, parameters, self.threads, body = entry.groups()
    self.parameters, self.threads = re.findall(r"\w+_param_\d+", parameters), int(self.threads)
    self.code, self.labels = [], {}
    for line in body.replace("\n", " ").split(";"):
      self._read_line(line.strip(" \t"))

  def _read_line(self, line):
    line = line.lstrip("} \t")  # the end of a scope
    while found := re.match(r"(\$\w+):\s*", line):
      self.labels[found[1]] = len(self.code)
      line = line[found.end() :]
    if not line or re.match(r"\{?\s*\.(reg|loc|pragma)", line):
      return
    condition, name, operands = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", line).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
    self.code.append((condition, name.split("."), [o.strip() for o in operands]))

  def __call__(self, grid, inputs, outputs):
    """Runs all blocks of the grid on arrays; shapes and types of outputs -> them.

    Raises:
      AssertionError: the kernel does what it must not.
    """
    outputs = [_nan(*o) for o in outputs]
    arrays = [*map(np.ascontiguousarray, inputs), *outputs]
    assert len(arrays) == len(self.parameters)
    self.arrays = [x.reshape(-1).view(np.uint8) for x in arrays]
    self.first_output = len(inputs)
    for block in itertools.product(*map(range, grid)):
      self._run_block({f"%ctaid.{axis}": i for axis, i in zip("xyz", block, strict=True)})
    return outputs

  def _run_block(self, values):
    self.registers = {k: np.full(self.threads, v, np.uint32) for k, v in values.items()}
    self.registers["%tid.x"] = np.arange(self.threads, dtype=np.uint32)
    self.shared = np.full(SHARED, 0xFF, np.uint8)
    self.copies = [[]]  # to shared memory: of every group that was not waited for
    at = 0
    while at < len(self.code):
      condition, (name, *how), operands = self.code[at]
      at += 1
      self.active = np.ones(self.threads, bool)
      if condition:
        self.active = self.registers[condition.lstrip("!")] ^ condition.startswith("!")
      if name == "bra":
        assert self.active.all() or not self.active.any(), f"threads part at {operands}"
        at = self.labels[operands[0]] if self.active.all() else at
      elif name == "ret":
        return
      elif self.active.any():
        with np.errstate(all="ignore"):
          self._step(name, how, operands)

  def _step(self, name, how, operands):
    special = getattr(self, f"do_{name}", None)
    if special:
      return special(how, *operands)
    kind, f = how[-1], FUNCTIONS[name]
    if "ftz" in how:
      f = _tiny_to_zero(f)
    target, *operands = operands
    if kind == "bf16x2":
      pairs = (self._pair(o) for o in operands)
      self._set(target, np.ascontiguousarray(f(*pairs)).view(np.uint32)[:, 0])
    elif "wide" in how or "hi" in how:
      x, y = (self._get(o, kind).astype(np.int64) for o in operands)
      product = x * y if kind == "s32" else (x.astype(np.uint64) * y.astype(np.uint64))
      self._set(target, product if "wide" in how else (product >> 32).astype(KINDS[kind]))
    elif kind == "pred":
      self._set(target, f(*(self.registers[o] for o in operands)))
    else:
      self._set(target, f(*(self._get(o, kind) for o in operands)).astype(KINDS[kind]))

  def _get(self, operand, kind):
    """A register's or a literal's value, for each thread."""
    dtype = np.dtype(KINDS[kind])
    if operand.startswith("0f"):
      return np.full(self.threads, int(operand[2:], 16), np.uint32).view(dtype)
    if re.match(r"-?\d", operand):
      number = int(operand, 0) % (1 << 8 * dtype.itemsize)
      return np.full(self.threads, number, BITS[dtype.itemsize]).view(dtype)
    if operand == "global_smem":
      return np.zeros(self.threads, dtype)
    return self.registers[operand].view(dtype)

  def _set(self, register, value):
    if value.dtype != bool:
      value = value.view(BITS[value.dtype.itemsize])
    old = self.registers.get(register)
    if old is not None and not self.active.all():
      value = np.where(self.active, value, old)
    self.registers[register] = value

  def _pair(self, operand):
    return self._get(operand, "u32")[:, None].view(ml_dtypes.bfloat16)

  # Memory.

  def _places(self, operand, size):
    """An array's number, 0 for the shared memory, its bytes, and which of them: (active, size)."""
    register, _, more = operand.strip("[] ").partition("+")
    kind = "s64" if register.startswith("%rd") or register.strip() == "global_smem" else "u32"
    start = self._get(register.strip(), kind).astype(np.int64) + int(more or 0)
    (array,) = np.unique(start[self.active] >> ADDRESS)
    start &= (1 << ADDRESS) - 1
    assert not (start[self.active] % size).any(), f"misaligned: {operand}"
    bytes_ = self.arrays[array - 1] if array else self.shared
    assert start[self.active].max() + size <= len(bytes_), f"outside of array {array}: {operand}"
    return array, bytes_, start[self.active][:, None] + np.arange(size)

  def do_ld(self, how, target, source):
    if how[0].startswith("param"):
      number = self.parameters.index(source.strip("[]")) + 1
      return self._set(target, np.full(self.threads, number << ADDRESS, np.uint64))
    targets = _names(target)
    kind = np.dtype(KINDS[how[-1]])
    _, bytes_, places = self._places(source, kind.itemsize * len(targets))
    found = np.zeros((self.threads, places.shape[1]), np.uint8)
    found[self.active] = bytes_[places]
    for register, value in zip(targets, found.view(kind).T, strict=True):
      self._set(register, value.copy())

  def do_st(self, how, target, source):
    values = np.stack([self._get(o, how[-1]) for o in _names(source)], axis=1).view(np.uint8)
    array, bytes_, places = self._places(target, values.shape[1])
    assert not 0 < array <= self.first_output, f"writes to what it is given: {target}"
    bytes_[places] = values[self.active]

  def do_cp(self, how, *operands):
    """cp.async: a copy is there once its group was waited for."""
    if how[1] == "commit_group":
      self.copies.append([])
    elif how[1] == "wait_group":
      rest = int(operands[0], 0)
      done, self.copies = self.copies[: -1 - rest], self.copies[-1 - rest :]
      for places, values in itertools.chain.from_iterable(done):
        self.shared[places] = values
    else:
      target, source, size, *given = operands
      size = int(size, 0)
      _, _, places = self._places(target, size)
      values = np.zeros((self.threads, size), np.uint8)
      all_of_them = self.active
      if given:  # 0 or the size: how much is read; the rest is zeros
        self.active = self.active & (self._get(given[0], "u32") > 0)
      if self.active.any():
        _, bytes_, sources = self._places(source, size)
        values[self.active] = bytes_[sources]
      self.copies[-1].append((places, values[all_of_them]))

  # Between threads.

  def do_shfl(self, how, target, source, lane, limit, members):
    assert self.active.all() and limit == "31" and members == "-1"
    found, by = self._get(source, "b32").reshape(-1, WARP), self._get(lane, "s32").reshape(-1, WARP)
    lane = {"bfly": LANE ^ by, "idx": by}[how[1]]
    self._set(target.split("|")[0], np.take_along_axis(found, lane % WARP, axis=1).reshape(-1))

  def _matrix_places(self, address, count):
    """(warps, count, 8 rows, 16 bytes): 8 x 8 numbers of 16 bits, a row to each of 8 lanes."""
    _, _, places = self._places(address, 16)
    return places.reshape(-1, WARP, 16)[:, : 8 * count].reshape(-1, count, 8, 16)

  def do_ldmatrix(self, how, target, address):
    targets = _names(target)
    found = self.shared[self._matrix_places(address, len(targets))].view(np.uint16)
    if "trans" in how:
      found = np.ascontiguousarray(found.swapaxes(2, 3))
    for i, register in enumerate(targets):
      self._set(register, found[:, i].reshape(-1, 8 * 8).view(np.uint32).reshape(-1))

  def do_stmatrix(self, how, address, source):
    assert "trans" not in how
    values = [self._get(o, "u32").reshape(-1, 8, 4).view(np.uint8) for o in _names(source)]
    self.shared[self._matrix_places(address, len(values))] = np.stack(values, axis=1)

  def do_mma(self, how, target, a, b, c):
    """m16n8k16: a lane has two neighbours of a row of 8 x 8 parts of A, of B's columns, of C."""
    assert how[2:] == ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]
    half = lambda o: self._get(o, "u32").reshape(-1, 8, 4).view(ml_dtypes.bfloat16)
    (a0, a1, a2, a3), (b0, b1) = map(half, _names(a)), map(half, _names(b))
    a = np.concatenate([np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)], 1)
    product = a.astype(np.float32) @ np.concatenate([b0, b1], 2).astype(np.float32).swapaxes(1, 2)
    product = product.reshape(-1, 2, 8, 4, 2)
    for i, (to, plus) in enumerate(zip(_names(target), _names(c), strict=True)):
      self._set(to, product[:, i // 2, :, :, i % 2].reshape(-1) + self._get(plus, "f32"))

  def do_bar(self, how, *operands):
    """Nothing: threads are together."""

  do_griddepcontrol = do_bar

  # Registers.

  def do_mov(self, how, target, source):
    if how[-1] == "pred":
      return self._set(target, self.registers[source])
    if target.startswith("{"):
      parts = self._get(source, how[-1])[:, None].view(BITS[KINDS[how[-1]](0).itemsize // 2])
      for register, part in zip(_names(target), parts.T, strict=True):
        self._set(register, part.copy())
    elif source.startswith("{"):
      half = {"b32": "b16", "b64": "b32"}[how[-1]]
      parts = np.stack([self._get(o, half) for o in _names(source)], axis=1)
      self._set(target, parts.view(KINDS[how[-1]])[:, 0])
    else:
      self._set(target, self._get(source, how[-1]))

  def do_cvta(self, how, target, source):
    self._set(target, self._get(source, "u64"))

  def do_cvt(self, how, target, *sources):
    into, kind = how[-2:]
    if kind == "bf16":
      values = self._get(sources[0], "b16").view(ml_dtypes.bfloat16)
      return self._set(target, values.astype(np.float32))
    values = [self._get(o, kind) for o in sources]
    if into.startswith("bf16"):
      rounded = np.stack(values[::-1], axis=1).astype(ml_dtypes.bfloat16)
      return self._set(target, rounded.view(BITS[2 * len(values)])[:, 0])
    self._set(target, values[0].astype(KINDS[into]))

  def do_setp(self, how, target, *operands):
    x, y = (self._get(o, how[-1]) for o in operands)
    found = getattr(operator, how[0][:2])(x, y)
    self._set(target, found | np.isnan(x) | np.isnan(y) if how[0][2:] == "u" else found)

  def do_selp(self, how, target, yes, no, condition):
    x, y = self._get(yes, how[-1]), self._get(no, how[-1])
    self._set(target, np.where(self.registers[condition], x, y))


def _names(operand):
  return [o.strip() for o in operand.strip("{} ").split(",")]


def _nan(shape, dtype):
  size = np.prod(shape) * np.dtype(dtype).itemsize
  return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)
