#!/usr/bin/env bash
# Several processes of one run on this machine's CPU, to see what several machines do:
#   launch/processes.sh 2 --config=... --workdir=... [...]
# Ctrl-C lets them save. Environment: DEVICES (virtual devices of each, 1), PORT (12355), PYTHON
# and VENV as in launch/local.sh, DRY_RUN=1 (say every command, run none).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || { echo "usage: launch/processes.sh N [FLAG ...]" >&2; exit 2; }
count="$1" pids="" code=0
shift
VENV="${VENV:-.venv}"
[ -n "${DRY_RUN:-}" ] || ACCELERATOR=cpu source launch/setup.sh

trap 'kill -TERM $pids 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${DEVICES:-1}" "$VENV/bin/python"
    -m jepa_vl.main --coordinator="127.0.0.1:${PORT:-12355}" --num_processes="$count"
    --process_id="$i" "$@")
  say "${command[@]}"
  [ -n "${DRY_RUN:-}" ] || { "${command[@]}" > >(sed "s/^/$i: /") 2>&1 & pids="$pids $!"; }
done
for pid in $pids; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2>/dev/null; do one=0; wait "$pid" || one=$?; done  # a signal ends `wait`
  [ "$one" = 0 ] || code="$one"
done
exit "$code"
