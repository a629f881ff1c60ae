"""Self-attention over short sequences, by name of its implementation."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jepa_vl import chips, sharding
from jepa_vl.model import attention_gpu, attention_tpu

# Up to here a sequence fits into the vector memory of a v5e, v5p or v6e at the width of any of our
# sizes; beyond, what is kept on the chip is better cut into blocks.
PALLAS_LENGTH = 512

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit of weight 0; as JAX's own attention has


def xla(qkv, mask, causal, length):
  """As XLA compiles it: the weights are an array of their own, (B, H, L, L) float32."""
  q, k, v = parts(qkv)
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation="xla"
  )


def cudnn(qkv, mask, causal, length):
  """cuDNN's flash attention: NVIDIA GPUs, bfloat16, head dimension up to 128."""
  return _cudnn(qkv, mask, causal, length, "cudnn")


def _cudnn(qkv, mask, causal, length, implementation):
  q, k, v = parts(qkv)
  lengths = None
  if length and length < q.shape[1] and mask is None and not causal:
    lengths = jnp.full(len(q), length, jnp.int32)
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation=implementation,
    query_seq_lengths=lengths, key_value_seq_lengths=lengths,
  )  # fmt: skip


def pallas(qkv, mask, causal, length, bias=None):
  """Kernels of our own for TPUs (`attention_tpu`) and NVIDIA GPUs (`attention_gpu`), which keep the
  weights on the chip.

  Interpreted on CPUs, slowly. Masks and long sequences go to `xla`; so does what is packed, but on
  GPUs, and on GPUs what is not bfloat16.
  """
  if bias is None:
    bias = jnp.zeros(qkv.shape[3:], qkv.dtype)
  packed = mask is not None and mask.ndim == 2
  if qkv.shape[1] > PALLAS_LENGTH or mask is not None and not packed:
    return xla(with_query_bias(qkv, bias), _of_pairs(mask), causal, length)
  f = functools.partial(_pallas, causal=causal)
  arrays = (qkv, bias, mask) if packed else (qkv, bias)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f(*arrays)
  # The compiler cannot divide a kernel; each device runs it on its own rows and heads.
  batch, _, _, heads, _ = spec = sharding.spec_of(qkv.shape, "batch", None, None, "tensor", None)
  specs = (spec, P(heads, None), P(batch, None))[: len(arrays)]
  out = P(batch, None, heads, None)
  return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def _pallas(qkv, bias, first=None, *, causal):
  B, L, _, H, K = qkv.shape

  def default(qkv, bias, first=None):
    return xla(with_query_bias(qkv, bias), _of_pairs(first), causal, L)

  def tpu(qkv, bias, first=None, interpret=False):
    if first is not None:
      return default(qkv, bias, first)
    qkv = with_query_bias(qkv, bias).reshape(B, L, 3 * H * K)
    return attention_tpu.attention(qkv, H, causal, interpret).reshape(B, L, H, K)

  def cuda(qkv, bias, first=None):
    if not attention_gpu.takes(qkv):
      return default(qkv, bias, first)
    return attention_gpu.attention(qkv, bias, first, causal, False)

  arrays = (qkv, bias) if first is None else (qkv, bias, first)
  # Not by the default backend: a program may be compiled for chips that are not here.
  return jax.lax.platform_dependent(
    *arrays, tpu=tpu, cuda=cuda, cpu=functools.partial(tpu, interpret=True)
  )


def _of_pairs(mask):
  """A mask as of `attend`, of keys and queries if it is of queries' first keys."""
  if mask is None or mask.ndim != 2:
    return mask
  return (jnp.arange(mask.shape[1]) >= mask[..., None])[:, None]


@jax.custom_vjp
def with_bias(x, bias):
  """x (B, L, ...) as it is, with a bias (...) in it whose gradient was stopped."""
  return x


with_bias.defvjp(
  lambda x, bias: (x, bias),
  lambda bias, grad: (grad, _sum(grad, bias)),
)


@jax.custom_vjp
def with_query_bias(qkv, bias):
  """qkv, as of `attend`, as it is, with a bias (H, K) in the queries whose gradient was stopped."""
  return qkv


with_query_bias.defvjp(
  lambda qkv, bias: (qkv, bias),
  lambda bias, grad: (grad, _sum(parts(grad)[0], bias)),
)


def _sum(grad, bias):
  return jnp.sum(grad, axis=(0, 1), dtype=jnp.float32).astype(bias.dtype)


def parts(qkv):
  """Queries, keys and values, (..., L, H, K) each, of what `attend` takes."""
  return qkv if isinstance(qkv, tuple) else tuple(qkv[..., i, :, :] for i in range(3))


def short(qkv, mask, causal, length):
  """XLA's with fewer passes over the weights: they are never divided by their sums, outputs are.

  With P = exp(S - max S) and r = 1 / sum P, O = r (P V), and given dO, dV = P^T (r dO) and
  dS = r P * (dO V^T - rowsum(dO * O)): P serves both passes as it is.
  """
  if causal:
    earlier = jnp.tril(jnp.ones((qkv.shape[1],) * 2, bool))
    mask = earlier if mask is None else mask & earlier
  return _short(qkv, mask)


@jax.custom_vjp
def _short(qkv, mask):
  return _short_forward(qkv, mask)[0]


def _short_forward(qkv, mask):
  q, k, v = (x.swapaxes(1, 2) for x in parts(qkv))  # (B, H, L, K)
  q = q * q.shape[-1] ** -0.5
  scores = _product("bhlk,bhmk->bhlm", q, k)
  if mask is not None:
    scores = jnp.where(mask, scores, NEVER)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))  # (B, H, L, L) float32
  share = 1 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(v.dtype)
  out = _product("bhlm,bhmk->bhlk", weights, v) * share
  return out.astype(v.dtype).swapaxes(1, 2), (q, k, v, weights, share, out)


def _short_backward(kept, grad):
  q, k, v, weights, share, out = kept
  grad = grad.swapaxes(1, 2)
  # Sums over the rows of weights, as products of which these are the second: on CPUs up to twice as
  # fast as with them turned.
  dv = _product("bhlk,bhlm->bhkm", (grad * share).astype(v.dtype), weights)
  own = jnp.sum(grad * out, axis=-1, keepdims=True)  # of float32: it is taken from its like
  ds = (weights * share * (_product("bhlk,bhmk->bhlm", grad, v) - own)).astype(v.dtype)
  dq = _product("bhlm,bhmk->bhlk", ds, k) * q.shape[-1] ** -0.5
  dk = _product("bhlk,bhlm->bhkm", q, ds)
  by_token = [dq.transpose(0, 2, 1, 3), dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2)]
  return jnp.stack([x.astype(v.dtype) for x in by_token], axis=2), None  # (B, L, 3, H, K)


_short.defvjp(_short_forward, _short_backward)


def _product(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


# All compute the same. `short` is the fastest on CPUs and, of the first two, moves less through a
# TPU's main memory as compiled. In a train step on an H100 `pallas` is faster than `cudnn`, that
# than `short`; for TPUs it was compiled, never timed, and beside remat=names the compiler's
# figures see no gain in it.
IMPLEMENTATIONS = {"short": short, "xla": xla, "pallas": pallas, "cudnn": cudnn}


# These take queries, keys and values as three arrays: what is cut out of one is copied once more.
APART = {"cudnn"}


def visible(shape, mask, causal, length, select):
  """Which keys of its row each selected token sees, (B, g, L) bool.

  shape: B and L. mask: (B, 1, 1 or L, L) bool, as of `attend`, or None. select: from an array
  (B, L, n) to the selected tokens' (B, g, n).
  """
  B, L = shape
  key = jnp.arange(L)
  seen = jnp.broadcast_to(key < length, (B, 1, L))
  if causal:
    seen &= key <= select(jnp.broadcast_to(key[:, None], (B, L, 1)))
  if mask is not None:
    mask = mask[:, 0]  # (B, 1 or L, L)
    seen &= mask if mask.shape[1] == 1 else select(mask)
  return seen


def read(q, k, v, visible):
  """Attention of a few queries, (B, g, H, K), over keys and values (B, L, H, K) -> (B, g, H, K).

  visible: (B, g, L). As sums of products in float32 and no matrix products, for which one query is
  too thin: keys and values are read as they lie.
  """
  dtype, (q, k, v) = v.dtype, (x.astype(jnp.float32) for x in (q, k, v))
  logits = jnp.sum(q[:, :, None] * k[:, None], axis=-1) * q.shape[-1] ** -0.5  # (B, g, L, H)
  weights = jax.nn.softmax(jnp.where(visible[..., None], logits, NEVER), axis=2)
  return jnp.sum(weights[..., None] * v[:, None], axis=2).astype(dtype)


def pad(x, mask, implementation):
  """Tokens x (B, L, W) and their mask as `attend` wants them, for all layers at once.

  JAX refuses to differentiate cuDNN's attention over an odd number of tokens: one more is put
  behind them, which no mask shows.
  """
  L = x.shape[1]
  if implementation != "cudnn" or L % 2 == 0:
    return x, mask
  behind = lambda x, axes: jnp.pad(x, [(0, int(axis in axes)) for axis in range(x.ndim)])
  if mask is not None and mask.ndim == 2:
    mask = behind(mask, (1,))
  elif mask is not None:
    mask = behind(mask, (2, 3) if mask.shape[2] == L else (3,))
  return behind(x, (1,)), mask


@jax.custom_vjp
def settle(x):
  """Tokens (B, L, W), on NVIDIA GPUs with each one's numbers together in memory.

  XLA (of jax 0.11) there else puts the batch last and turns all tokens at every layer norm: the
  residual stream's traffic doubles. So do their gradients lie, which are not summed over devices.
  """
  return _settle(x)


def _settle(x):
  in_rows = lambda x: with_layout_constraint(x, Layout((0, 1, 2)))
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # the compiler would gather all rows on every device to constrain them
    rows = sharding.spec_of(x.shape, "batch", None, None)
    in_rows = jax.shard_map(in_rows, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
  return jax.lax.platform_dependent(x, cuda=in_rows, default=lambda x: x)


settle.defvjp(lambda x: (_settle(x), None), lambda _, grad: (_settle(grad),))


def choose(name, dtype, device, lengths, size, masked):
  """What `model.attention` = "auto" is for so many tokens and heads of `size` numbers.

  In bfloat16 on an NVIDIA GPU of compute capability 8 or later pallas, or where that is not for
  such arrays or a mask cudnn, if it is at hand; else short. device: a jax device, or None. lengths:
  of the towers' rows in training. masked: whether a tower has a mask of keys.
  """
  if name != "auto":
    return name
  if dtype != jnp.bfloat16 or not chips.has_bfloat16(device):
    return "short"
  examples = [jax.ShapeDtypeStruct((1, n, 3, 1, size), dtype) for n in lengths]
  if not masked and max(lengths) <= PALLAS_LENGTH and all(map(attention_gpu.takes, examples)):
    return "pallas"
  # A GPU that is only compiled for has no cuDNN to ask.
  return "cudnn" if jax.default_backend() == "gpu" else "short"


def attend(qkv, mask, *, causal, implementation, length=None, bias=None):
  """Queries, keys and values of all heads, (B, L, 3, H, K) -> (B, L, H, K).

  qkv: one array, or where `implementation` is in APART a tuple of three, (B, L, H, K) each.
  mask: (B, 1, 1 or L, L) bool over keys, True where a query may look, or (B, L) int32, the first
  key that each query may look at, or None; `causal` comes on top of it. implementation: a name of
  IMPLEMENTATIONS. length: the tokens before those that `pad` put behind them; None: all. bias:
  (H, K), what was added to the queries with its gradient stopped; it has that gradient from here.

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"model.attention must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
    )
  if implementation == "pallas":
    return pallas(qkv, mask, causal, length, bias)
  if bias is not None:
    qkv = with_query_bias(qkv, bias)
  return IMPLEMENTATIONS[implementation](qkv, _of_pairs(mask), causal, length)
