"""Llama, Qwen2 and GPT-2 of random weights: the logits and the answers of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_modules as modules

from jepa_vl import sharding
from jepa_vl.interop import language as files
from jepa_vl.model import language

torch = modules.torch
pytestmark = pytest.mark.torch

TOLERANCE = 1e-4  # of logits, absolute; a hundred times what is measured
SMALL = dict(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(intermediate_size=80, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}


def make(name):
  import transformers as hf

  grouped = {**SMALL, "num_key_value_heads": 2}
  gpt2 = dict(
    vocab_size=101, n_embd=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=2
  )
  kinds = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)),
    "llama3": lambda: hf.LlamaForCausalLM(
      hf.LlamaConfig(**grouped, rope_parameters=LLAMA3, tie_word_embeddings=True)
    ),
    "llama_biases": lambda: hf.LlamaForCausalLM(
      hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=16)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped)),
    "qwen2_tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**grouped, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
  }
  torch.manual_seed(0)
  model = kinds[name]().eval()
  with torch.no_grad():  # zeros and ones would hide a swapped bias or scale
    for p in model.parameters():
      p.add_(torch.randn(p.shape) * 0.1)
  return model


NAMES = ("llama", "llama3", "llama_biases", "qwen2", "qwen2_tied", "gpt2")


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
  """transformers' model, and ours of the folder that it wrote, in several shards."""
  theirs, folder = make(request.param), str(tmp_path_factory.mktemp(request.param))
  theirs.save_pretrained(folder, max_shard_size="60KB")
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  c, params = files.read(folder, mesh, np.float32)
  return theirs, language.LanguageModel(c, True, "none", jnp.float32), params, folder


def prompts(side):
  """Ragged tokens (4, 12) with padding on one side, and their mask."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 101, (4, 12))
  count = np.array([12, 7, 1, 9])[:, None]
  column = np.arange(12)
  mask = column >= 12 - count if side == "left" else column < count
  return np.where(mask, tokens, 0).astype(np.int32), mask


def theirs_of(model, tokens, mask):
  position = np.maximum(mask.cumsum(1) - 1, 0)
  with torch.no_grad():
    return model(
      torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long(),
      position_ids=torch.from_numpy(position).long(),
    ).logits.numpy()  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_transformers(pair, side):
  theirs, model, params, _ = pair
  tokens, mask = prompts(side)
  expected = theirs_of(theirs, tokens, mask)
  found = model.apply({"params": params}, tokens, mask, method="of_tokens")
  error = np.abs(np.asarray(found) - expected)[mask].max()
  print(f"  {model.config.norm} {side}: {error:.1e} of {np.abs(expected).max():.1f}")
  assert error < TOLERANCE


def test_logits_with_the_cache_are_those_of_transformers(pair):
  """Seven columns at once, then one by one."""
  theirs, model, params, _ = pair
  tokens, mask = prompts("left")
  expected = theirs_of(theirs, tokens, mask)
  variables = {"params": params}
  x = model.apply(variables, tokens, method="embed")
  cache, found, start = language.empty_cache(model, 4, 12), [], 0
  for size in (7, 1, 1, 1, 1, 1):
    logits, cache = model.apply(
      variables, x[:, start : start + size], mask, cache=cache, start=start
    )
    found.append(logits)
    start += size
  assert np.abs(np.concatenate(found, axis=1) - expected)[mask].max() < TOLERANCE


def test_greedy_answers_are_those_of_generate(pair):
  theirs, model, params, _ = pair
  tokens, mask = prompts("left")
  with torch.no_grad():
    expected = theirs.generate(
      torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long(),
      max_new_tokens=20, do_sample=False, pad_token_id=2,
    ).numpy()[:, 12:]  # fmt: skip
  x = model.apply({"params": params}, tokens, method="embed")
  found = language.greedy(model, params, x, mask, steps=20, ends=(2,))
  np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
  assert (np.asarray(found)[:, expected.shape[1] :] == 2).all()


def test_bfloat16_weights_are_read_as_they_are(pair, mesh, tmp_path):
  theirs, model, _, _ = pair
  half = type(theirs)(theirs.config).to(torch.bfloat16)
  half.save_pretrained(tmp_path)
  _, params = files.read(str(tmp_path), mesh, jnp.bfloat16)
  found = params["token_embedding"]["embedding"]
  assert found.dtype == jnp.bfloat16
  expected = half.get_input_embeddings().weight.detach().float().numpy()
  np.testing.assert_array_equal(np.asarray(found, np.float32), expected)
