"""Effective rank of each modality's embeddings."""

from jepa_vl import metrics
from jepa_vl.evals import common

PROTOCOL = """
Effective rank: the exponential of the entropy of the centred embeddings' normalised singular
values, at most the smaller of the embedding's width and the number of rows.
"""


def run(encode, variables, mesh, *, source, path, splits):
  """Keys "SPLIT/img" and, where there are captions, "SPLIT/txt"; higher is closer to isotropic."""
  figures, sizes = {}, {}
  for split in splits:
    features = encode.features(variables, source, path, split)
    rows = {m: features[f"z_{m}"] for m in ("img", "txt") if f"z_{m}" in features}
    figures |= {f"{split}/{m}": metrics.effective_rank(z) for m, z in rows.items()}
    sizes[split] = {m: len(z) for m, z in rows.items()}
  return common.result(figures, protocol=PROTOCOL, sizes=sizes)
