"""Diagnostics are their definitions, log files hold each step once, rates are right."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_vl import metrics

B, D = 24, 6


@pytest.fixture
def out():
  rng = np.random.default_rng(0)
  return {k: rng.normal(size=(B, D)) + 0.5 for k in ("z_img", "z_txt", "p_img", "p_txt")}


def diagnose(out):
  found = metrics.diagnostics({k: jnp.asarray(v, jnp.float32) for k, v in out.items()})
  return {k: float(v) for k, v in found.items()}


def test_diagnostics_are_what_loops_say(out):
  cos = lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
  mean = lambda a, b, shift: np.mean([cos(out[a][i], out[b][(i - shift) % B]) for i in range(B)])

  def rank(z):
    s = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    return np.exp(-np.sum(s / s.sum() * np.log(s / s.sum())))

  logits = np.array([[cos(a, b) / 0.07 for b in out["z_txt"]] for a in out["z_img"]])
  positive, lse = np.mean(np.diag(logits)), np.mean(np.log(np.exp(logits).sum(axis=1)))
  expected = {
    "cos/matched": mean("z_img", "z_txt", 0),
    "cos/rolled": mean("z_img", "z_txt", 1),
    "cos/img_to_txt": mean("p_img", "z_txt", 0),
    "cos/img_to_txt_rolled": mean("p_img", "z_txt", 1),
    "cos/txt_to_img": mean("p_txt", "z_img", 0),
    "cos/txt_to_img_rolled": mean("p_txt", "z_img", 1),
    "rank/img": rank(out["z_img"]),
    "rank/txt": rank(out["z_txt"]),
    "logit/positive": positive,
    "logit/logsumexp": lse,
    "logit/gap": positive - lse,
  }
  found = diagnose(out)
  assert found.keys() == expected.keys()
  for k, v in expected.items():
    assert found[k] == pytest.approx(v, rel=1e-4, abs=1e-4), k


def test_diagnostics_of_equal_pairs(out):
  found = diagnose(out | {"z_txt": 3 * out["z_img"], "p_img": out["z_img"]})
  assert found["cos/matched"] == pytest.approx(1, abs=1e-5)
  assert found["cos/img_to_txt"] == pytest.approx(1, abs=1e-5)
  assert found["cos/rolled"] < 0.9
  assert found["logit/gap"] > diagnose(out)["logit/gap"]


def test_diagnostics_of_a_collapsed_batch_are_finite(out):
  found = diagnose({k: np.zeros((B, D)) for k in out})
  assert np.isfinite(list(found.values())).all()
  assert found["rank/img"] == found["rank/txt"] == 1


# As of a healthy run: predictions fit their own target and no other.
COSINES = {
  f"cos/{way}{rolled}": 0.0 if rolled else 0.6
  for way in ("img_to_txt", "txt_to_img")
  for rolled in ("", "_rolled")
}


def test_collapse_to_a_point_is_told_by_the_mismatched_targets():
  values = {"rank/img": 30.0, "rank/txt": 30.0, **COSINES, "cos/txt_to_img_rolled": 0.58}
  assert "the img embeddings" in metrics.collapse_warning(values, embed_dim=32, rows=128)


@pytest.mark.parametrize(
  ("img", "txt", "says"),
  [(60.0, 55.0, None), (2.0, 55.0, "the img embeddings"), (60.0, 1.0, "the txt embeddings")],
)
@pytest.mark.parametrize("rows", [64, 4096])
def test_collapse_warning(img, txt, says, rows):
  values = {"rank/img": img, "rank/txt": txt, **COSINES}
  warning = metrics.collapse_warning(values, embed_dim=64, rows=rows)
  assert (warning is None) if says is None else (says in warning and "of 64" in warning)


def test_collapse_warning_knows_that_few_rows_span_few_directions():
  values = {"rank/img": 6.0, "rank/txt": 6.0, **COSINES}
  assert metrics.collapse_warning(values, embed_dim=256, rows=8) is None
  assert metrics.collapse_warning(values, embed_dim=256, rows=256)


def test_collapse_warning_from_real_embeddings():
  """Healthy: an isotropic batch. Collapsed: all rows the same but for a little noise in one way."""
  rng = np.random.default_rng(0)
  healthy = dict.fromkeys(("z_img", "z_txt", "p_img", "p_txt"), rng.normal(size=(128, 32)))
  line = 1 + 1e-2 * rng.normal(size=(128, 1)) * np.ones(32)
  for z_txt, fires in ((healthy["z_txt"], False), (line, True)):
    warning = metrics.collapse_warning(diagnose(healthy | {"z_txt": z_txt}), 32, 128)
    assert bool(warning) == fires


# --- effective rank


def spectrum_rank(z):
  s = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
  p = s[s > 1e-9 * s[0]] / s.sum()
  return np.exp(-np.sum(p * np.log(p)))


def test_effective_rank_reads_the_dimensions_in_use():
  rng = np.random.default_rng(0)
  z = {"isotropic": rng.normal(size=(400, 32))}
  z["line"] = rng.normal(size=(400, 1)) @ rng.normal(size=(1, 32))
  z["decaying"] = z["isotropic"] * 0.7 ** np.arange(32) + 5
  z["few rows"] = z["isotropic"][:10]
  found = {k: float(metrics.effective_rank(jnp.asarray(v, jnp.float32))) for k, v in z.items()}
  assert found["isotropic"] > 31 and found["line"] < 1.1
  assert found["few rows"] == pytest.approx(9, abs=0.7)
  for k, v in z.items():
    assert found[k] == pytest.approx(spectrum_rank(v), rel=0.05), k
  constant = float(metrics.effective_rank(jnp.full((50, 32), 0.1)))
  assert 1 <= constant < 1.1


# --- files


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_resuming_cuts_the_lines_past_the_resumed_step(tmp_path):
  writer = metrics.Writer(str(tmp_path), resumed_step=0)
  for step in (10, 20, 30):
    writer.metrics(step, {"loss": 1 / step, "mfu": None})
    writer.evaluation(step, "rank", {"val/img": float(step)})
  writer.close()
  writer = metrics.Writer(str(tmp_path), resumed_step=20)
  writer.metrics(30, {"loss": 0.5, "mfu": None})
  writer.close()
  found = lines(tmp_path / "metrics.jsonl")
  assert found == [
    {"step": 10, "loss": 0.1, "mfu": None},
    {"step": 20, "loss": 0.05, "mfu": None},
    {"step": 30, "loss": 0.5, "mfu": None},
  ]
  assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == found
  assert lines(tmp_path / "evals.jsonl") == [
    {"step": step, "name": "rank", "metrics": {"val/img": float(step)}} for step in (10, 20)
  ]
  assert list((tmp_path / "tensorboard").iterdir())
  assert not list(tmp_path.glob("*.tmp"))


def test_a_half_written_line_costs_nothing_but_itself(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
  found = metrics.read_jsonl(path)
  assert [r["step"] for r in found] == [1, 2] and np.isnan(found[1]["loss"])
  writer = metrics.Writer(str(tmp_path), resumed_step=2)
  writer.metrics(3, {"loss": 1.0})
  writer.close()
  assert [r["step"] for r in lines(path)] == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": \x00\n{"step": 3}\n')
  with pytest.raises(ValueError, match="metrics.jsonl line 2 is no JSON .* delete that line"):
    metrics.read_jsonl(path)


def test_read_jsonl_of_no_file_is_empty(tmp_path):
  assert metrics.read_jsonl(tmp_path / "none.jsonl") == []


def test_a_wandb_run_is_that_of_its_workdir(tmp_path, monkeypatch):
  """Resumed with its id; another workdir of the same name starts its own."""
  asked = []

  def init(*, id, **_):
    asked.append(id)
    return types.SimpleNamespace(id=id or f"run{len(asked)}", log=print, finish=lambda: None)

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  for folder in ("a", "a", "b"):
    (tmp_path / folder / "tiny").mkdir(parents=True, exist_ok=True)
    writer = metrics.Writer(str(tmp_path / folder / "tiny"), resumed_step=0, wandb="project")
    writer.close()
  assert asked == [None, "run1", None]


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  writer = metrics.Writer(str(tmp_path), resumed_step=0)
  writer.metrics(1, {"loss": 1.0})
  writer.evaluation(1, "rank", {"val/img": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


# --- rates


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until its `now` is moved."""
  clock = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
  return clock


def device(kind):
  return types.SimpleNamespace(device_kind=kind)


def test_meter_counts_from_one_read_to_the_next(clock):
  meter = metrics.Meter(32, lambda step: 1e9, [device("cpu")])
  for number, waited in enumerate((0.5, 0.0, 1.5, 0.0)):
    clock.now += 2
    meter.step(number, waited)
  clock.now += 4  # an evaluation
  meter.pause(4)
  assert meter.read() == {
    "examples_per_s": 4 * 32 / 8, "step_time": 2.0, "mfu": None, "data_wait": 0.25
  }  # fmt: skip
  clock.now += 1
  meter.step(4, 3.0)
  assert meter.read() == {
    "examples_per_s": 32.0, "step_time": 1.0, "mfu": None, "data_wait": 1.0
  }  # fmt: skip


def test_mfu_is_the_share_of_all_devices_peak(clock):
  """Of what each step computes: the first two have smaller images."""
  flops = lambda step: 40e9 if step < 2 else 145e9
  meter = metrics.Meter(1000, flops, [device("TPU v4")] * 4)
  for first, of_three in ((1, 40e9 + 2 * 145e9), (4, 3 * 145e9)):
    for number in range(first, first + 3):
      clock.now += 0.5
      meter.step(number, 0.0)
    assert meter.read()["mfu"] == pytest.approx(1000 * of_three / 1.5 / (4 * 275e12))


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("cpu", None),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 2307e12 / 2),  # two devices per chip
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
  ],
)
def test_peak_by_device_kind(kind, peak):
  assert metrics.peak_flops(device(kind)) == peak
