"""Accelerators by name, of which none has to be here: `v5e:16x16`, `2*v6e-64`, `h100:4x8`.

TPU names are a generation and its chips as a grid, or Google's accelerator type: v5e-256 and v6e-64
count chips, v4-64 and v5p-64 count TensorCores, two to a chip. `2*` means two slices, joined by the
data centre's network. NVIDIA names are GPUs of one node, or nodes x GPUs.
"""

import dataclasses
import importlib.util
import math
import re

import jax

from jepa_vl import chips

_FLAT = {n: g for n, g in zip(
  (1, 4, 8, 16, 32, 64, 128, 256),
  ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), strict=True,
)}  # fmt: skip
_CUBES = {math.prod(map(int, g.split("x"))): g for g in (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)}  # fmt: skip

# generation: (grids by number of chips, what Google's accelerator type counts per chip, options)
_TPUS = {
  "v4": (_CUBES, 2, {"chip_config_name": "megacore"}),  # one device per chip, as on a v4 VM
  "v5e": (_FLAT, 1, {}),
  "v5p": (_CUBES, 2, {}),
  "v6e": (_FLAT, 1, {}),
  "tpu7x": (_CUBES, None, {}),
}

# What XLA's GPU compiler asks of a chip: its size, not its speed. Figures: NVIDIA's architecture
# white papers and CUDA programming guide, compute capabilities 8.0 and 9.0.
_AMPERE = dict(
  capability=8, cores=108, fpus=64, clock_ghz=1.41, l2=40 << 20, shared=164 << 10, optin=163 << 10
)
_HOPPER = dict(
  capability=9, cores=132, fpus=128, clock_ghz=1.98, l2=50 << 20, shared=228 << 10, optin=227 << 10
)
_GPUS = {
  "a100": ("NVIDIA A100-SXM4-80GB", _AMPERE),
  "a100-40": ("NVIDIA A100-SXM4-40GB", _AMPERE),
  "h100": ("NVIDIA H100 80GB HBM3", _HOPPER),
  "h200": ("NVIDIA H200", _HOPPER),
}

KNOWN = (
  "v5e:16x16, v5e-256, v6e:8x8, v6e-64, v5p:4x4x4, v5p-64 (64 cores, 32 chips), v4:2x2x2, v4-64, "
  "tpu7x:2x2x1, 2*v5e:16x16 (two slices), a100:8, a100-40:8, h100:8, h200:8, h100:4x8 (nodes x "
  "GPUs)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for; links join those of equal `domains[i]`, the slice or node of each."""

  name: str
  devices: list
  chip: chips.Chip
  domains: list

  @property
  def is_tpu(self):
    return self.devices[0].platform == "tpu"


def get(name):
  """The Topology of a name, without any such device.

  Raises:
    ValueError: an unknown name, or the compiler for it is not installed.
  """
  kind, shape, slices = _parse(name)
  if kind in _TPUS:
    return _tpu(name, kind, shape, slices)
  return _nvidia(name, kind, shape)


def _parse(name):
  """"2*v5e-256" -> ("v5e", "16x16", 2); "h100:8" -> ("h100", "1x8", 1)."""
  found = re.fullmatch(r"(?:(\d+)\*)?(\w+?(?:-40)?)(?::(\d+(?:x\d+)*)|-(\d+))", name)
  slices, kind, grid, count = found.groups() if found else (None, None, None, None)
  kind = {"v5litepod": "v5e"}.get(kind, kind)
  slices = int(slices or 1)
  if kind in _GPUS and grid and slices == 1 and grid.count("x") < 2:
    return kind, grid if "x" in grid else f"1x{grid}", 1
  dimensions = 3 if kind in _TPUS and _TPUS[kind][0] is _CUBES else 2
  if kind in _TPUS and grid and slices and grid.count("x") == dimensions - 1:
    return kind, grid, slices
  if kind in _TPUS and count and slices and _TPUS[kind][1]:
    grids, per_chip, _ = _TPUS[kind]
    by_type = {n * per_chip: g for n, g in grids.items()}
    if int(count) in by_type:
      return kind, by_type[int(count)], slices
    raise ValueError(
      f"--topology={name}: {kind}-N is known for N = {', '.join(map(str, by_type))}; other sizes "
      f"as a grid of chips, for example {kind}:{grids[16]}"
    )
  raise ValueError(f"--topology={name!r} is not known; names look like {KNOWN}")


def _tpu(name, kind, shape, slices):
  _needs("libtpu", name, f'pip install "jax[tpu]=={jax.__version__}"')
  options = dict(_TPUS[kind][2])
  sizes = [int(s) for s in shape.split("x")]
  if math.prod(sizes) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if slices > 1:
    options["num_slices"] = slices
  devices = _devices(f"{kind}:{shape}", "tpu", name, options)
  domains = [getattr(d, "slice_index", None) or 0 for d in devices]
  return Topology(name, devices, chips.find(devices[0].device_kind), domains)


def _nvidia(name, kind, shape):
  version = jax.__version__
  for module in ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"):
    _needs(module, name, (
      f"pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12"
    ))  # fmt: skip
  described, family = _GPUS[kind]
  chip = chips.find(described)
  nodes, per_node = map(int, shape.split("x"))
  options = {
    "topology": f"1x{nodes}x{per_node}", "target_config": _target_config(described, chip, **family)
  }  # fmt: skip
  devices = _devices("", "cuda", name, options)
  return Topology(name, devices, chip, [i // per_node for i in range(len(devices))])


def _needs(module, name, command):
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  if not found:
    raise ValueError(f"--topology={name} needs the compiler for such chips, and no chip: {command}")


def _devices(topology, platform, name, options):
  from jax.experimental import topologies  # late: it starts the platform's library

  try:
    return topologies.get_topology_desc(topology, platform, **options).devices
  except Exception as e:  # XLA's own error types differ between versions
    reason = str(e).splitlines()[0]
    raise ValueError(
      f"--topology={name} is refused by the compiler ({reason}); names look like {KNOWN}"
    ) from e


def _target_config(described, chip, *, capability, cores, fpus, clock_ghz, l2, shared, optin):
  """The text form of XLA's GpuTargetConfigProto."""
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
      shared_memory_per_core: {shared} core_count: {cores} fpus_per_core: {fpus}
      clock_rate_ghz: {clock_ghz} l2_cache_size: {l2}
      device_memory_size: {int(chip.hbm)} memory_bandwidth: {int(chip.hbm_bandwidth)}
      cuda_compute_capability {{ major: {capability} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{described}"
  """
