"""What a user meets on the command line: errors in words, exit codes, stopping and going on."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
import types

import processes
import pytest
from records import write

from jepa_vl import main, memory, metrics, train
from jepa_vl.build import build
from jepa_vl.data import bench, embedded

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Seconds instead of minutes: the smallest model that still has every part.
SMALL = [
  "--config=configs/tiny.py", "--config.model.image_size=16", "--config.model.patch_size=8",
  "--config.model.scan=True",
  "--config.model.embed_dim=16", "--config.model.hidden_dim=32", "--config.text.length=12",
  "--config.batch_size=16", "--config.objective.num_slices=64", "--config.optim.warmup=5",
]  # fmt: skip


def start(*flags, small=True):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  return subprocess.Popen(
    [sys.executable, "-m", "jepa_vl.main", *(SMALL if small else []), *flags],
    cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def run(*flags, small=True):
  """(exit code, everything printed)."""
  process = start(*flags, small=small)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def losses(workdir):
  logged = metrics.read_jsonl(workdir / "metrics.jsonl")
  return {r["step"]: (r["loss"], r["grad_norm"]) for r in logged}


NO_EVALS = ["--config.evals={}"]


@pytest.mark.parametrize("flags, code, words", [
  (["--config.model.sise=base"], 2, ["sise", "size"]),
  (["--config.steps=many"], 2, ["steps", "many"]),
  (["--mode=fly"], 2, ["mode", "train"]),
  (["--config=configs/none.py"], 2, ["configs/none.py"]),
  (["--config=configs/tiny.py:clop"], 2, ["no preset 'clop'", "plus, clip, siglip"]),
  (["--mode=export"], 2, ["--mode=export needs --checkpoint"]),
  (["--mode=export", "--checkpoint=/none"], 1, ["/none"]),
  (["--config.init_from=/none.safetensors"], 1, ["/none.safetensors"]),
  (["--config.data.augment=dino"], 1, ["'levljepa'", "'dino'", "configs/vit_b_plus.py"]),
  (["--config.batch_size=30", "--config.accumulate=4"], 1, ["batch_size=30", "accumulate=4"]),
  (["--config.objective.group_size=6"], 1, ["objective.group_size=6", "16 rows"]),
  (["--config.model.patch_size=7"], 1, ["model.patch_size=7", "model.image_size=16", "14"]),
  (["--config.model.size=giant"], 1, ["model.size", "giant", "base"]),
  (["--config.mesh.data=3"], 1, ["mesh.data=3", "1 devices"]),
  (["--config.data.source=array_record"], 1, ["data.path", "configs/tiny.py"]),
  (["--config.data.source=array_record", "--config.data.path=/none/*.array_record"], 1,
   ["/none/*.array_record", "matches no file"]),
  (["--config.data.source=tar"], 1, ["data.source", "emoji"]),
  (["--config.text.tokenizer=/none.model"], 1, ["text.tokenizer", "/none.model"]),
  (["--config.text.readout=mean"], 1, ["text.readout", "eot", "last"]),
  (["--config.optim.schedule=step"], 1, ["optim.schedule", "cosine", "wsd"]),
  (["--config.objective.name=magic"], 1, ["objective.name", "levljepa"]),
  (["--workdir=gs://bucket/run"], 1, ["gs://bucket/run", "pip install gcsfs"]),
])  # fmt: skip
def test_bad_input_is_named_without_a_traceback(tmp_path, flags, code, words):
  status, output = run(f"--workdir={tmp_path / 'run'}", *flags)
  assert status == code, output
  assert all(word in output for word in words), output
  assert "Traceback" not in output


def test_a_misspelt_key_is_said_on_lines_of_its_own():
  """The library's sentence, without the quotes and escapes of an exception within another."""
  _, output = run("--config.objective.lamda_img=0")
  assert "usage error: 'lamda_img'\nDid you mean \"lambda_img\"" in output


@pytest.mark.parametrize("text", [None, "import nothing_of_this_name", "x = ("])
def test_a_config_that_cannot_be_loaded_is_wrong_usage(tmp_path, text):
  path = tmp_path / "mine.py"
  if text:
    path.write_text(text)
  status, output = run(f"--config={path}", small=False)
  assert status == 2 and "Traceback" not in output, output
  assert (text or str(path)).split()[-1][:7] in output


def test_debug_shows_the_traceback(tmp_path):
  status, output = run(f"--workdir={tmp_path}", "--config.model.patch_size=7", "--debug")
  assert status == 1 and "Traceback" in output


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  status, output = run(f"--workdir={tmp_path / 'file' / 'run'}")
  assert status == 1 and "--workdir" in output and "Traceback" not in output


def test_a_missing_config_is_wrong_usage():
  status, output = run(small=False)
  assert status == 2 and "--config" in output


def test_the_canonical_config_without_data_says_what_to_do(tmp_path):
  status, output = run("--config=configs/vit_b.py", f"--workdir={tmp_path}", small=False)
  assert status == 1 and "Traceback" not in output
  assert "data.path" in output and "README" in output and "configs/tiny.py" in output


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_saving_and_resumed_equals_straight(tmp_path, kills):
  """kill -9 at random moments of saves, then a full disk: all losses to the last bit."""
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),  # the same programs, started often
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  steps = 6 * kills + 14
  program = ["-m", "jepa_vl.main", *SMALL, *NO_EVALS, f"--config.steps={steps}"]
  program += ["--config.log_every=1", "--config.checkpoint_every=2", "--config.keep_checkpoints=1"]
  straight, workdir = tmp_path / "straight", tmp_path / "killed"
  (result,) = processes.run(1, [*program, f"--workdir={straight}"], env=cache)
  assert result.code == 0, result.output

  (workdir / "checkpoints").mkdir(parents=True)
  unfinished = lambda: [p.name for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]
  saving = lambda step: any(int(name.split(".")[0]) >= step for name in unfinished())
  whole = lambda: [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  rng, torn = random.Random(0), 0
  for fault in [*["kill"] * kills, "full", ""]:
    newest = max(whole(), default=0)
    with processes.start(1, [*program, f"--workdir={workdir}"], env=cache) as (process,):
      if fault:
        process.wait_until(lambda p=process: "step " in p.output)  # older leftovers are gone
      if fault == "kill":
        target = newest + rng.choice((2, 4, 6))
        process.wait_until(lambda step=target: saving(step))
        time.sleep(rng.uniform(0.0, 0.2) if newest else 0.0)
        process.signal("SIGKILL")
      elif fault:  # refused to write, as by a full disk; the log's lines fit
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
      result = process.wait(200)
    assert result.code == {"kill": -9, "full": 1, "": 0}[fault], result.output
    assert ("resuming from" in result.output) == (newest > 0)
    assert f"checkpoints/{newest}\n" in result.output or not newest, result.output
    assert "damaged" not in result.output and "cannot be read" not in result.output
    torn += fault == "kill" and bool(unfinished())
    if fault == "full":
      assert "could not be saved" in result.output and "Make room" in result.output
      assert f"The last good one is {workdir}/checkpoints/{max(whole())}" in result.output
  print(f"{torn} of {kills} saves were cut short")
  assert torn
  assert sorted(losses(straight)) == list(range(1, steps + 1))
  assert losses(workdir) == losses(straight)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_stop_signal_saves_and_asks_to_be_started_again(tmp_path, name):
  flags = [f"--workdir={tmp_path}", *NO_EVALS, "--config.steps=100000", "--config.log_every=1"]
  process = start(*flags)
  deadline = time.time() + 200
  while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 3:
    assert process.poll() is None and time.time() < deadline, process.communicate()[0]
    time.sleep(0.1)
  process.send_signal(signal.Signals[name])
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 75, output
  saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
  assert saved and name in output and str(max(saved)) in output
  status, output = run(*flags[:2], f"--config.steps={max(saved) + 1}", "--config.log_every=1")
  assert status == 0 and f"checkpoints/{max(saved)}" in output, output
  assert max(losses(tmp_path)) == max(saved) + 1


def test_a_stop_where_nothing_can_be_saved_asks_to_be_started_again_too(monkeypatch, capsys):
  def stopped(watch):
    raise train.Stopped("stopped by SIGTERM")

  monkeypatch.setattr(main, "_run", stopped)
  monkeypatch.setattr(main, "_MODE", types.SimpleNamespace(value="bench"))
  for name in ("_check_config", "_start_logging"):
    monkeypatch.setattr(main, name, lambda: None)
  with pytest.raises(SystemExit) as e:
    main.main([""])
  assert e.value.code == train.PREEMPTED and capsys.readouterr().err == "stopped by SIGTERM\n"


def test_the_bench_of_the_data_is_not_refused_for_a_step_that_does_not_fit(config, monkeypatch):
  config.mesh.data = -1
  monkeypatch.setattr(memory, "limit", lambda device: 1)
  monkeypatch.setattr(bench, "report", lambda run: run.model.remat)
  monkeypatch.setattr(main, "_MODE", types.SimpleNamespace(value="bench"))
  monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=config))
  with pytest.raises(ValueError, match="nothing fits"):
    build(config.copy_and_resolve_references())
  assert main._run(None) == "none"


@pytest.mark.slow
def test_another_architecture_or_data_set_is_refused(tmp_path):
  assert run(f"--workdir={tmp_path}", *NO_EVALS, "--config.steps=1")[0] == 0
  status, output = run(
    f"--workdir={tmp_path}", *NO_EVALS, "--config.steps=2", "--config.model.embed_dim=8",
    "--config.data.split=val",
  )  # fmt: skip
  assert status == 1 and "Traceback" not in output
  assert "model.embed_dim: 16 there, 8 here" in output and "data identity" in output
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path):
  flags = [*NO_EVALS, "--config.checkpoint_every=5", "--config.steps=40"]
  assert run(f"--workdir={tmp_path}", *flags, "--config.steps=5")[0] == 0
  status, output = run(
    f"--workdir={tmp_path}", *flags, "--config.optim.lr=1e30", "--config.optim.clip=0.0",
    "--config.checkpoint_every=1",
  )  # fmt: skip
  assert status == 1 and "Traceback" not in output, output
  assert "not finite" in output and "checkpoints/5" in output and "optim.lr" in output
  saved = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
  assert saved == {"5"}


def write_pairs(path):
  """40 pairs in one ArrayRecord file: record 7 is no image, record 21 no record, 3 is long."""
  keep = lambda r: {k: r[k] for k in ("image", "caption")}
  pairs = [keep(r) for r in embedded.read_records("val")[:40]]
  pairs[3]["caption"] = "word " * 50
  pairs[7]["image"] = b"no image"
  pairs[21] = b"garbage"
  write(path, pairs)


def test_own_data_with_damaged_records(tmp_path):
  """Replaced, counted and said; too many of them end the run in words."""
  write_pairs(tmp_path / "pairs.array_record")
  flags = [*NO_EVALS, "--config.data.source=array_record", "--config.log_every=1"]
  flags += [f"--config.data.path={tmp_path}/*.array_record", "--config.steps=40"]
  allow = "--config.data.max_bad_fraction=0.2"
  status, output = run(f"--workdir={tmp_path / 'a'}", *flags, "--config.steps=3", allow)
  assert status == 0, output
  assert "record 7 cannot be used" in output and "record 21 cannot be used" in output
  assert "8 bytes of an unknown format" in output  # the reason
  logged = metrics.read_jsonl(tmp_path / "a" / "metrics.jsonl")
  assert len(logged) == 3 and all(r["examples_per_s"] > 0 for r in logged)
  assert (tmp_path / "a" / "report.html").exists()  # without evaluations too
  assert logged[-1]["data/bad_records"] >= 2 and logged[-1]["data/truncated_captions"] >= 1
  status, output = run(f"--workdir={tmp_path / 'b'}", *flags)
  assert status == 1 and "data.max_bad_fraction=0.01" in output and "Traceback" not in output


@pytest.mark.parametrize("size", [0, 1000])
def test_an_empty_or_truncated_file_is_named(tmp_path, size):
  path = tmp_path / "pairs.array_record"
  write_pairs(path)
  os.truncate(path, size)
  flags = ["--config.data.source=array_record", f"--config.data.path={path}"]
  status, output = run(f"--workdir={tmp_path / 'run'}", *flags)
  assert status == 1 and str(path) in output and "Traceback" not in output


def test_export_needs_no_config_and_a_run_starts_from_it(tmp_path):
  first, exported = tmp_path / "run", tmp_path / "exported"
  assert run(f"--workdir={first}", "--config.steps=2", *NO_EVALS)[0] == 0
  flags = ["--mode=export", f"--checkpoint={first}/checkpoints/2", f"--workdir={exported}"]
  status, output = run(*flags, small=False)
  assert status == 0 and f"to {exported}" in output, output
  assert (exported / "README.md").exists() and (exported / "tokenizer.model").exists()
  flags = [f"--workdir={tmp_path / 'next'}", f"--config.init_from={exported}", "--config.steps=1"]
  status, output = run(*flags, *NO_EVALS)
  assert status == 0 and "weights: image, image_head," in output, output


def test_a_config_with_a_preset_has_a_folder_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(main.flags, "FLAGS", {"config": None})
  name = lambda path: monkeypatch.setattr(
    main.config_flags, "get_config_filename", lambda _: path
  ) or main._default_workdir()
  assert name("configs/tiny.py") == "runs/tiny" == name("configs/tiny.py:")
  assert name("configs/tiny.py:clip") == "runs/tiny-clip"
  assert name("configs/vit_b.py:release1,plus") == "runs/vit_b-release1-plus"


def test_the_whole_run_leaves_results_and_report(tmp_path):
  """Train, evaluate, table, files; then --mode=eval on the checkpoint gives the same figures."""
  splits = [f"--config.evals.{name}.splits=('val',)" for name in ("retrieval", "zeroshot", "probe")]
  flags = [*splits, "--config.evals.rank.splits=('val',)", "--config.evals.probe.l2=(0.1,)"]
  flags += ["--config.steps=4", "--config.eval_every=2", "--config.log_every=2"]
  status, output = run(f"--workdir={tmp_path}", *flags)
  assert status == 0, output
  rows = json.loads((tmp_path / "results.json").read_text())["rows"]
  assert {r["evaluation"] for r in rows} == {"retrieval", "zeroshot", "probe", "rank"}
  assert "untrained" in output and "retrieval val i2t/avg/R@10" in output
  assert "<html" in (tmp_path / "report.html").read_text()
  assert {r["step"] for r in metrics.read_jsonl(tmp_path / "evals.jsonl")} == {2, 4}
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 4
  assert any((tmp_path / "tensorboard").iterdir())
  logged = metrics.read_jsonl(tmp_path / "metrics.jsonl")[-1]
  for key in ("loss", "examples_per_s", "mfu", "data_wait", "lr", "rank/img", "cos/matched"):
    assert key in logged

  status, again = run("--mode=eval", f"--checkpoint={tmp_path / 'checkpoints' / '4'}", *flags)
  assert status == 0, again
  names = ("retrieval", "zeroshot", "probe", "rank")
  table = lambda text: [line for line in text.splitlines() if line.startswith(names)]
  assert table(again) == table(output) and table(again)
