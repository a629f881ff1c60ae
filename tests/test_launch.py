"""The launch scripts: dry runs, and real ones with small stand-ins for the clusters' commands."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"])
TPU = {"NAME": "jepa", "ZONE": "us-west4-a", "PROJECT": "mine"}
JOBSET = {"NAME": "jepa", "IMAGE": "registry/jepa_vl"}
# A flag as users write them, with all that a shell could take amiss.
FLAGS = ["--config=configs/vit_b.py", "--config.data.path=/a b/*.tar", """--x="$HOME" ;'"""]
BASICS = ["bash", "cat", "dirname", "env", "git", "sed", "tail", "tar"]


@pytest.fixture
def bare(tmp_path):
  """A PATH with the basic commands alone: no gcloud, kubectl, srun."""
  folder = tmp_path / "bare"
  folder.mkdir()
  for name in BASICS:
    (folder / name).symlink_to(shutil.which(name))
  (folder / "python3").symlink_to(sys.executable)
  return str(folder)


def tool(folder, name, script):
  """Writes the command `name`; what it is called with is kept in NAME.log."""
  folder.mkdir(exist_ok=True, parents=True)
  path = folder / name
  log = shlex.quote(str(folder / f"{name}.log"))
  path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{log}\n{script}\n')
  path.chmod(0o755)
  return path


def codes(folder, *values):
  """Shell text that exits with each of `values` in turn, and with 99 after that."""
  path = folder / "codes"
  path.write_text("".join(f"{v}\n" for v in values))
  quoted = shlex.quote(str(path))
  return f"code=$(head -n 1 {quoted}); sed -i 1d {quoted}; exit ${{code:-99}}"


def launch(script, *arguments, path=None, cwd=ROOT, **env):
  """(exit code, everything printed)."""
  env = {"HOME": os.environ["HOME"], "PATH": path or os.environ["PATH"], "DELAY": "0"} | env
  result = subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments],
    cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
  )  # fmt: skip
  return result.returncode, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_the_shell_accepts_it(script):
  subprocess.run(["bash", "-n", script], check=True)
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  subprocess.run([shellcheck, "-x", "-S", "warning", "-s", "bash", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("script, before, programs", [
  ("restart.sh", ["launch/local.sh"], ["launch/local.sh"]),
  ("processes.sh", ["2"], ["env", "env"]),
  ("slurm.sbatch", [], ["srun", "scontrol"]),
])  # fmt: skip
def test_a_dry_run_says_every_command_with_the_flags_as_given(bare, script, before, programs):
  flags = [*FLAGS, ""]
  code, output = launch(script, *before, *flags, path=bare, DRY_RUN="1")
  assert code == 0, output
  commands = [shlex.split(line) for line in output.splitlines() if not line.endswith(":")]
  assert [c[0] for c in commands] == programs, output
  assert all(c[-len(flags) :] == flags for c in commands if c[0] != "scontrol"), output


@pytest.mark.parametrize("command, calls", [
  (["up"], ["list", "create", "list"]),
  (["run", *FLAGS], ["scp", "ssh", "ssh", "ssh", "ssh"]),
  (["keep", *FLAGS], ["list", "create", "list", "scp", "ssh", "ssh", "ssh", "ssh"]),
  (["logs"], ["ssh"]),
  (["stop"], ["ssh"]),
  (["down"], ["delete"]),
])  # fmt: skip
def test_a_dry_run_of_a_tpu_pod(bare, command, calls):
  code, output = launch("tpu_pod.sh", *command, path=bare, DRY_RUN="1", **TPU)
  assert code == 0, output
  commands = [c for line in output.splitlines() if (c := shlex.split(line))[0] == "gcloud"]
  assert [c[4] for c in commands] == calls, output
  assert all({"--zone=us-west4-a", "--project=mine"} <= set(c) for c in commands), output
  if len(command) > 1:
    (remote,) = re.findall(r"(cd jepa_vl && launch/worker.sh start .*)", "\n".join(commands[-2]))
    assert shlex.split(remote)[-len(FLAGS) :] == FLAGS, remote


@pytest.mark.parametrize("env, words", [
  ({}, ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=jepa"]),
  ({"SLICES": "2", "SPOT": "1"}, ["--node-count=2", "--spot"]),
  ({"TYPE": "v6e-64"}, ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"]),
  ({"TYPE": "v9-8", "RUNTIME": "new"}, ["--runtime-version=new"]),
])  # fmt: skip
def test_what_is_asked_of_cloud_tpu(bare, env, words):
  code, output = launch("tpu_pod.sh", "up", path=bare, DRY_RUN="1", **TPU, **env)
  assert code == 0 and set(words) <= set(shlex.split(output)), output
  assert ("--node-id=jepa" in output) == ("SLICES" not in env), output


@pytest.mark.parametrize("script, arguments, env, code, words", [
  ("tpu_pod.sh", ["up"], TPU | {"NAME": ""}, 2, "set NAME"),
  ("tpu_pod.sh", ["up"], TPU | {"ZONE": ""}, 2, "set ZONE"),
  ("tpu_pod.sh", ["up"], TPU | {"PROJECT": ""}, 2, "set PROJECT"),
  ("tpu_pod.sh", ["up"], TPU | {"TYPE": "v9-8", "DRY_RUN": "1"}, 2, "set RUNTIME"),
  ("tpu_pod.sh", ["fly"], TPU | {"DRY_RUN": "1"}, 2, "up | run | keep | logs | stop | down"),
  ("tpu_pod.sh", ["up"], TPU, 1, "gcloud is not installed"),
  ("jobset.sh", [], JOBSET | {"IMAGE": ""}, 2, "set IMAGE"),
  ("jobset.sh", [], JOBSET, 1, "kubectl is not installed"),
  ("jobset.sh", [], JOBSET | {"TOPOLOGY": "16", "DRY_RUN": "1"}, 2, "TOPOLOGY=16"),
  ("slurm.sbatch", [], {"VENV": "/none"}, 1, "no /none here"),
  ("slurm.sbatch", [], {"VENV": sys.prefix}, 1, "srun is not installed"),
  ("slurm.sbatch", [], {"SLURM_SUBMIT_DIR": "/"}, 2, "from the repository's root"),
  ("processes.sh", ["--config=x"], {}, 2, "launch/processes.sh N"),
  ("restart.sh", [], {}, 2, "COMMAND"),
  ("worker.sh", ["fly"], {}, 2, "idle | start"),
])  # fmt: skip
def test_what_is_missing_is_named(bare, script, arguments, env, code, words):
  status, output = launch(script, *arguments, path=bare, **env)
  assert (status, words in output) == (code, True), output


@pytest.mark.parametrize("values", [[0], [1], [2], [75, 75, 0], [75, 1], [75, 2], [139]])
def test_75_starts_again_and_nothing_else_does(tmp_path, values):
  program = tool(tmp_path, "program", codes(tmp_path, *values))
  code, output = launch("restart.sh", str(program), *FLAGS)
  assert code == values[-1], output
  calls = (tmp_path / "program.log").read_text().splitlines()
  assert calls == [" ".join(FLAGS)] * len(values)


def test_a_signal_reaches_the_program_and_ends_the_restarts(tmp_path):
  save = 'trap "sleep .5; echo saved; exit 75" TERM; echo ok; for i in {1..600}; do sleep .1; done'
  program = tool(tmp_path, "program", save)
  process = subprocess.Popen(
    ["bash", "launch/restart.sh", program], cwd=ROOT, text=True, stdout=subprocess.PIPE
  )
  while process.stdout.readline() != "ok\n":
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and "saved\n" in output and "again" not in output, output


@pytest.mark.parametrize("value, requeued", [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_puts_a_preempted_job_back(tmp_path, value, requeued):
  tool(tmp_path, "srun", f"exit {value}")
  tool(tmp_path, "scontrol", "")
  path = f"{tmp_path}:{os.environ['PATH']}"
  slurm = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
  code, output = launch(
    "slurm.sbatch", *FLAGS, path=path, cwd="/", VENV=sys.prefix, **slurm
  )  # as SLURM does: another folder
  assert code == value, output
  started = (tmp_path / "srun.log").read_text()
  assert "--cpus-per-task=7" in started and " ".join(FLAGS) in started
  log = tmp_path / "scontrol.log"
  assert (log.exists() and log.read_text() == "requeue 42\n") == requeued


@pytest.fixture
def cloud(tmp_path):
  """Cloud TPU on this machine: `gcloud` says the states in turn; its one worker is a folder."""
  worker = tmp_path / "worker"
  python = worker / "jepa_vl/.venv/bin"
  run = "[[ $* != *jepa_vl.main* ]] || {\n%s\n}"

  def make(states, values):
    tool(python, "python", run % codes(tmp_path, *values))
    shutil.copytree(ROOT / "launch", worker / "jepa_vl/launch", dirs_exist_ok=True)
    (tmp_path / "states").write_text("".join(f"{s}\n" for s in states))
    tool(tmp_path / "bin", "gcloud", string.Template("""cd $home
      for word; do [[ $$word != --command=* ]] || command="$${word#*=}"; done
      case "$$4" in
        list) head -n 1 states; [ "$$(wc -l <states)" = 1 ] || sed -i 1d states ;;
        scp) cp "$$5" "worker/$${6#*:}" ;;
        ssh) cd worker && bash -c "$$command" ;;
      esac""").substitute(home=shlex.quote(str(tmp_path))))  # fmt: skip

  def start(*arguments, **env):
    env |= TPU | {"TMPDIR": str(tmp_path)}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    code, output = launch("tpu_pod.sh", *arguments, path=path, **env)
    calls = (tmp_path / "bin/gcloud.log").read_text().splitlines()
    runs = [c for c in (python / "python.log").read_text().splitlines() if "jepa_vl.main" in c]
    return code, output, [c.split()[3] for c in calls], runs

  return make, start, worker / "jepa_vl"


def test_a_tpu_pod_from_nothing_to_the_end(cloud):
  make, start, worker = cloud
  make(["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [75, 0])
  (worker / ".venv/bin/python.log").write_text("")
  code, output, calls, _ = start("up")
  assert (code, calls) == (0, ["list", "create", "list", "list", "list"]), output
  code, output, _, runs = start("run", *FLAGS)
  assert code == 0 and "exit code 75: starting again" in output, output
  assert runs == ["-m jepa_vl.main " + " ".join(FLAGS)] * 2
  assert (worker / "jepa_vl/main.py").exists() and not (worker / "runs").exists()


def test_a_refused_tpu_pod_is_said(cloud):
  make, start, worker = cloud
  make(["", "WAITING_FOR_RESOURCES", "FAILED"], [])
  (worker / ".venv/bin/python.log").write_text("")
  code, output, *_ = start("up")
  assert code == 1 and "error: jepa is FAILED" in output, output


def test_a_failure_on_a_tpu_pod_is_its_exit_code(cloud):
  make, start, _ = cloud
  make(["ACTIVE"], [1])
  code, output, calls, runs = start("keep", "--config=none")
  assert (code, len(runs)) == (1, 1), output
  assert "create" not in calls


def test_a_preempted_tpu_pod_is_asked_for_again(cloud):
  make, start, worker = cloud
  make(["ACTIVE", "ACTIVE", *["SUSPENDING"] * 3, "SUSPENDED", "PROVISIONING", "ACTIVE"], [1, 0])
  code, output, calls, runs = start("keep", "--config=x", SETUP="echo data >>mounted")
  assert (code, len(runs)) == (0, 2), output
  assert calls.index("delete") < calls.index("create")
  assert (worker.parent / "mounted").read_text() == "data\n" * 2


def test_a_tpu_pod_runs_one_thing_at_a_time_and_stops_after_a_save(cloud):
  make, start, worker = cloud
  make(["ACTIVE"], [])
  save = '[[ $* != *vl.main* ]] || { trap "exit 75" TERM; for i in {1..600}; do sleep .1; done; }'
  tool(worker / ".venv/bin", "python", save)
  env = {"PATH": f"{worker.parent.parent / 'bin'}:{os.environ['PATH']}", "DELAY": "0", **TPU}
  env |= {"HOME": str(worker.parent), "TMPDIR": str(worker.parent)}
  running = subprocess.Popen(
    ["bash", "launch/tpu_pod.sh", "run"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
  )
  log = worker / "run.log"
  deadline = time.monotonic() + 60
  while not (log.exists() and "jepa_vl.main" in log.read_text()):
    assert running.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  code, output, _, runs = start("run")
  assert code == 1 and "a run is going on here" in output and len(runs) == 1, output
  assert start("stop")[0] == 0
  assert running.wait(timeout=60) == 75
  assert "ended with exit code 75" in log.read_text()


def test_several_processes_on_one_machine(tmp_path):
  venv = tmp_path / "venv"
  program = '[[ $* != *jepa_vl.main* ]] || { echo "$JAX_NUM_CPU_DEVICES"; [[ $* != *id=1* ]]; }'
  tool(venv / "bin", "python", program)
  code, output = launch("processes.sh", "3", *FLAGS, VENV=str(venv), DEVICES="2", PORT="9")
  assert code == 1, output  # of process 1
  runs = [c for c in (venv / "bin/python.log").read_text().splitlines() if "jepa_vl.main" in c]
  flags = "--coordinator=127.0.0.1:9 --num_processes=3 --process_id="
  assert sorted(runs) == [f"-m jepa_vl.main {flags}{i} {' '.join(FLAGS)}" for i in range(3)]
  assert {"0: 2", "1: 2", "2: 2"} <= set(output.splitlines()), output


def test_the_jobset(bare):
  env = JOBSET | {"SLICES": "2", "TOPOLOGY": "8x8", "DRY_RUN": "1"}
  code, output = launch("jobset.sh", *FLAGS, path=bare, **env)
  assert code == 0, output
  text, command = output.strip().rsplit("\n", 1)
  assert shlex.split(command) == ["kubectl", "apply", "-f", "-"]
  (manifest,) = yaml.safe_load_all(text)
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = manifest["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 16, 16)
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert (container["image"], container["args"]) == ("registry/jepa_vl", FLAGS)
  assert container["resources"]["limits"]["google.com/tpu"] == 4
  assert "8x8" in pod["nodeSelector"].values() and pod["restartPolicy"] == "Never"
  # 75 and eviction, and nothing else, fail the job by its policy: those restarts are not counted
  rules = spec["podFailurePolicy"]["rules"]
  rules = [r.get("onExitCodes") or r["onPodConditions"][0] for r in rules]
  assert rules[0] == {"containerName": container["name"], "operator": "In", "values": [75]}
  assert [r.get("type") for r in rules[1:]] == ["DisruptionTarget"] and spec["backoffLimit"] == 0
  assert manifest["spec"]["failurePolicy"]["rules"] == [
    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  assert "${" not in text


def test_the_container_file():
  text = (ROOT / "launch/Containerfile").read_text().replace("\\\n", " ")
  lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] != "#"]
  for _, rest in (line for line in lines if line[0] == "COPY"):
    assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
  for _, rest in (line for line in lines if line[0] == "RUN"):
    subprocess.run(["bash", "-n", "-c", rest], check=True)
  by_name = dict(lines)
  assert json.loads(by_name["ENTRYPOINT"])[1:] == ["-m", "jepa_vl.main"]
  assert by_name["USER"] not in ("0", "root")
