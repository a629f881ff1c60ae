"""The real Encode around a made-up model, for tests of evaluations."""

import functools

import jax
import jax.numpy as jnp

from jepa_vl.data import common, tokenizer
from jepa_vl.evals.common import READINGS
from jepa_vl.evals.encode import Encode

D = 12


def look(variables, batch):
  """A stand-in for the model: fixed random projections of colours and of token counts."""
  out = {}
  if "image" in batch:
    x = batch["image"].astype(jnp.float32) / 255
    B, S = x.shape[:2]
    patches = x.reshape(B, 2, S // 2, 2, S // 2, 3).mean(axis=(2, 4)).reshape(B, 4, 3)
    out["cls"] = patches.reshape(B, 12).astype(jnp.bfloat16)
    out["patches"] = patches.astype(jnp.bfloat16)
    out["z_img"] = patches.reshape(B, 12) @ variables["image"]
    out["p_img"] = jnp.tanh(out["z_img"])
  if "text" in batch:
    counts = jax.nn.one_hot(batch["text"] % 50, 50) * batch["mask"][..., None]
    out["z_txt"] = counts.sum(axis=1) @ variables["text"]
    out["p_txt"] = jnp.tanh(out["z_txt"])
  return out


def look_inside(variables, batch):
  """A stand-in for `two_tower.look_inside`: five blocks that differ in scale."""
  patches = look(variables, batch)["patches"].astype(jnp.float32)
  layers = jnp.stack([patches * k for k in range(1, 6)], axis=1)
  return {"layers": layers, "attention": jax.nn.softmax(patches.swapaxes(1, 2), axis=-1)}


def make_variables(seed=0):
  """Variables of `look`."""
  keys = jax.random.split(jax.random.key(seed))
  return {"image": jax.random.normal(keys[0], (12, D)), "text": jax.random.normal(keys[1], (50, D))}


def make_encode(mesh, apply=look, batch_size=64, readings=tuple(READINGS), cache=""):
  """Encode on images of 16 pixels and captions of 12 tokens."""
  tokenize = functools.partial(
    tokenizer.tokenize, tokenizer.load("emoji"), length=12, readout="eot"
  )
  return Encode(
    apply=apply, tokenize=tokenize, mesh=mesh, image_size=16, resize_ratio=1.0,
    batch_size=batch_size, readings=readings, keys=common.USUAL, cache=cache,
    look_inside=look_inside,
  )  # fmt: skip
