"""Prepared files hold the source's records, the same ones however the work was interrupted."""

import csv
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import PIL.Image
import pytest
from records import noise, pair, png, record, write, write_tar

from jepa_vl.data import embedded, pipeline, prepare, prepare_shards, sources, transforms
from jepa_vl.data.prepare_parts import clean_caption
from jepa_vl.data.transforms import DamagedRecord

ROOT = Path(__file__).resolve().parent.parent
COUNT = 330  # records of `source`: six parts


@pytest.fixture(autouse=True, scope="module")
def _small_contact_sheets():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare_shards, "_SHOWN", 4)
    yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Records of which every tenth cannot be used."""
  folder = tmp_path_factory.mktemp("source")
  images = [encoded(noise((90, 120), i), "JPEG") for i in range(10)]
  records = [
    record(i, id=f"id {i}", label=i, image=images[i % 10] if i % 10 else b"nothing")
    for i in range(COUNT)
  ]
  return write(folder / "source.array_record", records)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
  out = tmp_path_factory.mktemp("undisturbed") / "out"
  assert run(source, out) == 0
  return contents(out)


OPTIONS = ("--size=64", "--min-size=4", "--records-per-shard=40", "--held-out=30")


def arguments(path, out, *options, source="array_record"):
  return [f"--source={source}", f"--path={path}", f"--out={out}", *OPTIONS, *options]


def run(path, out, *options, processes=1, source="array_record"):
  return prepare.main(arguments(path, out, *options, f"--processes={processes}", source=source))


def contents(out):
  """The bytes of all that must not hang on how the work was done, by name."""
  names = [*out.glob("*.array_record"), out / "dataset.json", out / "rejected.csv"]
  return {path.name: path.read_bytes() for path in sorted(names)}


def opened(out, name="*"):
  source = sources.ArrayRecord(str(out / f"{name}.array_record"))
  return [source[i] for i in range(len(source))]


def about(out):
  return json.loads((out / "dataset.json").read_text())


def encoded(image, kind, mode="RGB", **options):
  return in_file(PIL.Image.fromarray(image).convert(mode), kind, **options)


def smooth(height, width, seed=0):
  """An image that survives being encoded, as noise does not."""
  return transforms.resize(noise((5, 8), seed), height, width)


def in_file(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


# --- what comes out


def test_every_accepted_record_comes_once_in_an_order_of_its_own(source, undisturbed, tmp_path):
  assert run(source, tmp_path, "--seed=1") == 0
  assert [n for n in sorted(undisturbed) if "held-out" in n] == [
    "held-out-00000-of-00001.array_record"
  ]
  assert "train-00006-of-00007.array_record" in undisturbed and len(undisturbed) == 8 + 2
  held_out, train = opened(tmp_path, "held-out-*"), opened(tmp_path, "train-*")
  assert (len(held_out), len(train)) == (30, 267)
  labels = [r["label"] for r in held_out + train]
  accepted = [i for i in range(COUNT) if i % 10]
  assert sorted(labels) == accepted != labels
  assert np.abs(np.corrcoef(accepted, labels)[0, 1]) < 0.2
  assert contents(tmp_path) != undisturbed  # another seed
  r = train[0]
  assert r["id"] == f"id {r['label']}" and r["caption"] == f"number {r['label']}"
  assert r["tags"] == ["red", "blue"]
  assert transforms.decode(r["image"]).shape == (64, 85, 3)
  assert not (tmp_path / "work").exists()
  assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_dataset_is_described(source, tmp_path, capsys):
  assert run(source, tmp_path) == 0
  said = capsys.readouterr().out
  d = about(tmp_path)
  assert (d["read"], d["accepted"], d["rejected"]) == (330, 297, {"image_undecodable": 33})
  assert (d["held_out"], d["train"], d["exact_duplicates"]) == (30, 267, 0)
  words, aspects = d["caption_words"], d["aspect_ratio"]
  assert words["counts"][words["edges"].index(2) + 1] == sum(words["counts"]) == 297
  assert aspects["counts"][aspects["edges"].index(4 / 3) + 1] == sum(aspects["counts"]) == 297
  assert d["options"]["size"] == 64 and d["options"]["identity"].startswith("330 records, ")
  packed = [msgpack.packb(r) for r in opened(tmp_path)]
  assert d["record_bytes"] == sum(map(len, packed))
  assert d["file_bytes"] == sum(os.path.getsize(tmp_path / n) for n in d["files"])
  assert "accepted 297 of 330 records\nrejected 33 (image_undecodable 33): " in said
  where = f"--config.data.source=array_record --config.data.path='{tmp_path}/train-*.array_record'"
  assert where in said


def test_the_content_hash_knows_records_and_their_order_and_not_the_files(source, tmp_path):
  hashes = []
  for i, options in enumerate(
    [(), ("--records-per-shard=297",), ("--held-out=3",), ("--seed=9",), ("--quality=80",)]
  ):
    assert run(source, tmp_path / str(i), *options) == 0
    hashes.append(about(tmp_path / str(i))["content"])
  assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes)) == 3


def test_without_shuffling_the_order_is_the_source_s(source, tmp_path):
  assert run(source, tmp_path, "--no-shuffle") == 0
  held_out, train = opened(tmp_path, "held-out-*"), opened(tmp_path, "train-*")
  assert [r["label"] for r in held_out + train] == [i for i in range(COUNT) if i % 10]


def test_a_dataset_of_one_record(tmp_path, capsys):
  path = write(tmp_path / "one", [record(5)])
  assert run(path, tmp_path / "out", "--held-out=0") == 0
  (r,) = opened(tmp_path / "out")
  assert r["caption"] == "number 5"
  assert run(path, tmp_path / "none", "--held-out=1") == 1
  assert "--held-out 1 of about 1 records leaves none" in capsys.readouterr().err
  assert not (tmp_path / "none").exists()


def test_images_are_never_enlarged_and_keep_their_bytes_where_they_can(tmp_path):
  image = smooth(40, 64)
  translucent = PIL.Image.fromarray(np.dstack([image, np.full((40, 64, 1), 250, np.uint8)]))
  turned = PIL.Image.Exif()
  turned[PIL.ExifTags.Base.Orientation] = 6
  upright = PIL.Image.Exif()
  upright[PIL.ExifTags.Base.Orientation] = 1
  frames = [PIL.Image.fromarray(smooth(40, 64, seed)) for seed in (1, 2)]
  kept = {
    "jpeg": encoded(image, "JPEG"),
    "progressive": encoded(image, "JPEG", progressive=True),
    "webp": encoded(image, "WEBP"),
    "exif": encoded(image, "JPEG", exif=upright),
  }
  anew = {
    "png": encoded(image, "PNG"),
    "grey": encoded(image, "JPEG", "L"),
    "cmyk": encoded(image, "JPEG", "CMYK"),
    "alpha": in_file(translucent, "WEBP"),
    "animated": encoded(image, "WEBP", save_all=True, append_images=frames),
    "turned": encoded(image, "JPEG", exif=turned),
    "large": encoded(smooth(65, 70), "JPEG"),
  }
  images = kept | anew
  records = [record(i, id=name, image=data) for i, (name, data) in enumerate(images.items())]
  path = write(tmp_path / "x", records)
  assert run(path, tmp_path / "out", "--no-shuffle", "--held-out=0", "--quality=100") == 0
  found = {r["id"]: r["image"] for r in opened(tmp_path / "out")}
  assert set(found) == set(images)
  assert {name for name in images if found[name] == images[name]} == set(kept)
  for name in anew:
    header = PIL.Image.open(io.BytesIO(found[name]))
    assert (header.format, header.mode) == ("JPEG", "RGB")
    before, after = (transforms.decode(x[name]) for x in (images, found))
    if name == "large":
      before = transforms.resize(before, 64, 69)
    assert after.shape == before.shape
    assert np.abs(after.astype(int) - before).mean() < 4, name
  assert transforms.decode(found["turned"]).shape == (64, 40, 3)


def test_images_are_encoded_as_asked(tmp_path):
  path = write(tmp_path / "x", [record(0, image=png(noise((50, 80))))])
  sizes = []
  for quality in (30, 90):
    out = tmp_path / str(quality)
    assert run(path, out, "--held-out=0", "--format=webp", f"--quality={quality}") == 0
    data = opened(out)[0]["image"]
    assert PIL.Image.open(io.BytesIO(data)).format == "WEBP"
    sizes.append(len(data))
  assert sizes[0] < 0.6 * sizes[1]


# --- what is left out, and why

SIXTEEN = PIL.Image.fromarray(noise((20, 24))[..., 0].astype(np.uint16) * 257)
JPEG = encoded(noise((20, 24)), "JPEG")


# key: (members of the tar, the reason why it is rejected or None)
SAMPLES = {
  "good": (pair(0, "good"), None),
  "palette": ([("palette.png", encoded(noise((20, 24)), "PNG", "P")), ("palette.txt", b"x")], None),
  "alpha": ([("alpha.png", encoded(noise((20, 24)), "PNG", "RGBA")), ("alpha.txt", b"x")], None),
  "cmyk": ([("cmyk.jpg", encoded(noise((20, 24)), "JPEG", "CMYK")), ("cmyk.txt", b"x")], None),
  "sixteen": ([("sixteen.png", in_file(SIXTEEN, "PNG")), ("sixteen.txt", b"x")], None),
  "animated": (
    [("animated.webp", encoded(noise((20, 24)), "WEBP", save_all=True,
                               append_images=[PIL.Image.fromarray(noise((20, 24), 2))])),
     ("animated.txt", b"x")], None),
  "long": ([("long.jpg", JPEG), ("long.txt", b"seven w " * 12_500)], None),  # 100 kB
  "corrupt": ([("corrupt.jpg", b"\xff\xd8\xff" + b"x" * 99), ("corrupt.txt", b"x")],
              "image_undecodable"),
  "cut": ([("cut.jpg", JPEG[: len(JPEG) // 2]), ("cut.txt", b"x")], "image_undecodable"),
  "tiny": ([("tiny.png", png(noise((1, 1)))), ("tiny.txt", b"x")], "image_too_small"),
  "slit": ([("slit.png", png(noise((2, 900)))), ("slit.txt", b"x")], "image_too_small"),
  "wide": ([("wide.png", png(noise((4, 65_501)))), ("wide.txt", b"x")], "image_too_large"),
  "no-image": ([("no-image.txt", b"x")], "no_image"),
  "no-caption": ([("no-caption.jpg", JPEG)], "no_caption"),
  "empty": ([("empty.jpg", JPEG), ("empty.txt", b" \n")], "no_caption"),
  "blank": ([("blank.jpg", JPEG), ("blank.txt", b"&#8203;&nbsp;\x07")], "no_caption"),
  "latin": ([("latin.jpg", JPEG), ("latin.txt", "käse".encode("latin-1"))], "caption_encoding"),
  "json": ([*pair(0, "json"), ("json.json", b"{")], "malformed"),
  "number": ([*pair(0, "number"), ("number.json", b'{"n": %d}' % 2**70)], "malformed"),
}  # fmt: skip


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path, capsys):
  for i, (members, _) in enumerate(SAMPLES.values()):
    write_tar(tmp_path / f"{i:02d}.tar", members)
  out = tmp_path / "out"
  assert run(tmp_path, out, "--no-shuffle", "--held-out=0", source="webdataset") == 0
  reasons = [reason for _, reason in SAMPLES.values()]
  with open(out / "rejected.csv", newline="") as f:
    header, *rows = csv.reader(f)
  assert header == ["source_index", "reason", "message"]
  assert {int(i): reason for i, reason, _ in rows} == {
    i: reason for i, reason in enumerate(reasons) if reason
  }
  assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
  messages = {int(i): message for i, _, message in rows}
  names = list(SAMPLES)
  assert "1 x 1 pixels; the shorter side must have 4" in messages[names.index("tiny")]
  assert "sample 'latin'" in messages[names.index("latin")]
  good = opened(out)
  assert len(good) == reasons.count(None) == about(out)["accepted"]
  assert all(transforms.decode(r["image"]).shape == (20, 24, 3) for r in good)
  first = transforms.decode(SAMPLES["animated"][0][0][1])
  assert np.abs(transforms.decode(good[5]["image"]).astype(int) - first).mean() < 15
  assert len(good[6]["caption"]) == 9999 and good[6]["caption"].endswith(" seven w")
  assert about(out)["captions_cut"] == 1
  assert "no_caption 3" in capsys.readouterr().out


def test_duplicates_are_counted_and_stay(tmp_path, monkeypatch):
  """The same image with the same cleaned caption, wherever in the source; not one of them alone."""
  monkeypatch.setattr(prepare_shards, "_HASHED", 40)  # four rounds
  records = [record(i) for i in range(150)]
  records[100] = record(3)
  records[101] = record(3, caption=" number  3\n")
  records[102] = record(3, caption="another")
  records[103] = record(4, caption="number 5")
  assert run(write(tmp_path / "x", records), tmp_path / "out", "--held-out=0") == 0
  assert (about(tmp_path / "out")["exact_duplicates"], len(opened(tmp_path / "out"))) == (2, 150)


@pytest.mark.parametrize(
  ("text", "clean"),
  [
    ("  a \n\t b\u00a0c\u3000", "a b c"),
    ("rock &amp; roll &#39;n&#x27; &lt;b&gt;", "rock & roll 'n' <b>"),
    ("AT&T, ?a=1&copy=2 &nosuch; &amp;amp;", "AT&T, ?a=1&copy=2 &nosuch; &amp;"),
    ("e\u0301", "\u00e9"),
    ("\ufeffa\u200bb\u2060c\x00d\x7fe\x85f", "abcde f"),
    (
      "\u0645\u06cc\u200c\u062e\u0648",
      "\u0645\u06cc\u200c\u062e\u0648",
    ),  # a joiner that is spelling
    ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ("\ufb01 \u00bd \u2460", "\ufb01 \u00bd \u2460"),  # composed, not simplified
  ],
)
def test_captions_are_cleaned_without_losing_what_they_say(text, clean):
  assert clean_caption(text) == (clean, False)


def test_long_captions_are_cut_between_words():
  assert clean_caption("x" * 10_000) == ("x" * 10_000, False)
  assert clean_caption("x" * 10_001) == ("x" * 10_000, True)
  assert clean_caption("x" * 9_999 + " yy") == ("x" * 9_999, True)
  assert clean_caption("x" * 9_998 + " y z") == ("x" * 9_998 + " y", True)
  assert clean_caption("x" * 9_000 + " " + "y" * 1_000) == ("x" * 9_000, True)
  assert clean_caption("\u6a19 " + "\u5b57" * 12_000) == ("\u6a19 " + "\u5b57" * 9_998, True)
  with pytest.raises(DamagedRecord, match="empty"):
    clean_caption("\u200b \x00")


# --- the same bytes, whatever happens


def test_the_memory_for_gathering_does_not_change_a_byte(
  source, undisturbed, tmp_path, monkeypatch
):
  monkeypatch.setattr(prepare_shards, "_GATHERED", 30_000)  # six records of a file's 38
  assert run(source, tmp_path) == 0
  assert contents(tmp_path) == undisturbed


def test_processes_and_shares_do_not_change_a_byte(source, undisturbed, tmp_path, capsys):
  assert run(source, tmp_path / "two", processes=2) == 0
  assert contents(tmp_path / "two") == undisturbed
  out = tmp_path / "shares"
  assert run(source, out, "--shard=0/2") == 0
  said = capsys.readouterr().out
  assert "3 of 6 parts are still to be made, by --shard 1/2" in said
  assert not list(out.glob("*.array_record"))
  assert run(source, out, "--shard=1/2") == 0
  assert contents(out) == undisturbed
  assert run(source, out, "--shard=0/2") == 0
  assert f"{out} is finished" in capsys.readouterr().out


def progress(out):
  """How many parts and final files are whole."""
  return len([*out.glob("work/*.npz"), *out.glob("work/*.digests")])


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(source, undisturbed, tmp_path):
  """Killed three times, by SIGKILL: among the parts, and (from 6 on) among the final files."""
  rng = np.random.default_rng(0)
  out = tmp_path / "out"
  command = [sys.executable, "-m", "jepa_vl.data.prepare", *arguments(source, out)]
  moments = (int(rng.integers(1, 4)), int(rng.integers(4, 7)), int(rng.integers(7, 12)))
  for i, moment in enumerate(moments):
    with subprocess.Popen(
      [*command, f"--processes={1 + i // 2}"], cwd=ROOT, stderr=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
      while progress(out) < moment and process.poll() is None:
        time.sleep(0.0005)
      time.sleep(float(rng.uniform(0, 0.005)))
      process.kill()
    assert process.returncode == -signal.SIGKILL and progress(out) >= moment
    assert not (out / "dataset.json").exists()
  before = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
  assert before
  assert run(source, out) == 0
  assert contents(out) == undisturbed
  after = {path: path.stat().st_mtime_ns for path in before}
  assert sum(after[path] == before[path] for path in before) >= len(before) - 2  # kept, not remade


def test_a_run_stopped_between_any_two_of_its_files_goes_on(
  source, undisturbed, tmp_path, monkeypatch
):
  """Every run gives three files their names and is stopped at the fourth, until none is left."""
  left, replace = 0, os.replace

  def give_name(temporary, path):
    nonlocal left
    left -= 1
    if left < 0:
      raise KeyboardInterrupt
    replace(temporary, path)

  monkeypatch.setattr(os, "replace", give_name)
  runs, code = 0, 1
  while code and runs < 40:
    runs, left = runs + 1, 3
    code = run(source, tmp_path)
  assert runs > 10  # 2 files for each of 6 parts and 8 shards, and 4 more
  assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize(("limit", "whole"), [(100_000, 0), (600_000, 6)])
def test_a_disk_that_runs_full_is_said_and_the_command_goes_on(
  source, tmp_path, capsys, limit, whole
):
  """Here as the largest size of a file: of the parts, or of a final file of all records."""
  options = ("--records-per-shard=400", "--held-out=0")
  assert run(source, tmp_path / "calm", *options) == 0
  out = tmp_path / "out"
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
  try:
    assert run(source, out, *options) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
  said = capsys.readouterr().err
  assert "cannot be written (File too large)" in said and "make room" in said
  assert progress(out) == whole and not list(out.glob("**/*.tmp"))
  assert not list(out.glob("*.array_record"))
  assert run(source, out, *options) == 0
  assert contents(out) == contents(tmp_path / "calm")


def test_a_part_that_was_damaged_is_named_and_can_be_made_again(
  source, undisturbed, tmp_path, capsys
):
  assert run(source, tmp_path, "--shard=0/2") == 0
  part = tmp_path / "work" / "part-00002.array_record"
  os.truncate(part, 70_000)
  assert run(source, tmp_path, "--shard=1/2") == 1
  assert f"{part} cannot be read any more" in capsys.readouterr().err
  part.unlink()
  part.with_suffix(".npz").unlink()
  assert run(source, tmp_path) == 0
  assert contents(tmp_path) == undisturbed


class Deadly:
  """Ends the worker process that reads its record 70."""

  identity = "deadly"

  def __len__(self):
    return COUNT

  def __getitem__(self, index):
    if index == 70 and multiprocessing.parent_process():
      os.kill(os.getpid(), signal.SIGKILL)
    return record(0)


def test_a_worker_that_dies_is_noticed_and_named(tmp_path):
  with pytest.raises(ChildProcessError, match="worker process died while .*part-00001.array_rec"):
    prepare.prepare(Deadly(), options_of(tmp_path), str(tmp_path), processes=2)
  assert not list(tmp_path.glob("**/*.tmp"))


class Odd(Deadly):
  def __getitem__(self, index):
    return record(0) if index != 77 else 1 / 0


def test_an_unforeseen_error_names_the_record(tmp_path):
  with pytest.raises(RuntimeError, match="record 77 of the source: ZeroDivisionError: division"):
    prepare.prepare(Odd(), options_of(tmp_path), str(tmp_path))


def options_of(out):
  return prepare.chosen(prepare._parser().parse_args(arguments("x", out)), "identity")


def test_other_options_or_another_source_are_refused(source, tmp_path, capsys):
  out = tmp_path / "out"
  other = write(tmp_path / "other", [record(i) for i in range(40)])
  for share in ("--shard=0/2", "--shard=1/2"):  # unfinished, then finished
    assert run(source, out, share) == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*")}
    capsys.readouterr()
    assert run(source, out, "--quality=80", "--seed=3") == 1
    assert "quality was 90 and is now 80; seed was 0 and is now 3" in capsys.readouterr().err
    assert run(other, out) == 1
    assert "identity was '330 records, " in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("**/*")}


def test_a_folder_with_other_data_is_not_written_to(source, tmp_path, capsys):
  write(tmp_path / "mine.array_record", [record(0)])
  assert run(source, tmp_path) == 1
  assert "mine.array_record, which is not of this program" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["mine.array_record"]


# --- before the start


@pytest.mark.parametrize("inside", ["prepared", "", "link/prepared"])
def test_a_folder_of_pairs_is_not_written_into(tmp_path, capsys, inside):
  """It could not go on after a stop: its own files would be records of the source."""
  folder = tmp_path / "pairs"
  folder.mkdir()
  for name, data in pair(1) + pair(2):
    (folder / name).write_bytes(data)
  before = sorted(folder.iterdir())
  (tmp_path / "link").symlink_to(folder)
  out = tmp_path / inside if inside.startswith("link") else folder / inside
  assert run(folder, out, "--held-out=0", source="folder") == 1
  assert f"--out {folder}" in (said := capsys.readouterr().err) and "lies within --path" in said
  assert sorted(folder.iterdir()) == before
  assert run(folder, tmp_path / "pairs-prepared", "--held-out=0", source="folder") == 0


def test_the_estimate_is_near_what_comes(source, tmp_path, capsys):
  assert run(source, tmp_path, "--dry-run") == 0
  said = capsys.readouterr().out
  assert not list(tmp_path.iterdir())
  assert "330 records; 256 of them" in said
  share = float(said.partition("rejected: ")[2].partition("%")[0])
  assert abs(share - 10) < 2 and "(image_undecodable " in said
  value, unit = said.partition("a record, ")[2].split()[:2]
  assert run(source, tmp_path) == 0
  assert float(value) == pytest.approx(about(tmp_path)["record_bytes"] / 1e6, rel=0.05)
  assert unit == "MB" and "ms a record" in said and "free" in said


def test_what_does_not_fit_is_refused_before_it_is_begun(source, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(prepare, "_free", lambda folder: 1_000_000)
  assert run(source, tmp_path / "out") == 1
  assert re.search(r"1 MB free, and about 2\.\d+ MB are needed", capsys.readouterr().err)
  assert not (tmp_path / "out").exists()


def test_storage_that_goes_away_is_no_part_of_rejects(tmp_path, capsys, monkeypatch):
  """It ends the run, and once it is back the same command makes the same files."""
  for i in range(200):
    for name, data in pair(i):
      (tmp_path / "pairs" / name).parent.mkdir(exist_ok=True)
      (tmp_path / "pairs" / name).write_bytes(data)
  command = lambda out, *more: run(tmp_path / "pairs", tmp_path / out, *more, source="folder")
  assert command("whole") == 0
  estimate = prepare._estimate

  def then_it_goes(*arguments):
    estimate(*arguments)
    os.rename(tmp_path / "pairs", tmp_path / "away")

  monkeypatch.setattr(prepare, "_estimate", then_it_goes)
  assert command("out") == 1
  said = capsys.readouterr().err
  assert "64 of 64 records in a row have no readable file, the first: record 0" in said
  assert "--max-unreadable" in said and not (tmp_path / "out" / "dataset.json").exists()
  monkeypatch.setattr(prepare, "_estimate", estimate)
  os.rename(tmp_path / "away", tmp_path / "pairs")
  assert command("out") == 0
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  for i in range(0, 64, 4):  # a quarter of the first stretch is missing for good
    (tmp_path / "pairs" / f"{i:06d}.png").unlink()
    (tmp_path / "pairs" / f"{i:06d}.png").symlink_to("nowhere")
  assert command("some") == 1 and command("some", "--max-unreadable=1") == 0
  assert about(tmp_path / "some")["rejected"] == {"unreadable": 16}


def test_what_sources_say_of_keys_is_said_of_flags(source, tmp_path, capsys):
  assert run(source, tmp_path / "out", "--path=/nowhere/*") == 1
  said = capsys.readouterr().err
  assert "--path='/data" in said and "data.path" not in said
  with pytest.raises(SystemExit):
    prepare.main(["--source=webdataset", f"--out={tmp_path}"])
  assert "--path is needed" in capsys.readouterr().err


def test_data_of_which_nothing_can_be_used_is_refused(source, tmp_path, capsys):
  assert run(source, tmp_path / "out", "--min-size=1000") == 1
  assert "none of the 256 records that were tried can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
  "wrong", ["--shard=2/2", "--shard=1", "--quality=101", "--size=0", "--source=tar", "--seed=-1"]
)
def test_wrong_usage_is_said(wrong, tmp_path, capsys):
  with pytest.raises(SystemExit) as e:
    run("x", tmp_path, wrong)
  assert e.value.code == 2 and wrong.partition("=")[0] in capsys.readouterr().err


# --- the embedded data set as tars, and through them


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
  """Split C as tars and, prepared without shuffling, as ArrayRecord."""
  folder = tmp_path_factory.mktemp("emoji")
  tars = embedded.write_tars("C", str(folder), samples=100)
  out = folder / "out"
  assert run(folder, out, "--no-shuffle", "--held-out=0", source="webdataset") == 0
  return tars, sources.open_source("webdataset", str(folder), ""), sources.ArrayRecord(str(out))


def test_the_embedded_tars_read_back_as_the_set_itself(emoji):
  tars, source, prepared = emoji
  expected = embedded.read_records("C")
  assert len(source) == len(prepared) == len(expected) and len(tars) == -(-len(expected) // 100)
  kinds = set()
  for i, e in enumerate(expected):
    for found in (source[i], prepared[i]):
      assert {k: v for k, v in found.items() if k != "image"} == {
        k: v for k, v in e.items() if k != "image" and v != []
      }
    image = source[i]["image"]
    kinds.add(PIL.Image.open(io.BytesIO(image)).format)
    before, after = transforms.decode(e["image"]).astype(int), transforms.decode(image)
    assert np.abs(before - after).mean() < 8
  assert kinds == {"JPEG", "PNG", "WEBP"}


def test_prepared_without_shuffling_trains_in_the_same_order(emoji, tok, cfg):
  def take(source):
    batches = pipeline.batches(source, tok, cfg, batch_size=16, seed=3, start_step=2)
    return [next(batches) for _ in range(3)]

  for a, b in zip(take(emoji[1]), take(emoji[2]), strict=True):
    assert [emoji[1][i]["id"] for i in a["index"]] == [emoji[2][i]["id"] for i in b["index"]]
    np.testing.assert_array_equal(a["text"], b["text"])


def test_the_command_line_writes_tars(tmp_path, capsys):
  embedded.main(["--split=val", f"--tars={tmp_path}"])
  assert "1 tars" in capsys.readouterr().out
  assert [p.name for p in tmp_path.iterdir()] == ["emoji-val-00000.tar"]
