"""Drops between class-folder sets: images find their partners, and a planted shift its size."""

import numpy as np
import pytest

from jepa_vl.evals import robustness


@pytest.mark.parametrize(
  ("name", "key"),
  [
    ("n02085620_16757.JPEG", "n02085620_16757"),
    ("fg_n02085620_16757_bg_n01532829_06835.JPEG", "n02085620_16757"),
    ("deep/a.b.png", "a.b"),
    ("fg_only.jpg", "fg_only"),
  ],
)
def test_the_foreground_names_an_image(name, key):
  assert robustness.pair_key(name) == key


def test_images_are_paired_only_if_each_has_exactly_one_partner():
  rows = lambda *names: [{"class": int(n[0]), "file_name": n[1:]} for n in names]
  first = rows("0n1_1.JPEG", "0n1_2.JPEG", "1n1_1.JPEG")
  other = rows("1fg_n1_1_bg_n7_7.JPEG", "0fg_n1_1_bg_n7_7.JPEG", "0fg_n1_2_bg_n8_8.JPEG")
  assert robustness.pairs(first, other, "class").tolist() == [1, 2, 0]
  assert robustness.pairs(first, other[:2], "class") is None
  assert robustness.pairs(first, [*other[:2], other[1]], "class") is None  # twice
  assert robustness.pairs(first, rows("0n1_1.jpg", "0n1_2.jpg", "0n1_1.png"), "class") is None
  assert robustness.pairs(first, [{"class": 0}] * 3, "class") is None


def test_a_planted_drop_is_found_and_pairing_narrows_its_interval():
  """A tenth of the images that were right are wrong elsewhere, in another order."""
  rng = np.random.default_rng(0)
  first = (rng.random((1000, 1)) < 0.7).astype(bool)
  other = first & (rng.random((1000, 1)) < 0.9)
  order = rng.permutation(1000)
  shuffled = np.empty_like(other)
  shuffled[order] = other  # record i has its partner at order[i]
  expected = 100 * (first.mean() - other.mean())
  drop, low, high = robustness.drops(first, shuffled, order)
  assert drop == pytest.approx(expected) and low < drop < high
  gaps = 100 * (first.astype(float) - other)
  error = 1.96 * gaps.std() / 1000**0.5
  assert (high - low) / 2 == pytest.approx(error, rel=0.15)
  alone, wide_low, wide_high = robustness.drops(first, shuffled, None)
  assert alone == pytest.approx(expected) and wide_high - wide_low > 1.5 * (high - low)
