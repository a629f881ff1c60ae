"""The matched baselines: CLIP (InfoNCE) and SigLIP on the embeddings, over the global batch.

They align z_img and z_txt directly: no predictors, no SIGReg. `out` brings the learned scalars:
`log_scale`, and `bias` for SigLIP.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jepa_vl.sharding import constrain

# Float32 means float32 on every chip: TPUs and recent GPUs would multiply in less.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def clip(out, rng, *, scale_max):
  """Symmetric cross-entropy over the batch (Radford et al., arXiv 2103.00020), from (B, D) rows.

  The scale exp(log_scale) of the cosines is held at `scale_max` (CLIP: 100).
  """
  images, texts = _unit(out["z_img"]), _unit(out["z_txt"])
  with jax.named_scope("clip"):
    scale = jnp.exp(_at_most(out["log_scale"], math.log(scale_max)))
    logits = scale * _matmul(images, texts.T)  # (B, B), its rows split over the devices
    # Out of the same matrix: a cosine computed apart from it is rounded otherwise, which shows once
    # the pairs are told apart and both terms of the difference are nearly equal.
    matched = jnp.sum(jnp.where(jnp.eye(logits.shape[0], dtype=bool), logits, 0.0), axis=1)
    return {
      "contrast/img_to_txt": jnp.mean(jax.nn.logsumexp(logits, axis=1) - matched),
      "contrast/txt_to_img": jnp.mean(jax.nn.logsumexp(logits, axis=0) - matched),
    }


def siglip(out, rng, *, chunk_size):
  """Pairwise sigmoid loss (Zhai et al., arXiv 2303.15343), summed over pairs, divided by B.

  -1/B sum_ij log sigmoid(y_ij (exp(log_scale) cos_ij + bias)), y_ij = 1 if i = j, else -1.
  The B x B pairs are visited in chunks of at most `chunk_size` captions (0: all at once) and
  recomputed in the backward pass: what is held at once is (rows of a device) x (chunk).
  """
  images, texts = _unit(out["z_img"]), _unit(out["z_txt"])
  scale, bias = jnp.exp(out["log_scale"]), out["bias"]
  B = images.shape[0]
  chunk = min(chunk_size or B, B)
  padding = -B % chunk
  texts = constrain(texts, None, None)  # (B, D), gathered once; the images stay where they are
  if padding:
    texts = jnp.pad(texts, [(0, padding), (0, 0)])

  @jax.checkpoint
  def body(sums, columns):
    index, some_texts = columns
    logits = scale * _matmul(images, some_texts.T) + bias  # (B, chunk)
    matched = jnp.arange(B)[:, None] == index
    losses = jax.nn.softplus(jnp.where(matched, -logits, logits))
    return sums + jnp.sum(jnp.where(index < B, losses, 0.0), axis=1), None

  with jax.named_scope("siglip"):
    index = jnp.arange(B + padding).reshape(-1, chunk)
    columns = (index, texts.reshape(-1, chunk, texts.shape[-1]))
    # One sum per row, added up after the loop, which thus needs no communication.
    sums, _ = jax.lax.scan(body, jnp.zeros(B), columns)
    return {"sigmoid": jnp.mean(sums)}


def _unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _at_most(x, limit):
  """min(x, limit) whose gradient above the limit passes only where it leads back below."""
  return jnp.minimum(x, limit)


def _at_most_fwd(x, limit):
  return jnp.minimum(x, limit), x


def _at_most_bwd(limit, x, cotangent):
  return (jnp.where((x <= limit) | (cotangent > 0), cotangent, 0.0),)


_at_most.defvjp(_at_most_fwd, _at_most_bwd)
