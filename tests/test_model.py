"""Towers and heads: shapes, causality, padding, one set of numbers however layers are compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from configs import vit_b
from jepa_vl import state as state_lib
from jepa_vl.model import heads, layers, two_tower, vit
from jepa_vl.model.gpt import readout_positions


def build(config, **changes):
  c = config.copy_and_resolve_references()
  c.update_from_flattened_dict(changes)
  return two_tower.from_config(c.model, c.text, vocab_size=50, dtype=jnp.float32, scalars={})


def example(model, rows=8, seed=0):
  rng = np.random.default_rng(seed)
  S, L = model.image_size, model.text_length
  lengths = rng.integers(1, L + 1, (rows, 1))
  return {
    "image": rng.integers(0, 256, (rows, S, S, 3), dtype=np.uint8),
    "text": rng.integers(0, 50, (rows, L)).astype(np.int32),
    "mask": np.arange(L)[None] < lengths,
  }


def init(model):
  batch = two_tower.dummy_batch(model, 2)
  return jax.jit(lambda key: model.init(key, batch, train=False))(jax.random.key(0))


def disturbed(variables):
  """With parameters of which none is zero, as biases are at first."""
  noise = lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape)
  return {**variables, "params": jax.tree.map(noise, variables["params"])}


def loss_and_grads(model, variables, batch):
  def loss(params):
    out, _ = model.apply({**variables, "params": params}, batch, train=True, mutable="batch_stats")
    return sum(jnp.sum(jnp.sin(3 * out[k])) for k in ("p_img", "p_txt")), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  return out, grads


def assert_near(grad, other):
  """Each number within what rounding does to an array whose largest is as large as this one's."""
  np.testing.assert_allclose(grad, other, atol=2e-5 * max(1, np.abs(other).max()))


def test_shapes(config):
  model = build(config)
  out = jax.eval_shape(lambda: model.apply(init(model), example(model), train=False))
  assert {k: v.shape for k, v in out.items()} == {
    **{k: (8, 16) for k in ("z_img", "z_txt", "p_img", "p_txt")},
    "cls": (8, 128), "patches": (8, 4, 128),
  }  # fmt: skip


@pytest.mark.parametrize("changes", [
  {"model.scan": False},
  {"model.scan": False, "model.remat": "names", "model.attention": "pallas"},
  pytest.param({"model.remat": "full"}, marks=pytest.mark.slow),
  pytest.param({"model.remat": "dots"}, marks=pytest.mark.slow),
  {"model.remat": "names"},
  pytest.param({"model.remat": "full", "model.scan": False}, marks=pytest.mark.slow),
])
def test_scan_unroll_and_remat_give_the_same_numbers(config, changes):
  """From the same parameters: one layout serves all of them."""
  config.model.scan = True
  model, other = build(config), build(config, **changes)
  variables, batch = disturbed(init(model)), example(model)
  assert jax.tree.structure(init(other)) == jax.tree.structure(variables)
  (out, grads), (out2, grads2) = (loss_and_grads(m, variables, batch) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, out2)
  jax.tree.map(assert_near, grads, grads2)


def products(jaxpr, shape):
  """How many products a program has one of whose factors is of that shape."""
  count = 0
  for e in jaxpr.eqns:
    count += e.primitive.name == "dot_general" and shape in [v.aval.shape for v in e.invars]
    for x in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(x, "jaxpr", x)
      count += products(inner, shape) if hasattr(inner, "eqns") else 0
  return count


@pytest.mark.parametrize("scan", [True, False])
def test_names_computes_no_product_again(scan):
  """But those of the attention itself: of a layer's kernels the backward pass has what it needs."""
  block = dict(
    heads=2, causal=False, attention="short", pointwise="xla", gelu_tanh=False, norm_eps=1e-6,
    kernel_init=jax.nn.initializers.ones, out_init=jax.nn.initializers.ones, dtype=jnp.float32,
  )  # fmt: skip
  x, found = jnp.ones((2, 5, 64)), []
  for remat in ("none", "names", "full"):
    blocks = layers.Blocks(2, scan, remat, block)
    params = blocks.init(jax.random.key(0), x)
    program = jax.make_jaxpr(jax.grad(lambda p, blocks=blocks: jnp.sum(blocks.apply(p, x))))(params)
    kernels = (64, 3, 2, 32), (64, 192), (2, 32, 64), (64, 256), (256, 64)
    found.append([products(program.jaxpr, shape) for shape in kernels])
  none, names, full = found
  assert none == names != full


@pytest.mark.parametrize("scan", [True, False])
def test_training_reads_cls_where_evaluation_does(config, scan):
  model = build(config, **{"model.scan": scan})
  variables, images = init(model), example(model)["image"]
  training, evaluation = (look(model, variables, images, train)["cls"] for train in (True, False))
  np.testing.assert_allclose(training, evaluation, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_unrolled_layers_read_the_same_tokens(config, packed):
  """The last token of each row; captions packed into rows, whose ends lie anywhere."""
  config.model.scan = True
  model, other = (build(config, **{"model.scan": scan, "text.readout": "last"})
                  for scan in (True, False))  # fmt: skip
  variables, batch = disturbed(init(model)), example(model)
  if packed:
    text = np.random.default_rng(0).integers(1, 50, (2, 3, 12)).astype(np.int32)
    position = np.broadcast_to(np.arange(12) % 5, text.shape).astype(np.int32)
    readout = np.array([[4, 9, 11, 35], [0, 16, 21, 30]], np.int32)
    batch = {"image": batch["image"], "packed_text": text, "packed_position": position,
             "packed_readout": readout}  # fmt: skip
  (out, grads), (out2, grads2) = (loss_and_grads(m, variables, batch) for m in (model, other))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out, out2)
  jax.tree.map(assert_near, grads, grads2)


def test_layers_start_from_different_numbers(config):
  kernel = init(build(config))["params"]["image"]["tower"]["blocks"]["attn"]["qkv"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])


def test_text_tower_is_causal(config):
  """The readout at EOT has no gradient to any later token, and one to every earlier."""
  model = build(config)
  variables = init(model)
  table = variables["params"]["text"]["token_embedding"]["embedding"]
  text = jnp.arange(12)[None]  # each token stands once, so a table row is a position
  mask = jnp.arange(12)[None] < 7

  def f(table):
    text_params = {**variables["params"]["text"], "token_embedding": {"embedding": table}}
    params = {**variables["params"], "text": text_params}
    batch = {"text": text, "mask": mask}
    out = model.apply({**variables, "params": params}, batch, train=False)
    return jnp.sum(jnp.sin(out["z_txt"]))

  norms = jnp.linalg.norm(jax.grad(f)(table), axis=1)
  assert (norms[:7] > 0).all() and (norms[7:] == 0).all()


@pytest.mark.parametrize("readout", ["eot", "last"])
def test_padding_does_not_matter(config, readout):
  model = build(config, **{"text.readout": readout})
  variables, batch = init(model), example(model)
  # Position 11 is what "last" reads, padding or not; its own token may count there.
  padding = ~batch["mask"] & (np.arange(12) < (12 if readout == "eot" else 11))
  other = {**batch, "text": np.where(padding, 7, batch["text"])}
  z, z2 = (model.apply(variables, b, train=False)["z_txt"] for b in (batch, other))
  np.testing.assert_allclose(z, z2, atol=1e-6)


def test_readout_positions():
  mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
  assert readout_positions(mask, "eot").tolist() == [1, 3]
  assert readout_positions(mask, "last").tolist() == [3, 3]
  with pytest.raises(ValueError, match="text.readout"):
    readout_positions(mask, "mean")


def test_other_image_sizes_resample_the_positions(config):
  """Twice the side gives four times the patches; the CLS token's position is kept."""
  model = build(config)
  variables = init(model)
  image = example(model)["image"]
  large = np.repeat(np.repeat(image, 2, axis=1), 2, axis=2)
  out = model.apply(variables, {"image": large}, train=False)
  assert out["patches"].shape == (8, 16, 128)


def test_resampling_keeps_constants_and_ramps():
  """Bicubic interpolation is exact on a linear field away from the border."""
  y, x = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
  table = jnp.stack([jnp.ones(64), jnp.asarray(x.ravel()), jnp.asarray(y.ravel())], axis=1)
  fine = np.asarray(layers.resample_positions(table, (16, 16))).reshape(16, 16, 3)
  np.testing.assert_allclose(fine[..., 0], 1, rtol=1e-6)
  inner = (np.arange(16) + 0.5) / 2 - 0.5
  np.testing.assert_allclose(fine[8, 5:11, 1], inner[5:11], atol=1e-5)
  np.testing.assert_allclose(fine[5:11, 8, 2], inner[5:11], atol=1e-5)


def test_cls_and_patch_tokens_are_read_where_they_stand(config):
  """With the blocks silenced CLS knows nothing of the image, and token n only patch n."""
  model = build(config)
  variables, image = init(model), example(model, rows=1)["image"]
  tower = variables["params"]["image"]["tower"]["blocks"]
  for part in (tower["attn"]["out"], tower["mlp"]["down"]):
    part["kernel"] = jnp.zeros_like(part["kernel"])
  look = lambda image: model.apply(variables, {"image": image}, train=False)
  before = look(image)
  p, side = model.patch_size, model.image_size // model.patch_size
  for n in range(side**2):
    row, column = divmod(n, side)
    changed = image.copy()
    changed[:, row * p : (row + 1) * p, column * p : (column + 1) * p] ^= 255
    after = look(changed)
    np.testing.assert_array_equal(after["cls"], before["cls"])
    moved = np.abs(after["patches"] - before["patches"]).max(axis=(0, 2)) > 1e-3
    assert moved.tolist() == [i == n for i in range(side**2)]


def pixels(config):
  """A model that drops half of its 16 patches, its variables, and images it does not normalise."""
  model = build(config, **{"model.patch_dropout": 0.5, "model.image_size": 32})
  images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
  return model, init(model), images


def look(model, variables, images, train=True, key=0):
  rngs = {"dropout": jax.random.key(key)} if train else {}
  return model.apply(
    variables, {"image": images}, train=train, mutable="batch_stats", rngs=rngs
  )[0]  # fmt: skip


def test_patch_dropout_takes_other_patches_of_every_image(config):
  """CLS has a gradient to eight patches of 16 of its own image; which, image and key decide."""
  model, variables, images = pixels(config)
  weights = jax.random.normal(jax.random.key(1), (128,))

  def seen(train, key):
    read = lambda x: jnp.sum(look(model, variables, x, train, key)["cls"] @ weights)
    grads = np.asarray(jax.jit(jax.grad(read))(images)).reshape(8, 4, 8, 4, 8, 3)
    return np.abs(grads).max(axis=(2, 4, 5)).reshape(8, 16) > 0

  first, again, other = seen(True, 0), seen(True, 0), seen(True, 1)
  assert (first.sum(axis=1) == 8).all() and (first == again).all()
  assert len({row.tobytes() for row in (*first, *other)}) > 12
  assert seen(False, 0).all()


def test_a_kept_patch_is_the_token_that_it_would_be(config):
  """With the blocks silenced each token is its own patch at its own place."""
  model, variables, images = pixels(config)
  tower = variables["params"]["image"]["tower"]["blocks"]
  for part in (tower["attn"]["out"], tower["mlp"]["down"]):
    part["kernel"] = jnp.zeros_like(part["kernel"])
  every = look(model, variables, images, train=False)["patches"]
  rng = np.random.default_rng(0)
  keep = jnp.stack([rng.permutation(16)[:8] for _ in images])
  kept = model.apply(variables, images, keep, method=lambda m, x, keep: m.image(x, keep)[1])
  assert every.shape == (8, 16, 128) and kept.shape == (8, 8, 128)
  chosen = np.take_along_axis(np.asarray(every), np.asarray(keep)[..., None], axis=1)
  np.testing.assert_allclose(kept, chosen, atol=1e-5)
  without = build(config, **{"model.image_size": 32})
  np.testing.assert_array_equal(look(without, variables, images, train=False)["patches"], every)


def test_normalisation_is_that_of_the_statistics():
  image = np.full((1, 2, 2, 3), 128, np.uint8)
  out = vit.normalise(jnp.asarray(image), "imagenet")
  np.testing.assert_allclose(out[0, 0, 0], (128 / 255 - np.array([0.485, 0.456, 0.406]))
                             / np.array([0.229, 0.224, 0.225]), rtol=1e-5)  # fmt: skip


def test_patch_that_does_not_divide_is_named(config):
  with pytest.raises(ValueError, match="model.patch_size=7 does not divide model.image_size=16"):
    build(config, **{"model.patch_size": 7})


def test_batch_norm_uses_running_statistics_only_in_evaluation(config):
  model = build(config)
  variables, batch = init(model), example(model)
  _, new = model.apply(variables, batch, train=True, mutable="batch_stats")
  differs = lambda a, b: bool((a != b).any())
  moved = jax.tree.map(differs, variables["batch_stats"], new["batch_stats"])
  assert all(jax.tree.leaves(moved))
  one = model.apply(variables, {k: v[:1] for k, v in batch.items()}, train=False)
  all_rows = model.apply(variables, batch, train=False)
  np.testing.assert_allclose(one["p_img"], all_rows["p_img"][:1], atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_head_equals_float64(train):
  """Two of [Dense - BatchNorm - GELU (erf)], then Dense; statistics as PyTorch's momentum 0.1."""
  head = heads.Head(depth=2, hidden_dim=7, out_dim=5, dropout=0.0, dtype=jnp.float32)
  x = 3 * jax.random.normal(jax.random.key(1), (32, 6)) + 1
  variables = head.init(jax.random.key(0), x, train=False)
  found, new = head.apply(variables, x, train=train, mutable="batch_stats")
  params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
  h = np.asarray(x, np.float64)
  for i in range(2):
    h = h @ params[f"dense_{i}"]["kernel"]
    mean, var = (h.mean(0), h.var(0)) if train else (0.0, 1.0)
    if train:
      stats = new["batch_stats"][f"bn_{i}"]
      np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
    h = (h - mean) / np.sqrt(var + 1e-5)
    h = h * params[f"bn_{i}"]["scale"] + params[f"bn_{i}"]["bias"]
    h = h * (1 + scipy.special.erf(h / 2**0.5)) / 2
  expected = h @ params["out"]["kernel"] + params["out"]["bias"]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_canonical_model_has_the_published_size():
  """ViT-B/16 as timm's without classifier: 85.8M; GPT-2 base with 77 positions: 123.7M."""
  c = vit_b.get_config()
  model = two_tower.from_config(c.model, c.text, vocab_size=50257, dtype=jnp.bfloat16, scalars={})
  params = jax.eval_shape(lambda: init(model))["params"]
  assert state_lib.count(params["image"]) == 85_798_656
  # Hugging Face's GPT2Model has 124,439,808 with 1024 positions; we keep the 77 that are used.
  assert state_lib.count(params["text"]) == 124_439_808 - (1024 - 77) * 768
  assert two_tower.forward_flops(model) == pytest.approx(48.5e9, rel=0.005)
  views = (224,) * 2 + (96,) * 4  # what README says of vit_b_plus
  assert two_tower.forward_flops(model, views) == pytest.approx(109e9, rel=0.005)


def test_gradients_of_a_frequent_token_are_added_in_float32(config):
  """In bfloat16 the EOT token's sum over a batch would stand still at 256 times what is added."""
  model = build(config).clone(dtype=jnp.bfloat16)
  variables, batch = init(model), example(model)
  loss = lambda v: model.apply(v, batch, train=True, mutable=["batch_stats"])[0]["p_txt"].sum()
  table = variables["params"]["text"]["token_embedding"]["embedding"].shape
  text = str(jax.make_jaxpr(jax.grad(loss))(variables))
  sums = re.findall(rf"(\w+)\[{table[0]},{table[1]}\] = scatter-add", text)
  assert sums and set(sums) == {"f32"}
