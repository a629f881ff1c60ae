"""A small model on the embedded dataset: minutes on two CPU cores, seconds on a GPU."""

from ml_collections import ConfigDict

from configs import base, presets
from jepa_vl.data import embedded

# A: other drawing style, seen concepts; B: seen styles, unseen families; C: both unseen; val and
# val_style: as B and C from families of their own, for choosing hyper-parameters.
SPLITS = ("val", "val_style", "A", "B", "C")


def get_config(names=""):
  c = base.get_config()
  c.steps = 1300
  c.batch_size = 128
  c.log_every = 20
  c.eval_every = 500
  c.checkpoint_every = 250

  c.model.size = "nano"
  c.model.image_size = 32
  c.model.patch_size = 8
  c.model.embed_dim = 32
  c.model.hidden_dim = 256
  c.model.predictor_depth = 2

  c.text.length = 24
  c.text.tokenizer = "emoji"

  c.objective.lambda_img = 0.01
  c.objective.lambda_txt = 0.01
  c.objective.num_slices = 512
  c.objective.group_size = 0

  c.optim.lr = 1e-3
  c.optim.warmup = 100
  c.optim.weight_decay = 0.3

  c.data.source = "emoji"
  c.data.tag_prob = 0.9
  c.data.packing_tokens = 13  # captions have 10 on average
  c.data.crop_scale = (0.5, 1.0)
  c.data.grey_prob = 0.1

  where = {"source": "emoji", "path": "", "splits": SPLITS}
  c.evals.retrieval = ConfigDict({**where, "ranks": (1, 5, 10), "folds": 0})
  groups = tuple(embedded.info()["groups"])
  c.evals.zeroshot = ConfigDict(
    {**where, "label": "group", "classes": groups, "templates": ("{}",)}
  )
  c.evals.probe = ConfigDict(
    {**where, "label": "group", "train_split": "train", "select_split": "val"}
  )
  c.evals.probe.l2 = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
  c.evals.probe.update(features=("cls", "pooled"), shots=(), draws=0)
  c.evals.rank = ConfigDict(where)

  c.data.local_size = 16  # of the preset `plus`: half the side, as 96 of 224
  return presets.apply(c, names)
