"""Weight files as flat dictionaries of NumPy arrays; nothing that a file holds is executed."""

import os
import pickle
import re

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (NumPy has no bfloat16 of its own)
import numpy as np
import safetensors


def read(path):
  """A weight file -> {name: array}; every float becomes float32, integers stay as they are.

  `.safetensors` needs no PyTorch; `.pt`, `.pth` and `.bin` do. The names of nested dictionaries
  are joined by dots. What lies beside the tensors (numbers, words) is left out.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is empty, damaged or no weight file, it holds objects that could run code, or
      PyTorch is needed and not installed.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"{path}: no weights there; expected a run's folder or one of its checkpoints/STEP, a folder "
      "that --mode=export wrote, or weight files"
    )
  suffix = os.path.splitext(path)[1]
  if suffix not in READERS:
    raise ValueError(f"{path} is no weight file by its name; expected one of {', '.join(READERS)}")
  if not os.path.getsize(path):
    raise ValueError(f"{path} is empty; copy or download it again")
  flat = READERS[suffix](path)
  if not flat:
    raise ValueError(f"{path} holds no tensors; give a file of weights (a state_dict)")
  return flat


def read_as(path, convert):
  """convert(flat weights of a file), what is amiss said with the file's name."""
  flat = read(path)
  try:
    return convert(flat)
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e


SAFE_TORCH = (2, 10)  # whose torch.load(weights_only=True) has no known way to run code


def _as_float32(x):
  return np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)


def _read_safetensors(path):
  try:
    with safetensors.safe_open(path, framework="np") as f:
      return {name: _as_float32(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
  except Exception as e:  # the library's own, and whatever an unknown dtype raises
    raise ValueError(
      f"{path} cannot be read as safetensors ({_first_line(e)}): it is damaged, cut short or "
      "another kind of file; copy or download it again"
    ) from e


def _read_torch(path):
  try:
    import torch
  except ImportError as e:
    raise ValueError(
      f"{path} is a PyTorch file and PyTorch is not installed: pip install torch, or convert the "
      "file to .safetensors where PyTorch is"
    ) from e
  version = tuple(int(x) for x in re.findall(r"\d+", torch.__version__)[:2])
  if version < SAFE_TORCH:
    raise ValueError(
      f"{path} is a PyTorch file, and PyTorch {torch.__version__} can be made to run code by one "
      f"(CVE-2025-32434, CVE-2026-24747): install {SAFE_TORCH[0]}.{SAFE_TORCH[1]} or later, or "
      "convert the file to .safetensors"
    )
  try:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {name: _as_float32(x) for name, x in _leaves(loaded, "", torch)}
  except Exception as e:  # unpickling raises as many kinds as there are kinds of damage
    refused = re.search(r"GLOBAL (\S+)", str(e))  # what beside tensors the file would call
    if refused:
      raise ValueError(
        f"{path} holds more than tensors: it asks for {refused[1]}. Opening such a file could run "
        "code, so nothing of it was used; save the model's state_dict() alone, at best as "
        ".safetensors"
      ) from None
    cause = e.__context__ if isinstance(e, pickle.UnpicklingError) else None  # without advice
    raise ValueError(
      f"{path} cannot be read as PyTorch weights ({_first_line(cause or e)}): it is damaged, cut "
      "short or another kind of file; copy or download it again"
    ) from None


READERS = {
  ".safetensors": _read_safetensors,
  ".pt": _read_torch,
  ".pth": _read_torch,
  ".bin": _read_torch,
}


def _leaves(tree, prefix, torch):
  """Every tensor of nested dictionaries as (dotted name, array)."""
  for key, x in tree.items():
    if isinstance(x, dict):
      yield from _leaves(x, f"{prefix}{key}.", torch)
    elif isinstance(x, torch.Tensor):
      x = x.detach()
      yield f"{prefix}{key}", (x.float() if x.is_floating_point() else x).numpy()


def _first_line(error):
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
