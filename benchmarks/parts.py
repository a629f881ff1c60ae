"""Which part of a train step moves how many bytes and multiplies how much, by XLA's names."""

import collections
import math
import re

from jepa_vl.aot import hlo

# First match wins, of what XLA calls an operation: the path of modules and scopes it came from.
PARTS = (
  ("SIGReg", r"sigreg"),
  ("heads and predictors", r"_head|_predictor"),
  ("token embedding", r"/text/(jit\(_take\)|convert_element_type|scatter|gather)"),
  ("products of the towers", r"/(qkv|out|up|down|patch_embedding)/dot_general"),
  ("attention", r"/attn/(?!(qkv|out)/)"),
  ("norms, GELU, residuals, biases", r"/(tower|image|text)\b"),
  ("optimizer, norms of gradients", r"optimizer|\)/(reduce_sum|sqrt|mul|add|square)$"),
)
COLLECTIVES = "collectives (their HBM traffic)"
WEIGHTS = "casts and stacks of weights and gradients"
REST = "the rest"


def part_of(name):
  """The part of an operation's name."""
  return next((part for part, pattern in PARTS if re.search(pattern, name)), REST)


def traffic(program, *, depth, rows):
  """{part: bytes} of `hlo.Program.traffic` on a TPU.

  A fusion counts whole for the product in it, if there is one. depth, rows: what tells stacks of
  weights, (depth, ...), from those of activations, (depth, rows, ...).
  """
  found = collections.Counter()
  weights = re.compile(rf"^\(*\w+\[(1|{depth}),(?!(1,)?{rows},)")
  for op, size in program.traffic(on_chip=True):
    names = _names(op, program)
    products = [name for name in names if "dot_general" in name]
    if op.opcode.removesuffix("-start") in hlo.COLLECTIVES:
      part = COLLECTIVES
    elif not products and weights.match(op.type) and part_of(names[0]) not in _WITH_WEIGHTS:
      part = WEIGHTS
    else:
      part = part_of((products or names)[0])
    found[part] += size
  return found


# These own what has a weight's shape.
_WITH_WEIGHTS = ("optimizer, norms of gradients", "heads and predictors", "SIGReg")


def _names(op, program):
  """The operation's own name, then those of what is fused in it."""
  own = re.findall(r'op_name="([^"]*)"', op.attributes)
  inside = [
    name for callee in op.called("calls") for inner in program.computations[callee].values()
    for name in _names(inner, program)
  ]  # fmt: skip
  return (own or inside[:1] or [""]) + inside


def flops(jaxpr, *, branch_share, path="", runs=1.0):
  """{part: FLOPs} of the products in a jaxpr, 2 per multiply-add, on all devices together.

  A kernel's are counted where it computes them, padding included.
  """
  found = collections.Counter()
  for eqn in jaxpr.eqns:
    name = f"{path}/{eqn.source_info.name_stack}/{eqn.primitive.name}"
    if eqn.primitive.name == "dot_general":
      found[part_of(name)] += runs * _dot_flops(eqn)
      continue
    inner = [
      flops(sub, branch_share=branch_share, path=name, runs=runs * _times(eqn))
      for sub in _jaxprs(eqn.params)
    ]
    if eqn.primitive.name == "cond":  # the kernels' by platform, and that of the diagnostics
      share = 1.0 if eqn.params.get("branches_platforms") else branch_share
      largest = max(inner, key=lambda counts: sum(counts.values()))
      inner = [{part: share * n for part, n in largest.items()}]
    for counts in inner:
      found.update(counts)
  return found


def _dot_flops(eqn):
  ((contracted, _), _), x = eqn.params["dimension_numbers"], eqn.invars[0].aval
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(x.shape[i] for i in contracted)


def _times(eqn):
  """How often the body of an equation runs, on all devices together."""
  if eqn.primitive.name == "shard_map":  # whose shapes are a device's
    return eqn.params["mesh"].size
  if eqn.primitive.name == "pallas_call":
    return math.prod(eqn.params["grid_mapping"].grid)
  return eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1


def _jaxprs(params):
  values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else [p])]
  values = [getattr(v, "jaxpr", v) for v in values]
  return [v for v in values if hasattr(v, "eqns")]
