"""Where a train step's time goes on this machine, by class of work.

python -m benchmarks.where [--size tiny] [--batch 16] [--image-size 224] [--steps 3]

Traces steps of the compiled program and adds up its instructions' times by what their names in the
program say. Of a CPU: of one thread that waits for the others; of a GPU: of its kernels. What
several classes are fused into counts for the class of the fusion's root.
"""

import argparse
import collections
import glob
import os
import re
import tempfile
import time

from jepa_vl import allocator

# First match wins; of an instruction's path of scopes.
CLASSES = (
  ("SIGReg", r"sigreg"),
  ("optimizer, clipping", r"optimizer|^reduce_sum|^\w+$"),
  ("heads and predictors", r"(image|text)_(head|predictor)"),
  ("products of the towers", r"(qkv|out|up|down|patch_embedding)/(dot_general|transpose)"),
  ("attention", r"/attn/"),
  ("LayerNorm", r"_norm/"),
  ("GELU", r"/mlp/"),
  ("token and patch embedding, positions", r"/text/|/image/(?!vit)"),
  ("residual stream, biases", r"vit|gpt"),
)  # fmt: skip


def class_of(scopes):
  """The name in CLASSES for an instruction's `op_name`."""
  scopes = re.sub(r"jit\([^)]*\)/|while/body/|closed_call/", "", scopes)
  return next((name for name, pattern in CLASSES if re.search(pattern, scopes)), "other")


def traced(take, steps):
  """{instruction: milliseconds per step} of all that was traced, and milliseconds of a step."""
  import jax

  options = jax.profiler.ProfileOptions()
  options.host_tracer_level, options.python_tracer_level = 3, 0
  with tempfile.TemporaryDirectory() as folder:
    begun = time.perf_counter()
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(steps):
        take()
    elapsed = 1e3 * (time.perf_counter() - begun) / steps
    (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
  found, planes = collections.Counter(), list(data.planes)
  chips = [p for p in planes if p.name.startswith("/device:")]
  for plane in chips or planes:
    for line in plane.lines:
      for event in line.events:
        # A GPU's event has the name of the kernel, and tells of which instruction it is.
        name = dict(event.stats).get("hlo_op", event.name) if chips else event.name
        found[name.removeprefix("%")] += event.duration_ns / 1e6 / steps
  return found, elapsed


def scopes_of(text):
  """{instruction: op_name} of a compiled program's text, loops' bodies and branches included."""
  found = {}
  for line in re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*$", text, re.M):
    scopes = re.search(r'op_name="([^"]*)"', line[0])
    # A loop's time is that of its body, whose instructions are there too.
    if not re.search(r" (while|conditional|call)\(", line[0]):
      found[line[1]] = scopes[1] if scopes else ""
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", default="tiny")
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--steps", type=int, default=3)
  args, keys = parser.parse_known_args()
  allocator.keep_freed_memory()
  # A GPU's kernels within a command buffer do not say of which instruction they are.
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
  os.environ["XLA_FLAGS"] = flags.strip()
  from benchmarks import step as bench

  c = bench.make_config(args.size, args.batch, args.image_size, keys)
  run = bench.Ours(c)
  batch = run.place(bench.make_batch(c))
  text = run.compiled(batch)
  for _ in range(3):
    run.take(batch)
  found, elapsed = traced(lambda: run.take(batch), args.steps)
  scopes = scopes_of(text)
  classes = collections.Counter()
  for name, milliseconds in found.items():
    if name in scopes:
      classes[class_of(scopes[name])] += milliseconds
  total = sum(classes.values())
  print(f"{args.size}, batch {args.batch}: {elapsed:.3g} ms a step while traced\n")
  print("| class | ms | share |\n|---|---|---|")
  for name, milliseconds in classes.most_common():
    print(f"| {name} | {milliseconds:.3g} | {milliseconds / total:.0%} |")
  print(f"| between instructions | {elapsed - total:.3g} | |")


if __name__ == "__main__":
  main()
