"""Time and memory of SIGReg, value and gradient, against the naive form, in one run.

python -m benchmarks.sigreg [--rows 256 1024 4096] [--dim 256] [--slices 4096]

`naive` is the formula as written in JAX, `PyTorch` the releases' in PyTorch (eager, on this
machine's device; "-" where it is not installed). The ratios are of the median times.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jepa_vl.objectives.sigreg import sigreg

KNOTS, T_MAX, SCALE_ROWS = 17, 3.0, 256


def naive(rng, z, num_slices):
  """The formula as written: a (B, M, T) array and automatic differentiation."""
  A = jax.random.normal(rng, (z.shape[1], num_slices))
  A = A / jnp.linalg.norm(A, axis=0)
  t = jnp.linspace(0, T_MAX, KNOTS)
  phi = jnp.exp(-(t**2) / 2)
  w = jnp.full(KNOTS, 2 * t[1]).at[jnp.array([0, -1])].set(t[1])
  xt = (z @ A)[..., None] * t
  distance = (jnp.cos(xt).mean(0) - phi) ** 2 + jnp.sin(xt).mean(0) ** 2
  return SCALE_ROWS * jnp.mean(distance @ (w * phi))


def streamed(rng, z, num_slices):
  return sigreg(
    rng, z, num_slices=num_slices, knots=KNOTS, t_max=T_MAX, group_size=0, scale_rows=SCALE_ROWS
  )


def compile_(f, num_slices, rng, z):
  return jax.jit(jax.value_and_grad(lambda r, z: f(r, z, num_slices), 1)).lower(rng, z).compile()


def torch_program(num_slices, z):
  """A step of PyTorch's, value and gradient; None where it is not installed."""
  try:
    import torch
  except ImportError:
    return None
  from benchmarks import torch_peer

  device = "cuda" if torch.cuda.is_available() else "cpu"
  z = torch.tensor(np.asarray(z), device=device, requires_grad=True)

  def step():
    z.grad = None
    torch_peer.sigreg(
      z, slices=num_slices, knots=KNOTS, t_max=T_MAX, group=0, rows=SCALE_ROWS
    ).backward()
    return float(z.grad[0, 0])  # waits

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--slices", type=int, default=4096)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; D={args.dim}, M={args.slices}")
  print("| B | streamed s | MiB | naive s | MiB | PyTorch s | streamed / naive | / PyTorch |")
  print("|---" * 8 + "|")
  rng = jax.random.key(0)
  for rows in args.rows:
    z = jax.random.normal(jax.random.key(1), (rows, args.dim))
    programs = {f: compile_(f, args.slices, rng, z) for f in (naive, streamed)}
    memory = {f: p.memory_analysis().temp_size_in_bytes / 2**20 for f, p in programs.items()}
    steps = {f: lambda p=p, z=z: jax.block_until_ready(p(rng, z)) for f, p in programs.items()}
    steps["PyTorch"] = torch_program(args.slices, z)
    times = {f: [] for f, step in steps.items() if step}
    for repeat in range(args.repeats + 1):  # in turn, so that all meet the same machine
      for f in times:
        start = time.perf_counter()
        steps[f]()
        if repeat:
          times[f].append(time.perf_counter() - start)
    seconds = {f: statistics.median(t) for f, t in times.items()}
    ours, peer = seconds[streamed], seconds.get("PyTorch")
    print(
      f"| {rows} | {ours:.3f} | {memory[streamed]:.0f} | {seconds[naive]:.3f} "
      f"| {memory[naive]:.0f} | {f'{peer:.3f}' if peer else '-'} | {ours / seconds[naive]:.2f} "
      f"| {f'{ours / peer:.2f}' if peer else '-'} |",
      flush=True,
    )


if __name__ == "__main__":
  main()
