"""python -m jepa_vl.evals.report RUN [RUN ...] [--out FILE]: runs side by side, in one page."""

import argparse
import os
import sys

from jepa_vl.evals.report import compare


def main(argv=None):
  """Writes the page; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.evals.report", description=__doc__)
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's working folder")
  parser.add_argument("--out", default="comparison.html", help="the page (comparison.html)")
  args = parser.parse_args(argv)
  try:
    page = compare.page([compare.read(folder) for folder in args.runs])
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out, "w", encoding="utf-8", errors="replace") as f:
      f.write(page)
  except (OSError, ValueError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  print(args.out)
  return 0


if __name__ == "__main__":
  sys.exit(main())
