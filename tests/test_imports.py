"""The direction of imports that the README draws: downward only, siblings apart."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANK = {
  "sharding": 0, "distributed": 0, "chips": 0, "allocator": 0, "compiled": 0,
  "stop": 0,
  "metrics": 1, "workdir": 1,
  "model": 2, "optim": 2, "checkpoint": 2, "online_probe": 2,
  "state": 3, "data": 3, "objectives": 3, "interop": 3,
  "step": 4, "evals": 4, "memory": 4, "checks": 4,
  "build": 5,
  "train": 6, "encoder": 6, "aot": 6,
  "export": 7,
  "main": 8,
}  # fmt: skip
# What `python -m` runs goes through main, which alone reads flags and says errors in words.
PROGRAMS = {("bench.py", "main")}


def edges():
  """(part, imported part, file) for every import of ours within the package."""
  for path in sorted((ROOT / "jepa_vl").rglob("*.py")):
    part = path.relative_to(ROOT / "jepa_vl").parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for name in names:
        if name.startswith("jepa_vl.") and part != "__init__":
          yield part, name.split(".")[1], path.name


def test_imports_point_downward():
  found = list(edges())
  assert len(found) > 30
  upward = [(a, b, f) for a, b, f in found if a != b and RANK[b] >= RANK[a]]
  bad = [f"{f}: {a} -> {b}" for a, b, f in upward if (f, b) not in PROGRAMS]
  assert not bad, "\n".join(bad)


def test_every_part_has_a_rank():
  parts = {p.name.removesuffix(".py") for p in (ROOT / "jepa_vl").iterdir()} - {"__pycache__"}
  assert parts - {"__init__"} == set(RANK)
