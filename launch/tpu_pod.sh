#!/usr/bin/env bash
# A TPU slice, or several joined by the data centre's network, through Cloud TPU's queued resources:
#   launch/tpu_pod.sh up                        asks for it, or takes up what is there; waits for it
#   launch/tpu_pod.sh run --config=... [...]    copies this working tree to every worker, installs,
#                                               starts there, and shows the first worker's log
#   launch/tpu_pod.sh keep --config=... [...]   up and run, again whenever it was preempted
#   launch/tpu_pod.sh logs | stop | down        show the log again | save and stop | delete it
# Environment: NAME, ZONE and PROJECT of the queued resource; TYPE of a slice (v5litepod-16);
# SLICES (1); SPOT=1 for Spot capacity; RUNTIME (the image that Google names for TYPE); SETUP (a
# command for every worker before each start, to mount or copy the data);
# DELAY (seconds between two looks, 30); DRY_RUN=1 (say every command, run none).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

need NAME "the queued resource's name, for example NAME=jepa"
need ZONE "where the TPUs are, for example ZONE=us-west4-a"
need PROJECT "the Google Cloud project that pays"
need_tool gcloud "it is the Google Cloud CLI"
TYPE="${TYPE:-v5litepod-16}" SLICES="${SLICES:-1}"
case "$TYPE" in
  v5litepod-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
  v5p-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
  v6e-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
  v[234]-*) RUNTIME="${RUNTIME:-tpu-ubuntu2204-base}" ;;
  *) need RUNTIME "the image for TYPE=$TYPE (Google: \"TPU software versions\")" ;;
esac

tpu() { run gcloud compute tpus queued-resources "$@" --zone="$ZONE" --project="$PROJECT" --quiet; }

on_all() { tpu ssh "$NAME" --node=all --worker=all --command="$1"; }

look() {  # sets STATE; empty where there is no such resource
  STATE="$(tpu list --filter="name~/$NAME\$" --format="value(state.state)")"
}

create() {
  if [ "$SLICES" = 1 ]; then set -- --node-id="$NAME"; else set -- --node-count="$SLICES"; fi
  [ -z "${SPOT:-}" ] || set -- "$@" --spot
  tpu create "$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "$@"
}

again() {  # looks again, later
  echo "$NAME is ${STATE:-not listed yet}; looking again in ${DELAY:-30} s"
  sleep "${DELAY:-30}"
  look
}

up() {
  look
  while [ "$STATE" = SUSPENDING ] || [ "$STATE" = DELETING ]; do again; done
  case "$STATE" in FAILED | SUSPENDED) down; STATE="" ;; esac
  [ -n "$STATE" ] || { create; look; }
  until [ "$STATE" = ACTIVE ] || [ -n "${DRY_RUN:-}" ]; do
    case "$STATE" in
      FAILED | SUSPENDED)
        echo "error: $NAME is $STATE; gcloud compute tpus queued-resources describe says why" >&2
        exit 1 ;;
    esac
    again
  done
}

start() {
  local archive="${TMPDIR:-/tmp}/$NAME.tgz"
  # what git tracks or would: configs of one's own, no virtual environment, no runs
  run bash -o pipefail -c \
    "git ls-files -z --cached --others --exclude-standard | tar -czf '$archive' --null -T -"
  [ -n "${DRY_RUN:-}" ] || echo "$(du -h "$archive" | cut -f1) of code and configs go to every worker"
  tpu scp "$archive" "$NAME:jepa_vl.tgz" --node=all --worker=all
  on_all "[ ! -x jepa_vl/launch/worker.sh ] || jepa_vl/launch/worker.sh idle"
  on_all "mkdir -p jepa_vl && tar -xzf jepa_vl.tgz -C jepa_vl"
  [ -z "${SETUP:-}" ] || on_all "$SETUP"
  on_all "cd jepa_vl && launch/worker.sh start $(say "$@")"
}

logs() { tpu ssh "$NAME" --node=0 --worker=0 --command="cd jepa_vl && launch/worker.sh follow"; }

down() { tpu delete "$NAME" --force; }

keep() {
  local code
  while true; do
    up
    code=0
    launch/tpu_pod.sh run "$@" || code=$?
    [ "$code" != 0 ] || exit 0
    look
    while [ "$STATE" = ACTIVE ] && [ "$code" = 255 ]; do  # ssh's own: the connection was lost
      sleep "${DELAY:-30}"
      code=0
      launch/tpu_pod.sh logs || code=$?
      look
    done
    again  # what is being taken away says ACTIVE for a moment
    [ "$STATE" != ACTIVE ] || exit "$code"
    echo "$NAME was preempted (${STATE:-gone}): asking for it again"
  done
}

command="${1:-}"
[ $# = 0 ] || shift
case "$command" in
  up | logs | down) "$command" ;;
  run) start "$@"; logs ;;
  keep) if [ -n "${DRY_RUN:-}" ]; then up; start "$@"; logs; else keep "$@"; fi ;;
  stop) on_all "jepa_vl/launch/worker.sh stop" ;;
  *) echo "usage: launch/tpu_pod.sh up | run | keep | logs | stop | down" >&2; exit 2 ;;
esac
