"""PyTorch modules that ours are compared with, every number in them random.

Importing this skips the importing test module where PyTorch is not installed. It comes before any
import of timm, torchvision or transformers.
"""

import re
import sys

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: launch/test_torch.sh")


def import_torchvision():
  """torchvision, also where its wheel was built for another PyTorch than the installed one.

  Such a wheel lacks its compiled operators (`nms`, `roi_align`, ...), which none of these tests
  calls, but whose names its import insists on; each name that it misses is defined. A build that
  fits is imported at the first attempt and stays untouched.

  Returns the module and the torch.library.Library that has to outlive it.
  """
  library = None
  while True:
    try:
      import torchvision

      return torchvision, library
    except RuntimeError as error:
      missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
      if not missing:
        raise
      library = library or torch.library.Library("torchvision", "DEF")
      library.define(f"{missing[1]}() -> ()")
      for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]


torchvision, _LIBRARY = import_torchvision()

import safetensors.torch  # noqa: E402, F401
import timm  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()  # else a word on every vocabulary below 50257
torch.set_num_threads(1)


def randomise(module, seed):
  """Every parameter and running statistic drawn anew, so that none can be exchanged unnoticed.

  Matrices keep the scale of their input, norms have a scale around 1 and a bias, BatchNorm has
  running means around 0 and variances in (0.5, 2). Returns `module`, in evaluation mode.
  """
  rng = torch.Generator().manual_seed(seed)
  normal = lambda x, std: std * torch.randn(x.shape, generator=rng)
  transposed = {f"{name}.weight" for name, m in module.named_modules()
                if isinstance(m, transformers.pytorch_utils.Conv1D)}  # fmt: skip
  norms = (torch.nn.LayerNorm, torch.nn.BatchNorm1d)
  scales = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, norms)}
  tables = ("wte.weight", "wpe.weight", "pos_embed", "cls_token")
  with torch.no_grad():
    for name, x in module.state_dict().items():  # shares memory with the module
      if name.endswith("num_batches_tracked"):
        x.fill_(7)
      elif name.endswith("running_var"):
        x.copy_(0.5 + 1.5 * torch.rand(x.shape, generator=rng))
      elif name in scales:
        x.copy_(1 + normal(x, 0.2))
      elif x.ndim > 1 and not name.endswith(tables):
        fan_in = x.shape[0] if name in transposed else x[0].numel()
        x.copy_(normal(x, fan_in**-0.5))
      else:
        x.copy_(normal(x, 0.3))
  return module.eval()


def timm_vit(size, patch, image_size, seed, **changes):
  """timm's vit_{size}_patch16_224 (huge: 14) with this patch and image size, no classifier.

  `changes` are its further arguments: depth, embed_dim, num_heads. Any image size is taken.
  """
  name = f"vit_{size}_patch{14 if size == 'huge' else 16}_224"
  model = timm.create_model(
    name, num_classes=0, dynamic_img_size=True, patch_size=patch, img_size=image_size, **changes
  )
  return randomise(model, seed)


def gpt2(width, depth, heads, seed, *, vocab_size=97, positions=1024):
  """Hugging Face's GPT2Model without dropout; vocabulary of 97, GPT-2's own number of positions."""
  return randomise(empty_gpt2(width, depth, heads, vocab_size, positions), seed)


def empty_gpt2(width, depth, heads, vocab_size, positions=1024):
  """GPT2Model as it is built, in evaluation mode."""
  config = transformers.GPT2Config(
    n_embd=width, n_layer=depth, n_head=heads, vocab_size=vocab_size, n_positions=positions,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
  )  # fmt: skip
  return transformers.GPT2Model(config).eval()


def pre_proj(width, hidden, out, seed):
  """The reference's embedding head: Linear - BatchNorm1d - GELU - Linear; (B, W) -> (B, D)."""
  layers = (
    torch.nn.Linear(width, hidden),
    torch.nn.BatchNorm1d(hidden),
    torch.nn.GELU(),
    torch.nn.Linear(hidden, out),
  )
  return randomise(torch.nn.Sequential(*layers), seed)


def projector(dim, hidden, depth, seed):
  """The reference's predictor, torchvision's MLP with `depth` hidden layers; (B, D) -> (B, D)."""
  mlp = torchvision.ops.MLP(
    dim, [hidden] * depth + [dim], norm_layer=torch.nn.BatchNorm1d,
    activation_layer=torch.nn.GELU, dropout=0.0,
  )  # fmt: skip
  return randomise(mlp, seed)
