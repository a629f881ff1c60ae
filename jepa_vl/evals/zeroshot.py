"""Zero-shot classification: images against the class names in a prompt."""

import numpy as np

from jepa_vl.evals import common


def run(encode, variables, mesh, *, source, path, splits, label, classes, prompt):
  """Top-1 in every reading: keys "SPLIT/READING/top1", with "@random" and "@majority".

  label: the record's field that holds the class index; classes: their names; prompt: a template
  with one {}.
  """
  texts = encode.texts(variables, [prompt.format(name) for name in classes])
  metrics = {}
  for split in splits:
    labels = np.array([r[label] for r in encode.split(source, path, split).records])
    features = encode.features(variables, source, path, split)
    one_hot = np.eye(len(classes), dtype=bool)[labels]
    for reading in encode.readings:
      first = common.first_hit(common.similarity(features, texts, reading), one_hot)
      key = f"{split}/{reading}/top1"
      metrics[key] = common.recall_at(first, 1)
      metrics[f"{key}@random"] = 1 / len(classes)
      metrics[f"{key}@majority"] = float(np.max(one_hot.mean(axis=0)))
  return metrics
