"""--mode=compile: the report on a real compilation, and whether the recipe fits known chips."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_main import run as run_main

from jepa_vl import aot, chips, state
from jepa_vl.aot import sweep, topologies
from jepa_vl.build import build

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = 2**30
V5E = chips.find("TPU v5 lite")


@pytest.fixture
def eight(monkeypatch):
  """`cpu`: this machine's eight virtual devices as two slices of v5e, so that all of it runs."""
  topology = topologies.Topology("cpu", jax.devices(), V5E, [0] * 4 + [1] * 4)
  monkeypatch.setattr(topologies, "get", lambda name: topology)
  return topology


def test_the_report_of_a_step(config, eight, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(aot, "prepare", lambda: None)
  config.mesh.data, config.log_every, config.text.tokenizer = -1, 50, ""
  assert aot.report(config, "cpu", str(tmp_path / "new"), "tiny") == 0
  text = capsys.readouterr().out
  (path,) = (tmp_path / "new").iterdir()
  found = json.loads(path.read_text())
  assert path.name == "tiny-cpu.json" and found["fits"]

  run = build(config, devices=jax.devices())
  gradients = 4 * state.count(run.abstract_state.params)
  reduced = sum(c["bytes"] for c in found["collectives"] if c["kind"] == "all-reduce")
  assert gradients <= reduced < 1.2 * gradients  # data parallel: every gradient once

  terms = found["roofline"]
  assert terms["compute"]["work"] == pytest.approx(run.flops * config.batch_size / 8)
  assert terms["compute"]["seconds"] == pytest.approx(terms["compute"]["work"] / V5E.flops)
  # of two slices of four: half of a shard's all-reduce crosses, in both directions
  assert terms["network"]["work"] == pytest.approx(reduced / 4, rel=0.01)
  assert found["step_s"] == max(t["seconds"] for t in terms.values())
  assert found["examples_per_s"] == config.batch_size / found["step_s"]
  assert found["chip_hours"] == pytest.approx(config.steps * found["step_s"] / 3600 * 8)
  hbm = found["hbm"]
  assert hbm["used"] == sum(v for k, v in hbm.items() if k not in ("used", "limit"))
  assert hbm["batch"] == 16 // 8 * (16 * 16 * 3 + 12 * 5) + 4  # and the step's number
  for words in ("50257 tokens", "fits: ", "to spare", V5E.source, "all-reduce", "chip-hours"):
    assert words in text


@pytest.mark.parametrize(("kind", "given", "domains", "sent"), [
  ("all-reduce", 8, [[0, 0, 0, 0]], (12, 0)),
  ("all-reduce", 8, [[0, 0, 1, 1]], (8, 4)),
  ("all-gather", 2, [[0, 0, 0, 0]], (6, 0)),
  ("all-gather", 2, [[0, 0, 1, 1]], (4, 2)),
  ("reduce-scatter", 8, [[0, 0, 0, 0]], (6, 0)),
  ("all-to-all", 8, [[0, 0, 1, 1]], (2, 4)),
  ("collective-permute", 8, [[0, 0]], (8, 0)),
  ("all-reduce", 8, [[0]], (0, 0)),
  ("send", 8, [[0, 0, 1, 1]], (0, 8)),
])  # fmt: skip
def test_what_a_device_sends(kind, given, domains, sent):
  assert aot.sent(kind, given, np.array(domains)) == sent


@pytest.mark.parametrize(("message", "used", "limit"), [
  ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.46G of 15.75G hbm. Exceeded",
   23.46, 15.75),
  ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
   "(32.00G) exceeds available HBM (15.75G).", 32, 15.75),
  ("RESOURCE_EXHAUSTED: something new", None, 16),
])  # fmt: skip
def test_what_is_too_big_is_told_with_its_figures(message, used, limit, eight):
  hbm = aot._refused(message, eight)
  assert hbm["used"] == (used and int(used * GIB)) and hbm["limit"] == int(limit * GIB)
  found = {"hbm": hbm, "fits": False, "device_kind": V5E.kind}
  lines = "\n".join(aot._fit_words(found, lambda b: f"{b / GIB:.2f} GiB"))
  assert "does not fit" in lines and "--sweep" in lines
  assert (f"{used:.2f} GiB of 15.75 GiB per device" if used else "something new") in lines


def test_a_sweep_recommends_the_shortest_step_that_fits():
  row = lambda fits, step, used: {"fits": fits, "step_s": step, "hbm": {"used": used}}
  rows = [row(False, 1.0, 9), row(True, 2.0, 5), row(True, 2.01, 3), row(True, 3.0, 1)]
  assert sweep.cheapest(rows) is rows[2]  # within a per cent, the one with more room
  assert sweep.cheapest(rows[:1]) is None


def test_a_sweep_tries_each_mesh_remat_and_layout_once():
  found = [tuple(c.values()) for c in sweep.candidates(16)]
  assert len(set(found)) == len(found) == 4 * 4 * 2
  assert {c[1:3] for c in found} == {(1, 1), (8, 1), (16, 1), (1, 2)}
  assert len(sweep.candidates(1)) == 8


@pytest.mark.parametrize(("flags", "code", "words"), [
  (["--mode=compile"], 2, "--mode=compile and --topology=NAME, as v5e:16x16, go together"),
  (["--topology=v5e-16"], 2, "go together"),
  (["--mode=compile", "--topology=v9-16"], 1, "names look like v5e:16x16"),
])  # fmt: skip
def test_on_the_command_line(flags, code, words):
  found, output = run_main(*flags)
  assert found == code and words in output and "Traceback" not in output


# ViT-B, batch 4096, remat chosen by the rule: (remat, GiB per device) with jax 0.10.2. The
# compiler's plans change with its version: where a figure moves by more than the tolerance, see
# that the step still fits with room and record the new one.
RECIPE = {
  "v5e-16": ("full", 7.97),
  "v5e-256": ("none", 4.54),
  "v6e-64": ("none", 10.54),
  "v5p-64": ("none", 16.74),
  "h100:8": ("none", 41.27),
}


def needs(topology):
  modules = ["jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"] if "h100" in topology else ["libtpu"]
  for module in modules:
    try:
      missing = importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
      missing = True
    if missing:
      pytest.skip(f"the compiler for {topology} is not installed ({module}); launch/test_slow.sh")


@pytest.mark.slow
@pytest.mark.parametrize("topology", RECIPE)
def test_the_recipe_fits(topology, tmp_path):
  needs(topology)
  remat, used = RECIPE[topology]
  env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  done = subprocess.run(
    [sys.executable, "-m", "jepa_vl.main", "--mode=compile", "--config=configs/vit_b.py",
     f"--topology={topology}", f"--workdir={tmp_path}", "--config.model.remat=auto"],
    cwd=ROOT, env=env, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(next(tmp_path.iterdir()).read_text())
  print(topology, found["hbm"]["used"] / GIB, found["compile_s"], found["host_memory"] / GIB)
  assert found["fits"] and found["remat"] == remat
  assert found["hbm"]["used"] / GIB == pytest.approx(used, rel=0.1)
  assert found["estimate"]["total"] == pytest.approx(found["hbm"]["used"], rel=0.25)
  reduced = sum(c["bytes"] for c in found["collectives"] if c["kind"] == "all-reduce")
  assert 2 * 212e6 < reduced < 4.4 * 212e6  # gradients of 212M parameters, in bf16 or float32
  assert found["host_memory"] < 9 * GIB


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_ends_with_1(tmp_path):
  needs("v5e-4")
  env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  done = subprocess.run(
    [sys.executable, "-m", "jepa_vl.main", "--mode=compile", "--config=configs/vit_s.py",
     "--topology=v5e-1", f"--workdir={tmp_path}"],
    cwd=ROOT, env=env, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 1 and "does not fit: " in done.stdout, done.stdout + done.stderr
  assert "--sweep tries them" in done.stdout
