# Sourced by the scripts for several machines: DRY_RUN=1 (say every command, run none), and words
# for what is missing.
# shellcheck shell=bash
exec 3>&1  # commands are said there, from within "$(...)" too

say() {  # as one could type it; in one write, for lines of several processes meet
  local word line=""
  for word; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*)
        word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line $word"
  done
  echo "${line# }"
}

run() {
  say "$@" >&3
  [ -n "${DRY_RUN:-}" ] || "$@"
}

need() {  # VARIABLE "what it is"
  [ -n "${!1:-}" ] || { echo "error: set $1, $2" >&2; exit 2; }
}

need_tool() {  # COMMAND "where it comes from"
  [ -n "${DRY_RUN:-}" ] || command -v "$1" >/dev/null || {
    echo "error: $1 is not installed here; $2" >&2
    exit 1
  }
}
