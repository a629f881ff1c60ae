#!/usr/bin/env bash
# Installs what the tests need and runs them, in two processes: launch/test.sh [pytest arguments]
# (-n 0 for one process, as -s and --pdb want it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ACCELERATOR=cpu source launch/setup.sh
"$VENV/bin/python" -m pip install --quiet -r requirements-test.txt
"$VENV/bin/ruff" check .
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
