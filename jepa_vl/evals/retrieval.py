"""Image-to-text and text-to-image retrieval within a split."""

import numpy as np

from jepa_vl.evals import common

PROTOCOL = """
Images rank all captions of the split, captions all its images, by cosine; R@k: the share of queries
with a right answer among the first k (Karpathy's protocol for COCO and Flickr30k). Ties count
against the model.
"""


def run(encode, variables, mesh, *, source, path, splits, ranks, folds):
  """R@k both ways in every reading: keys "SPLIT/i2t/READING/R@k" and "SPLIT/t2i/READING/R@k".

  Candidates are the split's captions (one per concept, or all of each image's `captions`) or its
  images; several right answers count as one hit. "@random" is the expectation of a random ranking.
  folds: 0, or into how many equal parts the images are cut, each with its own candidates, and the
  figures are means over these (COCO's 1k protocol: 5 parts of 5000 images).

  Raises:
    ValueError: a split without captions, or folds of one whose records share their captions.
  """
  figures, sizes = {}, {}
  for split in splits:
    features = encode.features(variables, source, path, split)
    data = encode.split(source, path, split)
    if not data.captions:
      raise ValueError(f"split {split!r} has no captions: {data.identity}; retrieval needs some")
    parts = _parts(data, folds)
    # What is right does not change while the encoder trains, nor with the reading.
    chance = encode.once(
      ("chance", source, path, split, tuple(ranks), folds),
      lambda parts=parts: {
        (way, k): np.mean([common.random_recall(r, k) for _, _, r in _queries(parts, way)])
        for way in ("i2t", "t2i")
        for k in ranks
      },
    )
    for way in ("i2t", "t2i"):
      hits = {}
      for reading in encode.readings:
        first, weights = _first_hits(features, parts, way, common.READINGS[reading], mesh)
        hits |= {f"{split}/{way}/{reading}/R@{k}": (first < k) * weights for k in ranks}
      figures |= common.means(hits)
      figures |= {f"{key}@random": chance[way, int(key.rpartition("@")[2])] for key in hits}
    sizes[split] = {"images": len(data), "captions": len(data.captions), "folds": folds}
    sizes[split]["left_out"] = len(data.left_out)
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)


def _parts(data, folds):
  """(images, captions, sparse relevant) of each fold, or of the whole split."""
  if not folds:
    return [(slice(None), slice(None), data.relevant)]
  counts = [len(common.several_captions(record)) for record in data.records]
  if not all(counts) or folds > len(data):
    raise ValueError(
      f"folds={folds} is for at least as many images with `captions` of their own (COCO, "
      f"Flickr30k); {data.identity} has {np.count_nonzero(counts)} of {len(data)}; 0 takes all"
    )
  owner = np.repeat(np.arange(len(data)), counts)
  parts = []
  for images in np.array_split(np.arange(len(data)), folds):
    captions = np.flatnonzero((owner >= images[0]) & (owner <= images[-1]))
    parts.append((images, captions, data.relevant[images][:, captions]))
  return parts


def _queries(parts, way):
  """(queries, candidates, sparse relevant) of the parts, one way."""
  for images, captions, relevant in parts:
    if way == "i2t":
      yield images, captions, relevant
    else:
      yield captions, images, relevant.T.tocsr()


def _first_hits(features, parts, way, pairs, mesh):
  """Every query's `first_hit` within its part, and weights that make their mean the parts' mean."""
  sides = zip(*(pairs if way == "i2t" else [pair[::-1] for pair in pairs]), strict=True)
  queries, candidates = ([features[name] for name in names] for names in sides)
  found = [
    common.first_hits([x[q] for x in queries], [x[c] for x in candidates], relevant, mesh)
    for q, c, relevant in _queries(parts, way)
  ]
  total = sum(map(len, found))
  weights = [np.full(len(first), total / len(found) / len(first)) for first in found]
  return np.concatenate(found), np.concatenate(weights)
