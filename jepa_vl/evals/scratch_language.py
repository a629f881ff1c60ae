"""A small language model trained here, on the questions of a set whose images are told in words.

Where no pretrained model can be had, one has to learn what a frozen one must know: to find an
answer in what stands before the question. So it is trained on texts, and where the image's tokens
will stand it is told what the image shows, in the form that a bridge speaks in: a grid of slots,
each with one vector, the sum of those of the words of all that is there. Which words belong
together is then given, and does not have to be learnt from their order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jepa_vl.evals import bridge_fit
from jepa_vl.interop.language import Tokenizer
from jepa_vl.model import language

END, NOTHING = "<end>", "nothing"  # NOTHING: what is said of an empty slot
WIDTH, DEPTH, HEAD = 64, 3, 32
STEPS, BATCH, LR, WARMUP = 3000, 64, 2e-3, 50
NOISE = 0.3  # in the slots, as a share of the token vectors' scale, at most: no bridge is exact


def words(texts):
  """A Tokenizer with a token for each word of the texts, alphabetical, and their number."""
  import tokenizers
  from tokenizers import models, pre_tokenizers

  split = pre_tokenizers.Whitespace()
  known = {word for text in set(texts) for word, _ in split.pre_tokenize_str(text)}
  known -= {NOTHING}
  vocabulary = {word: i for i, word in enumerate((END, "<unknown>", NOTHING, *sorted(known)))}
  found = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
  found.pre_tokenizer = split
  return Tokenizer(found, [0]), len(vocabulary)


def slots(told, tokenizer, size, side):
  """What images show, on a grid by rows: how often each slot has each token, (N, side^2, size).

  told: of each image a list of (y, x, words); size: the number of tokens.
  """
  found = np.zeros((len(told), side, side, size), np.uint8)
  tokens = functools.cache(lambda text: tokenizer.encode(text, start=False))
  for grid, image in zip(found, told, strict=True):
    for y, x, text in image:
      np.add.at(grid[min(int(side * y), side - 1), min(int(side * x), side - 1)], tokens(text), 1)
  found[..., tokens(NOTHING)[0]] = ~found.any(axis=-1)
  return found.reshape(len(told), side * side, size)


def spoken(params, shown):
  """The vectors of such slots, (B, n, size) -> (B, n, W); params: the language model's."""
  table = params["token_embedding"]["embedding"]
  return jnp.einsum("bnv,vw->bnw", shown.astype(table.dtype), table)


def train(records, told, template, mesh, *, side, answer_tokens, seed, folder):
  """A Speaker that answers the records' questions about what it is told, as in `slots`.

  side: of the grid of image tokens; folder: for checkpoints, "" for none.
  """
  questions, answers = [r["question"] for r in records], [r["answers"][0] for r in records]
  said = {text for image in told for *_, text in image}
  tokenizer, size = words([template, *questions, *answers, *said])
  prompts = bridge_fit.Prompts(tokenizer, template, questions, answers, answer_tokens)
  shown, model = slots(told, tokenizer, size, side), _model(size)
  how = bridge_fit.Fit(STEPS, BATCH, LR, WARMUP, 0.0, seed)
  tx = how.optimizer()

  def step(state, _, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params):
      image = _noisy(rng, params, spoken(params, batch["slots"]))
      return bridge_fit.loss(model, params, image, batch, prompts.opening)

    return bridge_fit.descend(loss, tx, state)

  def take(k):
    rows = how.rows(k, len(prompts))
    return {**prompts.batch(rows), "slots": shown[rows]}

  state = bridge_fit.start(lambda key: _first(model, key), tx, mesh, seed)
  what = "a language model of the questions"
  state = bridge_fit.train(step, state, (), take, how, mesh, what, folder)
  return bridge_fit.Speaker(model, state.params, tokenizer)


def _model(size):
  c = language.Config(
    vocab_size=size, width=WIDTH, depth=DEPTH, heads=WIDTH // HEAD, kv_heads=WIDTH // HEAD,
    head_dim=HEAD, hidden=4 * WIDTH, length=1 << 20, norm="rms", norm_eps=1e-5, positions="rotary",
    mlp="gelu", qkv_bias=False, out_bias=False, mlp_bias=False, tied=True, rope_theta=1e4,
  )  # fmt: skip
  return language.LanguageModel(c, False, "none", jnp.float32)


def _first(model, key):
  """Parameters to begin with, from which looking up is learnt in hundreds of steps.

  The model's own are made for wide ones. Where keys are made as queries are, what is alike is
  looked at, so that a word of the question sees its slot from the first step on; and the token
  vectors are large beside what the blocks add, so that later blocks know them, too.
  """
  one = jnp.zeros((1, 1), jnp.int32)
  params = model.init(key, one, one > -1, method="of_tokens")["params"]
  attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
  unit = lambda tree, std: jax.tree.map(lambda x: x * std / 0.02, tree)
  params["token_embedding"] = unit(params["token_embedding"], 0.24)
  attn["q"], attn["v"], mlp["up"] = (
    unit(x, WIDTH**-0.5) for x in (attn["q"], attn["v"], mlp["up"])
  )
  attn["k"] = jax.tree.map(jnp.copy, attn["q"])
  return params


def _noisy(rng, params, image):
  """Image tokens with noise, of another level in each image."""
  level, noise = jax.random.split(rng)
  table = jax.lax.stop_gradient(params["token_embedding"]["embedding"])
  most = NOISE * jnp.sqrt(jnp.mean(jnp.square(table)))
  level = most * jax.random.uniform(level, (len(image), 1, 1))
  return image + level * jax.random.normal(noise, image.shape)
