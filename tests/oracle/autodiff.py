"""Reverse-mode differentiation over float64 NumPy arrays: just enough to give the oracles exact gradients.

An operation returns a Tensor that remembers its inputs and how to send a gradient to them; `backward` walks the graph once, last
made first. Everything is written for being obviously right, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


class Tensor:
    """A float64 array with a gradient of the same shape after `backward`."""

    def __init__(self, data: Any, parents: tuple[Tensor, ...] = (), send: Callable[[Array], tuple[Array, ...]] | None = None):
        self.data: Array = np.asarray(data, dtype=np.float64)
        self.grad: Array | None = None
        self.parents = parents
        self.send = send

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def backward(self, gradient: Any = 1.0) -> None:
        backward([(self, gradient)])

    def __add__(self, other: Any) -> Tensor:
        a, b = self, tensor(other)
        return Tensor(a.data + b.data, (a, b), lambda g: (_unbroadcast(g, a.shape), _unbroadcast(g, b.shape)))

    def __mul__(self, other: Any) -> Tensor:
        a, b = self, tensor(other)
        return Tensor(a.data * b.data, (a, b), lambda g: (_unbroadcast(g * b.data, a.shape), _unbroadcast(g * a.data, b.shape)))

    def __truediv__(self, other: Any) -> Tensor:
        return self * tensor(other) ** -1.0

    def __sub__(self, other: Any) -> Tensor:
        return self + tensor(other) * -1.0

    def __rsub__(self, other: Any) -> Tensor:
        return tensor(other) - self

    def __neg__(self) -> Tensor:
        return self * -1.0

    __radd__ = __add__
    __rmul__ = __mul__

    def __pow__(self, exponent: float) -> Tensor:
        return Tensor(self.data**exponent, (self,), lambda g: (g * exponent * self.data ** (exponent - 1),))

    def __matmul__(self, other: Tensor) -> Tensor:
        a, b = self, other
        return Tensor(
            a.data @ b.data,
            (a, b),
            lambda g: (_unbroadcast(g @ b.data.swapaxes(-1, -2), a.shape), _unbroadcast(a.data.swapaxes(-1, -2) @ g, b.shape)),
        )

    def __getitem__(self, index: Any) -> Tensor:
        def send(g: Array) -> tuple[Array]:
            whole = np.zeros_like(self.data)
            whole[index] += g  # basic slices only: no element is selected twice
            return (whole,)

        return Tensor(self.data[index], (self,), send)

    def reshape(self, *shape: int) -> Tensor:
        return Tensor(self.data.reshape(shape), (self,), lambda g: (g.reshape(self.shape),))

    def transpose(self, *axes: int) -> Tensor:
        return Tensor(self.data.transpose(axes), (self,), lambda g: (g.transpose(np.argsort(axes)),))

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        def send(g: Array) -> tuple[Array]:
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), send)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        total = self.sum(axis, keepdims)
        return total * (total.data.size / self.data.size)


def tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)


def _unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sums a gradient over the axes along which its tensor was repeated."""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
    return g.sum(axis=repeated, keepdims=True) if repeated else g


def backward(seeds: Sequence[tuple[Tensor, Any]]) -> None:
    """Gradients of sum over (output, seed) of <output, seed>, left in `.grad` of every tensor that took part."""
    order: list[Tensor] = []
    seen: set[int] = set()
    stack = [(out, False) for out, _ in seeds]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    for node in order:
        node.grad = None
    for out, seed in seeds:
        seed = np.broadcast_to(np.asarray(seed, dtype=np.float64), out.shape)
        out.grad = seed.copy() if out.grad is None else out.grad + seed
    for node in reversed(order):
        if node.send is None or node.grad is None:
            continue
        for parent, g in zip(node.parents, node.send(node.grad), strict=True):
            parent.grad = np.array(g) if parent.grad is None else parent.grad + g


def _elementwise(x: Tensor, value: Array, slope: Array) -> Tensor:
    return Tensor(value, (x,), lambda g: (g * slope,))


def exp(x: Tensor) -> Tensor:
    y = np.exp(x.data)
    return _elementwise(x, y, y)


def log(x: Tensor) -> Tensor:
    return _elementwise(x, np.log(x.data), 1 / x.data)


def tanh(x: Tensor) -> Tensor:
    y = np.tanh(x.data)
    return _elementwise(x, y, 1 - y * y)


def sigmoid(x: Tensor) -> Tensor:
    y = 0.5 * (1 + np.tanh(0.5 * x.data))
    return _elementwise(x, y, y * (1 - y))


def softplus(x: Tensor) -> Tensor:
    return _elementwise(x, np.logaddexp(0, x.data), 0.5 * (1 + np.tanh(0.5 * x.data)))


def relu(x: Tensor) -> Tensor:
    return _elementwise(x, np.maximum(x.data, 0), (x.data > 0).astype(np.float64))


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    factor = np.where(x.data > 0, 1.0, slope)
    return _elementwise(x, x.data * factor, factor)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return _elementwise(x, np.clip(x.data, low, high), ((x.data >= low) & (x.data <= high)).astype(np.float64))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """The tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return x * 0.5 * (tanh((x + x**3 * 0.044715) * np.sqrt(2 / np.pi)) + 1.0)


def concat(parts: Sequence[Tensor], axis: int) -> Tensor:
    cuts = np.cumsum([part.shape[axis] for part in parts])[:-1]
    return Tensor(np.concatenate([part.data for part in parts], axis), tuple(parts), lambda g: tuple(np.split(g, cuts, axis)))


def softmax(x: Tensor) -> Tensor:
    e = exp(x - x.data.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + b over the last axis."""
    y = x.reshape(-1, x.shape[-1]) @ weight.transpose(1, 0)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * ((centred**2).mean(axis=-1, keepdims=True) + eps) ** -0.5


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * ((x**2).mean(axis=-1, keepdims=True) + eps) ** -0.5 * weight


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    batch, channels, *space = x.shape
    per_group = layer_norm(x.reshape(batch, groups, -1), eps).reshape(*x.shape)
    shape = (channels,) + (1,) * len(space)
    return per_group * gamma.reshape(*shape) + beta.reshape(*shape)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over [..., tokens, dh]; scale is 1/sqrt(dh) unless given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    axes = (*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2)
    return softmax((q @ k.transpose(*axes)) * scale) @ v


def pad2d(x: Tensor, top: int, left: int, bottom: int, right: int) -> Tensor:
    rows, columns = x.shape[2:]
    padded = np.pad(x.data, ((0, 0), (0, 0), (top, bottom), (left, right)))
    return Tensor(padded, (x,), lambda g: (g[:, :, top : top + rows, left : left + columns],))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, pad: Sequence[int] = (0, 0, 0, 0)) -> Tensor:
    """Cross-correlation, weight [Cout, Cin, kh, kw], pad = (top, left, bottom, right): a matrix product a kernel position."""
    x = pad2d(x, *pad)
    c_out, _, kh, kw = weight.shape
    batch, _, rows, columns = x.shape
    rows, columns = (rows - kh) // stride + 1, (columns - kw) // stride + 1
    out = None
    for dy in range(kh):
        for dx in range(kw):
            window = x[:, :, dy : dy + stride * (rows - 1) + 1 : stride, dx : dx + stride * (columns - 1) + 1 : stride]
            term = weight[:, :, dy, dx] @ window.reshape(batch, -1, rows * columns)
            out = term if out is None else out + term
    assert out is not None
    y = out.reshape(batch, c_out, rows, columns)
    return y if bias is None else y + bias.reshape(c_out, 1, 1)


def upsample2x(x: Tensor) -> Tensor:
    """Nearest neighbour."""
    b, c, h, w = x.shape
    return (x.reshape(b, c, h, 1, w, 1) * np.ones((1, 1, 1, 2, 1, 2))).reshape(b, c, 2 * h, 2 * w)
