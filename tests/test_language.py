"""The language model beside itself: cache, padding, meshes; and what its folder must hold."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jepa_vl import sharding
from jepa_vl.interop import language as files
from jepa_vl.model import language

RAW = dict(
  model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=48, max_position_embeddings=32, rms_norm_eps=1e-5,
  rope_theta=10000.0, hidden_act="silu", eos_token_id=2,
)  # fmt: skip


def write(folder, raw=RAW, change=lambda tensors: None):
  """A folder of random weights as the config describes them; `change` may spoil the tensors."""
  (folder / "config.json").write_text(json.dumps(raw))
  c = files.read_config(str(folder))
  rng = np.random.default_rng(0)
  rows = files._expected(files.FAMILIES[raw["model_type"]][1](c), c)
  tensors = {
    name if name == "lm_head.weight" else f"model.{name}":
      rng.standard_normal(shape).astype(np.float32) * 0.1
    for name, _, _, shape, _ in rows
  }  # fmt: skip
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return str(folder)


def tokens_and_mask():
  tokens = np.random.default_rng(1).integers(3, 64, (8, 10)).astype(np.int32)
  return tokens, np.arange(10) >= np.arange(8)[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("llama"))


def read(folder, mesh, **changes):
  c, params = files.read(folder, mesh, np.float32)
  how = {"scan": True, "remat": "none", "dtype": jnp.float32} | changes
  return language.LanguageModel(c, **how), params


def test_padding_may_stand_anywhere(folder, mesh):
  """Before, behind and amid the tokens: those after it see the same, at the same positions."""
  model, params = read(folder, mesh)
  tokens = np.arange(5, 11, dtype=np.int32)
  found = []
  for places in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 1, 4, 5, 6, 8]):
    row, mask = np.zeros((1, 9), np.int32), np.zeros((1, 9), bool)
    row[0, places], mask[0, places] = tokens, True
    logits = model.apply({"params": params}, row, mask, method="of_tokens")
    found.append(np.asarray(logits)[0, places])
  np.testing.assert_allclose(found[1], found[0], atol=1e-5)
  np.testing.assert_allclose(found[2], found[0], atol=1e-5)


@pytest.mark.parametrize("sizes", [
  (2, 2, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in [(1, 1, 8), (8, 1, 1), (1, 4, 2)]),
])
def test_every_mesh_gives_the_same(folder, mesh, sizes):
  """Logits and greedy answers; parameters are really split where RULES say so."""
  tokens, mask = tokens_and_mask()
  results = []
  for m in (mesh, sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))):
    model, params = read(folder, m)
    batch = sharding.put_batch({"tokens": tokens, "mask": mask}, m)
    with jax.set_mesh(m):
      apply = jax.jit(lambda p, t, k, model=model: (
        model.apply({"params": p}, t, k, method="of_tokens"),
        language.greedy(
          model, p, model.apply({"params": p}, t, method="embed"), k, steps=6, ends=(2,)
        ),
      ))  # fmt: skip
      results.append(jax.device_get(apply(params, batch["tokens"], batch["mask"])))
  np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
  np.testing.assert_array_equal(results[0][1], results[1][1])
  gate = params["blocks"]["mlp"]["gate"]["kernel"]
  assert gate.addressable_shards[0].data.size == gate.size // (sizes[1] * sizes[2])


@pytest.mark.slow
def test_scanned_unrolled_and_rematerialised_are_one_model(folder, mesh):
  tokens, mask = tokens_and_mask()
  expected = None
  for changes in ({}, {"scan": False}, {"remat": "full"}, {"remat": "dots"}):
    model, params = read(folder, mesh, **changes)
    loss = lambda p, model=model: jnp.mean(
      model.apply({"params": p}, tokens, mask, method="of_tokens") ** 2
    )
    found = jax.grad(loss)(params)
    expected = expected or found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_an_answer_stays_ended(folder, mesh):
  """Behind the first end there is nothing but the first of `ends`."""
  model, params = read(folder, mesh)
  tokens, mask = tokens_and_mask()
  x = model.apply({"params": params}, tokens, method="embed")
  free = np.asarray(language.greedy(model, params, x, mask, steps=6, ends=(63,)))
  found = language.greedy(model, params, x, mask, steps=6, ends=(1, int(free[0, 1])))
  assert (np.asarray(found)[0] == [*free[0, :2], 1, 1, 1, 1]).all()


def test_tensors_that_do_not_fit_are_all_named(tmp_path, mesh):
  def change(tensors):
    del tensors["model.layers.1.mlp.gate_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.2.mlp.gate_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.norm.weight"] = np.zeros((31,), np.float32)

  folder = write(tmp_path, change=change)
  with pytest.raises(ValueError) as e:
    files.read(folder, mesh, np.float32)
  lines = str(e.value).splitlines()
  assert folder in lines[0] and lines[1:] == [
    "  missing: layers.1.mlp.gate_proj.weight",
    "  missing: lm_head.weight",
    "  unexpected: layers.2.mlp.gate_proj.weight (48, 32)",
    "  other shape: norm.weight (31,), expected (32,)",
  ]


def test_a_missing_shard_is_named(folder, tmp_path, mesh):
  (tmp_path / "config.json").write_text(json.dumps(RAW))
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
  (tmp_path / files.INDEX).write_text(json.dumps(index))
  with pytest.raises(FileNotFoundError, match="lacks model-00001-of-00002.safetensors"):
    files.read(str(tmp_path), mesh, np.float32)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model_type": "mamba"}, "model_type is 'mamba'; known are llama, qwen2, gpt2"),
    ({"hidden_act": "relu"}, "hidden_act='relu' .only 'silu'"),
    ({"quantization_config": {"bits": 4}}, "quantised"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"num_attention_heads": 3}, "2 key heads do not divide 3 heads"),
    ({"rms_norm_eps": None}, "lacks 'rms_norm_eps'"),
  ],
)
def test_what_is_not_built_is_refused_in_words(tmp_path, change, words):
  raw = {k: v for k, v in (RAW | change).items() if v is not None}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=words) as e:
    files.read_config(str(tmp_path))
  assert "config.json" in str(e.value) or "quantised" in words


def test_a_folder_without_weights_or_config_is_named(tmp_path, mesh):
  with pytest.raises(FileNotFoundError, match="config.json is no file"):
    files.read(str(tmp_path), mesh, np.float32)
  (tmp_path / "config.json").write_text(json.dumps(RAW))
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    files.read(str(tmp_path), mesh, np.float32)
  with pytest.raises(FileNotFoundError, match="tokenizer.json is no file"):
    files.read_tokenizer(str(tmp_path))


def test_a_tokenizer_begins_as_the_family_wants_it(tmp_path):
  """Llama's first token comes with the start of the text alone, and an answer ends at an end."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, processors

  vocab = {"<s>": 0, "</s>": 1, "red": 2, "?": 3}
  raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
  raw.pre_tokenizer = pre_tokenizers.Whitespace()
  raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
  raw.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "config.json").write_text('{"eos_token_id": [1, 3]}')
  found = files.read_tokenizer(str(tmp_path))
  assert found.encode("red", start=True) == [0, 2] and found.encode("red", start=False) == [2]
  assert found.ends == (1, 3) and found.decode([2, 2, 1, 2]) == "red red"


def test_flops_are_those_of_the_matrices():
  """Two per parameter and token but for the table, and attention's scores."""
  c = language.Config(
    vocab_size=64, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, hidden=48, length=32,
    norm="rms", norm_eps=1e-5, positions="rotary", mlp="swiglu", qkv_bias=False, out_bias=False,
    mlp_bias=False, tied=False, rope_theta=1e4,
  )  # fmt: skip
  shapes = language.abstract_params(language.LanguageModel(c, True, "none", jnp.float32))
  kernels = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim > 2)
  head = c.width * c.vocab_size
  scores = 2 * 2 * 10 * 10 * 32 * 2
  assert language.forward_flops(c, 10, 3) == 2 * 10 * kernels + 2 * 3 * head + scores
  with pytest.raises(ValueError, match="norm must be one of rms, layer"):
    dataclasses.replace(c, norm="batch")
