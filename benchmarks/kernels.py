"""Attention, norms and GELU alone, forward and backward, by name of the implementation, in one run.

python -m benchmarks.kernels [--rows 256] [--width 768] [--image-tokens 197] [--caption-tokens 77]

At the shapes of a train step with so many pairs: bfloat16 on a GPU, float32 on a CPU. PyTorch's
attention (SDPA, eager) is the peer, where PyTorch is installed. `error` is relative, of results and
of gradients, against float32 on this device. TB/s are of what cannot but be read and written.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from jepa_vl import allocator
from jepa_vl.model import attention, pointwise

REPEATS, QUEUED = 5, 10


def milliseconds(f, *args, wait=jax.block_until_ready):
  """The median of a call's time, so many of them queued at once."""
  wait(f(*args))
  times = []
  for _ in range(REPEATS):
    begun = time.perf_counter()
    for _ in range(QUEUED):
      found = f(*args)
    wait(found)
    times.append(1e3 * (time.perf_counter() - begun) / QUEUED)
  return statistics.median(times)


def both_ways(f):
  """f, and what gives the gradients of its arguments, compiled: of (arguments, results' ones)."""
  forward = jax.jit(lambda args: f(*args))
  # Of a program that has only the backward pass: what the forward one keeps is an argument.
  kept = jax.jit(lambda args: jax.vjp(f, *args)[1])
  backward = jax.jit(lambda pull, grads: pull(grads))
  return forward, lambda args: functools.partial(backward, kept(args))


def distance(found, exact):
  """Of two trees of arrays, relative."""
  squares = lambda tree: sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree))
  minus = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found, exact)
  return float(jnp.sqrt(squares(minus) / squares(exact)))


def measure(name, what, f, args, grads, moved=0, exact=None):
  """A row of the table; exact: results and gradients in float32."""
  forward, backward_of = both_ways(f)
  backward = backward_of(args)
  ms = milliseconds(forward, args), milliseconds(backward, grads)
  found = forward(args), backward(grads)
  errors = [f"{distance(a, b):.1e}" for a, b in zip(found, exact, strict=True)] if exact else []
  rate = [f"{part / t / 1e9:.2f}" for part, t in zip(moved, ms, strict=True)] if moved else []
  cells = *(f"{t:.3f}" for t in ms), ", ".join(rate) or "-", ", ".join(errors) or "-"
  print(f"| {what} | {name} | {' | '.join(cells)} |", flush=True)


def in_float32(f, args, grads):
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  with jax.default_matmul_precision("highest"):  # on a GPU else of TF32
    out, pull = jax.vjp(f, *wide(args))
    return jax.block_until_ready((out, pull(wide(grads))))


def measure_attention(what, B, L, heads, size, causal, dtype, names):
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)
  qkv, bias, grad = draw(0, B, L, 3, heads, size), draw(1, heads, size), draw(2, B, L, heads, size)

  def run(name, qkv, bias):
    if name not in attention.APART:
      return attention.attend(qkv, None, causal=causal, implementation=name, bias=bias)
    # As the step does: a token more for all layers, and three arrays from three products.
    padded, _ = attention.pad(qkv.reshape(B, L, -1), None, name)
    parts = attention.parts(padded.reshape(B, -1, *qkv.shape[2:]))
    out = attention.attend(parts, None, causal=causal, implementation=name, bias=bias, length=L)
    return out[:, :L]

  exact = in_float32(functools.partial(run, "xla"), (qkv, bias), grad)
  for name in names:
    measure(name, what, functools.partial(run, name), (qkv, bias), grad, exact=exact)
  if ms := torch_attention((B, L, 3, heads, size), causal):
    print(f"| {what} | PyTorch | {' | '.join(f'{t:.3f}' for t in ms)} | - | - |", flush=True)


def torch_attention(shape, causal):
  """Milliseconds of PyTorch's, forward and backward; None where it is not installed."""
  try:
    import torch
  except ImportError:
    return None
  gpu = torch.cuda.is_available()
  wait = torch.cuda.synchronize if gpu else lambda: None
  dtype = torch.bfloat16 if gpu else torch.float32
  qkv = torch.randn(shape, device="cuda" if gpu else "cpu", dtype=dtype, requires_grad=True)

  def run():
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)

  out = run()
  grad = torch.randn_like(out)
  return tuple(
    milliseconds(f, wait=lambda _: wait())
    for f in (run, lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True))
  )


def measure_pointwise(what, B, L, width, dtype, names):
  draw = lambda i, width=width: jax.random.normal(jax.random.key(i), (B, L, width), dtype)
  size, numbers = draw(0).nbytes, jnp.ones(width)

  def norm(name, x, y, bias):
    return pointwise.layer_norm(x, (y, bias), numbers, numbers, 1e-6, name)

  args, grads = (draw(0), draw(1), numbers), (draw(2), draw(3))
  exact = in_float32(functools.partial(norm, "xla"), args, grads)
  for name in names:
    f = functools.partial(norm, name)
    measure(name, f"{what}, sum and norm", f, args, grads, (4 * size, 4 * size), exact)
  for tanh in (False, True):
    gelu = lambda name, x, bias, tanh=tanh: pointwise.gelu(x, bias, tanh, name)
    args, grads = (draw(0, 4 * width), jnp.ones(4 * width)), draw(1, 4 * width)
    exact = in_float32(functools.partial(gelu, "xla"), args, grads)
    for name in names:
      f = functools.partial(gelu, name)
      kind = f"{what}, GELU by {'tanh' if tanh else 'erf'}"
      measure(name, kind, f, args, grads, (8 * size, 12 * size), exact)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=256)
  parser.add_argument("--width", type=int, default=768)
  parser.add_argument("--image-tokens", type=int, default=197)
  parser.add_argument("--caption-tokens", type=int, default=77)
  args = parser.parse_args()
  allocator.keep_freed_memory()
  gpu = jax.default_backend() == "gpu"
  dtype = jnp.bfloat16 if gpu else jnp.float32
  # On a CPU kernels are interpreted, which says nothing of their time.
  of_attention = ("short", "xla", "cudnn", "pallas") if gpu else ("short", "xla")
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {args.rows} rows")
  print("| what | implementation | forward ms | backward ms | TB/s | error |")
  print("|---" * 6 + "|")
  for what, tokens in (("images", args.image_tokens), ("captions", args.caption_tokens)):
    shape = args.rows, tokens, args.width // 64, 64
    measure_attention(what, *shape, what == "captions", dtype, of_attention)
  measure_pointwise(
    "images", args.rows, args.image_tokens, args.width, dtype, pointwise.IMPLEMENTATIONS[: 1 + gpu]
  )


if __name__ == "__main__":
  main()
