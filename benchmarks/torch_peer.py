"""The method's train step in PyTorch, as its users write it today: what ours is timed against.

timm's ViT, transformers' GPT2Model, heads and losses of the releases, AdamW, clipping. An honest
best effort: flash attention where it applies (captions need no mask: the readout is at EOT, and
attention is causal), fused AdamW; on a GPU bfloat16 autocast, TF32 for the rest and torch.compile.
"""

import os
import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"


def make_step(c, *, compiled):
  """Returns place(batch) -> rows and step(rows) -> loss, one optimizer step of the config `c`.

  place puts a batch of NumPy arrays on the device.

  Args:
    c: a config as of configs/base.py with objective levljepa.
    compiled: torch.compile for the model with its losses.

  Raises:
    ImportError: PyTorch, timm or transformers are missing (requirements-torch.txt).
  """
  sys.path.insert(0, str(TESTS))  # the model that the tests compare ours with
  import torch
  import torch_reference as reference

  from jepa_vl.model.two_tower import SIZES

  width, depth, heads = SIZES[c.model.size]
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.set_num_threads(torch.get_num_threads() if device.type == "cuda" else cores())
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  model = reference.Model(
    width=width, depth=depth, heads=heads, image_size=c.model.image_size,
    patch_size=c.model.patch_size, vocab_size=50257, length=c.text.length, readout="eot",
    embed_dim=c.model.embed_dim, hidden_dim=c.model.hidden_dim,
    predictor_depth=c.model.predictor_depth, predict_from="views", scalars={},
  ).to(device)  # fmt: skip
  model.train()
  statistics = [torch.tensor(x, device=device) for x in (reference.CLIP_MEAN, reference.CLIP_STD)]

  def losses(images, text, readout):
    mean, std = statistics
    images = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    cls = model.image.encoder.forward_features(images)[:, 0]
    hidden = model.text.encoder(input_ids=text, use_cache=False).last_hidden_state
    z_img = model.image.pre_proj(cls)
    z_txt = model.text.pre_proj(hidden[torch.arange(len(text), device=device), readout])
    p_img, p_txt = model.image.projector(z_img), model.text.projector(z_txt)
    align = ((p_img - z_txt.detach()) ** 2).mean() + ((p_txt - z_img.detach()) ** 2).mean()
    o = c.objective
    shape = dict(
      slices=o.num_slices, knots=o.knots, t_max=o.t_max, group=o.group_size, rows=o.scale_rows
    )
    spread = o.lambda_img * sigreg(z_img, **shape) + o.lambda_txt * sigreg(z_txt, **shape)
    return (1 - o.lambda_img - o.lambda_txt) * align / 2 + spread

  forward = torch.compile(losses) if compiled else losses
  trained = [p for p in model.parameters() if p.requires_grad]
  adamw = torch.optim.AdamW(
    trained, lr=1e-4, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps,
    weight_decay=c.optim.weight_decay, fused=True,
  )  # fmt: skip

  def place(batch):
    put = lambda x: torch.from_numpy(x).to(device)
    return put(batch["image"]), put(batch["text"]).long(), put(batch["mask"].sum(axis=1) - 1)

  def step(rows):
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
      loss = forward(*rows)
    adamw.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, c.optim.clip)
    adamw.step()
    return loss.detach()

  return place, step


def sigreg(z, *, slices, knots, t_max, group, rows):
  """As the releases compute it: every cosine and sine, in one (g, M, T) array a group."""
  import torch

  A = torch.randn(z.shape[1], slices, device=z.device)
  A = A / A.norm(dim=0)
  t = torch.linspace(0, t_max, knots, device=z.device)
  phi = torch.exp(-(t**2) / 2)
  weight = torch.full_like(t, 2 * t_max / (knots - 1))
  weight[0] = weight[-1] = t_max / (knots - 1)
  x = (z.float() @ A).reshape(-1, group or len(z), slices)  # (G, g, M)
  xt = x[..., None] * t
  distance = (xt.cos().mean(1) - phi) ** 2 + xt.sin().mean(1) ** 2  # (G, M, T)
  return rows * (distance @ (weight * phi)).mean()


def cores():
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
