"""A trained model as its users want it: `load(path)`, then images and captions in, arrays out.

  enc = encoder.load("runs/tiny")
  features = enc.patch_features(["cat.jpg", "dog.jpg"])  # (2, h, w, W)
  scores = enc.similarity(["cat.jpg", "dog.jpg"], ["a cat", "a dog"])  # (2, 2)
"""

import copy
import os

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from jepa_vl import checkpoint, interop
from jepa_vl.build import compute_dtype
from jepa_vl.data import tokenizer as tokenizer_lib
from jepa_vl.data import transforms
from jepa_vl.evals import common
from jepa_vl.interop import levljepa
from jepa_vl.model import two_tower


def load(path, *, tokenizer=None, readout=None, statistics=None, batch_size=64):
  """The encoder of a trained model.

  Args:
    path: a checkpoint of ours or its workdir (its newest), a folder that --mode=export wrote, or
      the LeVLJEPA authors' files (a folder, or "vision.pt,text.pt").
    tokenizer: for the authors' files, which hold none and whose captions need one: GPT-2's
      tokenizer.json, or the folder of its vocabulary.
    readout: for the authors' files: "eot" (release 2, the default) or "last" (release 1).
    statistics: of the images' normalisation, "clip" or "imagenet"; by default what the model was
      trained with, of the authors' "clip".
    batch_size: the most images or captions encoded at once.

  Raises:
    FileNotFoundError: no such path.
    ValueError: it is damaged, holds no whole model, or its parts do not fit each other.
  """
  path = checkpoint.find(path) or os.fspath(path)  # once: a run may save a newer one meanwhile
  loaded = interop.read(path)
  missing = [name for name in levljepa.NEEDED if name not in loaded["params"]]
  if missing:
    raise ValueError(
      f"{path} holds no whole model: without {', '.join(missing)}. Weights of a tower alone are "
      "for --config.init_from"
    )
  described = interop.describe(path)
  config = _config(described, loaded)
  changes = {"text": {"readout": readout}, "model": {"statistics": statistics}}
  for part, values in changes.items():
    config[part].update({k: v for k, v in values.items() if v is not None})
  if tokenizer is not None:
    tokenizer = tokenizer_lib.load(tokenizer)
  elif described and described.tokenizer:
    tokenizer = tokenizer_lib.from_bytes(described.tokenizer)
    if tokenizer.identity != described.tokenizer_identity:
      raise ValueError(
        f"{path}: the tokenizer there ({tokenizer.identity}) is not the one that the model was "
        f"trained with ({described.tokenizer_identity}); export again"
      )
  return Encoder(loaded, config, tokenizer, described, batch_size)


def _config(described, loaded):
  """The model's config: what is said beside the weights, over the reference's and the shapes'."""
  config = copy.deepcopy(levljepa.CONFIG)
  for key, value in interop.shapes(loaded).items():
    if key.startswith("model."):
      config["model"][key.removeprefix("model.")] = value
  for part, values in (described.config if described else {}).items():
    config[part] = {**config.get(part, {}), **values} if isinstance(values, dict) else values
  return ConfigDict(config)


class Encoder:
  """Images and captions to NumPy arrays (float32), in batches, compiled once per shape.

  Images are paths, PIL images, uint8 arrays (H, W, 3) or a list of these, or one uint8 array
  (N, H, W, 3); captions a string or a list. The first dimension of every result counts them, also
  where there is one.

  Images are prepared as in the model's evaluations: the shorter side resized, the centre cropped.
  `image_size` asks for another side than the trained one, or with (h, w) for the whole image
  resized to that and nothing cropped; the patch must divide it.
  """

  def __init__(self, loaded, config, tokenizer, description, batch_size):
    """`load` makes one: weights, their config, a tokenizer or None, interop.Description or None."""
    if batch_size < 1:
      raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    self.config, self.tokenizer, self.description = config, tokenizer, description
    self._batch_size = batch_size
    vocabulary = interop.shapes(loaded)["vocab_size"]
    if tokenizer and tokenizer.vocab_size != vocabulary:
      raise ValueError(
        f"the tokenizer has {tokenizer.vocab_size} tokens and the text tower {vocabulary}: give "
        "the tokenizer that the model was trained with"
      )
    scalars = {name: 0.0 for name, x in loaded["params"].items() if not isinstance(x, dict)}
    self._model = two_tower.from_config(
      config.model, config.text, vocab_size=vocabulary, scalars=scalars,
      dtype=compute_dtype(config.model, jax.default_backend()), device=jax.devices()[0],
    )  # fmt: skip
    batch = two_tower.dummy_batch(self._model, 1)
    init = lambda: self._model.init(jax.random.key(0), batch, train=False)
    variables, left_out, lacking = interop.fit(loaded, {"batch_stats": {}, **jax.eval_shape(init)})
    if lacking or left_out:
      raise ValueError(
        "the weights are not of the model that is described beside them: "
        f"{', '.join(lacking) or 'nothing'} missing, {', '.join(left_out) or 'nothing'} unexpected"
      )
    self.variables = jax.tree.map(jnp.asarray, variables)
    self._apply = jax.jit(self._model.apply, static_argnames="train")

  @property
  def embed_dim(self):
    """D, the width of embeddings and predictions."""
    return self._model.embed_dim

  @property
  def reading(self):
    """The reading of `similarity`: `avg`, or `embed` for a model without predictors."""
    return "avg" if self._model.predictor_depth else "embed"

  def encode_image(self, images, *, image_size=None):
    """Image embeddings z_img, (N, D)."""
    return self._images(images, image_size, ("z_img",))["z_img"]

  def encode_text(self, captions):
    """Text embeddings z_txt, (N, D). Raises ValueError without a tokenizer."""
    return self._texts(captions, ("z_txt",))["z_txt"]

  def predict_text_from_image(self, images, *, image_size=None):
    """The text embeddings that the image predictor expects, p_img (N, D)."""
    self._check_predictors()
    return self._images(images, image_size, ("p_img",))["p_img"]

  def predict_image_from_text(self, captions):
    """The image embeddings that the text predictor expects, p_txt (N, D)."""
    self._check_predictors()
    return self._texts(captions, ("p_txt",))["p_txt"]

  def cls_features(self, images, *, image_size=None):
    """The frozen backbone's CLS token, (N, W)."""
    return self._images(images, image_size, ("cls",))["cls"]

  def patch_features(self, images, *, image_size=None):
    """The frozen backbone's patch tokens on their grid, (N, h, w, W)."""
    tokens = self._images(images, image_size, ("patches",))["patches"]
    h, w = (side // self._model.patch_size for side in self._size(image_size))
    return tokens.reshape(len(tokens), h, w, -1)

  def similarity(self, images, captions, *, reading=None):
    """Cosine of every image with every caption, (N, C), in one of evals.common.READINGS.

    By default `avg`, the mean of both predictive readings; `embed` for CLIP and SigLIP.
    """
    reading = reading or self.reading
    if reading not in common.READINGS:
      raise ValueError(f"reading must be one of {', '.join(common.READINGS)}, got {reading!r}")
    images = self._images(images, None, ("z_img", "p_img"))
    return common.similarity(images, self._texts(captions, ("z_txt", "p_txt")), reading)

  def _check_predictors(self):
    if not self._model.predictor_depth:
      raise ValueError("this model has no predictors; its embeddings are aligned directly")

  def _size(self, image_size):
    if image_size is None:
      image_size = self._model.image_size
    size = (image_size, image_size) if np.ndim(image_size) == 0 else tuple(image_size)
    patch = self._model.patch_size
    if len(size) != 2 or any(side < patch or side % patch for side in size):
      raise ValueError(
        f"image_size={image_size} must be a side or (height, width), multiples of the patch "
        f"({patch} pixels)"
      )
    return size

  def _images(self, images, image_size, keys):
    size = self._size(image_size)
    whole = np.ndim(image_size) > 0

    def prepare(image):
      image = _as_array(image)
      if whole:
        return transforms.resize(image, *size)
      return transforms.centre_crop(image, size[0], self.config.data.eval_resize)

    rows = lambda part: {"image": np.stack([prepare(image) for image in part])}
    return self._map(_as_list(images), rows, keys, "images")

  def _texts(self, captions, keys):
    if self.tokenizer is None:
      raise ValueError(
        "these files hold no tokenizer: encoder.load(path, tokenizer=...) with GPT-2's "
        "tokenizer.json, or the folder that holds vocab.json and merges.txt"
      )
    captions = [captions] if isinstance(captions, str) else _list(captions, "captions")
    for caption in captions:
      if not isinstance(caption, str):
        raise ValueError(f"captions must be strings, got {type(caption).__name__}")
    text = self.config.text

    def rows(part):
      ids, mask, _ = tokenizer_lib.tokenize(
        self.tokenizer, part, length=text.length, readout=text.readout
      )
      return {"text": ids, "mask": mask}

    return self._map(captions, rows, keys, "captions")

  def _map(self, items, rows_of, keys, what):
    """{key: (N, ...)} of `keys` for the items, encoded in batches."""
    if not items:
      raise ValueError(f"no {what} were given")
    B = self._batch_size
    parts = []
    starts = range(0, len(items), B)
    for start in tqdm.tqdm(starts, desc=what, disable=None if len(starts) > 1 else True):
      part = items[start : start + B]
      rows = _pad(rows_of(part), min(B, 1 << (len(part) - 1).bit_length()))
      out = self._apply(self.variables, rows, train=False)
      parts.append({k: np.asarray(out[k], np.float32)[: len(part)] for k in keys})
    return {k: np.concatenate([part[k] for part in parts]) for k in keys}


def _pad(rows, count):
  """Repeats the last row up to `count`: few shapes are compiled, however many rows there are."""
  return {k: np.pad(x, [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1), "edge")
          for k, x in rows.items()}  # fmt: skip


def _as_list(images):
  if hasattr(images, "ndim"):
    return list(images) if images.ndim == 4 else [images]
  single = isinstance(images, (str, os.PathLike)) or hasattr(images, "convert")
  return [images] if single else _list(images, "images")


def _list(items, what):
  try:
    return list(items)
  except TypeError as e:
    raise ValueError(f"{what} must be one or a list of them, got {type(items).__name__}") from e


def _as_array(image):
  """A path, PIL image or array -> (H, W, 3) uint8. Raises ValueError or FileNotFoundError."""
  if isinstance(image, (str, os.PathLike)):
    with open(image, "rb") as f:
      data = f.read()
    try:
      return transforms.decode(data)
    except transforms.DamagedRecord as e:
      raise ValueError(f"{os.fspath(image)}: {e}") from e
  if hasattr(image, "convert"):  # PIL; upright and in eight bits, as a file is decoded
    import PIL.ImageOps

    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
      image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise ValueError(
      f"an image must be a path, a PIL image or a uint8 array (H, W, 3), got {image.dtype} "
      f"{image.shape}; of floats in [0, 1]: (255 * x).round().astype('uint8')"
    )
  return image
