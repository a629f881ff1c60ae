"""A decoder-only language model: one block that Llama, Qwen2 and GPT-2 are settings of."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_vl.model.layers import REMAT
from jepa_vl.sharding import constrain

NORMS, POSITIONS, MLPS = ("rms", "layer"), ("rotary", "learned"), ("swiglu", "gelu")


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a model; `length` is the most positions that it was made for.

  rope_scaling: () for none, ("linear", factor), or ("llama3", factor, low_freq_factor,
  high_freq_factor, original length). tied: the output layer is the token table.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  hidden: int
  length: int
  norm: str
  norm_eps: float
  positions: str
  mlp: str
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  tied: bool
  rope_theta: float = 0.0
  rope_scaling: tuple = ()

  def __post_init__(self):
    for name, known in (("norm", NORMS), ("positions", POSITIONS), ("mlp", MLPS)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.kv_heads} key heads do not divide {self.heads} heads")
    if self.positions == "rotary" and self.head_dim % 2:
      raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")


def frequencies(c):
  """Radians per position of each pair of a head's dimensions, (K / 2,) float32.

  llama3: slow waves are stretched by the factor, fast ones stay, and between the two a line.
  """
  inverse = c.rope_theta ** -(jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  if not c.rope_scaling:
    return inverse
  kind, factor, *rest = c.rope_scaling
  if kind == "linear":
    return inverse / factor
  low, high, length = rest
  turns = length * inverse / (2 * jnp.pi)  # that a wave makes over the original length
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return inverse * (kept + (1 - kept) / factor)


def rotate(x, angle):
  """Turns pairs (i, i + K / 2) of x (B, L, H, K) by angle (B, L, K / 2); float32 inside."""
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(c, dtype, name):
  # flax computes the statistics in float32 and rounds after the scale.
  kind = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
  return kind(epsilon=c.norm_eps, dtype=dtype, name=name)


class Attention(nn.Module):
  """Grouped-query attention; x (B, l, W), see: (B, 1, l, T) bool, angle as `rotate`'s or None.

  cache: {"k", "v"} (B, T, Hk, K), into which this call's keys and values go from `start` on; or
  None, and T is l.
  """

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, x, see, angle, cache, start):
    c = self.config
    init = nn.initializers.normal(0.02)
    project = lambda heads, name: nn.DenseGeneral(
      (heads, c.head_dim), use_bias=c.qkv_bias, kernel_init=init, dtype=self.dtype, name=name
    )(x)
    q, k, v = project(c.heads, "q"), project(c.kv_heads, "k"), project(c.kv_heads, "v")
    if angle is not None:
      q, k = rotate(q, angle), rotate(k, angle)
    if cache is not None:
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), start, axis=1
      )
      cache = {"k": put(cache["k"], k), "v": put(cache["v"], v)}
      k, v = (cache[name].astype(self.dtype) for name in ("k", "v"))
    x = jax.nn.dot_product_attention(q, k, v, mask=see)
    out_init = nn.initializers.normal(0.02 / (2 * c.depth) ** 0.5)
    out = nn.DenseGeneral(
      c.width, axis=(-2, -1), use_bias=c.out_bias, kernel_init=out_init, dtype=self.dtype,
      name="out",
    )  # fmt: skip
    return out(x), cache


class Mlp(nn.Module):
  """silu(gate) * up, or tanh-GELU(up), then down."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, x):
    c = self.config
    dense = lambda width, name, std: nn.Dense(
      width, use_bias=c.mlp_bias, kernel_init=nn.initializers.normal(std), dtype=self.dtype,
      name=name,
    )  # fmt: skip
    up = dense(c.hidden, "up", 0.02)(x)
    if c.mlp == "swiglu":
      x = nn.silu(dense(c.hidden, "gate", 0.02)(x)) * up
    else:
      x = nn.gelu(up, approximate=True)
    return dense(c.width, "down", 0.02 / (2 * c.depth) ** 0.5)(x)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); x: (B, l, W). Returns (x, cache)."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, x, cache, see, angle, start):
    norm = lambda name: _norm(self.config, self.dtype, name)
    x = constrain(x, "batch", None, None)
    found, cache = Attention(self.config, self.dtype, name="attn")(
      norm("attn_norm")(x), see, angle, cache, start
    )
    x = x + found
    return x + Mlp(self.config, self.dtype, name="mlp")(norm("mlp_norm")(x)), cache


class LanguageModel(nn.Module):
  """Embedded tokens (B, l, W) -> (logits (B, last, V) float32, cache).

  `embed` makes such vectors of tokens, so that others (images) can stand between them. mask:
  (B, T) bool, True where a column holds something; columns are seen by those after them. Padding
  may stand anywhere: a token's position is the count of what stands before it. Without a cache T
  is l; with one (`empty_cache`), the call's columns are those from `start` on. `last`: of how many
  columns at the end logits are made, None: of all.
  """

  config: Config
  scan: bool
  remat: str
  dtype: Any

  def setup(self):
    c = self.config
    init = nn.initializers.normal(0.02)
    self.token_embedding = nn.Embed(c.vocab_size, c.width, embedding_init=init, dtype=self.dtype)
    if c.positions == "learned":
      self.position_embedding = self.param("position_embedding", init, (c.length, c.width))
    block = Block
    if REMAT[self.remat]:
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.depth,
      unroll=1 if self.scan else c.depth,
    )(c, self.dtype)
    self.final_norm = _norm(c, self.dtype, None)
    if not c.tied:
      self.head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, dtype=self.dtype)

  def embed(self, tokens):
    """(B, l) int32 -> (B, l, W), without positions."""
    table = constrain(self.token_embedding.embedding.astype(self.dtype), None, "tensor")
    return constrain(jnp.take(table, tokens, axis=0), "batch", None, None)

  def __call__(self, x, mask, *, cache=None, start=0, last=None):
    count, T = x.shape[1], mask.shape[1]
    columns = start + jnp.arange(count)
    position = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # (B, T)
    position = jax.lax.dynamic_slice_in_dim(position, start, count, axis=1)
    see = mask[:, None, None] & (jnp.arange(T) <= columns[:, None])  # (B, 1, l, T)
    angle = None
    x = x.astype(self.dtype)
    if self.config.positions == "learned":
      x = x + jnp.take(self.position_embedding, position, axis=0).astype(self.dtype)
    else:
      angle = position[..., None] * frequencies(self.config)
    x, cache = self.blocks(x, cache, see, angle, start)
    x = self.final_norm(x if last is None else x[:, count - last :])
    logits = self.token_embedding.attend(x) if self.config.tied else self.head(x)
    return constrain(logits, "batch", None, "tensor").astype(jnp.float32), cache

  def of_tokens(self, tokens, mask):
    """Tokens (B, l) int32 -> logits (B, l, V) float32; also what initialises all parameters."""
    return self(self.embed(tokens), mask)[0]


def abstract_params(model):
  """The parameters' shapes."""
  one = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), one, one > -1, method="of_tokens")["params"]
  )


def empty_cache(model, rows, columns):
  """Keys and values of no token yet: {"k", "v"} (N, B, T, Hk, K), N the number of layers."""
  c = model.config
  shape = (c.depth, rows, columns, c.kv_heads, c.head_dim)
  make = lambda: constrain(jnp.zeros(shape, model.dtype), None, "batch", None, "tensor", None)
  return {"k": make(), "v": make()}


def greedy(model, params, x, mask, *, steps, ends):
  """The likeliest next token, `steps` times: (B, steps) int32, ends[0] behind the first of `ends`.

  x: (B, L, W) embedded prompts, whose last column is no padding; mask: (B, L) bool.
  """
  B, L = mask.shape
  variables = {"params": params}
  end, stops = jnp.int32(ends[0]), jnp.asarray(ends, jnp.int32)
  mask = jnp.pad(mask, ((0, 0), (0, steps)), constant_values=True)
  logits, cache = model.apply(
    variables, x, mask, cache=empty_cache(model, B, L + steps), start=0, last=1
  )

  def one(carry, column):
    cache, logits, done = carry
    token = jnp.where(done, end, jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32))
    done = done | jnp.any(token[:, None] == stops, axis=1)
    embedded = model.apply(variables, token[:, None], method="embed")
    logits, cache = model.apply(variables, embedded, mask, cache=cache, start=column, last=1)
    return (cache, logits, done), token

  carry = (cache, logits, jnp.zeros(B, bool))
  _, tokens = jax.lax.scan(one, carry, L + jnp.arange(steps))
  return tokens.T


def forward_flops(c, columns, logits):
  """Analytic FLOPs of one row of so many columns, forward; matrix products, 2 per multiply-add."""
  attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  mlp = c.width * c.hidden * (3 if c.mlp == "swiglu" else 2)
  scores = 2 * columns * c.heads * c.head_dim
  return 2 * columns * c.depth * (attention + mlp + scores) + 2 * logits * c.width * c.vocab_size
