"""LeVLJEPA+: the views that a row brings, and what the towers and the objective make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import noise, png

from jepa_vl import build as build_lib
from jepa_vl import objectives
from jepa_vl import state as state_lib
from jepa_vl.data import pipeline, transforms
from jepa_vl.model import two_tower


@pytest.fixture
def config(config):
  config.mesh.data = -1
  config.objective.name = "levljepa_plus"
  config.data.augment = "dino"
  config.data.local_views, config.data.local_size = 3, 8
  return config


@pytest.fixture
def batch(config):
  rng = np.random.default_rng(0)
  images = lambda views, side: rng.integers(0, 256, (16, views, side, side, 3), dtype=np.uint8)
  L = config.text.length
  return {
    "global": images(2, 16), "local": images(3, 8),
    "text": rng.integers(0, 50, (16, L)).astype(np.int32),
    "mask": np.arange(L)[None] < rng.integers(1, L + 1, (16, 1)),
  }  # fmt: skip


def apply(run, *batches, train=True):
  """`out` of each batch, from the same initial weights; of one batch alone for one."""
  variables = state_lib.init_variables(run.model, run.mesh, 0)
  call = lambda batch: run.model.apply(variables, batch, train=train, mutable="batch_stats")[0]
  outs = [jax.jit(call)(batch) for batch in batches]
  return outs if len(outs) > 1 else outs[0]


def test_every_view_drops_patches_of_its_own(config, batch):
  """Two views of the same pixels are told apart by what of them is seen, and by nothing else."""
  views = {"global": np.repeat(batch["global"][:, :1], 2, axis=1)}
  same = {}
  for share in (0.0, 0.5):
    config.model.patch_dropout = share
    config.data.local_views = 0
    run = build_lib.build(config)
    variables = state_lib.init_variables(run.model, run.mesh, 0)
    call = lambda key, model=run.model, variables=variables: model.apply(
      variables, views, train=True, mutable="batch_stats", rngs={"dropout": key}
    )[0]  # fmt: skip
    a, b = jax.jit(call)(jax.random.key(0))["views"]
    same[share] = np.isclose(a, b, atol=1e-5).all(axis=1).mean()
  assert same[0.0] == 1 and same[0.5] < 0.5


def test_a_row_brings_all_views_in_order(config, tok):
  run = build_lib.build(config)
  data = lambda: pipeline.batches(
    run.source, tok, run.data_config, batch_size=4, seed=0, start_step=0
  )
  rows, again = next(data()), next(data())
  assert rows["global"].shape == (4, 2, 16, 16, 3) and rows["local"].shape == (4, 3, 8, 8, 3)
  assert rows["global"].dtype == rows["local"].dtype == np.uint8 and "image" not in rows
  np.testing.assert_array_equal(rows["local"], again["local"])
  assert len({view.tobytes() for row in rows["local"] for view in row}) == 12
  assert run.view_sides == (16, 16, 8, 8, 8)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_blur_and_solarisation_are_of_their_views(cfg, kind):
  """Each probability acts on its own kind of view: first global, other global, local."""
  cfg.update({"crop_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "local_size": 16})
  cfg.update({"flip": 0.0, "jitter_prob": 0.0, "grey_prob": 0.0, "local_views": 2})
  cfg.solarise_prob = tuple(float(i == kind) for i in range(3))
  cfg.blur_prob = (0.0, 0.0, 0.0)
  image = noise((16, 16))
  found = transforms.dino(png(image), lambda *view: np.random.default_rng(view), 16, cfg)
  expected = np.where(image < 128, image, 255 - image)
  for of, view in zip((0, 1, 2, 2), [*found["global"], *found["local"]], strict=True):
    np.testing.assert_array_equal(view, expected if of == kind else image)
  cfg.solarise_prob, cfg.blur_prob = cfg.blur_prob, cfg.solarise_prob
  found = transforms.dino(png(image), lambda *view: np.random.default_rng(view), 16, cfg)
  for of, view in zip((0, 1, 2, 2), [*found["global"], *found["local"]], strict=True):
    assert (view.std() < image.std()) == (of == kind)


def test_blur_is_a_gaussian_of_that_width():
  point = np.zeros((41, 41, 3), np.uint8)
  point[20, 20] = 255
  found = transforms.blur(point, np.random.default_rng(0), (2.0, 2.0))[20, :, 0]
  t = np.arange(-11, 12)
  weights = np.exp(-(t**2) / 8)
  weights /= weights.sum()
  np.testing.assert_allclose(found[9:32], 255 * weights * weights[11], atol=1)
  assert not found[:9].any()


def test_without_local_views_there_is_one_group(config, tok):
  config.data.local_views = 0
  run = build_lib.build(config)
  data = pipeline.batches(run.source, tok, run.data_config, batch_size=4, seed=0, start_step=0)
  rows = next(data)
  assert "local" not in rows and rows["global"].shape[1] == 2


@pytest.mark.parametrize(
  "predict_from",
  [p if p == "views" else pytest.param(p, marks=pytest.mark.slow) for p in two_tower.PREDICT_FROM],
)
def test_views_are_the_tower_on_each_view(config, batch, predict_from):
  """In evaluation mode rows do not mix, so every view must be what it is alone."""
  config.model.predict_from = predict_from
  views = [batch["global"][:, i] for i in range(2)] + [batch["local"][:, i] for i in range(3)]
  batches = [batch, *({"image": view} for view in views)]
  out, *alone = apply(build_lib.build(config), *batches, train=False)
  assert out["views"].shape == (5, 16, 16)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(out["views"], np.stack([a["z_img"] for a in alone]))
  close(out["cls"], alone[0]["cls"])
  close(out["z_img"], (alone[0]["z_img"] + alone[1]["z_img"]) / 2)
  if predict_from == "views":
    close(out["p_img"], np.stack([a["p_img"] for a in alone]))
  else:
    assert out["p_img"].shape == (16, 16)


def test_terms_and_weights(config, batch):
  """multi is the views' mean squared distance to the global mean; the weights sum to one."""
  config.objective.update({"lambda_img": 0.1, "lambda_txt": 0.2, "lambda_multi": 0.3})
  out = apply(build_lib.build(config), batch)
  loss, terms = objectives.from_config(config.objective)(out, jax.random.key(0))
  views = np.asarray(out["views"], np.float64)
  np.testing.assert_allclose(terms["multi"], np.mean((views - views[:2].mean(0)) ** 2), rtol=1e-5)
  p, t = (np.asarray(out[k], np.float64) for k in ("p_img", "z_txt"))
  np.testing.assert_allclose(terms["align/img_to_txt"], np.mean((p - t) ** 2), rtol=1e-5)
  align = terms["align/img_to_txt"] + terms["align/txt_to_img"]
  expected = 0.2 * align + 0.1 * terms["sigreg/img"] + 0.2 * terms["sigreg/txt"]
  np.testing.assert_allclose(loss, expected + 0.3 * terms["multi"], rtol=1e-6)


def test_multi_is_not_stopped_and_the_caption_is(config, batch):
  """The mean moves towards the views as well, and the predicted caption gives no gradient."""
  out = apply(build_lib.build(config), batch)
  terms = lambda out: objectives.from_config(config.objective)(out, jax.random.key(0))[1]
  grad = jax.grad(lambda out: terms(out)["multi"])(out)
  assert float(jnp.abs(grad["z_img"]).max()) > 0
  grad = jax.grad(lambda out: terms(out)["align/img_to_txt"])(out)
  assert not float(jnp.abs(grad["z_txt"]).max())


def test_views_and_objective_need_each_other(config):
  config.objective.name = "levljepa"
  with pytest.raises(ValueError, match="'levljepa' and data.augment='dino' do not go together"):
    build_lib.build(config)
  config.objective.name, config.data.augment = "levljepa_plus", "standard"
  with pytest.raises(ValueError, match="'levljepa_plus' and 'dino' need each other"):
    build_lib.build(config)
  config.data.update({"augment": "dino", "local_size": 12})
  with pytest.raises(ValueError, match="patch_size=8 does not divide data.local_size=12; .* 8"):
    build_lib.build(config)
  config.model.predict_from = "all"
  config.data.local_size = 8
  with pytest.raises(ValueError, match="predict_from must be one of views, mean, got 'all'"):
    build_lib.build(config)


def test_flops_count_every_view(config):
  model = build_lib.build(config).model
  one = two_tower.forward_flops(model)
  six = two_tower.forward_flops(model, (16, 16))
  text = 2 * one - six  # a second view doubles all that is the image's, and nothing else
  width, depth, _ = two_tower.SIZES[model.size]
  L = model.text_length
  tower = depth * (24 * L * width**2 + 4 * L**2 * width)
  assert tower < text < 1.1 * tower
  assert two_tower.forward_flops(model, (16,)) == one > two_tower.forward_flops(model, (8,))
