"""Image-to-text and text-to-image retrieval within a split."""

from jepa_vl.evals import common


def run(encode, variables, mesh, *, source, path, splits, ranks):
  """R@k both ways in every reading: keys "SPLIT/i2t/READING/R@k" and "SPLIT/t2i/READING/R@k".

  Candidates are the split's captions (one per concept) or its images; several right answers count
  as one hit. "@random" is the expectation of a random ranking.
  """
  metrics = {}
  for split in splits:
    relevant = encode.split(source, path, split).relevant
    features = encode.features(variables, source, path, split)
    # What is right does not change while the encoder trains, nor with the reading.
    chance = encode.once(
      ("chance", source, path, split, tuple(ranks)),
      lambda right=relevant: {
        (way, k): common.random_recall(r, k)
        for way, r in (("i2t", right), ("t2i", right.T))
        for k in ranks
      },
    )
    for reading in encode.readings:
      scores = common.similarity(features, features, reading)
      for way, s, r in (("i2t", scores, relevant), ("t2i", scores.T, relevant.T)):
        first = common.first_hit(s, r)
        for k in ranks:
          key = f"{split}/{way}/{reading}/R@{k}"
          metrics[key] = common.recall_at(first, k)
          metrics[f"{key}@random"] = chance[way, k]
  return metrics
