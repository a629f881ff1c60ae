#!/usr/bin/env bash
# From nothing to a trained, evaluated encoder on this machine:
#   launch/local.sh                       trains configs/tiny.py on the embedded dataset
#   launch/local.sh --config=... [...]    the same set-up, then any other run
# Environment: PYTHON (default python3), VENV (default .venv), ACCELERATOR (cpu, cuda or tpu).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/setup.sh
case " $* " in *" --config"[=\ ]*) ;; *) set -- --config=configs/tiny.py "$@" ;; esac
echo "python -m jepa_vl.main $*"
exec "$VENV/bin/python" -m jepa_vl.main "$@"
