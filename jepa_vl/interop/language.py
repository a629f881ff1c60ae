"""Language models of the Llama, Qwen2 and GPT-2 families from a Hugging Face folder.

The folder holds `config.json`, `model.safetensors` or its shards with
`model.safetensors.index.json`, and `tokenizer.json`. No PyTorch is needed.
"""

import json
import os
import re

import flax
import jax
import ml_dtypes  # noqa: F401  (NumPy has no bfloat16 of its own)
import numpy as np
import safetensors

from jepa_vl import sharding
from jepa_vl.interop.layout import complaint
from jepa_vl.model import language

INDEX = "model.safetensors.index.json"


def read_config(folder):
  """config.json of a folder -> language.Config.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, of no family that is known, or asks for what is not built.
  """
  raw = _read_json(os.path.join(folder, "config.json"))
  where = f"{folder}/config.json"
  kind = raw.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(
      f"{where}: model_type is {kind!r}; known are {', '.join(FAMILIES)}. Give a folder of one of "
      "these families"
    )
  if raw.get("quantization_config"):
    raise ValueError(f"{where}: the weights are quantised; give the folder of the full weights")
  config_of, _, only = FAMILIES[kind]
  refused = [
    f"{key}={raw[key]!r} (only {' or '.join(map(repr, values))})"
    for key, values in only.items()
    if key in raw and raw[key] not in values
  ]
  sliding = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
  refused += [f"layer_types with {kind}" for kind in sliding]
  if refused:
    raise ValueError(f"{where} asks for what is not built here: {'; '.join(refused)}")
  try:
    return config_of(raw)
  except KeyError as e:
    raise ValueError(f"{where} lacks {e.args[0]!r}, which a {kind} model needs") from e
  except ValueError as e:
    raise ValueError(f"{where}: {e}") from e


def read(folder, mesh, dtype):
  """The folder's (language.Config, parameters), `dtype`, each device with its own shards.

  One tensor after another is read, so that host memory holds the result and little more.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: as `read_config`, or tensors are missing, unexpected or of another shape: all of
      them are named.
  """
  c = read_config(folder)
  kind = _read_json(os.path.join(folder, "config.json"))["model_type"]
  rows = _expected(FAMILIES[kind][1](c), c)
  files = _find(folder)
  _check(folder, rows, files, c)
  flat = {}
  for name, path, layer, _, convert in rows:
    with _open(files[name][0]) as f:
      x = convert(np.asarray(f.get_tensor(files[name][1]))).astype(dtype)
    if layer is None:
      flat[path] = x
    else:
      flat.setdefault(path, np.empty((c.depth, *x.shape), dtype))[layer] = x
  return c, place(flax.traverse_util.unflatten_dict(flat, sep="/"), mesh)


def place(params, mesh):
  """Host arrays -> arrays on the mesh, split as sharding.RULES say."""
  put = lambda x, how: jax.make_array_from_callback(x.shape, how, lambda index: x[index])
  return jax.tree.map(put, params, sharding.shardings_of(params, mesh))


# --- families: their config and their names


def _llama(raw):
  heads, width = raw["num_attention_heads"], raw["hidden_size"]
  qwen = raw["model_type"] == "qwen2"
  bias = bool(raw.get("attention_bias", False))
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the newer name first
  theta = rope.get("rope_theta", raw.get("rope_theta"))
  return language.Config(
    vocab_size=raw["vocab_size"], width=width, depth=raw["num_hidden_layers"], heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or width // heads, hidden=raw["intermediate_size"],
    length=raw["max_position_embeddings"], norm="rms", norm_eps=raw["rms_norm_eps"],
    positions="rotary", mlp="swiglu", qkv_bias=qwen or bias, out_bias=bias,
    mlp_bias=bool(raw.get("mlp_bias", False)), tied=bool(raw.get("tie_word_embeddings", False)),
    rope_theta=float(10000.0 if theta is None else theta), rope_scaling=_scaling(rope),
  )  # fmt: skip


def _scaling(rope):
  """What rope_scaling, or rope_parameters, says beside theta. Raises ValueError."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return ()
  if kind == "linear":
    return ("linear", float(rope["factor"]))
  if kind == "llama3":
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return ("llama3", *(float(rope[key]) for key in keys))
  raise ValueError(f"rope_type is {kind!r}; built are default, linear and llama3")


def _gpt2(raw):
  width, heads = raw["n_embd"], raw["n_head"]
  return language.Config(
    vocab_size=raw["vocab_size"], width=width, depth=raw["n_layer"], heads=heads, kv_heads=heads,
    head_dim=width // heads, hidden=raw.get("n_inner") or 4 * width, length=raw["n_positions"],
    norm="layer", norm_eps=raw["layer_norm_epsilon"], positions="learned", mlp="gelu",
    qkv_bias=True, out_bias=True, mlp_bias=True, tied=bool(raw.get("tie_word_embeddings", True)),
  )  # fmt: skip


# A row: their name ("{}" the layer), our path, their shape, what makes our array of theirs.
_SAME = lambda x: x


def _linear(*shape):
  """Of PyTorch's Linear, (out, in), to (in, out) and then `shape`."""
  return lambda x: x.T.reshape(shape)


def _llama_rows(c):
  W, F, V = c.width, c.hidden, c.vocab_size
  q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  rows = [
    ("embed_tokens.weight", "token_embedding/embedding", (V, W), _SAME),
    ("norm.weight", "final_norm/scale", (W,), _SAME),
    ("layers.{}.input_layernorm.weight", "blocks/attn_norm/scale", (W,), _SAME),
    ("layers.{}.post_attention_layernorm.weight", "blocks/mlp_norm/scale", (W,), _SAME),
  ]
  for name, heads, size in (("q", c.heads, q), ("k", c.kv_heads, kv), ("v", c.kv_heads, kv)):
    theirs, ours = f"layers.{{}}.self_attn.{name}_proj", f"blocks/attn/{name}"
    kernel = _linear(W, heads, c.head_dim)
    rows.append((f"{theirs}.weight", f"{ours}/kernel", (size, W), kernel))
    if c.qkv_bias:
      split = lambda x, heads=heads: x.reshape(heads, -1)
      rows.append((f"{theirs}.bias", f"{ours}/bias", (size,), split))
  out = _linear(c.heads, c.head_dim, W)
  rows.append(("layers.{}.self_attn.o_proj.weight", "blocks/attn/out/kernel", (W, q), out))
  if c.out_bias:
    rows.append(("layers.{}.self_attn.o_proj.bias", "blocks/attn/out/bias", (W,), _SAME))
  for name, shape in (("gate", (F, W)), ("up", (F, W)), ("down", (W, F))):
    theirs, ours = f"layers.{{}}.mlp.{name}_proj", f"blocks/mlp/{name}"
    rows.append((f"{theirs}.weight", f"{ours}/kernel", shape, np.transpose))
    if c.mlp_bias:
      rows.append((f"{theirs}.bias", f"{ours}/bias", shape[:1], _SAME))
  return rows


def _gpt2_rows(c):
  W, F = c.width, c.hidden
  rows = [
    ("wte.weight", "token_embedding/embedding", (c.vocab_size, W), _SAME),
    ("wpe.weight", "position_embedding", (c.length, W), _SAME),
  ]
  for theirs, ours in (
    ("ln_f", "final_norm"), ("h.{}.ln_1", "blocks/attn_norm"), ("h.{}.ln_2", "blocks/mlp_norm"),
  ):  # fmt: skip
    rows += [(f"{theirs}.weight", f"{ours}/scale", (W,), _SAME)]
    rows += [(f"{theirs}.bias", f"{ours}/bias", (W,), _SAME)]
  # One matrix holds all three; its Conv1D is (in, out).
  for i, name in enumerate("qkv"):
    part = lambda x, i=i: np.split(x, 3, axis=-1)[i].reshape(*x.shape[:-1], c.heads, c.head_dim)
    ours = f"blocks/attn/{name}"
    rows.append(("h.{}.attn.c_attn.weight", f"{ours}/kernel", (W, 3 * W), part))
    rows.append(("h.{}.attn.c_attn.bias", f"{ours}/bias", (3 * W,), part))
  heads = lambda x: x.reshape(c.heads, c.head_dim, W)
  rows += [
    ("h.{}.attn.c_proj.weight", "blocks/attn/out/kernel", (W, W), heads),
    ("h.{}.attn.c_proj.bias", "blocks/attn/out/bias", (W,), _SAME),
    ("h.{}.mlp.c_fc.weight", "blocks/mlp/up/kernel", (W, F), _SAME),
    ("h.{}.mlp.c_fc.bias", "blocks/mlp/up/bias", (F,), _SAME),
    ("h.{}.mlp.c_proj.weight", "blocks/mlp/down/kernel", (F, W), _SAME),
    ("h.{}.mlp.c_proj.bias", "blocks/mlp/down/bias", (W,), _SAME),
  ]
  return rows


_LLAMA_ONLY = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
_GPT2_ONLY = {
  "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
  "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
}  # fmt: skip
# model_type: (its config to ours, the rows of its tensors, what alone of a key is built)
FAMILIES = {
  "llama": (_llama, _llama_rows, _LLAMA_ONLY),
  "qwen2": (_llama, _llama_rows, _LLAMA_ONLY),
  "gpt2": (_gpt2, _gpt2_rows, _GPT2_ONLY),
}
# Tables that old files carry and the model makes itself.
_LEFT_OUT = r"rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$"


# --- tensors


def _expected(rows, c):
  """[(their name, our path, layer or None, shape, convert)], each layer by itself."""
  if not c.tied:
    rows = [*rows, ("lm_head.weight", "head/kernel", (c.vocab_size, c.width), np.transpose)]
  return [
    (name.format(layer), path, layer, shape, convert)
    for name, path, shape, convert in rows
    for layer in (range(c.depth) if "{}" in name else (None,))
  ]


def _find(folder):
  """{name without its prefix: (file, name in it)} of all tensors of the folder."""
  single = os.path.join(folder, "model.safetensors")
  if os.path.isfile(os.path.join(folder, INDEX)):
    names = _read_json(os.path.join(folder, INDEX)).get("weight_map", {}).values()
    paths = [os.path.join(folder, name) for name in sorted(set(names))]
  elif os.path.isfile(single):
    paths = [single]
  else:
    raise FileNotFoundError(
      f"{folder} holds neither model.safetensors nor {INDEX}; give the folder of a language model "
      "as Hugging Face's save_pretrained writes it"
    )
  lost = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
  if lost:
    raise FileNotFoundError(f"{folder} lacks {', '.join(lost)}, which {INDEX} names; copy it")
  found = {}
  for path in paths:
    with _open(path) as f:
      for name in f.keys():  # noqa: SIM118
        found[re.sub(r"^(model|transformer)\.", "", name)] = (path, name)
  return found


def _check(folder, rows, files, c):
  """Raises ValueError unless the files hold just what the rows ask for, in its shapes."""
  wanted = {name: tuple(shape) for name, _, _, shape, _ in rows}
  shapes = {}
  for path in sorted({path for path, _ in files.values()}):
    with _open(path) as f:
      for name, (where, own) in files.items():
        if where == path:
          shapes[name] = tuple(f.get_slice(own).get_shape())
  ignored = lambda name: re.search(_LEFT_OUT, name) or (c.tied and name == "lm_head.weight")
  missing = [name for name in wanted if name not in shapes]
  unexpected = {n: s for n, s in shapes.items() if n not in wanted and not ignored(n)}
  other = {n: (shapes[n], s) for n, s in wanted.items() if shapes.get(n, s) != s}
  if missing or unexpected or other:
    raise ValueError(
      f"{folder}: its tensors are not those that its config.json describes:\n"
      + complaint(missing, unexpected, other)
    )


def _open(path):
  try:
    return safetensors.safe_open(path, framework="np")
  except Exception as e:  # the library's own
    raise ValueError(
      f"{path} cannot be read as safetensors ({e}): it is damaged or cut short; copy it again"
    ) from e


def _read_json(path):
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"{path} is no file; give the folder of a language model as Hugging Face's save_pretrained "
      "writes it"
    )
  try:
    with open(path) as f:
      found = json.load(f)
  except ValueError as e:
    raise ValueError(f"{path} is no JSON ({e}): it is damaged or cut short; copy it again") from e
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds a JSON {type(found).__name__}; expected an object")
  return found


# --- tokenizer


class Tokenizer:
  """Text to ids and back, and `ends`, the ids that end an answer, the one to train on first."""

  def __init__(self, tokenizer, ends):
    tokenizer.no_padding()
    tokenizer.no_truncation()
    self._tokenizer, self.ends = tokenizer, tuple(ends)

  def encode(self, text, *, start):
    """Ids; `start`: with what the model wants before all text (Llama's first token)."""
    # Half a surrogate pair, which JSON can carry, is no text to the library.
    text = text.encode("utf-8", "replace").decode()
    return self._tokenizer.encode(text, add_special_tokens=start).ids

  def decode(self, ids):
    """The text before the first of `ends`."""
    ids = [int(i) for i in ids]
    stop = next((n for n, i in enumerate(ids) if i in self.ends), len(ids))
    return self._tokenizer.decode(ids[:stop]).strip()


def read_tokenizer(folder):
  """The folder's Tokenizer. Raises FileNotFoundError or ValueError."""
  import tokenizers

  path = os.path.join(folder, "tokenizer.json")
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"{path} is no file; where only a tokenizer.model is there, transformers makes one: "
      "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
  except Exception as e:  # a bare Exception is what the library raises
    raise ValueError(f"{path} cannot be read by the library tokenizers: {e}") from e
  ends = None
  for name in ("generation_config.json", "config.json"):
    if ends is None and os.path.isfile(os.path.join(folder, name)):
      ends = _read_json(os.path.join(folder, name)).get("eos_token_id")
  if ends is None:
    raise ValueError(f"{folder}: neither generation_config.json nor config.json has eos_token_id")
  return Tokenizer(tokenizer, ends if isinstance(ends, list) else [ends])
