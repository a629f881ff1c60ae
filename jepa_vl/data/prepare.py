"""Any source as ArrayRecord files for training: checked, cleaned, resized once and shuffled.

    python -m jepa_vl.data.prepare --source webdataset --path '/data/{00000..01242}.tar' --out DIR

Images are reduced to RGB and resized to `--size` on the shorter side (never enlarged). A JPEG or
WebP that is RGB, still, upright and small enough keeps its bytes; all others are encoded anew.
Captions: HTML entities (`&amp;`, `&#39;`) become what they stand for; control characters, byte
order marks, zero-width spaces and word joiners go; Unicode is composed (NFC); a run of white space
becomes one space, none at the ends; after 10,000 characters a caption is cut, between words unless
that costs a tenth of it. All other fields, `tags` among them, stay as the source gave them. What
cannot be used is left out and listed in `rejected.csv`.

First each stretch of the source becomes a file in DIR/work, then those are put into their final
order. Every file gets its name when it is whole, and the bytes depend on the source and the
options alone: a run that was stopped, in whatever way, goes on by the same command to the same
files, and several machines that see DIR share the work by `--shard 0/4`, `--shard 1/4`, ...
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import time

from jepa_vl.data import common, sources
from jepa_vl.data.prepare_parts import Options, Parts, prepare_record
from jepa_vl.data.prepare_shards import Shards
from jepa_vl.data.prepare_work import remove_left_over, run
from jepa_vl.data.transforms import DamagedRecord

_TRIED = 256  # records that the estimate is made from


def prepare(
  source, options, out, *, processes=1, shard=(0, 1), dry_run=False, path="", max_unreadable=1.0
):
  """Does what is left to do of a source into the folder `out`; prints what there is and was.

  shard: (i, n), the i-th of n shares of the work. path: of the source, to be written down.
  max_unreadable: a larger share of a part's records without a readable file is an error.

  Raises:
    ValueError: the folder holds other work, it does not fit on the disk, nothing can be used.
    OSError: a file cannot be read or written, or a worker process died.
    RuntimeError: something unforeseen, with the record at which it happened.
  """
  work = os.path.join(out, "work")
  if _finished(out, options, work):
    return
  parts = Parts(source, options, work, max_unreadable)
  mine = [c for c in range(shard[0], len(parts), shard[1]) if not parts.done(c)]
  if mine or dry_run:
    _estimate(source, options, out, sum(len(parts.stretch(c)) for c in mine), processes)
  if dry_run:
    return
  _claim(work, options)
  run(parts, mine, processes, sum(len(parts.stretch(c)) for c in mine), "reading", work)
  missing = [c for c in range(len(parts)) if not parts.done(c)]
  if missing:
    shares = sorted({c % shard[1] for c in missing})
    print(
      f"{len(missing)} of {len(parts)} parts are still to be made, by --shard "
      + ", ".join(f"{i}/{shard[1]}" for i in shares)
      + ". When they are, any of the commands, given again, makes the final files."
    )
    return
  try:
    _assemble(Shards(parts, options, out, work), options, out, work, processes, shard, path)
  except (OSError, ValueError):
    if not _finished(out, options, work):  # by another machine, which has removed the work folder
      raise


def _assemble(shards, options, out, work, processes, shard, path):
  # Its own share first, then what is still missing: another machine may be at it, or gone.
  todo = [k for k in range(len(shards.files)) if not shards.done(k)]
  todo.sort(key=lambda k: (k % shard[1] != shard[0], k))
  records = sum(shards.files[k][2] - shards.files[k][1] for k in todo)
  run(shards, todo, processes, records, "writing", work)
  shards.write_rejects(os.path.join(out, "rejected.csv"))
  shards.draw(os.path.join(out, "contact_sheet.png"))
  about = {"path": path, "options": dataclasses.asdict(options), **shards.describe()}
  _write_json(_about(out), about, work)
  shutil.rmtree(work, ignore_errors=True)
  _summarise(about, out)


def _about(out):
  return os.path.join(out, "dataset.json")


def _finished(out, options, work):
  """Whether `out` holds all of it, said if so. Raises ValueError if it holds anything else."""
  for path in (_about(out), os.path.join(work, "options.json")):
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as f:
      found = json.load(f)
      _compare(found.get("options", found), dataclasses.asdict(options), path)
      if path == _about(out):
        shutil.rmtree(work, ignore_errors=True)  # it may have been stopped just before
        print(f"{out} is finished")
        _summarise(found, out)
        return True
      return False
  foreign = [n for n in _names(out) if n.endswith(".array_record")]
  if foreign:
    raise ValueError(
      f"--out {out} holds {foreign[0]}, which is not of this program; give an empty folder"
    )
  return False


def _compare(found, options, path):
  differences = [
    f"{name} was {found.get(name)!r} and is now {options.get(name)!r}"
    for name in found | options
    if found.get(name) != options.get(name)
  ]
  if differences:
    raise ValueError(
      f"{path} is of a run with other options or of another source: {'; '.join(differences)}. "
      "Give the same ones to go on, or another --out"
    )


def _names(folder):
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _claim(work, options):
  os.makedirs(work, exist_ok=True)
  remove_left_over(work)
  path = os.path.join(work, "options.json")
  if not os.path.exists(path):
    _write_json(path, dataclasses.asdict(options), work)


def _write_json(path, content, work):
  with common.whole(path, work) as temporary, open(temporary, "w", encoding="utf-8") as f:
    json.dump(content, f, indent=2)
    f.write("\n")


# --- what it will take, and what it was


def _estimate(source, options, out, records, processes):
  """Tries records from all over the source and prints what the whole will take.

  records: how many are left to this machine. Raises ValueError if it clearly cannot be done.
  """
  total = len(source)
  tried = sorted({(2 * i + 1) * total // (2 * _TRIED) for i in range(_TRIED)})
  sizes, reasons = [], collections.Counter()
  start = time.perf_counter()
  for index in tried:
    try:
      sizes.append(len(prepare_record(source, index, options)[0]))
    except DamagedRecord as e:
      reasons[e.reason] += 1
      last = f"record {index}: {e}"
  seconds = (time.perf_counter() - start) / len(tried)
  if not sizes:
    raise ValueError(f"none of the {len(tried)} records that were tried can be used; the {last}")
  final = total * sum(sizes) / len(tried)
  print(f"{total:,} records; {len(tried)} of them, from all over, were tried:")
  print(f"  rejected: {sum(reasons.values()) / len(tried):.1%}{_listed(reasons)}")
  print(f"  size: {_size(sum(sizes) / len(sizes))} a record, {_size(final)} in all")
  there, free = _bytes_in(out), _free(out)
  print(
    f"  disk: {_size(2 * final)} until it is finished, {_size(there)} there, {_size(free)} free"
  )
  print(
    f"  time: {_duration(seconds * records / processes)} for {records:,} records at {processes} "
    f"processes ({seconds * 1e3:.1f} ms a record), and that of writing {_size(final)} once more"
  )
  usable = total * len(sizes) // len(tried)
  if options.held_out >= usable:
    raise ValueError(
      f"--held-out {options.held_out} of about {usable} records leaves none to train with"
    )
  if 2 * final > 1.1 * (free + there):
    raise ValueError(
      f"--out {out} has {_size(free)} free, and about {_size(2 * final)} are needed until it is "
      "finished; make room, give another --out, or lower --size or --quality"
    )


def _bytes_in(folder):
  paths = [os.path.join(f, n) for f in (folder, os.path.join(folder, "work")) for n in _names(f)]
  return sum(os.path.getsize(p) for p in paths if os.path.isfile(p))


def _free(folder):
  folder = os.path.abspath(folder)
  while not os.path.isdir(folder):
    folder = os.path.dirname(folder)
  return shutil.disk_usage(folder).free


def _listed(counts):
  return f" ({', '.join(f'{k} {n:,}' for k, n in sorted(counts.items()))})" if counts else ""


def _size(count):
  for unit in ("bytes", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:,.1f} TB"


def _duration(seconds):
  for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
    if seconds >= length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.0f} s"


def _summarise(about, out):
  inside = lambda name: os.path.join(out, name)
  rejected = about["rejected"]
  lines = (
    f"accepted {about['accepted']:,} of {about['read']:,} records",
    f"rejected {sum(rejected.values()):,}{_listed(rejected)}: {inside('rejected.csv')}",
    f"exact duplicates {about['exact_duplicates']:,}, kept",
    f"captions cut {about['captions_cut']:,}",
    f"{_size(about['file_bytes'])} of files, {about['held_out']:,} records of them held out; "
    f"look at {inside('contact_sheet.png')}",
    "train with --config.data.source=array_record "
    f"--config.data.path='{inside('train-*.array_record')}'",
  )
  print("\n".join(lines))


# --- command line


def main(argv=None):
  """Command line; returns the exit code."""
  parser = _parser()
  a = parser.parse_args(argv)
  if not a.path and a.source in sources.EXAMPLES:
    parser.error("--path is needed: the files of --source, as in data.path")
  logging.basicConfig(level=logging.INFO, format="%(message)s")
  try:
    if a.source == "folder":
      _check_apart(a.path.replace("{split}", a.split), a.out)
    keys = common.Keys(a.image_key, a.caption_key, a.image_root, a.index_dir)
    source = sources.open_source(a.source, a.path, a.split, keys)
    prepare(
      source, chosen(a, source.identity), a.out, processes=a.processes, shard=a.shard,
      dry_run=a.dry_run, path=a.path, max_unreadable=a.max_unreadable,
    )  # fmt: skip
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    return 1
  except (ValueError, OSError, RuntimeError) as e:
    # What the sources say names keys of the configuration; here they are flags.
    flag = lambda match: "--" + match[1].replace("_", "-")
    print("error: " + re.sub(rf"(?:--config\.)?data\.({_KEYS})\b", flag, str(e)), file=sys.stderr)
    return 1
  return 0


def _check_apart(path, out):
  path, out = os.path.realpath(os.path.expanduser(path)), os.path.realpath(out)
  if os.path.commonpath([path, out]) == path:
    raise ValueError(
      f"--out {out} lies within --path {path}: what is written there would be read as records of "
      "the source; give an --out beside it"
    )


_KEYS = "source|path|split|image_key|caption_key|image_root|index_dir"


def chosen(arguments, identity):
  """The Options of parsed arguments and of the source's identity."""
  names = [f.name for f in dataclasses.fields(Options) if hasattr(arguments, f.name)]
  return Options(identity=identity, **{name: getattr(arguments, name) for name in names})


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m jepa_vl.data.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--source", required=True, choices=list(sources.SOURCES), help="as data.source")
  add("--path", default="", help="its files, as data.path")
  add("--out", required=True, help="folder to write to")
  add("--split", default="train", help="what {split} in the path stands for")
  add("--image-key", default="", help="as data.image_key")
  add("--caption-key", default="", help="as data.caption_key")
  add("--image-root", default="", help="as data.image_root")
  add("--index-dir", default="", help="as data.index_dir")
  size = "pixels of the shorter side (288: at 224, square crops of 60%% of the image still suffice)"
  add("--size", type=_whole(1), default=288, help=size)
  add("--min-size", type=_whole(1), default=32, help="smaller images are rejected (32)")
  add("--format", choices=("jpeg", "webp"), default="jpeg", help="of images encoded anew (jpeg)")
  add("--quality", type=_whole(1, 100), default=90, help="of images encoded anew (90)")
  add("--records-per-shard", type=_whole(1), default=16384, help="at most, of a file (16384)")
  held_out = "first records of the final order, to go to held-out-* instead of train-* (0)"
  add("--held-out", type=_whole(0), default=0, help=held_out)
  add("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the order of the records (0)")
  add("--no-shuffle", dest="shuffle", action="store_false", help="keep the source's order")
  add("--processes", type=_whole(1), default=common.cores(), help="this machine's cores")
  unreadable = "share of a stretch's records whose files may be missing; more ends the run, as the"
  add("--max-unreadable", type=float, default=0.1, help=f"{unreadable} storage may be gone (0.1)")
  shard = "this machine's share of the work: 0/4, 1/4, ...; all of them see --out"
  add("--shard", type=_shard, default=(0, 1), metavar="I/N", help=shard)
  add("--dry-run", action="store_true", help="print what it will take, and stop")
  return parser


def _whole(least, most=None):
  def parse(text):
    value = int(text)
    if value < least or (most is not None and value > most):
      raise argparse.ArgumentTypeError(
        f"must be at least {least}" + (f", at most {most}" if most else "") + f"; got {text}"
      )
    return value

  parse.__name__ = "whole number"  # as argparse calls it where int() fails
  return parse


def _shard(text):
  i, _, n = text.partition("/")
  if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
    raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, for example 0/4; got {text!r}")
  return int(i), int(n)


if __name__ == "__main__":
  sys.exit(main())
