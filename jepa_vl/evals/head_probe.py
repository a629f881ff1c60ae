"""Probes whose head is trained by AdamW: linear (the paper's), MLP, attentive."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_vl.evals import common, fit, probes

PROTOCOL = """
A head trained by AdamW with a cosine decay to 0 on frozen features of one split; of several
learning rates the best on another split or on every tenth training image is used, so that test
splits choose nothing. linear: no bias, on standardised features. mlp: one hidden layer with GELU,
on standardised features. attentive: one learned query attends to the patch tokens in a transformer
block, then a linear layer.
"""


class Linear(nn.Module):
  """(B, W) -> (B, classes), without a bias, from zero."""

  classes: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.classes, use_bias=False, kernel_init=nn.initializers.zeros)(x)


class Mlp(nn.Module):
  """(B, W) -> (B, classes) over one hidden layer."""

  classes: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(self.hidden)(x), approximate=False)
    return nn.Dense(self.classes)(x)


class Attentive(nn.Module):
  """Patch tokens (B, N, W) -> (B, classes): V-JEPA's attentive probe (arXiv 2404.08471)."""

  classes: int
  heads: int

  @nn.compact
  def __call__(self, tokens):
    B, _, W = tokens.shape
    query = self.param("query", nn.initializers.normal(0.02), (1, 1, W))
    query = jnp.broadcast_to(query, (B, 1, W))
    tokens = nn.LayerNorm(name="tokens_norm")(tokens)
    x = query + nn.MultiHeadDotProductAttention(self.heads, name="attn")(query, tokens)
    y = nn.gelu(nn.Dense(4 * W, name="up")(nn.LayerNorm(name="norm")(x)), approximate=False)
    x = x + nn.Dense(W, name="down")(y)
    return nn.Dense(self.classes, name="classes")(x[:, 0])


HEADS = "linear, mlp:HIDDEN_UNITS, attentive:HEADS"


def make_head(spec, classes, width):
  """The module that `head` names (HEADS). Raises ValueError."""
  kind, _, number = spec.partition(":")
  if kind == "linear" and not number:
    return Linear(classes)
  if kind == "mlp" and number.isdigit() and int(number):
    return Mlp(classes, int(number))
  if kind == "attentive" and number.isdigit() and int(number):
    if width % int(number):
      raise ValueError(f"head={spec!r}: {number} heads do not divide the width of {width}")
    return Attentive(classes, int(number))
  raise ValueError(f"head must be one of {HEADS}, got {spec!r}")


def run(
  encode, variables, mesh, *, source, path, splits, label, train_split, select_split, features,
  head, epochs, batch_size, lrs, weight_decay, keep, seed,
):  # fmt: skip
  """Top-1 "SPLIT/FEATURE/LABEL" of a trained `head` (HEADS) on each of `features`.

  features: of probes.READOUTS; () for an attentive head, whose figures are "SPLIT/tokens/LABEL".
  `select_split`, or every tenth training image where it is "", chooses among `lrs`. epochs to
  weight_decay, and seed: fit.Fit; keep: GiB of patch tokens that are held in memory, of more the
  rest is made again in every epoch. "@majority" guesses the test split's largest class.

  Raises:
    ValueError: an unknown head, or features that do not go with it.
  """
  _check(head, features)  # before anything is encoded
  features = features or ("tokens",)
  parts = dict.fromkeys((train_split, *([select_split] if select_split else []), *splits))
  data = {s: encode.split(source, path, s) for s in parts}
  y = {s: common.labels(split, label) for s, split in data.items()}
  how = fit.Fit(epochs, batch_size, tuple(lrs), weight_decay, seed)
  figures, rates = {}, {}
  for name in features:
    if name == "tokens":
      x = {s: _tokens(encode, variables, data[s], keep) for s in parts}
    else:
      found = {s: encode.features(variables, source, path, s) for s in parts}
      x = {s: probes.readout(found[s], name) for s in parts}
    right, rates[name] = fit_head(x, y, head, how, train_split, select_split, splits, mesh)
    for s in splits:
      key = f"{s}/{name}/{label}"
      figures |= common.means({key: right[s]})
      figures[f"{key}@majority"] = np.bincount(y[s]).max() / len(y[s])
  sizes = {s: {"images": len(labels)} for s, labels in y.items()}
  sizes[train_split] |= {"seed": seed, "lr": rates}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)


def check(encode, keys):
  """Raises ValueError for a head or features that `run` would stop at."""
  _check(keys.head, keys.features)


def _check(head, features):
  make_head(head, 1, 0)
  if not head.startswith("attentive"):
    probes.check_features(features)
  elif features:
    raise ValueError(f"head={head!r} is of patch tokens: features must be (), got {features!r}")


def _tokens(encode, variables, split, keep):
  """The Bank of a split's patch tokens, (N, W) each."""

  def make(rows):
    x = encode.patches(variables, split.images(rows))
    return x.reshape(len(x), -1, x.shape[-1])

  bank = fit.Bank(make, keep)
  for start in range(0, len(split), _AT_ONCE):
    rows = np.arange(start, min(start + _AT_ONCE, len(split)))
    bank.add(rows, make(rows))
  return bank


_AT_ONCE = 256  # images whose patch tokens are made in one go


def fit_head(x, y, spec, how, train, select, splits, mesh):
  """Which rows of each of `splits` are right, {split: (N,) bool}, and the learning rate.

  x: {split: (N, W) array or Bank of (N, W) tokens}; y: {split: (N,) labels}.
  """
  one = x[train][np.arange(1)]
  head = make_head(spec, int(max(v.max() for v in y.values())) + 1, one.shape[-1])
  standardise = lambda x: x
  if one.ndim == 2:
    mean, std = x[train].mean(axis=0), x[train].std(axis=0) + 1e-6
    standardise = lambda x: (x - mean) / std
  start = head.init(jax.random.key(how.seed), jnp.asarray(one, jnp.float32))

  def loss(params, x, labels):
    logits = head.apply(params, x.astype(jnp.float32))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  rows, chooses = np.arange(len(y[train])), np.arange(len(y[select or train]))
  if len(how.lrs) > 1 and not select:
    rows, chooses = fit.part(len(rows))
  take = lambda places: (standardise(x[train][places]), y[train][places].astype(np.int32))
  fitted = fit.adamw(loss, start, take, rows, how, mesh, "fitting a head")
  heads = [fit.pick(fitted, i) for i in range(len(how.lrs))]
  apply = jax.jit(lambda params, x: jnp.argmax(head.apply(params, x), axis=-1))

  def right(params, split, places):
    parts = np.split(places, range(_AT_ONCE, len(places), _AT_ONCE))
    take = lambda some: standardise(x[split][some]).astype(np.float32)
    return np.concatenate([np.asarray(apply(params, take(p))) == y[split][p] for p in parts])

  best = 0
  if len(heads) > 1:
    best = int(np.argmax([right(h, select or train, chooses).mean() for h in heads]))
  return {s: right(heads[best], s, np.arange(len(y[s]))) for s in splits}, how.lrs[best]
