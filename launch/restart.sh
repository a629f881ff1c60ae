#!/usr/bin/env bash
# Runs a command, and again as long as it exits with 75 ("saved, start me again"):
#   launch/restart.sh launch/local.sh --config=... [...]
# SIGTERM and Ctrl-C are passed on as SIGTERM, and it is not started again: the way to stop it.
# Environment: DELAY (seconds before the next start, 5), DRY_RUN=1 (say the command, run none).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || { echo "usage: launch/restart.sh COMMAND [ARGUMENT ...]" >&2; exit 2; }

child="" stopped=""
stop() {
  stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

code=75
while [ "$code" = 75 ] && [ -z "$stopped" ]; do
  say "$@"
  [ -z "${DRY_RUN:-}" ] || exit 0
  "$@" &
  child=$! code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not the command
    code=0
    wait "$child" || code=$?
  done
  child=""
  if [ "$code" = 75 ] && [ -z "$stopped" ]; then
    echo "exit code 75: starting again in ${DELAY:-5} s"
    sleep "${DELAY:-5}" & wait $! || true
  fi
done
echo "ended with exit code $code"
exit "$code"
