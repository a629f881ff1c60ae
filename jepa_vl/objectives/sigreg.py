"""SIGReg: sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544).

Embeddings are projected on random unit directions; along each, the empirical characteristic
function is compared with the standard Gaussian's at a few knots (Epps-Pulley statistic).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jepa_vl import sharding

# Slices handled at once (the largest power of two up to this that divides M). Small enough that
# one chunk's cos and sin stay in a core's cache at a batch of 256.
CHUNK = 64

# Chunks are joined until a device has about this many projections of its rows at once. On
# accelerators the number of small operations, and of sums over devices, is what takes time; on a
# CPU more slices make up for fewer rows than 1024: its cores share larger arrays alone.
PROJECTIONS, PROJECTIONS_ON_CPU = 2**20, 2**16

# Float32 means float32 on every chip: TPUs and recent GPUs would multiply in less.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def sigreg(rng, z, *, num_slices, knots, t_max, group_size, scale_rows):
  """Distance of the rows of z from an isotropic standard Gaussian.

  For M fresh unit directions a_m, x = z a_m and knots t_k = k t_max / (T - 1),
  S_m = scale_rows * sum_k w_k phi_k |mean_b exp(i t_k x_b) - phi_k|^2, phi_k = exp(-t_k^2 / 2),
  with trapezoid weights w_k doubled for the symmetric negative half; the value is mean_m S_m.

  Args:
    rng: key; the directions are drawn from it.
    z: (B, D) or (V, B, D) float32; views are tested one by one and averaged.
    num_slices: M, the number of directions.
    knots: T, the number of points in [0, t_max].
    group_size: rows that share one characteristic function; 0 means all B. Several groups are
      averaged. Never a matter of devices: the reference's "local batch" is a group here.
    scale_rows: the multiplier n (the reference: 256, the batch of one process).

  Returns:
    float32 scalar.

  Raises:
    ValueError: B is not a multiple of group_size.
  """
  z = jnp.asarray(z, jnp.float32)
  B, D = z.shape[-2:]
  group_size = group_size or B
  if B % group_size:
    raise ValueError(
      f"group_size={group_size} does not divide the {B} rows; choose a divisor, or 0 for all"
    )
  with jax.named_scope("sigreg"):
    A = _directions(rng, D, num_slices)
    # Views stay apart from the rows, which are split over devices: their groups remain whole there.
    views = z.reshape(-1, B // group_size, group_size, D)
    statistic = lambda groups: _statistic(groups, A, knots, float(t_max))
    if len(views) == 1:
      return scale_rows * statistic(views[0])
    return scale_rows * jnp.mean(jax.vmap(statistic)(views))


def _directions(rng, D, num_slices):
  """num_slices random unit directions as chunks of slices, (chunks, D, chunk)."""
  chunk = math.gcd(num_slices, CHUNK)
  A = jax.random.normal(rng, (num_slices // chunk, D, chunk), jnp.float32)
  return A / jnp.linalg.norm(A, axis=1, keepdims=True)


def _quadrature(knots, t_max):
  """Knots t_k, targets phi_k and weights w_k phi_k as float64 NumPy constants, (T,) each."""
  t = np.linspace(0.0, t_max, knots)
  phi = np.exp(-(t**2) / 2)
  w = np.full(knots, 2 * t[1])
  w[[0, -1]] = t[1]
  return t, phi, w * phi


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _statistic(z, A, knots, t_max):
  """z (G, g, D), A (chunks, D, chunk) -> mean over groups and slices of the statistic, n = 1."""
  return _scan_chunks(z, A, knots, t_max, with_gradient=False)[0]


def _statistic_fwd(z, A, knots, t_max):
  # The value is a scalar, so the gradient can be formed in the same pass over the slices while
  # the projections are at hand; what is kept for the backward pass is one (B, D) array.
  value, grad = _scan_chunks(z, A, knots, t_max, with_gradient=True)
  return value, (grad, A)


def _statistic_bwd(knots, t_max, residuals, cotangent):
  grad, A = residuals
  return cotangent * grad, jnp.zeros_like(A)


_statistic.defvjp(_statistic_fwd, _statistic_bwd)


def _scan_chunks(z, A, knots, t_max, with_gradient):
  """Sums value (and d value / d z) over chunks of slices; no (B, M) array need exist."""
  scan = functools.partial(_scan, knots=knots, t_max=t_max, with_gradient=with_gradient)
  joined = lambda most: lambda z, A: scan(z, _joined(A, z.shape[0] * z.shape[1], most))
  return jax.lax.platform_dependent(
    z, A, cpu=joined(PROJECTIONS_ON_CPU), default=joined(PROJECTIONS)
  )


def _joined(A, rows, projections):
  """The same directions in fewer, larger chunks: a power of two of them becomes one."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = max(rows // (1 if mesh.empty else sharding.batch_shards(mesh)), 1)
  chunks, D, chunk = A.shape
  most = 1 << max((projections // (rows * chunk)).bit_length() - 1, 0)
  join = math.gcd(chunks, most)
  return A.reshape(-1, join, D, chunk).swapaxes(1, 2).reshape(-1, D, join * chunk)


def _scan(z, A, knots, t_max, with_gradient):
  # A value per group, added up after the loop: groups that lie whole on their devices need no
  # communication within it.

  def body(carry, a):
    values, grad = carry
    chunk_values, dx = _chunk(_einsum("gbd,dm->gbm", z, a), knots, t_max, with_gradient)
    if with_gradient:
      grad = grad + _einsum("gbm,dm->gbd", dx, a)
    return (values + chunk_values, grad), None

  values = jnp.zeros(z.shape[0], jnp.float32)
  start = (values, jnp.zeros_like(z) if with_gradient else jnp.zeros(()))
  (values, grad), _ = jax.lax.scan(body, start, A)
  scale = 1.0 / (z.shape[0] * A.shape[0] * A.shape[2])
  return jnp.sum(values) * scale, grad * scale


def _chunk(x, knots, t_max, with_gradient):
  """x (G, g, chunk) projections -> summed statistic (G,), its derivative with respect to x."""
  t, phi, weight = _quadrature(knots, t_max)
  rows = x.shape[1]
  # The knots are equally spaced: cos and sin of k * theta follow from one cos and one sin. Their
  # modulus is 1 but for rounding. They are divided by it because XLA on CPUs takes cos and sin for
  # cheap and would compute both again for each array that follows; a quotient it keeps.
  c1, s1 = jnp.cos(x * t[1]), jnp.sin(x * t[1])
  modulus = jnp.sqrt(c1 * c1 + s1 * s1)
  c1, s1 = c1 / modulus, s1 / modulus

  real, imaginary = [], []
  for c, s in _harmonics(c1, s1, knots):
    real.append(jnp.mean(c, axis=1, keepdims=True))  # (G, 1, chunk)
    imaginary.append(jnp.mean(s, axis=1, keepdims=True))
  distance = sum(
    w * ((re - p) ** 2 + im**2) for w, p, re, im in zip(weight, phi, real, imaginary, strict=True)
  )
  values = jnp.sum(distance, axis=(1, 2))
  if not with_gradient:
    return values, None

  dx = jnp.zeros_like(x)
  for k, (c, s) in enumerate(_harmonics(c1, s1, knots)):
    if k:
      scale = 2 * weight[k] * t[k] / rows
      dx += scale * (imaginary[k] * c - (real[k] - phi[k]) * s)
  return values, dx


def _harmonics(c1, s1, knots):
  """Yields (cos k theta, sin k theta) for k = 0 .. knots - 1 by angle addition."""
  c, s = jnp.ones_like(c1), jnp.zeros_like(s1)
  for _ in range(knots):
    yield c, s
    c, s = c * c1 - s * s1, s * c1 + c * s1
