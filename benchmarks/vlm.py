"""The VLM evaluation: does it fit with a language model of a billion parameters, and who sees best.

python -m benchmarks.vlm compile [--batch=64]
python -m benchmarks.vlm step [--batch=64] [--steps=20]
python -m benchmarks.vlm shapes --out DIR [--steps 500] [--seeds 0 1 2]
python -m benchmarks.vlm oracle [--seed 0] [--keys '{"steps": 500}']

compile: one step of the bridge (ViT-B/16 at 224 px, frozen, before a frozen model of the shape of
Llama 3.2 1B) for chips that are not here; needs what `--mode=compile` needs. step: the same, with
random weights, timed on the accelerator that is here. shapes: LeVLJEPA,
LeVLJEPA+, CLIP and SigLIP of benchmarks/shapes.py in DIR (trained if they are not there), their
untrained network and no vision at all. oracle: the small language model of `shapes` told all that
it asks for, and a bridge to it from features that hold all of every object.
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import objectives, seeds
from configs import tiny_shapes, vit_b
from jepa_vl import aot, build, sharding, state, train
from jepa_vl.aot import hlo, topologies
from jepa_vl.data import shapes_questions, shapes_scene, shapes_text
from jepa_vl.evals import bridge_fit, scratch_language, vlm
from jepa_vl.model import bridge as bridge_lib
from jepa_vl.model import language, two_tower

GIB = 2**30
# The published config.json of Llama 3.2 1B.
LLAMA = language.Config(
  vocab_size=128256, width=2048, depth=16, heads=32, kv_heads=8, head_dim=64, hidden=8192,
  length=131072, norm="rms", norm_eps=1e-5, positions="rotary", mlp="swiglu", qkv_bias=False,
  out_bias=False, mlp_bias=False, tied=True, rope_theta=5e5,
  rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192.0),
)  # fmt: skip
OPENING, QUESTION, ANSWER = 8, 48, 8  # tokens
WAYS = (("v5e-16", 16, 1), ("v5e-16", 1, 16), ("h100:1", 1, 1))  # topology, data, fsdp


def lowered(mesh, batch, pool):
  """The bridge's step with the encoder before it, lowered for the mesh; nothing is allocated.

  Returns:
    the lowered program; its arguments' shapes, and what makes the first of them; the number of
    image tokens; FLOPs of a step.
  """
  config = vit_b.get_config()
  tower = two_tower.from_config(
    config.model, config.text, vocab_size=50257, dtype=jnp.bfloat16, scalars={},
    device=mesh.devices.flat[0],
  )  # fmt: skip
  model = language.LanguageModel(LLAMA, True, "full", jnp.bfloat16)
  bridge = bridge_lib.Bridge(LLAMA.width, LLAMA.width, 0.02, jnp.bfloat16)
  how = bridge_fit.Fit(5000, batch, 1e-3, 100, 0.0, 0)
  tx, opening = how.optimizer(), np.zeros(OPENING, np.int32)
  side = config.model.image_size // config.model.patch_size
  n, F = (side // pool) ** 2, two_tower.width(config.model.size)

  def step(bridge_state, frozen, encoder, data):
    image = {"image": data.pop("image")}
    patches = tower.apply(encoder, image, train=False)["patches"]
    features = bridge_lib.pool(patches.reshape(-1, side, side, F), pool)
    one = bridge_fit.make_step(bridge, model, tx, opening)
    return one(bridge_state, frozen, {**data, "features": features})

  abstract = lambda tree: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
    sharding.shardings_of(tree, mesh),
  )  # fmt: skip
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), language.abstract_params(model)
  )
  init = lambda: bridge.init(jax.random.key(0), jnp.zeros((1, n, F)))["params"]
  make_state = lambda: bridge_fit.new_state(init(), tx)
  first = jax.eval_shape(make_state)
  encoder = jax.eval_shape(state.init_fn(tower, tx), jax.random.key(0)).variables
  rows = NamedSharding(mesh, P(sharding.BATCH))
  shape = lambda dtype, *s: jax.ShapeDtypeStruct((batch, *s), dtype, sharding=rows)
  data = {"image": shape(jnp.uint8, config.model.image_size, config.model.image_size, 3)}
  for name, count in (("tokens", QUESTION), ("answer", ANSWER)):
    mask = "mask" if name == "tokens" else f"{name}_mask"
    data |= {name: shape(jnp.int32, count), mask: shape(bool, count)}
  with jax.set_mesh(mesh):
    arguments = abstract(first), abstract(params), abstract(encoder), data
    program = jax.jit(step, donate_argnums=0).lower(*arguments)
  # Forward, forward again in the backward pass (remat), and back to the bridge: the weights' own
  # gradients, a third of training's work, are not made. The text tower is not run.
  image = two_tower.forward_flops(tower, text_rows=0)
  flops = image + 3 * language.forward_flops(LLAMA, OPENING + n + QUESTION + ANSWER, ANSWER + 1)
  return program, arguments, make_state, n, batch * flops


def measure(name, data, fsdp, batch, pool):
  """Prints a row of the table: what fits, and the least time of a step at published peaks."""
  topology = topologies.get(name)
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=1, devices=topology.devices)
  started = time.perf_counter()
  program, _, _, n, flops = lowered(mesh, batch, pool)
  compiled = program.compile()
  took = time.perf_counter() - started
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  used += memory.generated_code_size_in_bytes
  flops /= mesh.size
  found = hlo.Program(compiled.as_text(), branch_share=1.0)
  _, links, _ = aot.collectives(found, mesh, topology)
  ms = {
    "compute": 1e3 * flops / topology.chip.flops,
    "memory": 1e3 * found.hbm_bytes(on_chip=topology.is_tpu) / topology.chip.hbm_bandwidth,
    "links": 1e3 * links / topology.chip.link,
  }
  print(
    f"| {name} | data {data}, fsdp {fsdp} | {batch} | {n} | {used / GIB:.2f} of "
    f"{topology.chip.usable / GIB:.0f} | {memory.argument_size_in_bytes / GIB:.2f} | "
    + " | ".join(f"{t:.1f}" for t in ms.values())
    + f" | {max(ms.values()):.1f} | {1e3 * batch / max(ms.values()):,.0f} | {took:.0f} |",
    flush=True,
  )


def compile_table(args):
  aot.prepare()
  print(
    "| topology | mesh | batch | image tokens | memory, GiB | weights and state, GiB | compute, ms "
    "| memory, ms | links, ms | step at least, ms | questions/s at most | compiled in, s |"
  )
  print("|---" * 12 + "|", flush=True)
  for name, data, fsdp in WAYS:
    measure(name, data, fsdp, args.batch, args.pool)


def step_here(args):
  """Prints what a step takes on this machine's first device."""
  device = jax.devices()[0]
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=[device])
  program, (_, *shapes), make_state, n, flops = lowered(mesh, args.batch, args.pool)
  step = program.compile()
  leaves, tree = jax.tree.flatten(shapes)
  rest = jax.tree.unflatten(tree, [_random(i, leaf) for i, leaf in enumerate(leaves)])
  state, seconds = jax.jit(make_state)(), []
  for _ in range(args.steps + 1):
    begun = time.perf_counter()
    state, loss = jax.block_until_ready(step(state, *rest))
    seconds.append(time.perf_counter() - begun)
  if not np.isfinite(loss):
    raise SystemExit("the loss is not finite, so the times say little")
  low, median, high = np.quantile(seconds[1:], (0, 0.5, 1))
  memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
  print(
    f"{device.device_kind}, jax {jax.__version__}: {args.batch} questions, {n} image tokens; "
    f"{1e3 * median:.1f} ms a step ({1e3 * low:.1f} - {1e3 * high:.1f}), "
    f"{args.batch / median:.0f} questions/s, {flops / median / 1e12:.0f} TFLOP/s, peak "
    f"{memory / GIB:.2f} GiB"
  )


def _random(i, leaf):
  key = jax.random.key(i)
  if leaf.dtype == bool:
    return jnp.ones(leaf.shape, bool)
  if jnp.issubdtype(leaf.dtype, jnp.integer):
    return jax.random.randint(key, leaf.shape, 0, 256).astype(leaf.dtype)
  return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)


FIGURES = ("accuracy", *(f"{kind}/accuracy" for kind in (
  "colour", "shape", "count", "relation", "presence")))  # fmt: skip


def shapes(args):
  rows = {name: [] for name in (*objectives.PRESETS, "untrained")}
  for seed in args.seeds:
    for name, preset in objectives.PRESETS.items():
      workdir = os.path.join(args.out, f"{preset or 'levljepa'}-seed{seed}")
      flags = [f"--config.steps={args.steps}", "--config.eval_every=0", "--config.evals={}"]
      seeds.results(workdir, seed, f"configs/tiny_shapes.py:{preset}", flags)
      rows[name].append(answers(preset, seed, workdir, args))
    rows["untrained"].append(answers("", seed, train.UNTRAINED, args))
  table(rows, args)


def answers(preset, seed, weights, args):
  """The VLM evaluation's figures with one encoder; what its folder in args.out holds is kept."""
  path = os.path.join(args.out, f"vlm-{os.path.basename(weights)}-seed{seed}.json")
  if os.path.exists(path):
    with open(path) as f:
      return json.load(f)
  config = tiny_shapes.get_config(",".join(filter(None, (preset, "shapes_vlm"))))
  config.seed = config.evals.shapes_vlm.seed = seed
  config.evals.shapes_vlm.update(json.loads(args.keys))
  run = build.build(config, training=False)
  encode = build.make_encode(run, cache=os.path.join(args.out, "vlm"))
  variables, _ = train.read_variables(run, weights)
  keys = {k: v for k, v in config.evals.shapes_vlm.items() if k not in ("evaluation", "when")}
  result = vlm.run(encode, variables, run.mesh, **keys)
  print(f"{weights} seed {seed}: {result['figures']['iid/accuracy']:.3f}", flush=True)
  with open(path, "w") as f:
    json.dump(result["figures"], f, indent=1)
  return result["figures"]


def table(rows, args):
  print(f"{args.steps} steps, seeds {args.seeds}; mean (lowest - highest)\n")
  print("| figure | " + " | ".join(rows) + " | no vision | majority |")
  print("|---" * (len(rows) + 3) + "|")
  first = rows["untrained"]
  for split in tiny_shapes.get_config("shapes_vlm").evals.shapes_vlm.splits:
    for figure in FIGURES:
      key = f"{split}/{figure}"
      if key not in first[0]:  # a kind that the split does not ask
        continue
      cells = [objectives.spread([found[key] for found in some]) for some in rows.values()]
      cells += [objectives.spread([found[f"{key}@{floor}"] for found in first])
                for floor in ("no_vision", "majority")]  # fmt: skip
      print(f"| {key} | {' | '.join(cells)} |")


class Told:
  """In a bridge's place: features are counts of tokens, as scratch_language.slots has them."""

  def apply(self, variables, shown):
    return scratch_language.spoken(variables["params"], shown)


def objects(split, path):
  """vlm.Questions of a split, with perfect features of objects on a grid of 4 x 4, and all told."""
  source = shapes_questions.ShapesQuestions(path, split)
  scenes = [source.scene(i) for i in range(len(source))]
  rng, eye = np.random.default_rng(len(source)), np.eye(8)
  bank = rng.normal(scale=0.05, size=(len(source), 4, 4, 20)).astype(np.float32)
  bank[..., -1] += 1  # where nothing is: the bridge's first LayerNorm would make noise large
  for grid, scene in zip(bank, scenes, strict=True):
    for o in scene.objects:
      near = (shapes_scene.FARTHEST - o.depth) / (shapes_scene.FARTHEST - shapes_scene.NEAREST)
      what = (*eye[o.shape], *eye[o.colour], 1, 4 * o.x - 2, 4 * near - 2, -1)
      grid[int(4 * o.y), int(4 * o.x)] += what
  records, places = [source.asked(i) for i in range(len(source))], np.arange(len(source))
  questions = vlm.Questions(source, records, places, 0, bank.reshape(-1, 16, 20), (16, 20))
  return questions, [shapes_text.told(scene) for scene in scenes]


def oracle(args):
  keys = tiny_shapes.get_config("shapes_vlm").evals.shapes_vlm
  keys.update(json.loads(args.keys))
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  (train, train_told), (test, test_told) = (
    objects(*which) for which in (("train", keys.train_path), ("iid", keys.path))
  )
  timed = Timed()
  speaker = scratch_language.train(
    train.records, train_told, keys.template, mesh, side=4, answer_tokens=keys.answer_tokens,
    seed=args.seed, folder="",
  )  # fmt: skip
  timed("language model")
  print_accuracy("told", test, told_answers(speaker, test, test_told, keys, mesh))
  how = bridge_fit.Fit(
    keys.steps, keys.batch_size, keys.lr, keys.warmup, keys.weight_decay, args.seed
  )
  ask = vlm.Ask(
    speaker, keys.template, keys.answer_tokens, keys.hidden, how, mesh, train, {"iid": test}
  )
  timed()
  for name, see in (("objects", lambda q: q), ("nothing", lambda q: q.blind())):
    print_accuracy(name, test, ask(see(train), {"iid": see(test)}, "")["iid"])
    timed(f"bridge to {name}")


def told_answers(speaker, test, told, keys, mesh):
  """What the language model says without a bridge."""
  shown = scratch_language.slots(told, speaker.tokenizer, speaker.model.config.vocab_size, 4)
  asked, said = zip(*((r["question"], r["answers"][0]) for r in test.records), strict=True)
  prompts = bridge_fit.Prompts(speaker.tokenizer, keys.template, asked, said, keys.answer_tokens)
  of_batch = bridge_fit.make_answer(Told(), speaker, prompts)
  features = lambda rows: shown[rows]
  return bridge_fit.answer(
    of_batch, speaker.params, speaker, prompts, features, mesh, keys.batch_size
  )


def print_accuracy(name, test, answers):
  right = {}
  for record, answer in zip(test.records, answers, strict=True):
    right.setdefault(record["kind"], []).append(answer == record["answers"][0])
  print(name, " ".join(f"{kind} {np.mean(found):.2f}" for kind, found in right.items()), flush=True)


class Timed:
  """Prints the CPU's seconds since it was last called."""

  def __init__(self):
    self._last = time.process_time()

  def __call__(self, what=""):
    now = time.process_time()
    if what:
      print(f"{what}: {now - self._last:.0f} s of a CPU core", flush=True)
    self._last = now


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  which = parser.add_subparsers(dest="which", required=True)
  for name, do in (("compile", compile_table), ("step", step_here)):
    part = which.add_parser(name)
    part.add_argument("--batch", type=int, default=64)
    part.add_argument("--pool", type=int, default=1, help="side of the patches that share a token")
    part.add_argument("--steps", type=int, default=20, help="to time")
    part.set_defaults(do=do)
  part = which.add_parser("shapes")
  objectives.add_arguments(part, steps=500)
  part.add_argument("--keys", default="{}", help="JSON of evals.shapes_vlm's keys that differ")
  part.set_defaults(do=shapes)
  part = which.add_parser("oracle")
  part.add_argument("--seed", type=int, default=0)
  part.add_argument("--keys", default="{}", help="as for shapes")
  part.set_defaults(do=oracle)
  args = parser.parse_args()
  args.do(args)


if __name__ == "__main__":
  main()
