# shellcheck shell=bash
# Sourced by the other scripts: makes the virtual environment and installs what this machine can
# use. Sets VENV. ACCELERATOR=cpu|cuda|tpu overrides what is detected.
VENV="${VENV:-.venv}"

detect() {
  if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null ||
    [ -n "${TPU_NAME:-}" ]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo cuda
  else
    echo cpu
  fi
}

ACCELERATOR="${ACCELERATOR:-$(detect)}"
case "$ACCELERATOR" in
  cpu) JAX=(jax) ;;
  cuda) JAX=("jax[cuda12]") ;;
  tpu) JAX=("jax[tpu]" gcsfs) ;;  # gs://, where such machines have their working folder
  *) echo "error: ACCELERATOR=$ACCELERATOR; expected cpu, cuda or tpu" >&2; exit 2 ;;
esac

if [ ! -x "$VENV/bin/python" ]; then
  PYTHON="${PYTHON:-python3}"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: $PYTHON is missing or older than Python 3.11; set PYTHON=/path/to/python3.11, or let" >&2
    echo "uv fetch one: pip install --user uv && python3 -m uv venv --seed --python 3.12 $VENV" >&2
    exit 1
  }
  echo "making the virtual environment $VENV"
  [ ! -e "$VENV" ] || {
    echo "error: $VENV exists and is no virtual environment; remove it, or set VENV=another/folder" >&2
    exit 1
  }
  "$PYTHON" -m venv "$VENV" || {
    rm -rf "$VENV"  # half made, by the line above
    echo "error: $PYTHON cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
  }
fi
echo "installing ${JAX[*]} and requirements.txt for: $ACCELERATOR (ACCELERATOR=cpu|cuda|tpu overrides)"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${JAX[@]}" -r requirements.txt
