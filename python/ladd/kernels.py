"""The kernels by themselves, on arrays, forward and backward.

Every function takes NumPy arrays or anything that speaks DLPack or `__array__` on the CPU, computes in float32 and returns new
NumPy arrays. A forward returns its result first, then what its backward wants; a backward takes the gradient of the result
first (`d` in front of a name is its gradient) and returns the gradients of the inputs in the order of the forward. TypeError
for what cannot become a float32 array, ValueError for a shape or a number that does not fit; the message says what was expected
and what came. The same inputs give the same bits for any number of threads. The GIL is released while a kernel runs.

Letters: B batch, C channels, H W size, N tokens of one stream, S tokens of all streams, D width, dh head_dim, G groups; "..."
any further axes.

    y, mean, rstd = kernels.layer_norm_modulate_forward(x, shift, scale)
    dx, dshift, dscale = kernels.layer_norm_modulate_backward(dy, x, mean, rstd, scale)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ladd import _core
from ladd.arrays import Array, as_float32, per_sample

__all__ = [
    "adamw",
    "adversarial_loss",
    "attention_backward",
    "attention_forward",
    "conv2d_backward",
    "conv2d_forward",
    "gate_residual_backward",
    "gate_residual_forward",
    "gelu_backward",
    "gelu_forward",
    "group_norm_backward",
    "group_norm_forward",
    "joint_attention_backward",
    "joint_attention_forward",
    "layer_norm_modulate_backward",
    "layer_norm_modulate_forward",
    "linear_backward",
    "linear_forward",
    "linear_gelu_backward",
    "linear_gelu_forward",
    "normal",
    "renoise_backward",
    "renoise_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "silu_backward",
    "silu_forward",
    "spectral_norm_backward",
    "spectral_norm_forward",
]

Stream = tuple[Any, Any, Any]


# ---- attention ---------------------------------------------------------------------------------------------------------------


def attention_forward(q: Any, k: Any, v: Any, *, scale: float | None = None, dtype: str = "float32") -> tuple[Array, Array]:
    """o = softmax(scale q k^T) v for each head, without ever storing the scores (FlashAttention, arXiv 2205.14135, Algorithm
    1).

    q, k, v [B,N,heads,dh]; scale: 1/sqrt(dh) by default. Returns o [B,N,heads,dh] and lse [B,heads,N], the log of the sum of
    exponentials of each row, from which backward recomputes the scores. dtype "bfloat16", as of a model: the factors of all
    products are rounded to it, sums and softmax stay in float32, and so do arrays; ValueError where the processor cannot.
    """
    outs, lse = joint_attention_forward([(q, k, v)], scale=scale, dtype=dtype)
    return outs[0], lse


def attention_backward(
    d_o: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *, scale: float | None = None, dtype: str = "float32"
) -> tuple[Array, Array, Array]:
    """dq, dk, dv [B,N,heads,dh] (arXiv 2205.14135, Algorithm 4); q, k, v, o, lse, scale and dtype as in forward."""
    return joint_attention_backward([d_o], [(q, k, v)], [o], lse, scale=scale, dtype=dtype)[0]


def joint_attention_forward(streams: Sequence[Stream], *, scale: float | None = None, dtype: str = "float32") -> tuple[list[Array], Array]:
    """Attention over one or two token streams at once: every token attends to the tokens of all streams (SD3, arXiv 2403.03206,
    section 4).

    streams: (q, k, v) each, of shape [B,N_i,heads,dh]. Returns one o [B,N_i,heads,dh] a stream, and lse [B,heads,S].
    """
    return _core.attention_forward(_streams(streams), scale, dtype)


def joint_attention_backward(
    d_outs: Sequence[Any],
    streams: Sequence[Stream],
    outs: Sequence[Any],
    lse: Any,
    *,
    scale: float | None = None,
    dtype: str = "float32",
) -> list[tuple[Array, Array, Array]]:
    """(dq, dk, dv) a stream, each [B,N_i,heads,dh]."""
    d_arrays, o_arrays = _arrays(d_outs, "d_outs"), _arrays(outs, "outs")
    return _core.attention_backward(d_arrays, _streams(streams), o_arrays, as_float32(lse, "lse"), scale, dtype)


# ---- norms, modulation, gate -------------------------------------------------------------------------------------------------


def layer_norm_modulate_forward(x: Any, shift: Any = None, scale: Any = None, *, eps: float = 1e-6) -> tuple[Array, Array, Array]:
    """y = (x - mean) rstd (1 + scale) + shift over the last axis (adaLN of DiT, arXiv 2212.09748, section 3.2).

    x [B,N,D]; shift, scale [B,D], both or neither. Returns y [B,N,D], mean [B,N], rstd [B,N] with rstd = 1/sqrt(variance +
    eps).
    """
    return _core.layer_norm_modulate_forward(as_float32(x, "x"), _maybe(shift, "shift"), _maybe(scale, "scale"), eps)


def layer_norm_modulate_backward(dy: Any, x: Any, mean: Any, rstd: Any, scale: Any = None) -> tuple[Array, Array | None, Array | None]:
    """dx [B,N,D], dshift [B,D], dscale [B,D]; the latter two are None when forward had none."""
    arrays = as_float32(dy, "dy"), as_float32(x, "x"), as_float32(mean, "mean"), as_float32(rstd, "rstd")
    return _core.layer_norm_modulate_backward(*arrays, _maybe(scale, "scale"))


def gate_residual_forward(x: Any, y: Any, gate: Any) -> Array:
    """x + gate y: how a block's output joins the residual stream (adaLN-Zero, arXiv 2212.09748, section 3.2). x, y [B,N,D];
    gate [B,D]."""
    return _core.gate_residual_forward(as_float32(x, "x"), as_float32(y, "y"), as_float32(gate, "gate"))


def gate_residual_backward(dout: Any, y: Any, gate: Any) -> tuple[Array, Array, Array]:
    """dx [B,N,D] (a copy of dout), dy [B,N,D], dgate [B,D]."""
    dx = as_float32(dout, "dout")
    dy, dgate = _core.gate_residual_backward(dx, as_float32(y, "y"), as_float32(gate, "gate"))
    return dx.copy(), dy, dgate


def rms_norm_forward(x: Any, weight: Any, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """y = x rstd weight, rstd = 1/sqrt(mean x^2 + eps) over the last axis (arXiv 1910.07467, eq. 4). x [...,D]; weight [D].

    Returns y [...,D] and rstd [...].
    """
    x, shape = _rows(x, "x")
    y, rstd = _core.rms_norm_heads_forward(x[:, None], as_float32(weight, "weight"), eps)
    return y.reshape(shape), rstd.reshape(shape[:-1])


def rms_norm_backward(dy: Any, x: Any, rstd: Any, weight: Any) -> tuple[Array, Array]:
    """dx [...,D], dweight [D]."""
    (dy, dy_shape), (x, shape) = _rows(dy, "dy"), _rows(x, "x")
    _same("dy", dy_shape, shape)
    rstd = as_float32(rstd, "rstd")
    _same("rstd", rstd.shape, shape[:-1])
    dx, dweight = _core.rms_norm_heads_backward(dy[:, None], x[:, None], rstd.reshape(-1, 1), as_float32(weight, "weight"))
    return dx.reshape(shape), dweight


def group_norm_forward(x: Any, weight: Any, bias: Any, groups: int, *, eps: float = 1e-6, silu: bool = False) -> tuple[Array, Array, Array]:
    """y = (x - mean) rstd weight + bias, statistics over each group of C/G channels (arXiv 1803.08494, eq. 1 to 4).

    x [B,C,...]; weight, bias [C]. silu: y is then y sigmoid(y), in the same pass. Returns y [B,C,...], mean [B,G], rstd [B,G].
    """
    x, shape = _planes(x, "x")
    y, mean, rstd = _core.group_norm_forward(x, as_float32(weight, "weight"), as_float32(bias, "bias"), groups, eps, silu)
    return y.reshape(shape), mean, rstd


def group_norm_backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, *, silu: bool = False) -> tuple[Array, Array, Array]:
    """dx [B,C,...], dweight [C], dbias [C]; silu as in forward."""
    (dy, dy_shape), (x, shape) = _planes(dy, "dy"), _planes(x, "x")
    _same("dy", dy_shape, shape)
    statistics = as_float32(mean, "mean"), as_float32(rstd, "rstd")
    dx, dweight, dbias = _core.group_norm_backward(dy, x, *statistics, as_float32(weight, "weight"), as_float32(bias, "bias"), silu)
    return dx.reshape(shape), dweight, dbias


def spectral_norm_forward(weight: Any, u: Any, *, iterations: int = 1) -> tuple[Array, Array, Array, float]:
    """weight / sigma, sigma the largest singular value by power iteration (arXiv 1802.05957, Algorithm 1).

    weight [R,...], taken as a matrix of R rows; u [R], the iteration's state: of length 1 and not orthogonal to the first left
    singular vector, a random one at the start. Returns the normalised weight [R,...], the new u [R] (the given one is left
    alone), v [K] and sigma = u^T weight v.
    """
    weight = as_float32(weight, "weight")
    if weight.ndim < 1:
        raise ValueError(f"weight must have shape [R, ...], got {list(weight.shape)}")
    u = as_float32(u, "u").copy()
    w_hat, v, sigma = _core.spectral_norm_forward(_matrix(weight), u, iterations)
    return w_hat.reshape(weight.shape), u, v, sigma


def spectral_norm_backward(dw_hat: Any, w_hat: Any, u: Any, v: Any, sigma: float) -> Array:
    """dweight [R,...] = (dw_hat - <dw_hat, w_hat> u v^T) / sigma (arXiv 1802.05957, eq. 9 to 12); u and v count as
    constants."""
    dw_hat, w_hat = as_float32(dw_hat, "dw_hat"), as_float32(w_hat, "w_hat")
    _same("dw_hat", dw_hat.shape, w_hat.shape)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a finite number above 0, got {sigma!r}")
    dw = _core.spectral_norm_backward(_matrix(dw_hat), _matrix(w_hat), as_float32(u, "u"), as_float32(v, "v"), sigma)
    return dw.reshape(w_hat.shape)


# ---- linear, activations, convolution ----------------------------------------------------------------------------------------


def linear_forward(x: Any, weight: Any, bias: Any = None) -> Array:
    """y = x weight^T + bias. x [...,K]; weight [N,K]; bias [N] or None. Returns y [...,N]."""
    x, shape = _rows(x, "x")
    y = _core.linear_forward(x, as_float32(weight, "weight"), _maybe(bias, "bias"))
    return y.reshape(*shape[:-1], y.shape[1])


def linear_backward(dy: Any, x: Any, weight: Any) -> tuple[Array, Array, Array]:
    """dx [...,K], dweight [N,K], dbias [N]."""
    (dy, dy_shape), (x, shape) = _rows(dy, "dy"), _rows(x, "x")
    _same("dy without its last axis", dy_shape[:-1], shape[:-1])
    dx, dweight, dbias = _core.linear_backward(dy, x, as_float32(weight, "weight"))
    assert dx is not None and dweight is not None and dbias is not None
    return dx.reshape(shape), dweight, dbias


def linear_gelu_forward(x: Any, weight: Any, bias: Any = None) -> tuple[Array, Array]:
    """y = gelu(h), h = x weight^T + bias, in one pass. x [...,K]; weight [N,K]; bias [N] or None. Returns y and h, both
    [...,N]."""
    x, shape = _rows(x, "x")
    y, h = _core.linear_gelu_forward(x, as_float32(weight, "weight"), _maybe(bias, "bias"))
    return y.reshape(*shape[:-1], y.shape[1]), h.reshape(*shape[:-1], h.shape[1])


def linear_gelu_backward(dy: Any, h: Any, x: Any, weight: Any) -> tuple[Array, Array, Array]:
    """dx [...,K], dweight [N,K], dbias [N]; h as forward returned it."""
    return linear_backward(gelu_backward(dy, h), x, weight)


def gelu_forward(x: Any) -> Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the tanh form that SD3 uses (arXiv 1606.08415, section 2)."""
    return _core.gelu_forward(as_float32(x, "x"))


def gelu_backward(dy: Any, x: Any) -> Array:
    """dx, of x's shape; x is what forward was given."""
    return _core.gelu_backward(as_float32(dy, "dy"), as_float32(x, "x"))


def silu_forward(x: Any) -> Array:
    """x sigmoid(x) (arXiv 1702.03118, eq. 2)."""
    return _core.silu_forward(as_float32(x, "x"))


def silu_backward(dy: Any, x: Any) -> Array:
    """dx, of x's shape; x is what forward was given."""
    return _core.silu_backward(as_float32(dy, "dy"), as_float32(x, "x"))


def conv2d_forward(x: Any, weight: Any, bias: Any = None, *, stride: int = 1, padding: int | tuple[int, int, int, int] = 0) -> Array:
    """Cross-correlation as in every framework. x [B,Cin,H,W]; weight [Cout,Cin,kh,kw]; bias [Cout] or None; zeros around x: one
    number for all sides, or (top, left, bottom, right). Returns y [B,Cout,Ho,Wo], Ho = (H + top + bottom - kh) // stride + 1,
    Wo likewise."""
    return _core.conv2d_forward(as_float32(x, "x"), as_float32(weight, "weight"), _maybe(bias, "bias"), stride, _padding(padding))


def conv2d_backward(
    dy: Any, x: Any, weight: Any, *, stride: int = 1, padding: int | tuple[int, int, int, int] = 0
) -> tuple[Array, Array, Array]:
    """dx [B,Cin,H,W], dweight [Cout,Cin,kh,kw], dbias [Cout]; stride and padding as in forward."""
    arrays = as_float32(dy, "dy"), as_float32(x, "x"), as_float32(weight, "weight")
    dx, dweight, dbias = _core.conv2d_backward(*arrays, stride, _padding(padding))
    assert dx is not None and dweight is not None and dbias is not None
    return dx, dweight, dbias


# ---- adversarial diffusion ---------------------------------------------------------------------------------------------------


def adversarial_loss(
    logits: Any,
    loss: Literal["hinge", "logistic", "lsgan", "bce"],
    role: Literal["real", "fake", "generator"],
    *,
    weight: float = 1.0,
) -> tuple[float, Array]:
    """The mean loss over all logits, and its gradient times `weight` in their shape.

    hinge (arXiv 1705.02894): real max(0, 1 - l), fake max(0, 1 + l), generator -l. logistic (arXiv 1406.2661, non-saturating):
    real softplus(-l), fake softplus(l), generator softplus(-l). lsgan (arXiv 1611.04076, eq. 9): real (l - 1)^2 / 2, fake l^2 /
    2, generator (l - 1)^2 / 2. bce: as logistic. A real picture's logit l grows, a fake's falls, and the generator wants its
    own to grow.
    """
    return _core.adversarial_loss(as_float32(logits, "logits"), loss, role, weight)


def normal(shape: Sequence[int], *, seed: int, purpose: int = 0, step: int = 0, samples: ArrayLike | None = None) -> Array:
    """Standard normal numbers [B,...] of the counter-based Philox4x32-10 (Salmon et al. 2011): row b depends on (seed, purpose,
    step, samples[b]) alone, so not on the batch, the order or the number of threads. samples: integers [B], 0, 1, ... by
    default. purpose: keep a number of your own for each use of randomness; 1 to 99 are those of the trainers'."""
    return _core.normal(tuple(shape), seed, purpose, step, _samples(samples))


def renoise_forward(x0: Any, t: Any, *, seed: int, purpose: int = 0, step: int = 0, samples: ArrayLike | None = None) -> tuple[Array, Array]:
    """x_t = (1 - t) x0 + t e with e from `normal`, in one pass (rectified flow: arXiv 2403.03206, section 2; its use on the
    student's output: LADD, arXiv 2403.12015, section 3.1). x0 [B,...]; t [B] or a number, in [0, 1]. Returns x_t and e, both of x0's
    shape."""
    x0 = as_float32(x0, "x0")
    return _core.renoise(x0, _times(t, x0, "x0"), seed, purpose, step, _samples(samples), return_noise=True)


def renoise_backward(dout: Any, t: Any) -> Array:
    """dx0 [B,...] = (1 - t) dout."""
    dout = as_float32(dout, "dout")
    return _core.row_scale(dout, 1 - _times(t, dout, "dout"))


def adamw(
    p: Any,
    m: Any,
    v: Any,
    g: Any,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step (arXiv 1711.05101, Algorithm 2, with the decay times lr as in PyTorch) on p, m, v **in place**: float32,
    C-contiguous, writable, of one shape, or memory of that kind behind DLPack. g is multiplied by grad_scale first (for
    clipping); step counts from 1. m may be None where betas[0] is 0: it would be nothing but the last gradient."""
    written = {name: _shared(a, name) for name, a in (("p", p), ("m", m), ("v", v)) if a is not None or name != "m"}
    g = as_float32(g, "g")
    for name, array in {**written, "g": g}.items():
        _same(name, array.shape, written["p"].shape)
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    flat = {name: a.reshape(-1) for name, a in written.items()}
    _core.adamw(flat["p"], flat.get("m"), flat["v"], g.reshape(-1), lr, betas[0], betas[1], eps, weight_decay, step, grad_scale)


# ---- arguments ---------------------------------------------------------------------------------------------------------------


def _maybe(value: Any, name: str) -> Array | None:
    return None if value is None else as_float32(value, name)


def _arrays(values: Sequence[Any], name: str) -> list[Array]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of arrays, one a stream, got {type(values).__name__}")
    return [as_float32(value, f"{name}[{i}]") for i, value in enumerate(values)]


def _streams(streams: Sequence[Stream]) -> list[tuple[Array, Array, Array]]:
    if not isinstance(streams, (list, tuple)) or not 1 <= len(streams) <= 2:
        raise TypeError("streams must be a list of one or two (q, k, v)")
    triples = []
    for stream in streams:
        if not isinstance(stream, (list, tuple)) or len(stream) != 3:
            raise TypeError(f"each of streams must be (q, k, v), got {type(stream).__name__}")
        q, k, v = stream
        triples.append((as_float32(q, "q"), as_float32(k, "k"), as_float32(v, "v")))
    return triples


def _rows(value: Any, name: str) -> tuple[Array, tuple[int, ...]]:
    """[...,D] as [rows,D], and the shape it had."""
    array = as_float32(value, name)
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape [..., D], got a single number")
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1]), array.shape


def _planes(value: Any, name: str) -> tuple[Array, tuple[int, ...]]:
    """[B,C,...] as [B,C,L], and the shape it had."""
    array = as_float32(value, name)
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape [B, C, ...], got {list(array.shape)}")
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:])), array.shape


def _matrix(array: Array) -> Array:
    return array.reshape(array.shape[0], math.prod(array.shape[1:])) if array.ndim else array


def _same(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if given != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(given)}")


def _padding(padding: int | tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return (padding, padding, padding, padding) if isinstance(padding, (int, np.integer)) else padding


def _samples(samples: ArrayLike | None) -> NDArray[np.int64] | None:
    if samples is None:
        return None
    array = np.asarray(samples)
    if array.dtype.kind not in "iu":
        raise TypeError(f"samples must be integers, got dtype {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _times(t: Any, rows: Array, name: str) -> Array:
    if rows.ndim == 0:
        raise ValueError(f"{name} must have shape [B, ...], got a single number")
    return per_sample(t, "t", rows.shape[0])


def _shared(value: Any, name: str) -> Array:
    """The memory of `value` itself, for it will be written: nothing is converted."""
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        value = np.from_dlpack(value)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        given = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} is updated in place and must be a float32 array, got {given}")
    if not value.flags.c_contiguous or not value.flags.writeable:
        raise ValueError(f"{name} is updated in place and must be C-contiguous and writable")
    return value
