"""A small model on the procedural shapes set, of which everything is known: minutes on a CPU."""

from ml_collections import ConfigDict

from configs import base, presets
from jepa_vl.data import shapes_scene

# iid: as train; pairs, counts, relations: what train never has (jepa_vl/data/shapes_scene.py)
SPLITS = ("iid", "pairs", "counts", "relations")
EVALUATED = "side=64,size=1000"  # of every split


def get_config(names=""):
  c = base.get_config()
  c.steps = 1000
  c.batch_size = 64
  c.log_every = 20
  c.eval_every = 0
  c.checkpoint_every = 200

  c.model.size = "nano"
  c.model.image_size = 64
  c.model.patch_size = 8
  c.model.embed_dim = 32
  c.model.hidden_dim = 256
  c.model.predictor_depth = 2

  c.text.length = 26  # the longest caption and its EOT have 25
  c.text.tokenizer = "shapes"

  c.objective.lambda_img = 0.01
  c.objective.lambda_txt = 0.01
  c.objective.num_slices = 512
  c.objective.group_size = 0

  c.optim.lr = 1e-3
  c.optim.warmup = 100
  c.optim.weight_decay = 0.3

  c.data.source = "shapes"
  c.data.path = "side=64,size=200000"  # more than the steps need: no image comes twice
  c.data.packing_tokens = 14  # captions have 11 on average
  c.data.eval_resize = 1.0  # objects stand at the edges, too
  c.data.local_size = 32  # of the preset `plus`

  where = {"source": "shapes", "path": EVALUATED, "splits": SPLITS}
  c.evals.retrieval = ConfigDict({**where, "ranks": (1, 5, 10), "folds": 0})
  c.evals.compositional = ConfigDict({**where, "kinds": ("colour", "relation")})
  alone = {"evaluation": "zeroshot", **where, "path": f"{EVALUATED},objects=1"}
  alone["splits"] = ("iid", "pairs")  # the others have no scenes of one object
  c.evals.zeroshot_shape = ConfigDict(
    {**alone, "label": "shape", "classes": shapes_scene.SHAPES, "templates": ("a {}",)}
  )
  colours = shapes_scene.COLOUR_NAMES
  c.evals.zeroshot_colour = ConfigDict(
    {**alone, "label": "colour", "classes": colours, "templates": ("one {} object",)}
  )
  for label in ("shape", "colour", "count"):
    # No probe can name a count that training never has.
    splits = tuple(s for s in SPLITS if (label, s) != ("count", "counts"))
    c.evals[f"probe_{label}"] = ConfigDict(
      {"evaluation": "probe", **where, "splits": splits, "label": label, "train_split": "train"}
    )
    c.evals[f"probe_{label}"].update(
      select_split="val", features=("cls", "pooled"), l2=(1e-3, 1e-2, 1e-1, 1.0), shots=(), draws=0
    )
  c.evals.knn_count = ConfigDict({
    "evaluation": "knn", **where, "splits": ("iid", "pairs", "relations"), "label": "count",
    "train_split": "train", "ks": (20,), "temperature": 0.07,
  })  # fmt: skip
  dense = {
    "source": "shapes", "path": EVALUATED, "splits": ("iid", "pairs"), "train_split": "train",
    "size": 0, "mode": "resize", "stride": 0, "side": 64, "epochs": 10, "batch_size": 64,
    "lrs": (3e-2, 1e-1), "weight_decay": 1e-3, "keep": 4.0,
    "seed": 0,
  }  # fmt: skip
  c.evals.segmentation = ConfigDict({
    **dense, "num_classes": 1 + len(shapes_scene.SHAPES),
    "class_names": ("background", *shapes_scene.SHAPES),
  })  # fmt: skip
  c.evals.clusters = ConfigDict({
    **{k: dense[k] for k in ("source", "path", "splits", "train_split", "size", "mode", "stride")},
    **{k: c.evals.segmentation[k] for k in ("num_classes", "class_names")},
    "components": 32, "sample": 16, "seed": 0,
  })  # fmt: skip
  c.evals.depth = ConfigDict({**dense, "min_depth": 0.5, "max_depth": 10.0, "scale": "metric"})
  c.evals.rank = ConfigDict(where)

  presets.apply(c, names)
  # A mirrored image makes "left of" false, another hue "red", and a small crop leaves objects out.
  c.data.flip = c.data.grey_prob = 0.0
  c.data.jitter = (*c.data.jitter[:3], 0.0)
  c.data.crop_scale = (0.9, 1.0)
  return c
