#!/usr/bin/env bash
# TPU slices on GKE: fills launch/jobset.yaml in and hands it to the cluster of `kubectl`:
#   launch/jobset.sh --config=... --workdir=gs://... [...]
# Environment: NAME; IMAGE (built from launch/Containerfile with ACCELERATOR=tpu); TPU
# (tpu-v5-lite-podslice) and TOPOLOGY (4x4) of a slice's node pool, with CHIPS in each machine (4);
# SLICES (1); RESTARTS (3: of failures other than exit code 75 and eviction, after which the others
# cannot tell a broken machine from a wrong setting); SERVICE_ACCOUNT (default);
# DRY_RUN=1 (print the manifest and the command, run none).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

need NAME "the JobSet's name, for example NAME=jepa"
need IMAGE "the container image, for example IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/jepa_vl"
need_tool kubectl "it is the Kubernetes command line"
export NAME IMAGE TPU="${TPU:-tpu-v5-lite-podslice}" TOPOLOGY="${TOPOLOGY:-4x4}" CHIPS="${CHIPS:-4}"
export SLICES="${SLICES:-1}" RESTARTS="${RESTARTS:-3}" SERVICE_ACCOUNT="${SERVICE_ACCOUNT:-default}"
[[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] || {
  echo "error: TOPOLOGY=$TOPOLOGY; expected chips by dimension, as 4x4 or 4x4x4" >&2
  exit 2
}
export HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
[ "$HOSTS" -gt 0 ] || {
  echo "error: TOPOLOGY=$TOPOLOGY has fewer chips than one machine, CHIPS=$CHIPS; set CHIPS" >&2
  exit 2
}

manifest="$("${PYTHON:-python3}" -c 'import json, os, string, sys
text = string.Template(open("launch/jobset.yaml").read())
print(text.substitute(os.environ, ARGS=json.dumps(sys.argv[1:])))' "$@")"
[ -z "${DRY_RUN:-}" ] || echo "$manifest"
run kubectl apply -f - <<<"$manifest"
