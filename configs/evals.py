"""Evaluations by published protocols, as presets of any configuration.

--config=configs/vit_b.py:imagenet,coco --config.data.sets=/data looks for the sets below /data,
in the places that stand here; --config.evals.NAME.path=... names another. They run at the end of
training and in --mode=eval.
"""

from ml_collections import ConfigDict


def imagenet(c):
  """ImageNet zero-shot, by the authors' one prompt and by CLIP's ensemble of 80."""
  root = c.data.get_ref("sets")
  for name, templates in (("imagenet", ("a photo of a {}.",)), ("imagenet80", "imagenet80")):
    c.evals[name] = ConfigDict({
      "evaluation": "zeroshot", "when": "end", "source": "class_folder", "splits": ("val",),
      "path": root + "/imagenet/{split}", "label": "class", "templates": templates,
      # One per line, in the order of the synset folders.
      "classes": root + "/imagenet/classnames.txt",
    })  # fmt: skip


def imagenet_knn(c):
  """ImageNet by the nearest of its training images' features, as DINO reports it."""
  c.evals.imagenet_knn = ConfigDict({
    "evaluation": "knn", "when": "end", "source": "class_folder", "splits": ("val",),
    "path": c.data.get_ref("sets") + "/imagenet/{split}", "label": "class",
    "train_split": "train", "ks": (10, 20), "temperature": 0.07,
  })  # fmt: skip


def imagenet_probes(c):
  """ImageNet probes: the paper's linear one, a swept one, few-shot, MLP, attentive.

  The paper's: no bias, standardised CLS, AdamW, learning rate 0.1, 50 epochs; its batch size and
  schedule are not told.
  """
  where = {
    "when": "end", "source": "class_folder", "splits": ("val",), "label": "class",
    "path": c.data.get_ref("sets") + "/imagenet/{split}", "train_split": "train",
    "select_split": "",
  }  # fmt: skip
  sweep = {"l2": (1e-6, 1e-5, 1e-4, 1e-3), "features": ("cls", "pooled", "both")}
  c.evals.imagenet_logistic = ConfigDict(
    {"evaluation": "probe", **where, **sweep, "shots": (1, 5, 10), "draws": 5}
  )
  head = {"evaluation": "head_probe", **where, "batch_size": 4096, "keep": 16.0, "seed": 0}
  c.evals.imagenet_linear = ConfigDict({
    **head, "head": "linear", "features": ("cls",), "epochs": 50, "lrs": (0.1,),
    "weight_decay": 0.0,
  })  # fmt: skip
  c.evals.imagenet_mlp = ConfigDict({
    **head, "head": "mlp:2048", "features": ("cls", "pooled"), "epochs": 50,
    "lrs": (3e-4, 1e-3, 3e-3), "weight_decay": 0.05,
  })  # fmt: skip
  c.evals.imagenet_attentive = ConfigDict({
    **head, "head": "attentive:12", "features": (), "epochs": 20, "batch_size": 1024,
    "lrs": (1e-4, 3e-4, 1e-3), "weight_decay": 0.05,
  })  # fmt: skip


def pets(c):
  """Oxford-IIIT Pets zero-shot, the images sorted into a folder per breed."""
  c.evals.pets = ConfigDict({
    "evaluation": "zeroshot", "when": "end", "source": "class_folder", "splits": ("test",),
    "path": c.data.get_ref("sets") + "/pets/{split}", "label": "class", "classes": "",
    "templates": ("a photo of a {}, a type of pet.",),
  })  # fmt: skip


def coco(c):
  """COCO retrieval on Karpathy's test split: all 5000 images, and five folds of 1000."""
  for name, folds in (("coco_5k", 0), ("coco_1k", 5)):
    c.evals[name] = _retrieval(c, "/coco/dataset_coco.json", folds)


def flickr30k(c):
  """Flickr30k retrieval on Karpathy's test split of 1000 images."""
  c.evals.flickr30k = _retrieval(c, "/flickr30k/dataset_flickr30k.json", 0)


def _retrieval(c, path, folds):
  return ConfigDict({
    "evaluation": "retrieval", "when": "end", "source": "coco_captions", "splits": ("test",),
    "path": c.data.get_ref("sets") + path, "ranks": (1, 5, 10), "folds": folds,
  })  # fmt: skip


def imagenet9(c):
  """ImageNet-9: a linear probe trained on Original, and what other backgrounds cost it."""
  root = c.data.get_ref("sets")
  c.evals.imagenet9 = ConfigDict({
    "evaluation": "robustness", "when": "end", "source": "class_folder", "label": "class",
    "path": root + "/bg_challenge/{split}/val", "splits": ("original", "mixed_same", "mixed_rand"),
    "train_path": root + "/in9l/{split}", "train_split": "train",
    "l2": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "templates": ("a photo of a {}.",), "classes": "",
  })  # fmt: skip


def _dense(c, source, folder, splits, train_split):
  return {
    "when": "end", "source": source, "path": c.data.get_ref("sets") + folder, "splits": splits,
    "train_split": train_split, "size": 448, "mode": "resize", "stride": 0, "side": 112,
    "epochs": 10, "batch_size": 16, "lrs": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": 1e-3,
    "keep": 16.0, "seed": 0,
  }  # fmt: skip


def ade20k(c):
  """ADE20K: 150 classes by a linear layer on patch tokens."""
  c.evals.ade20k = ConfigDict({
    "evaluation": "segmentation", "num_classes": 150, "class_names": (),
    **_dense(c, "ade20k", "/ADEChallengeData2016", ("validation",), "training"),
  })  # fmt: skip


def coco_stuff(c):
  """COCO-Stuff: 171 classes by a linear layer on patch tokens."""
  c.evals.coco_stuff = ConfigDict({
    "evaluation": "segmentation", "num_classes": 171, "class_names": (),
    **_dense(c, "coco_stuff", "/coco_stuff", ("val2017",), "train2017"),
  })  # fmt: skip


def voc(c):
  """PASCAL VOC 2012: 21 classes by a linear layer on patch tokens, and by clusters of them."""
  keys = _dense(c, "voc", "/VOCdevkit/VOC2012", ("val",), "train")
  keys |= {"num_classes": 21, "class_names": ()}
  c.evals.voc = ConfigDict({"evaluation": "segmentation", **keys})
  for key in ("side", "epochs", "batch_size", "lrs", "weight_decay", "keep"):
    del keys[key]
  c.evals.voc_clusters = ConfigDict(
    {"evaluation": "clusters", **keys, "components": 64, "sample": 32}
  )


def nyuv2(c):
  """NYUv2: metric depth by a linear layer on patch tokens."""
  c.evals.nyuv2 = ConfigDict({
    "evaluation": "depth", "min_depth": 0.001, "max_depth": 10.0, "scale": "metric",
    **_dense(c, "nyuv2", "/nyuv2", ("test",), "train"),
  })  # fmt: skip


def gqa(c):
  """GQA's balanced questions: exact match on testdev, the bridge trained on train."""
  c.evals.gqa = _vlm(c, "gqa", "/gqa", ("testdev",), "train", "exact")


def vqav2(c):
  """VQAv2: VQA accuracy on val, the bridge trained on train."""
  c.evals.vqav2 = _vlm(c, "vqav2", "/vqav2", ("val",), "train", "vqa")


def pope(c):
  """POPE: are objects there that are not. It has no train split: the bridge learns on VQAv2's."""
  splits = ("random", "popular", "adversarial")
  c.evals.pope = _vlm(c, "pope", "/pope", splits, "train", "pope")
  c.evals.pope.train_source = "vqav2"
  c.evals.pope.train_path = c.data.get_ref("sets") + "/vqav2"


def _vlm(c, source, folder, splits, train_split, score):
  root = c.data.get_ref("sets")
  return ConfigDict({
    "evaluation": "vlm", "when": "end", "source": source, "path": root + folder, "splits": splits,
    "train_source": "", "train_path": "", "train_split": train_split, "score": score,
    # A Hugging Face folder of the Llama, Qwen2 or GPT-2 family.
    "language": root + "/language",
    "template": "{image}\nQuestion: {question}\nAnswer in a word or a short phrase:",
    "questions": 0, "pool": 1, "hidden": 2048, "answer_tokens": 8, "steps": 10_000,
    "batch_size": 64, "lr": 1e-3, "warmup": 300, "weight_decay": 0.0, "keep": 16.0,
    "dtype": "bfloat16", "seed": 0,
  })  # fmt: skip


def shapes_vlm(c):
  """Questions of the shapes set, by a small language model trained on their scenes in words."""
  c.evals.shapes_vlm = ConfigDict({
    "evaluation": "vlm", "when": "end", "source": "shapes_questions", "path": "side=64,size=1000",
    "splits": ("iid", "pairs", "counts", "relations"), "train_source": "",
    "train_path": "side=64,size=20000", "train_split": "train", "score": "exact", "language": "",
    "template": "image : {image} question : {question} answer :", "questions": 10_000, "pool": 2,
    "hidden": 256, "answer_tokens": 2, "steps": 1000, "batch_size": 64, "lr": 2e-3, "warmup": 50,
    "weight_decay": 0.01, "keep": 4.0, "dtype": "float32", "seed": 0,
  })  # fmt: skip


PROTOCOLS = {
  f.__name__: f
  for f in (
    imagenet, imagenet_knn, imagenet_probes, pets, coco, flickr30k, imagenet9, ade20k, coco_stuff,
    voc, nyuv2, gqa, vqav2, pope, shapes_vlm,
  )
}  # fmt: skip
