#!/usr/bin/env bash
# Installs what the tests need and runs those that take minutes: launch/test_slow.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ACCELERATOR=cpu source launch/setup.sh
"$VENV/bin/python" -m pip install --quiet -r requirements-test.txt
# The compilers for chips that are not here, in the versions that this JAX wants.
version="$("$VENV/bin/python" -c 'import jax; print(jax.__version__)')"
"$VENV/bin/python" -m pip install --quiet "jax[tpu]==$version" \
  "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version" nvidia-cuda-nvcc-cu12
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile -m slow "$@"
