"""Published figures of accelerators, per JAX device. What no source gives is None, never a guess.

Bandwidths are bytes per second one way: the links between chips (ICI or NVLink) and the share of a
host's or pod's network (DCN) that falls to one device.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One row; `kind` is a part of JAX's `device_kind`."""

  kind: str
  flops: float  # dense bf16, FLOP/s
  hbm: float | None = None  # bytes
  hbm_bandwidth: float | None = None
  link: float | None = None
  network: float | None = None
  source: str = ""
  per_chip: int = 1  # devices that JAX shows of one chip

  @property
  def usable(self):
    """Bytes that a program may have: JAX takes three quarters of a GPU unless it is told to take
    another share (XLA_PYTHON_CLIENT_MEM_FRACTION), and all of a TPU."""
    return self.hbm if self.kind.startswith("TPU") or self.hbm is None else 0.75 * self.hbm


_TPU = "Google Cloud documentation, TPU machine types (BF16, HBM, bidirectional ICI / 2, DCN)"
_V5E = "Google Cloud documentation, TPU v5e (bidirectional ICI / 2, network of a pod / 256 chips)"
_V4 = "Google Cloud documentation, TPU v4; links: 6 of 50 GB/s, Jouppi et al., arXiv 2304.01433"
_A100 = "NVIDIA A100 data sheet (NVLink 600 GB/s / 2); network: DGX A100, 8 x 200 Gb/s"
_H100 = "NVIDIA H100 data sheet (NVLink 900 GB/s / 2); network: DGX H100, 8 x 400 Gb/s"
_H200 = "NVIDIA H200 data sheet (NVLink 900 GB/s / 2); network: DGX H200, 8 x 400 Gb/s"
_DENSE = "NVIDIA data sheet, half of the figure with sparsity"

# First match wins.
CHIPS = (
  Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 300e9, None, _V4),
  Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, _V5E),
  Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9, _V5E),
  Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9, _TPU),
  Chip("TPU v6", 918e12, 32 * GIB, 1638e9, 400e9, 12.5e9, _TPU),
  # A device is one of the chip's two chiplets: half of everything.
  Chip("TPU7x", 1153.5e12, 96 * GIB, 3690e9, 300e9, 6.25e9, _TPU, per_chip=2),
  Chip("H100 PCIe", 756e12, 80e9, 2000e9, None, None, "NVIDIA H100 data sheet"),
  Chip("H100", 989e12, 80e9, 3350e9, 450e9, 50e9, _H100),
  Chip("H200", 989e12, 141e9, 4800e9, 450e9, 50e9, _H200),
  Chip("A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9, 25e9, _A100),
  Chip("A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9, 25e9, _A100),
  Chip("A100", 312e12, source="NVIDIA A100 data sheet"),
  Chip("B200", 2250e12, source=_DENSE),
  Chip("L40S", 362e12, source=_DENSE),
  Chip("L40", 181e12, source=_DENSE),
  Chip("L4", 121e12, source=_DENSE),
)


def find(device_kind):
  """The Chip of a JAX device's `device_kind`, or None where it is not known (a CPU)."""
  return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def has_bfloat16(device):
  """Whether a JAX device, here or only compiled for, is an NVIDIA GPU with bfloat16 tensor cores.

  Triton's kernels, too, need compute capability 8.
  """
  nvidia = device is not None and "nvidia" in device.device_kind.lower()
  return nvidia and float(device.compute_capability) >= 8
