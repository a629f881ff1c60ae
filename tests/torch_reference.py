"""The method in plain PyTorch, written from its description and not from our code: slow, short.

Losses are sums over what the paper's formulas sum over, nothing is chunked or rewritten, and every
matrix that a formula names exists. Float32 or float64, as the arguments are.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch_modules import gpt2, pre_proj, projector, timm_vit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def sigreg(z, A, *, group_size=0, scale_rows, knots=17, t_max=3.0):
  """z (B, D) or (V, B, D), unit directions A (D, M): n times the Epps-Pulley distance.

  `group_size` rows share one empirical characteristic function (0: all B); groups, views and
  directions are averaged.
  """
  if z.ndim == 3:
    views = [sigreg(v, A, group_size=group_size, scale_rows=scale_rows, knots=knots, t_max=t_max)
             for v in z]  # fmt: skip
    return torch.stack(views).mean()
  dt = t_max / (knots - 1)
  t = dt * torch.arange(knots, dtype=z.dtype)
  phi = torch.exp(-(t**2) / 2)
  w = torch.full_like(t, 2 * dt)
  w[0] = w[-1] = dt
  statistics = []
  for rows in z.split(group_size or len(z)):
    x = rows @ A  # (g, M)
    ecf = torch.exp(1j * x[..., None] * t).mean(dim=0)  # (M, T)
    statistics.append(scale_rows * (w * phi * (ecf - phi).abs() ** 2).sum(dim=-1).mean())
  return torch.stack(statistics).mean()


def squared_error(prediction, target):
  return ((prediction - target) ** 2).mean()


def squared_distance(prediction, target):
  return ((prediction - target) ** 2).sum(dim=-1).mean()


def cosine_distance(prediction, target):
  return (2 - 2 * F.cosine_similarity(prediction, target, dim=-1)).mean()


ALIGN = {"mse": squared_error, "mse_sum": squared_distance, "cosine": cosine_distance}


def levljepa(out, A, *, align="mse", stop_gradient=True, **sigreg_args):
  """out: z and p of both modalities; A: directions of the image and of the text embeddings."""
  sg = torch.Tensor.detach if stop_gradient else lambda x: x
  distance = ALIGN[align]
  return {
    "align/img_to_txt": distance(out["p_img"], sg(out["z_txt"]).expand_as(out["p_img"])),
    "align/txt_to_img": distance(out["p_txt"], sg(out["z_img"])),
    "sigreg/img": sigreg(out["z_img"], A[0], **sigreg_args),
    "sigreg/txt": sigreg(out["z_txt"], A[1], **sigreg_args),
  }


def levljepa_plus(out, A, **args):
  """Also views (V, B, D); z_img is the mean over the global ones.

  p_img is the prediction of every view (V, B, D), each against the same text embedding, or of
  z_img (B, D).
  """
  shape = {k: args[k] for k in ("group_size", "scale_rows", "knots", "t_max") if k in args}
  terms = levljepa(out, A, **args)
  terms["sigreg/img"] = sigreg(out["views"], A[0], **shape)
  terms["multi"] = ((out["views"] - out["z_img"]) ** 2).mean()  # zbar has its gradient too
  return terms


def clip(out):
  """Each image tells its caption from the batch's others, and each caption its image."""
  img, txt = F.normalize(out["z_img"], dim=-1), F.normalize(out["z_txt"], dim=-1)
  logits = capped(out["log_scale"], math.log(100.0)).exp() * img @ txt.T  # (images, captions)
  own = torch.arange(len(img))
  return {
    "contrast/img_to_txt": F.cross_entropy(logits, own),
    "contrast/txt_to_img": F.cross_entropy(logits.T, own),
  }


def capped(x, limit):
  """min(x, limit), to be trained as CLIP's scale is, which its code puts back after every step.

  On the limit x has its plain gradient. Beyond it, where that code never is, it keeps the gradient
  of the limit as far as that leads back.
  """
  if x <= limit:
    return x
  held = x - (x - limit).detach()
  if held.requires_grad:
    held.register_hook(lambda gradient: gradient.clamp(min=0.0))
  return held


def siglip(out):
  """Every pair on its own: does this caption belong to this image?"""
  img, txt = F.normalize(out["z_img"], dim=-1), F.normalize(out["z_txt"], dim=-1)
  logits = out["log_scale"].exp() * img @ txt.T + out["bias"]
  y = 2 * torch.eye(len(img), dtype=logits.dtype) - 1
  return {"sigmoid": -F.logsigmoid(y * logits).sum() / len(img)}


def weights(name, lambda_img=0.0, lambda_txt=0.0, lambda_multi=0.0):
  """What the terms of objective `name` are multiplied by before they are added."""
  if name == "clip":
    return {"contrast/img_to_txt": 0.5, "contrast/txt_to_img": 0.5}
  if name == "siglip":
    return {"sigmoid": 1.0}
  lambda_multi = lambda_multi if name == "levljepa_plus" else 0.0
  cross = 1 - lambda_img - lambda_txt - lambda_multi
  return {
    "align/img_to_txt": cross / 2,
    "align/txt_to_img": cross / 2,
    "sigreg/img": lambda_img,
    "sigreg/txt": lambda_txt,
  } | ({"multi": lambda_multi} if name == "levljepa_plus" else {})


def objective(cfg, out, A):
  """(loss, terms) of the config's `objective` sub-tree, whose keys are the method's own."""
  if cfg["name"] == "clip":
    terms = clip(out)
  elif cfg["name"] == "siglip":
    terms = siglip(out)
  else:
    keys = ("align", "stop_gradient", "group_size", "scale_rows", "knots", "t_max")
    function = {"levljepa": levljepa, "levljepa_plus": levljepa_plus}[cfg["name"]]
    terms = function(out, A, **{k: cfg[k] for k in keys})
  lambdas = {k: cfg[k] for k in ("lambda_img", "lambda_txt", "lambda_multi") if k in cfg}
  weight = weights(cfg["name"], **lambdas)
  assert set(weight) == set(terms)
  return sum(weight[k] * terms[k] for k in terms), terms


def of_processes(cfg, out, A, processes):
  """(loss, terms) that data parallel training averages: each process has a part of the rows.

  A process sees nothing of the others' rows but through BatchNorm, which made `out` of all rows
  (SyncBatchNorm). The gradient of the mean loss is the mean of the processes' gradients.
  """
  split = {k: x.chunk(processes, dim=x.ndim - 2) if x.ndim else [x] * processes
           for k, x in out.items()}  # fmt: skip
  each = [objective({**cfg, "group_size": 0}, {k: x[i] for k, x in split.items()}, A)
          for i in range(processes)]  # fmt: skip
  mean = lambda values: sum(values) / processes
  terms = {k: mean([terms[k] for _, terms in each]) for k in each[0][1]}
  return mean([loss for loss, _ in each]), terms


class Branch(nn.Module):
  """One modality, its parts named as in the authors' files; `projector` is None in a baseline."""

  def __init__(self, encoder, width, hidden_dim, embed_dim, predictor_depth, seed):
    super().__init__()
    self.encoder = encoder
    self.pre_proj = pre_proj(width, hidden_dim, embed_dim, seed)
    self.projector = None
    if predictor_depth:
      self.projector = projector(embed_dim, hidden_dim, predictor_depth, seed + 1)
    for module in self.modules():
      layers = list(module.children()) if isinstance(module, nn.Sequential) else []
      for layer, following in zip(layers, layers[1:], strict=False):
        if isinstance(layer, nn.Linear) and isinstance(following, nn.BatchNorm1d):
          # Zero and out of training. BatchNorm takes out any constant, so the gradient of this bias
          # is exactly zero; what is computed for it is round-off, which Adam divides by its own
          # size: it would wander by up to lr a step, without effect. Ours does not exist.
          nn.init.zeros_(layer.bias).requires_grad_(False)


class Model(nn.Module):
  """Both towers, embedding heads, predictors and the baselines' learned scalars, random weights.

  A batch has `text` (B, L), `mask` (B, L) and `image` (B, S, S, 3), or `global` (B, Vg, S, S, 3)
  and `local` (B, Vl, s, s, 3); images are uint8, or floats that are normalised already.
  """

  def __init__(
    self, *, width, depth, heads, image_size, patch_size, vocab_size, length, readout, embed_dim,
    hidden_dim, predictor_depth, predict_from, scalars,
  ):  # fmt: skip
    super().__init__()
    self.readout, self.predict_from = readout, predict_from
    vit = timm_vit(
      "tiny", patch_size, image_size, 0, embed_dim=width, depth=depth, num_heads=heads
    )
    gpt = gpt2(width, depth, heads, 1, vocab_size=vocab_size, positions=length)
    self.image = Branch(vit, width, hidden_dim, embed_dim, predictor_depth, 2)
    self.text = Branch(gpt, width, hidden_dim, embed_dim, predictor_depth, 4)
    self.scalars = nn.ParameterDict({k: torch.tensor(float(x)) for k, x in scalars.items()})
    self.train()  # dropout is 0 everywhere; BatchNorm takes the batch's statistics

  def forward(self, batch):
    z_txt = self.text.pre_proj(self.read_text(batch["text"], batch["mask"]))
    out = {"z_txt": z_txt, **self.scalars}
    if "image" in batch:
      out["z_img"] = seen = self.image.pre_proj(self.cls(batch["image"]))
    else:
      out["views"], out["z_img"] = self.views(batch)
      seen = out["views"] if self.predict_from == "views" else out["z_img"]
    if self.image.projector:
      rows = seen.flatten(0, -2)  # one BatchNorm pass over all rows of all views
      out["p_img"] = self.image.projector(rows).reshape(seen.shape)
      out["p_txt"] = self.text.projector(z_txt)
    return out

  def views(self, batch):
    """Embeddings of all views (V, B, D), the global ones first, and the mean of the latter."""
    crops = [*batch["global"].unbind(1), *batch["local"].unbind(1)]
    rows = torch.cat([self.cls(crop) for crop in crops])
    views = self.image.pre_proj(rows).reshape(len(crops), len(crops[0]), -1)
    return views, views[: batch["global"].shape[1]].mean(dim=0)

  def cls(self, images):
    if images.dtype == torch.uint8:
      mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
      images = (images / 255 - mean) / std
    return self.image.encoder.forward_features(images.permute(0, 3, 1, 2))[:, 0]

  def read_text(self, text, mask):
    """The hidden state that stands for the caption; padded keys are masked."""
    hidden = self.text.encoder(
      input_ids=text, attention_mask=mask.long(), position_ids=torch.arange(text.shape[1])[None]
    ).last_hidden_state
    if self.readout == "last":
      return hidden[:, -1]
    return hidden[torch.arange(len(text)), mask.sum(dim=1) - 1]  # EOT: the last that is no padding


def learning_rate(cfg, steps):
  """step -> learning rate, from the config's `optim` sub-tree."""
  warmup = min(cfg["warmup"], steps // 2)
  start, end = warmup, steps
  if cfg["schedule"] == "wsd":  # the same cosine, later
    start = max(steps - round(cfg["decay"] * steps), warmup)

  def rate(step):
    if step < warmup:
      return cfg["lr"] * (cfg["warmup_from"] + (1 - cfg["warmup_from"]) * step / warmup)
    done = min(max(step - start, 0) / max(end - start, 1), 1)
    return cfg["lr"] * (cfg["final"] + (1 - cfg["final"]) * (1 + math.cos(math.pi * done)) / 2)

  return rate


def trainer(model, cfg, steps):
  """Returns update(loss): one AdamW step on the loss's gradient, clipped; gives its norm."""
  trained = [p for p in model.parameters() if p.requires_grad]
  groups = [  # a learned scalar does not decay: zero means nothing for it
    {"params": [p for p in trained if p.ndim], "weight_decay": cfg["weight_decay"]},
    {"params": [p for p in trained if not p.ndim], "weight_decay": 0.0},
  ]
  rate = learning_rate(cfg, steps)
  opt = torch.optim.AdamW(groups, lr=1.0, betas=(cfg["b1"], cfg["b2"]), eps=cfg["eps"])
  schedule = torch.optim.lr_scheduler.LambdaLR(opt, rate)

  def update(loss):
    opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained, cfg["clip"] or math.inf)
    opt.step()
    schedule.step()
    return norm

  return update
