"""How the `emoji` dataset in `emoji/` was made: python -m jepa_vl.data.emoji_build (needs npm).

Icons in three drawing styles are paired with a human-written label and keywords. Splits are made
by concept *family*, so that "man running" never tests what "woman running" taught, and one drawing
style is withheld from training altogether.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import msgpack
import numpy as np

from jepa_vl.data import transforms
from jepa_vl.data.embedded import DIRECTORY

IMAGE_SIZE = 64
WEBP_QUALITY = 80
VOCABULARY = 2000
END_OF_TEXT = "<|endoftext|>"

# Changing the salt redraws every split and makes results incomparable: raise "version" with it.
# Of the salts numbered from 1 this is the first that leaves val and test within 1.2 points of their
# shares, and each group's share in them within a factor of 1.45 of its overall share; it was chosen
# before any model was trained.
SALT = "jepa-vl-emoji-8"
TEST_SHARE = 0.15
VAL_SHARE = 0.10

LABELS = "emojibase-data"
SOURCES = {
  "emoji-datasource-google": "16.0.0",
  "emoji-datasource-twitter": "16.0.0",
  "@lobehub/fluent-emoji-3d": "1.1.0",
  LABELS: "17.0.0",
}
# style -> (package, folder of its images)
STYLES = {
  "noto": ("emoji-datasource-google", "package/img/google/64/"),
  "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64/"),
  "fluent": ("@lobehub/fluent-emoji-3d", "package/assets/"),
}
# split -> (part of the families, styles)
PARTS_OF_SPLITS = {
  "train": ("train", ("noto", "twemoji")),
  "val": ("val", ("noto", "twemoji")),
  "val_style": ("val", ("fluent",)),
  "A": ("train", ("fluent",)),
  "B": ("test", ("noto", "twemoji")),
  "C": ("test", ("fluent",)),
}
EXCLUDED_GROUPS = {"component", "flags"}

PERSON_WORDS = {
  *("man", "woman", "men", "women", "person", "people", "male", "female"),
  *("man’s", "woman’s", "men’s", "women’s"),
}
DIRECTION_WORDS = {
  *("left", "right", "up", "down", "leftwards", "rightwards", "upwards", "downwards"),
  *("facing", "pointed", "oncoming", "tilted", "clockwise", "counterclockwise"),
  # Phases of the moon that mirror each other.
  *("waxing", "waning", "first", "last"),
}
# In a subgroup, shapes that differ in size alone and heads of animals that are also drawn whole.
WORDS_OF_SUBGROUP = {"geometric": {"large", "medium", "small"}, "animal-mammal": {"face"}}
CLOCK_FACE = re.compile(r"^(\w+ o’clock|\w+-thirty)$")
# Families that a label's words do not give away: gendered nouns, mirrored buttons, and "left" in
# the sense of "left behind".
FAMILY_OF_LABEL = {
  "man": "person",
  "woman": "person",
  "person": "person",
  "boy": "child",
  "girl": "child",
  "older person": "old person",
  "old man": "old person",
  "old woman": "old person",
  "prince": "person with crown",
  "princess": "person with crown",
  "person with crown": "person with crown",
  "merman": "merperson",
  "mermaid": "merperson",
  "santa claus": "claus",
  "mrs. claus": "claus",
  "mx claus": "claus",
  "breast-feeding": "feeding baby",
  "men’s room": "restroom",
  "women’s room": "restroom",
  "female sign": "gender sign",
  "male sign": "gender sign",
  "play button": "triangle button",
  "reverse button": "triangle button",
  "upwards button": "triangle button",
  "downwards button": "triangle button",
  "fast-forward button": "double triangle button",
  "fast reverse button": "double triangle button",
  "fast up button": "double triangle button",
  "fast down button": "double triangle button",
  "next track button": "track button",
  "last track button": "track button",
  "left luggage": "left luggage",
}
# Families whose images are, up to a mirror or a turn, almost the same in at least one style.
LOOKALIKE_FAMILY = {
  "in manual wheelchair": "manual wheelchair",
  "in motorized wheelchair": "motorized wheelchair",
  "pouting": "frowning",
  "raised hand": "hand",
  "raised back of hand": "hand",
  "repeat button": "vertical arrows",
  "snowman without snow": "snowman",
  "speaker low volume": "speaker",
  "speaker medium volume": "speaker",
  "speaker high volume": "speaker",
  "speech balloon": "speech bubble",
  "smiling face with horns": "face with horns",
  "angry face with horns": "face with horns",
  "dotted six-pointed star": "star of david",
}


def family_name(label: str, subgroup: str) -> str:
  """Label without its person, gender and direction words; the unit by which splits are made."""
  label = label.lower()
  if label in FAMILY_OF_LABEL:
    return FAMILY_OF_LABEL[label]
  if CLOCK_FACE.match(label):
    return "clock face"
  dropped = PERSON_WORDS | DIRECTION_WORDS | WORDS_OF_SUBGROUP.get(subgroup, set())
  # "up-right" goes as a whole, "upside-down" and "high-speed" stay.
  kept = [
    word
    for word in re.split(r"[,\s]+", label.replace(": ", " : "))
    if not all(part in dropped for part in word.split("-"))
  ]
  # What joined two dropped words ("woman and man", "kiss: woman, man") is left over at either end.
  while kept and kept[0] in {"and", ":"}:
    kept.pop(0)
  while kept and kept[-1] in {"and", ":"}:
    kept.pop()
  name = " ".join(kept).replace(" : ", ": ") or label
  return LOOKALIKE_FAMILY.get(name, name)


def part_of_family(family: str) -> str:
  """Returns "train", "val" or "test", by a salted hash of the family's name."""
  digest = hashlib.sha256(f"{SALT}/{family}".encode()).digest()
  draw = int.from_bytes(digest[:8], "big") / 2**64
  if draw < TEST_SHARE:
    return "test"
  return "val" if draw < TEST_SHARE + VAL_SHARE else "train"


def concept_code(file_name: str) -> str:
  """Upper-case hex code without the variation selector FE0F, on which the sources are joined."""
  stem = file_name.rsplit(".", 1)[0].upper()
  return "-".join(part for part in stem.split("-") if part != "FE0F")


def own_tags(label: str, tags: Iterable[str]) -> list[str]:
  """Tags, in order and once each, that say a word the label does not."""
  label_words = set(re.findall(r"\w+", label))
  kept = dict.fromkeys(tag.lower() for tag in tags)
  return [tag for tag in kept if set(re.findall(r"\w+", tag)) - label_words]


def fetch_package(name: str, cache: Path) -> Path:
  """Path of a source package's archive in `cache`, fetched with `npm pack` when missing."""
  version = SOURCES[name]
  archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
  if archive.exists():
    return archive
  if shutil.which("npm") is None:
    raise SystemExit(
      "Building the emoji dataset needs the command `npm`, which was not found; install Node.js, "
      f"or put {archive.name} into the folder given with --cache."
    )
  command = ["npm", "pack", "--silent", "--pack-destination", str(cache), f"{name}@{version}"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode or not archive.exists():
    raise SystemExit(
      f"`npm pack {name}@{version}` did not write {archive.name}; check that npm can reach its "
      f"registry. npm said: {done.stderr.strip() or 'nothing'}"
    )
  return archive


def read_archive(archive: Path, prefixes: tuple[str, ...]) -> dict[str, bytes]:
  """File name -> contents for the files of an npm archive whose names start with a prefix."""
  try:
    with tarfile.open(archive) as tar:
      files = {
        member.name: tar.extractfile(member).read()
        for member in tar
        if member.isfile() and member.name.startswith(prefixes)
      }
  except (tarfile.TarError, EOFError, OSError) as error:
    raise SystemExit(
      f"Expected {archive} to be a complete npm archive, but reading it failed ({error}); delete "
      "it and build again."
    ) from error
  for prefix in prefixes:
    if not any(name.startswith(prefix) for name in files):
      raise SystemExit(
        f"Expected {prefix} in {archive.name}, but the package has no such file; delete the "
        "archive from the cache folder and build again."
      )
  return files


def load_labels(archive: Path) -> tuple[list[dict], list[str], list[str]]:
  """Concepts with label, tags, group and subgroup, then the names of the groups and subgroups."""
  names = ("package/en/data.json", "package/meta/groups.json")
  data, meta = (json.loads(read_archive(archive, names)[name]) for name in names)
  groups = [key for key, name in meta["groups"].items() if name not in EXCLUDED_GROUPS]
  subgroups = [str(sub) for key in groups for sub in meta["hierarchy"][key]]
  concepts = []
  for entry in data:
    label = entry["label"].lower()
    group = str(entry.get("group"))
    # Families of people are silhouettes with near-equal labels in every source.
    if group not in groups or label == "family" or label.startswith("family:"):
      continue
    subgroup = str(entry["subgroup"])
    concepts.append({
      "concept": concept_code(entry["hexcode"] + "."),
      "caption": label,
      "tags": own_tags(label, entry.get("tags", ())),
      "group": groups.index(group),
      "subgroup": subgroups.index(subgroup),
      "family": family_name(label, meta["subgroups"][subgroup]),
    })
  group_names = [meta["groups"][key].replace("-", " and ") for key in groups]
  subgroup_names = [meta["subgroups"][key].replace("-", " ") for key in subgroups]
  return concepts, group_names, subgroup_names


def encode_image(data: bytes) -> bytes:
  """Composites an image on white, shrinks it to 64x64 with antialiasing and encodes it as WebP."""
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  if image is None:
    raise SystemExit("A source package holds an image that cannot be decoded; fetch it again.")
  if image.ndim == 2:
    image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
  if image.shape[2] == 4:
    alpha = image[..., 3:].astype(np.float32) / 255
    image = image[..., :3] * alpha + 255 * (1 - alpha)
  image = image.astype(np.float32)
  if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
    image = cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
  pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
  return cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes()


def join_sources(cache: Path) -> tuple[list[dict], list[str], list[str]]:
  """Records of every concept that all styles draw, sorted, then group and subgroup names."""
  concepts, groups, subgroups = load_labels(fetch_package(LABELS, cache))
  images = {}
  for style, (package, folder) in STYLES.items():
    files = read_archive(fetch_package(package, cache), (folder,))
    images[style] = {concept_code(name[len(folder):]): data for name, data in files.items()}
  records = [
    {
      "id": f"{style}/{concept['concept']}",
      "image": encode_image(images[style][concept["concept"]]),
      "caption": concept["caption"],
      "tags": concept["tags"],
      "style": style,
      "concept": concept["concept"],
      "family": concept["family"],
      "group": concept["group"],
      "subgroup": concept["subgroup"],
    }
    for concept in sorted(concepts, key=lambda concept: concept["concept"])
    if all(concept["concept"] in images[style] for style in STYLES)
    for style in sorted(STYLES)
  ]
  return records, groups, subgroups


def image_hash(data: bytes) -> str:
  """Hash of the decoded pixels, equal for images that look the same to a model."""
  return hashlib.sha256(transforms.decode(data).tobytes()).hexdigest()


def merge_families(records: list[dict]) -> None:
  """Gives families that share a pixel-identical image one name, in place."""
  parent = {record["family"]: record["family"] for record in records}

  def root(family: str) -> str:
    while parent[family] != family:
      family = parent[family]
    return family

  first_family = {}
  for record in records:
    family = root(record["family"])
    other = root(first_family.setdefault(image_hash(record["image"]), family))
    # The smaller name wins, so that the result does not depend on the order of the records.
    parent[max(family, other)] = min(family, other)
  for record in records:
    record["family"] = root(record["family"])


def check_splits(parts: dict[str, list[dict]]) -> None:
  """Asserts that no family is in two of train, val and test and every concept has all styles."""
  families = {part: {record["family"] for record in records} for part, records in parts.items()}
  assert not families["train"] & families["val"], "families in both train and val"
  assert not families["train"] & families["test"], "families in both train and test"
  assert not families["val"] & families["test"], "families in both val and test"
  styles = {}
  for records in parts.values():
    for record in records:
      styles.setdefault(record["concept"], []).append(record["style"])
  for concept, found in styles.items():
    assert sorted(found) == sorted(STYLES), f"concept {concept} has styles {found}"


def write_split(path: Path, records: list[dict]) -> dict:
  """Writes records as ArrayRecord and returns the split's entry in `dataset.json`."""
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(msgpack.packb(record))
  writer.close()
  return {
    "file": path.name,
    "records": len(records),
    "concepts": len({record["concept"] for record in records}),
    "families": len({record["family"] for record in records}),
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
  }


def train_tokenizer(path: Path, records: list[dict]) -> None:
  """Trains the SentencePiece model on the captions of `records`, with and without tags."""
  import sentencepiece

  lines = [record["caption"] for record in records]
  lines += [transforms.full_caption(record) for record in records]
  with path.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      # Both styles of a concept carry the same caption.
      sentence_iterator=iter(sorted(set(lines))),
      model_writer=file,
      model_type="unigram",
      vocab_size=VOCABULARY,
      character_coverage=1.0,
      byte_fallback=True,
      normalization_rule_name="nmt_nfkc_cf",
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      eos_piece=END_OF_TEXT,
      num_threads=1,
      shuffle_input_sentence=False,
      minloglevel=2,
    )


def build(out: Path, cache: Path) -> dict:
  """Builds the dataset and its tokenizer into `out` and returns the contents of `dataset.json`."""
  records, groups, subgroups = join_sources(cache)
  merge_families(records)
  parts = {"train": [], "val": [], "test": []}
  for record in records:
    parts[part_of_family(record["family"])].append(record)
  check_splits(parts)
  out.mkdir(parents=True, exist_ok=True)
  splits = {}
  for split, (part, styles) in PARTS_OF_SPLITS.items():
    chosen = [record for record in parts[part] if record["style"] in styles]
    splits[split] = write_split(out / f"{split}.array_record", chosen)
  trained_on = PARTS_OF_SPLITS["train"][1]
  train_tokenizer(
    out / "tokenizer.model", [record for record in parts["train"] if record["style"] in trained_on]
  )
  dataset = {
    "name": "emoji",
    "version": 1,
    "image_size": IMAGE_SIZE,
    "groups": groups,
    "subgroups": subgroups,
    "splits": splits,
    "sources": SOURCES,
    "salt": SALT,
  }
  (out / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n", encoding="utf-8")
  # The licences are written by hand; whoever copies the data elsewhere must take them along.
  for licence in DIRECTORY.glob("LICENSE*"):
    if out.resolve() != DIRECTORY:
      shutil.copy(licence, out)
  return dataset


def main(argv: list[str] | None = None) -> None:
  """Command line: fetches the sources with npm and writes the dataset."""
  parser = argparse.ArgumentParser(prog="python -m jepa_vl.data.emoji_build", description=__doc__)
  parser.add_argument("--out", default=str(DIRECTORY), help="folder to write the dataset into")
  parser.add_argument("--cache", help="folder that keeps the fetched packages")
  arguments = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as temporary:
    cache = Path(arguments.cache or temporary)
    cache.mkdir(parents=True, exist_ok=True)
    dataset = build(Path(arguments.out), cache)
  for split, entry in dataset["splits"].items():
    print(split, *(f"{entry[key]} {key}" for key in ("records", "concepts", "families")))


if __name__ == "__main__":
  main()
