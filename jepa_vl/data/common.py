"""What sources share: finding files, picking fields by name, checking a record, identity."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import socket
import threading

from jepa_vl.data.transforms import DamagedRecord

log = logging.getLogger(__name__)

# Tried in order where `image_key` and `caption_key` are empty.
IMAGE_NAMES = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
PATH_NAMES = ("image_path", "filepath", "file_path", "file_name", "filename", "path", "file", "url")
CAPTION_NAMES = ("txt", "caption", "text", "title")


@dataclasses.dataclass(frozen=True)
class Keys:
  """How records are read, as `config.data` says; "" is what is usual (see configs/base.py)."""

  image_key: str = ""
  caption_key: str = ""
  image_root: str = ""
  index_dir: str = ""


USUAL = Keys()


def find(pattern, *, what, suffix, remote=False):
  """The files that a pattern names, sorted; `*`, {00..99} and {a,b} are expanded.

  A folder stands for its files that end in `suffix`. Names without a file are logged.

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: a bucket, where `remote` says that there can be none.
  """
  match = functools.partial(_remote_glob if "://" in pattern else _local_glob, suffix=suffix)
  if "://" in pattern and not remote:
    raise ValueError(
      f"path {pattern!r}: {what} are read from files alone; mount the bucket (gcsfuse, "
      "mountpoint-s3) or copy it, and give that path"
    )
  names = expand_braces(os.path.expanduser(pattern))
  found = [match(name) for name in names]
  paths = sorted({path for matches in found for path in matches})
  if not paths:
    raise FileNotFoundError(
      f"path {pattern!r} matches no file; expected one or more {what}, for example "
      f"--config.data.path='/data/pairs/train-*{suffix}'"
    )
  without = [name for name, matches in zip(names, found, strict=True) if not matches]
  if without:
    log.warning(
      "%d of the %d names in %r have no file: %s%s", len(without), len(names), pattern,
      ", ".join(without[:3]), ", ..." if len(without) > 3 else "",
    )  # fmt: skip
  return paths


def expand_braces(pattern):
  """"a-{08..10}.{x,y}" -> ["a-08.x", "a-08.y", "a-09.x", ...]; other braces stay."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
  if not match:
    return [pattern]
  first, last, names = match.groups()
  if names is None:
    names = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
  else:
    names = names.split(",")
  rests = expand_braces(pattern[match.end() :])
  return [pattern[: match.start()] + a + b for a, b in itertools.product(names, rests)]


def _local_glob(pattern, suffix):
  if os.path.isdir(pattern):
    pattern = os.path.join(glob.escape(pattern), "*" + suffix)
  paths = glob.glob(pattern, recursive=True)
  if os.path.isfile(pattern) and pattern not in paths:  # "a[1].tar" itself
    paths = [pattern]
  return [p for p in paths if not p.endswith(INDEX_SUFFIX) and not os.path.isdir(p)]


# Of the files that webdataset.py keeps beside the tars: never data.
INDEX_SUFFIX = ".jepa-index"


def _remote_glob(pattern, suffix):
  files, path = filesystem(pattern)
  if files.isdir(path):
    path = path.rstrip("/") + "/*" + suffix
  return [files.unstrip_protocol(p) for p in files.glob(path)]


def filesystem(path):
  """fsspec's file system of a path or URL, and the path in it. Raises ValueError in words."""
  import fsspec  # late: only for buckets

  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as e:
    raise ValueError(
      f"path {path!r} cannot be opened: {e} (gs:// needs `pip install gcsfs`, s3:// s3fs)"
    ) from e


def image_bytes(value, folder):
  """The image's bytes of a table's cell: bytes, a path, or a dict of both (Hugging Face's)."""
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path")
  if not isinstance(value, str) or not value:
    return value
  return read_file(value if "://" in value else os.path.join(os.path.expanduser(folder), value))


def cores():
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent():
  """In a worker process: ends it when the one that started it is gone, in whatever way.

  It would otherwise wait for ever for work, or to hand over its own.
  """

  def follow():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def whole(path, folder):
  """A temporary name in `folder` for what becomes `path` when all of it is on the disk.

  Raises OSError that says which file could not be written, why, and what to do.
  """
  name = f"{os.path.basename(path)}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}"
  temporary = os.path.join(folder, name)
  try:
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    _flush(os.path.dirname(path))
  except OSError as e:
    raise OSError(
      f"{path} cannot be written ({e.strerror or e}); what is whole is kept: make room or put "
      "right what is wrong, and the same command goes on from there"
    ) from e
  finally:
    with contextlib.suppress(OSError):
      os.remove(temporary)


TEMPORARY = ".tmp"


def _flush(path):
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


# As WebDataset's own: the key is the folder and the name up to its first dot, the rest is the kind.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


def split_name(name):
  """"a.b/c.seg.png" -> ("a.b/c", "seg.png"); None without a key or an extension."""
  match = _NAME.fullmatch(name)
  return match.groups() if match else None


def read_file(path):
  """The bytes of an image file, or of one in a bucket. Raises DamagedRecord."""
  if path.startswith(("http://", "https://")):
    raise DamagedRecord(
      f"{path!r} is a web address: download the images first, for example with img2dataset",
      "unreadable",
    )
  try:
    if "://" in path:
      files, path = filesystem(path)
      return files.cat_file(path)
    with open(path, "rb") as f:
      return f.read()
  except (OSError, ValueError) as e:
    raise DamagedRecord(f"image file {path!r} cannot be read ({_reason(e)})", "unreadable") from e


def image_folder(path, names, folders):
  """The first of `folders` that has one of a sample of the images that the file at `path` names.

  Raises FileNotFoundError that lists where they were looked for.
  """
  folders = [os.path.normpath(folder) for folder in folders]
  some = names[:: max(len(names) // 8, 1)]
  for folder in folders:
    if any(os.path.isfile(os.path.join(folder, name)) for name in some):
      return folder
  raise FileNotFoundError(
    f"{path}: none of its images is there; data.image_root names their folder. Looked for "
    + ", ".join(os.path.join(folder, names[0]) for folder in folders)
  )


def _reason(error):
  return getattr(error, "strerror", None) or str(error) or type(error).__name__


def pick(what, there, key, names):
  """The field that `key` names or, where it is empty, the first of `names` that is there.

  what: "image" or "caption". Raises DamagedRecord that lists what is there.
  """
  for name in (key,) if key else names:
    if name in there:
      return name
  tried = repr(key) if key else "any of " + ", ".join(names)
  have = ", ".join(list(there)[:20]) or "nothing"
  raise DamagedRecord(
    f"no {what}: looked for {tried}, found {have}; data.{what}_key names another",
    f"no_{what}",
  )


def check_caption(value):
  """A caption as text without blanks around it; bytes are UTF-8. Raises DamagedRecord."""
  if isinstance(value, bytes):
    try:
      value = value.decode("utf-8")
    except UnicodeDecodeError as e:
      message = f"the caption is not UTF-8 (from its byte {e.start} on)"
      raise DamagedRecord(message, "caption_encoding") from e
  if value is None:
    raise DamagedRecord("the caption is missing", "no_caption")
  if not isinstance(value, str):
    message = f"the caption is no text but of type {type(value).__name__}"
    raise DamagedRecord(message, "malformed")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as e:  # half a surrogate pair, which JSON can express
    message = f"the caption is no valid Unicode (from its character {e.start} on)"
    raise DamagedRecord(message, "caption_encoding") from e
  value = value.strip("\ufeff \t\r\n")
  if not value:
    raise DamagedRecord("the caption is empty", "no_caption")
  return value


def class_name(names, number):
  """The name of a record's class; None, of which no caption is made, where it has none."""
  return names[number] if type(number) is int and 0 <= number < len(names) else None


def make_record(image, caption, fields):
  """The record of encoded bytes and a caption, with what else `fields` has of use.

  That is whole numbers and texts (labels, concepts) and `tags`, if they are a list of texts (as
  bytes of UTF-8, too).
  """
  if not isinstance(image, bytes) or not image:
    raise DamagedRecord("the image is no bytes" if image else "the image is empty", "no_image")
  record = {k: v for k, v in fields.items() if isinstance(v, (int, str))}
  record.pop("captions", None)  # of a record, a list (sources.py); whoever asked for it has it
  tags = fields.get("tags")
  record.pop("tags", None)
  if isinstance(tags, list) and tags and all(isinstance(t, (str, bytes)) for t in tags):
    record["tags"] = [t if isinstance(t, str) else t.decode("utf-8", "replace") for t in tags]
  return record | {"image": image, "caption": check_caption(caption)}


def member_record(names, read, keys):
  """The record of one sample that lies in several members or files of one key.

  names: what follows the key ("jpg", "txt", "json"); read(name) -> bytes. Fields of a json member
  count as the sample's own, after its members.
  """
  fields = parse_json(read("json")) if "json" in names else {}
  there = dict.fromkeys([n for n in names if n != "json"]) | fields
  image = pick("image", names, keys.image_key, IMAGE_NAMES)
  caption = pick("caption", there, keys.caption_key, CAPTION_NAMES)
  if "cls" in names:
    fields["cls"] = parse_number(read("cls").decode("utf-8", "replace"))
  text = read(caption) if caption in names else fields[caption]
  return make_record(read(image), text, fields)


def parse_json(data):
  """The fields of a JSON object in bytes. Raises DamagedRecord."""
  try:
    fields = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise DamagedRecord(f"its JSON cannot be read ({e})", "malformed") from e
  if not isinstance(fields, dict):
    message = f"its JSON is no object but of type {type(fields).__name__}"
    raise DamagedRecord(message, "malformed")
  return fields


def parse_number(text):
  """" 12 " -> 12; what is no whole number stays text."""
  return int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else text


def identity(source, parts):
  """Changes with `parts`, the number of records and a sample of them, not with the folder."""
  n, parts = len(source), list(parts)
  for index in sorted({i * (n - 1) // 7 for i in range(8)}):
    try:
      parts.append(repr(source[index]))
    except DamagedRecord:  # its message may name the folder
      parts.append("damaged")
  return f"{n} records, {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def probe(source):
  """A record that can be used; raises ValueError if a sample has none: a key or a path is wrong."""
  return next(sample(source))


def sample(source):
  """Yields those of up to 32 records, spread over the source, that can be used.

  Raises ValueError if none can.
  """
  n, any_, reason = len(source), False, None
  for index in sorted({i * (n - 1) // 31 for i in range(32)}):
    try:
      record = source[index]
    except DamagedRecord as e:
      reason = e
    else:
      any_ = True
      yield record
  if not any_:
    raise ValueError(f"none of the records looked at can be used; the last: {reason}")
