"""Effective rank of each modality's embeddings."""

from jepa_vl import metrics as metrics_lib


def run(encode, variables, mesh, *, source, path, splits):
  """Keys "SPLIT/img" and "SPLIT/txt"; in [1, min(D, rows)], higher is closer to isotropic."""
  metrics = {}
  for split in splits:
    features = encode.features(variables, source, path, split)
    for modality in ("img", "txt"):
      metrics[f"{split}/{modality}"] = float(
        metrics_lib.effective_rank(features[f"z_{modality}"])
      )
  return metrics
