#!/usr/bin/env bash
# One worker of a TPU slice; launch/tpu_pod.sh calls this there, over ssh:
#   launch/worker.sh idle                       fails in words while a run is going on
#   launch/worker.sh start --config=... [...]   installs, then runs beyond the connection
#   launch/worker.sh follow                     its log until it ends, and its exit code
#   launch/worker.sh stop                       lets it save, and waits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

running() { [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; }

idle() {
  ! running || { echo "error: a run is going on here; launch/tpu_pod.sh stop ends it" >&2; exit 1; }
}

start() {
  if [ ! -x .venv/bin/python ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
  then  # the images for TPU VMs have Python 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  ACCELERATOR=tpu source launch/setup.sh
  [ ! -f run.log ] || mv run.log run.log.before
  nohup launch/restart.sh "$VENV/bin/python" -m jepa_vl.main "$@" >run.log 2>&1 </dev/null &
  echo $! >run.pid
}

follow() {
  [ -f run.pid ] || { echo "error: nothing was started here" >&2; exit 1; }
  local code
  tail -n 50 --pid="$(cat run.pid)" -F run.log
  code="$(sed -n 's/^ended with exit code //p' run.log)"
  exit "${code:-1}"
}

stop() {
  ! running || { kill -TERM "$(cat run.pid)" && tail --pid="$(cat run.pid)" -f /dev/null; }
}

case "${1:-}" in
  idle | start | follow | stop) "$@" ;;
  *) echo "usage: launch/worker.sh idle | start [FLAG ...] | follow | stop" >&2; exit 2 ;;
esac
