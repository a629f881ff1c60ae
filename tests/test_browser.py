"""The report in a real browser: it fits a phone, its pictures open, nothing is fetched.

Skipped where there is no Chromium.
"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_report import DRAWN, log, patches_of, read, row

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium")

# The page as a frame of that width; what is found out about it becomes the document's text.
FRAME = """<!doctype html><iframe width="{width}" height="3000" srcdoc="{page}"></iframe><script>
onload = () => {{
  const d = document.querySelector("iframe").contentDocument, images = [...d.images];
  document.body.textContent = "FOUND" + JSON.stringify({{
    width: d.documentElement.scrollWidth, images: images.length,
    broken: images.filter(i => !i.naturalWidth).length,
    requests: d.defaultView.performance.getEntriesByType("resource")
      .filter(e => !e.name.startsWith("data:")).length,
    headings: d.querySelectorAll("h2").length,
  }}) + "END"
}}
</script>"""


def look(page, width, folder):
  """What the browser says of the page in a window of that width."""
  path = folder / f"frame{width}.html"
  path.write_text(FRAME.format(width=width, page=html.escape(page, quote=True)), encoding="utf-8")
  command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
  command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
  out = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
  return json.loads(html.unescape(re.search("FOUND(.*)END", out.stdout)[1]))


def test_a_whole_report_on_a_phone_and_on_a_desk(tmp_path):
  log(tmp_path, (1, 2, 3))
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(9, 8, 8, 3)).astype(np.uint8)
  names = [f"a rather long caption, number {i}, of a picture nobody would draw" for i in range(9)]
  page = read(
    tmp_path,
    config={"model": {"size": "base"}, "data": {"path": "/a/path/" + "long/" * 40}},
    results=[
      row("retrieval", "val", f"i2t/avg/R@{k}", 0.5, random=0.1, untrained=0.2)
      | {"low": 0.4, "high": 0.6}
      for k in (1, 5, 10)
    ],
    embeddings={"image": rng.normal(size=(50, 8)), "text": rng.normal(size=(50, 8))},
    retrieval={"split": "val", "images": images, "captions": names, "similarity": np.eye(9),
               "relevant": np.eye(9, dtype=bool)},
    patches=patches_of(images, rng.normal(size=(9, 2, 2, 5))),
    notes={"val": "a note"},
    drawn=DRAWN,
  )  # fmt: skip
  for width in (390, 1280):
    found = look(page, width, tmp_path)
    assert found["width"] <= width, found
    assert found["images"] == page.count("<img") > 60
    assert found["broken"] == found["requests"] == 0
    assert found["headings"] == page.count("<h2") >= 8
