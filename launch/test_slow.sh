#!/usr/bin/env bash
# Installs what the tests need and runs those that take minutes: launch/test_slow.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ACCELERATOR=cpu source launch/setup.sh
"$VENV/bin/python" -m pip install --quiet -r requirements-test.txt
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile -m slow "$@"
