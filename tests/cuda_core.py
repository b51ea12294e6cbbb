"""The kernels of a device behind the functions of ladd._core, so that the case table of kernel_rows/ runs on them: NumPy float32
in and out, the compute type float32, bfloat16 or float16 in between.

Every array gets a buffer of its own of exactly its size, filled with NaN where it is an output. `shift` moves every buffer by
that many elements off its alignment, as a tensor in the middle of a flat buffer is.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np

Array = np.ndarray
HEADER = Path(__file__).resolve().parent.parent / "csrc" / "backend.h"
DTYPES = ("float32", "bfloat16", "float16")


def to_bfloat16(x: Array) -> Array:
    """The bits of x rounded to nearest even."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def encode(x: Array, dtype: str) -> Array:
    x = np.ascontiguousarray(x)
    if dtype == "bfloat16":
        return to_bfloat16(x)
    with np.errstate(over="ignore"):  # infinity is what the device gives, too
        return x.astype(np.dtype(dtype))


def decode(x: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float64 if dtype == "float64" else np.float32)


def rounded(x: Array, dtype: str) -> Array:
    """x as the compute type holds it."""
    return decode(encode(x, dtype), dtype)


class Context(ctypes.Structure):
    _fields_ = (
        ("backend", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("act", ctypes.c_int),
        ("act_size", ctypes.c_size_t),
        ("interrupted", ctypes.c_void_p),
        ("interrupt_argument", ctypes.c_void_p),
    )


class RngKey(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint64), ("purpose", ctypes.c_uint32), ("step", ctypes.c_uint64), ("step_at", ctypes.c_void_p))


class Stream(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "qkv"),
        ("row", ctypes.c_ssize_t),
        ("batch", ctypes.c_ssize_t),
        ("o", ctypes.c_void_p),
        ("o_row", ctypes.c_ssize_t),
        ("o_batch", ctypes.c_ssize_t),
        ("n", ctypes.c_int),
    )


class StreamGrad(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("dq", "dk", "dv", "d_o"))


class Conv(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int) for name in "B Cin H W Cout kh kw stride pad_top pad_left pad_bottom pad_right Ho Wo upsample".split()
    )


def signatures() -> dict[str, list[Any]]:
    """The C types of every kernel's arguments, read from its line in LADD_KERNELS."""
    found = {}
    for name, arguments in re.findall(r"^  K\((\w+), \(LADD_CTX, (.*)\)\)(?: \\)?$", HEADER.read_text(), re.MULTILINE):
        types: list[Any] = []
        for argument in arguments.split(", "):
            kind = argument.removeprefix("const ").split()[0]
            plain = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "ptrdiff_t": ctypes.c_ssize_t, "float": ctypes.c_float}
            plain |= {"double": ctypes.c_double, "ladd_loss": ctypes.c_int, "ladd_role": ctypes.c_int, "ladd_rng_key": RngKey}
            types.append(ctypes.c_void_p if "*" in argument else plain[kind])
        found[name] = types
    return found


REPORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
LOCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)


class Api(ctypes.Structure):
    """The head of struct ladd_device_api in csrc/device.h."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("kernels", ctypes.c_size_t),
        ("connect", ctypes.CFUNCTYPE(None, REPORT, LOCATE)),
        ("count", ctypes.c_void_p),
        ("open", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int)),
        ("close", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("enter", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))),
        ("leave", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("backend", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)),
    )


class Device:
    """A device's memory and its kernels, by the table that it offers to the core."""

    def __init__(self, api: int) -> None:
        self.api, self.message, self.state = Api.from_address(api), "", ctypes.c_void_p()
        self.callbacks = REPORT(self._report), LOCATE(lambda *_: 1)  # kept: the device keeps their addresses
        self.api.connect(*self.callbacks)
        self._reopen()
        self.names = ["name", *signatures(), "alloc", "release", "upload", "download", "to_act", "to_float"]
        assert self.api.kernels == ctypes.sizeof(ctypes.c_void_p) * len(self.names)

    def _report(self, code: int, sentence: bytes) -> int:
        self.message = sentence.decode()
        return code

    def _reopen(self) -> None:
        if self.api.open(ctypes.byref(self.state), 0) != 0:
            raise RuntimeError(self.message)

    def context(self, dtype: str) -> Context:
        act = DTYPES.index(dtype)
        return Context(self.api.backend(act), self.state, act, 4 if dtype == "float32" else 2, None, None)

    def call(self, context: Context, name: str, types: Sequence[Any], arguments: Sequence[Any]) -> None:
        table = ctypes.cast(context.backend, ctypes.POINTER(ctypes.c_void_p))
        address = table[self.names.index(name)]
        assert address is not None
        if ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *types)(address)(ctypes.byref(context), *arguments) != 0:
            message = self.message
            if self.api.enter(self.state, ctypes.byref(ctypes.c_void_p())) != 0:  # broken by this: the next test gets a fresh one
                self._reopen()
            raise RuntimeError(message)

    def _memory(self, name: str, *arguments: Any) -> None:
        self.call(self.context("float32"), name, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t][: len(arguments)], arguments)

    def alloc(self, size: int) -> int:
        block, types = ctypes.c_void_p(), (ctypes.c_void_p, ctypes.c_size_t)
        self.call(self.context("float32"), "alloc", types, (ctypes.byref(block), size))
        assert block.value is not None
        return block.value

    def release(self, block: int) -> None:
        table = ctypes.cast(self.context("float32").backend, ctypes.POINTER(ctypes.c_void_p))
        free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(table[self.names.index("release")] or 0)
        free(ctypes.byref(self.context("float32")), block)

    def upload(self, block: int, x: Array) -> None:
        self._memory("upload", block, host(x), x.nbytes)

    def download(self, x: Array, block: int) -> None:
        self._memory("download", host(x), block, x.nbytes)


@cache
def device() -> Device:
    """The GPU where ladd was built for one and finds it, else the emulator's."""
    try:
        provider = importlib.import_module("ladd._cuda").provider
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        return Device(get(provider, b"ladd.device_api"))
    except (ImportError, RuntimeError):
        return Device(cuda_emulator.api("kernels"))


class Buffer:
    """An array on the device. ACT: in the compute type."""

    def __init__(self, block: int, pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self.block, self._as_parameter_, self.shape, self.dtype = block, ctypes.c_void_p(pointer), shape, dtype

    @property
    def address(self) -> int | None:
        return self._as_parameter_.value


class Call:
    """The buffers of one call: up() for inputs, new() for outputs, then the kernel, then down()."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.buffers: list[Buffer] = []
        self.known: dict[int, Buffer] = {}
        self.given: list[Array] = []  # kept alive, so that no other array gets the same id

    def up(self, x: Array | None, dtype: str | None = None) -> Buffer | None:
        if x is None:
            return None
        if id(x) not in self.known:
            self.given.append(x)
            self.known[id(x)] = self.filled(encode(x, dtype or self.core.dtype), x.shape, dtype or self.core.dtype)
        return self.known[id(x)]

    def filled(self, raw: Array, shape: Sequence[int], dtype: str) -> Buffer:
        offset = self.core.shift * raw.itemsize
        block = self.core.device.alloc(raw.nbytes + offset)
        buffer = Buffer(block, block + offset, tuple(shape), dtype)
        self.buffers.append(buffer)
        self.core.device.upload(block + offset, raw)
        return buffer

    def new(self, shape: Sequence[int], dtype: str | None = None, fill: float = np.nan) -> Buffer:
        dtype = dtype or self.core.dtype
        return self.filled(encode(np.full(shape, fill), dtype), shape, dtype)

    def out(self, out: Array | None, shape: Sequence[int]) -> Buffer:
        """The result's buffer: that of an input if `out` is that input's memory."""
        return self.known[id(out)] if id(out) in self.known else self.new(shape)

    def down(self, buffer: Buffer | None, out: Array | None = None) -> Any:
        if buffer is None:
            return None
        raw = np.empty(buffer.shape, dtype={"bfloat16": np.uint16}.get(buffer.dtype, buffer.dtype))
        assert buffer.address is not None
        self.core.device.download(raw, buffer.address)
        value = decode(raw, buffer.dtype)
        if out is None:
            return value
        out[...] = value
        return out

    def __call__(self, name: str, *arguments: Any) -> None:
        self.core.device.call(self.core.context, name, self.core.signatures[name], arguments)


def host(x: Array) -> Any:
    return x.ctypes.data_as(ctypes.c_void_p)


class Core:
    """The kernel functions of ladd._core on a device; see _core.pyi for what each takes and gives."""

    def __init__(self, device: Device, dtype: str = "float32", shift: int = 0) -> None:
        self.device, self.dtype, self.shift = device, dtype, shift
        self.signatures = signatures()

    @property
    def context(self) -> Context:
        return self.device.context(self.dtype)

    @contextmanager
    def call(self) -> Iterator[Call]:
        call = Call(self)
        try:
            yield call
        finally:
            for buffer in call.buffers:
                self.device.release(buffer.block)

    def _map(self, name: str, inputs: Sequence[Array], *numbers: Any, out: Array | None = None, shape: Sequence[int] | None = None) -> Array:
        """y of the first input's shape from inputs, then numbers."""
        with self.call() as c:
            buffers = [c.up(x) for x in inputs]
            y = c.out(out, shape or inputs[0].shape)
            c(name, y, *buffers, *numbers)
            return c.down(y, out)

    def _change(self, name: str, changed: Sequence[Array | None], inputs: Sequence[Array], *numbers: Any, dtype: str | None = None) -> None:
        with self.call() as c:
            buffers = [c.up(x, dtype) for x in (*changed, *inputs)]
            c(name, *buffers, *numbers)
            for x, buffer in zip(changed, buffers, strict=False):
                if x is not None:
                    c.down(buffer, x)

    # ---- flat buffers ------------------------------------------------------------------------------------------------

    def zero(self, y: Array) -> None:
        self._change("zero", [y], [], y.size)

    def copy(self, x: Array, *, out: Array | None = None) -> Array:
        return self._map("copy", [x], x.size, out=out)

    def add(self, a: Array, b: Array, *, out: Array | None = None) -> Array:
        return self._map("add", [a, b], a.size, out=out)

    def axpy(self, y: Array, x: Array, alpha: float) -> None:
        self._change("axpy", [y], [x], alpha, y.size)

    def scale(self, x: Array, alpha: float, *, out: Array | None = None) -> Array:
        return self._map("scale", [x], alpha, x.size, out=out)

    def adamw(self, p: Array, m: Array | None, v: Array, g: Array, *numbers: Any) -> None:
        self._change("adamw", [p, m, v], [g], p.size, *numbers, None, None, dtype="float32")

    def clip_factor(
        self, factor: Array, norm: Array, failed: Array, done: Array, squares: Array, checked: Array | None, limit: float, who: int
    ) -> None:
        with self.call() as c:
            doubles = [None if x is None else x.view(np.float64) for x in (norm, failed, done, squares, checked)]
            changed = [c.up(factor, "float32"), *(c.up(x, "float64") for x in doubles[:3])]
            read = [c.up(x, "float64") for x in doubles[3:]]
            c("clip_factor", *changed, read[0], squares.size // 2, read[1], 0 if checked is None else checked.size // 2, limit, who)
            for buffer, x in zip(changed, [factor, *doubles[:3]], strict=True):
                c.down(buffer, x)

    def r1_factors(self, factors: Array, penalty: Array, sums: Array, weight: float, epsilon: float, scale: float) -> None:
        with self.call() as c:
            outputs = c.up(factors, "float32"), c.up(penalty.view(np.float64), "float64")
            c("r1_factors", *outputs, c.up(sums.view(np.float64), "float64"), weight, epsilon, scale)
            c.down(outputs[0], factors)
            c.down(outputs[1], penalty.view(np.float64))

    def sum_squares(self, x: Array) -> float:
        with self.call() as c:
            total = c.new((1,), "float64")
            c("sum_squares", total, c.up(x, "float32"), x.size)
            return float(c.down(total)[0])

    def ema(self, e: Array, p: Array, decay: float) -> None:
        self._change("ema", [e], [p], decay, e.size, None, dtype="float32")

    # ---- layout ------------------------------------------------------------------------------------------------------

    def transpose(self, x: Array, *, out: Array | None = None) -> Array:
        b, r, q = x.shape
        return self._map("transpose", [x], b, r, q, out=out, shape=(b, q, r))

    def patch_gather(self, image: Array, p: int, last: bool = False) -> Array:
        b, c, h, w = image.shape
        return self._map("patch_gather", [image], b, c, h, w, p, last, shape=(b, (h // p) * (w // p), c * p * p))

    def patch_scatter(self, tokens: Array, channels: int, h: int, w: int, p: int, last: bool = False) -> Array:
        b = tokens.shape[0]
        return self._map("patch_scatter", [tokens], b, channels, h, w, p, last, shape=(b, channels, h, w))

    def add_position(self, x: Array, table: Array, grid: tuple[int, int]) -> None:
        self._change("add_position", [x], [table], x.shape[0], *grid, table.shape[0], x.shape[2])

    def timestep_features(self, sigma: Array, dim: int) -> Array:
        with self.call() as c:
            f = c.new((sigma.size, dim))
            c("timestep_features", f, c.up(sigma, "float32"), sigma.size, dim)
            return c.down(f)

    # ---- norms and activations ---------------------------------------------------------------------------------------

    def layer_norm_modulate_forward(
        self, x: Array, shift: Array | None, scale: Array | None, eps: float = 1e-6, *, out: Array | None = None
    ) -> tuple[Array, Array, Array]:
        with self.call() as c:
            args = [c.up(a) for a in (x, shift, scale)]
            y, mean, rstd = c.out(out, x.shape), c.new(x.shape[:2], "float32"), c.new(x.shape[:2], "float32")
            c("layer_norm_modulate_forward", y, mean, rstd, *args, x.shape[2], *x.shape, eps)
            return c.down(y, out), c.down(mean), c.down(rstd)

    def layer_norm_modulate_backward(
        self, dy: Array, x: Array, mean: Array, rstd: Array, scale: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        with self.call() as c:
            dx = c.new(x.shape, fill=0.0)
            dshift, dscale = (c.new(scale.shape) if scale is not None else None for _ in range(2))
            saved = c.up(mean, "float32"), c.up(rstd, "float32")
            c("layer_norm_modulate_backward", dx, dshift, dscale, c.up(dy), c.up(x), *saved, c.up(scale), x.shape[2], *x.shape)
            return c.down(dx), c.down(dshift), c.down(dscale)

    def gate_residual_forward(self, x: Array, y: Array, gate: Array, *, out: Array | None = None) -> Array:
        return self._map("gate_residual_forward", [x, y, gate], x.shape[2], *x.shape, out=out)

    def gate_residual_backward(self, dout: Array, y: Array, gate: Array) -> tuple[Array, Array]:
        with self.call() as c:
            dy, dgate = c.new(y.shape), c.new(gate.shape)
            c("gate_residual_backward", dy, dgate, c.up(dout), c.up(y), c.up(gate), y.shape[2], *y.shape)
            return c.down(dy), c.down(dgate)

    def rms_norm_heads_forward(self, x: Array, w: Array, eps: float = 1e-6, *, out: Array | None = None) -> tuple[Array, Array]:
        rows, heads, dh = x.shape
        with self.call() as c:
            args = c.up(x), c.up(w)
            y, rstd = c.out(out, x.shape), c.new((rows, heads), "float32")
            c("rms_norm_heads_forward", y, rstd, *args, rows, heads, dh, heads * dh, heads * dh, eps)
            return c.down(y, out), c.down(rstd)

    def rms_norm_heads_backward(self, dy: Array, x: Array, rstd: Array, w: Array) -> tuple[Array, Array]:
        rows, heads, dh = x.shape
        with self.call() as c:
            dx, dw = c.new(x.shape), c.new(w.shape, "float32", 0.0)
            args = c.up(dy), c.up(x), c.up(rstd, "float32"), c.up(w)
            c("rms_norm_heads_backward", dx, dw, *args, rows, heads, dh, *(heads * dh,) * 3)
            return c.down(dx), c.down(dw)

    def group_norm_forward(
        self, x: Array, gamma: Array, beta: Array, groups: int, eps: float = 1e-6, silu: bool = False, *, out: Array | None = None
    ) -> tuple[Array, Array, Array]:
        with self.call() as c:
            args = c.up(x), c.up(gamma), c.up(beta)
            y, mean, rstd = c.out(out, x.shape), *(c.new((x.shape[0], groups), "float32") for _ in range(2))
            c("group_norm_forward", y, mean, rstd, *args, *x.shape, groups, eps, silu)
            return c.down(y, out), c.down(mean), c.down(rstd)

    def group_norm_backward(
        self, dy: Array, x: Array, mean: Array, rstd: Array, gamma: Array, beta: Array, silu: bool = False
    ) -> tuple[Array, Array, Array]:
        with self.call() as c:
            dx, dgamma, dbeta = c.new(x.shape), c.new(gamma.shape, "float32", 0.0), c.new(beta.shape, "float32", 0.0)
            args = c.up(dy), c.up(x), c.up(mean, "float32"), c.up(rstd, "float32"), c.up(gamma), c.up(beta)
            c("group_norm_backward", dx, dgamma, dbeta, *args, *x.shape, mean.shape[1], silu)
            return c.down(dx), c.down(dgamma), c.down(dbeta)

    def gelu_forward(self, x: Array, *, out: Array | None = None) -> Array:
        return self._map("gelu_forward", [x], x.size, out=out)

    def gelu_backward(self, dy: Array, x: Array, *, out: Array | None = None) -> Array:
        return self._map("gelu_backward", [dy, x], x.size, out=out)

    def silu_forward(self, x: Array, *, out: Array | None = None) -> Array:
        return self._map("silu_forward", [x], x.size, out=out)

    def silu_backward(self, dy: Array, x: Array, *, out: Array | None = None) -> Array:
        return self._map("silu_backward", [dy, x], x.size, out=out)

    def leaky_relu_forward(self, x: Array, slope: float = 0.2, *, out: Array | None = None) -> Array:
        return self._map("leaky_relu_forward", [x], slope, x.size, out=out)

    def leaky_relu_backward(self, dy: Array, x: Array, slope: float = 0.2, *, out: Array | None = None) -> Array:
        return self._map("leaky_relu_backward", [dy, x], slope, x.size, out=out)

    # ---- products ----------------------------------------------------------------------------------------------------

    def linear_forward(self, x: Array, w: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
        with self.call() as c:
            args = c.up(x), c.up(w), c.up(bias)
            y = c.out(out, (x.shape[0], w.shape[0]))
            c("linear_forward", y, *args, x.shape[0], *w.shape)
            return c.down(y, out)

    def linear_gelu_forward(self, x: Array, w: Array, bias: Array | None = None, *, out: Array | None = None) -> tuple[Array, Array]:
        with self.call() as c:
            args = c.up(x), c.up(w), c.up(bias)
            y, h = c.out(out, (x.shape[0], w.shape[0])), c.new((x.shape[0], w.shape[0]))
            c("linear_gelu_forward", y, h, *args, x.shape[0], *w.shape)
            return c.down(y, out), c.down(h)

    def linear_backward(
        self, dy: Array, x: Array, w: Array, *, input: bool = True, weight: bool = True, bias: bool = True
    ) -> tuple[Array | None, Array | None, Array | None]:
        with self.call() as c:
            dx = c.new(x.shape) if input else None
            dw = c.new(w.shape, "float32", 0.0) if weight else None
            dbias = c.new(w.shape[:1], "float32", 0.0) if bias else None
            c("linear_backward", dx, dw, dbias, c.up(dy), c.up(x), c.up(w), x.shape[0], *w.shape)
            return c.down(dx), c.down(dw), c.down(dbias)

    def _conv(self, x: Array, w: Array, stride: int, padding: tuple[int, int, int, int]) -> Conv:
        b, c_in, h, wide = x.shape
        top, left, bottom, right = padding
        ho, wo = (h + top + bottom - w.shape[2]) // stride + 1, (wide + left + right - w.shape[3]) // stride + 1
        return Conv(b, c_in, h, wide, w.shape[0], w.shape[2], w.shape[3], stride, *padding, ho, wo, 0)

    def conv2d_forward(
        self,
        x: Array,
        w: Array,
        bias: Array | None = None,
        stride: int = 1,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        *,
        out: Array | None = None,
    ) -> Array:
        conv = self._conv(x, w, stride, padding)
        with self.call() as c:
            args = c.up(x), c.up(w), c.up(bias)
            y = c.out(out, (conv.B, conv.Cout, conv.Ho, conv.Wo))
            c("conv2d_forward", y, *args, ctypes.byref(conv))
            return c.down(y, out)

    def conv2d_backward(
        self, dy: Array, x: Array, w: Array, stride: int = 1, padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    ) -> tuple[Array, Array, Array]:
        conv = self._conv(x, w, stride, padding)
        with self.call() as c:
            dx, dw, dbias = c.new(x.shape), c.new(w.shape, "float32", 0.0), c.new(w.shape[:1], "float32", 0.0)
            c("conv2d_backward", dx, dw, dbias, c.up(dy), c.up(x), c.up(w), ctypes.byref(conv))
            return c.down(dx), c.down(dw), c.down(dbias)

    def upsample2x_forward(self, x: Array, *, out: Array | None = None) -> Array:
        b, c, h, w = x.shape
        return self._map("upsample2x_forward", [x], b * c, h, w, out=out, shape=(b, c, 2 * h, 2 * w))

    def upsample2x_backward(self, dy: Array, *, out: Array | None = None) -> Array:
        b, c, h, w = dy.shape
        return self._map("upsample2x_backward", [dy], b * c, h // 2, w // 2, out=out, shape=(b, c, h // 2, w // 2))

    # ---- attention ---------------------------------------------------------------------------------------------------

    def attention_forward(self, streams: Sequence[Any], scale: float | None = None) -> tuple[list[Array], Array]:
        b, _, heads, dh = streams[0][0].shape
        with self.call() as c:
            outs = [c.new(q.shape) for q, _, _ in streams]
            lse = c.new((b, heads, sum(q.shape[1] for q, _, _ in streams)), "float32")
            c("attention_forward", self._streams(c, streams, outs), len(streams), lse, b, heads, dh, scale or dh**-0.5)
            return [c.down(o) for o in outs], c.down(lse)

    def attention_backward(
        self, douts: Sequence[Array], streams: Sequence[Any], outs: Sequence[Array], lse: Array, scale: float | None = None
    ) -> list[tuple[Array, ...]]:
        b, _, heads, dh = streams[0][0].shape
        with self.call() as c:
            grads = [[c.new(x.shape) for x in triple] for triple in streams]
            table = (StreamGrad * len(streams))(
                *((*(g.address for g in triple), self._address(c.up(d))) for triple, d in zip(grads, douts, strict=True))
            )
            given = self._streams(c, streams, [c.up(o) for o in outs])
            c("attention_backward", table, given, len(streams), c.up(lse, "float32"), b, heads, dh, scale or dh**-0.5)
            return [tuple(c.down(g) for g in triple) for triple in grads]

    @staticmethod
    def _address(buffer: Buffer | None) -> int | None:
        return None if buffer is None else buffer.address

    def _streams(self, c: Call, streams: Sequence[Any], outs: Sequence[Buffer | None]) -> Any:
        rows = []
        for triple, out in zip(streams, outs, strict=True):
            n, heads, dh = triple[0].shape[1:]
            row, batch = heads * dh, n * heads * dh
            rows.append((*(self._address(c.up(x)) for x in triple), row, batch, self._address(out), row, batch, n))
        return (Stream * len(rows))(*rows)

    # ---- heads and losses --------------------------------------------------------------------------------------------

    def spectral_norm_forward(self, w: Array, u: Array, iterations: int = 1) -> tuple[Array, Array, float]:
        with self.call() as c:
            given, direction = c.up(w, "float32"), c.up(u, "float32")
            w_hat, v, sigma = c.new(w.shape), c.new(w.shape[1:], "float32"), c.new((1,), "float32")
            c("spectral_norm_forward", w_hat, direction, v, sigma, given, *w.shape, iterations)
            c.down(direction, u)
            return c.down(w_hat), c.down(v), float(c.down(sigma)[0])

    def spectral_norm_backward(self, dw_hat: Array, w_hat: Array, u: Array, v: Array, sigma: float) -> Array:
        with self.call() as c:
            dw = c.new(w_hat.shape, "float32", 0.0)
            saved = (c.up(a, "float32") for a in (u, v, np.float32([sigma])))
            c("spectral_norm_backward", dw, c.up(dw_hat, "float32"), c.up(w_hat), *saved, *w_hat.shape)
            return c.down(dw)

    def channel_dot_forward(self, x: Array, e: Array, bias: Array, *, out: Array | None = None) -> Array:
        return self._map("channel_dot_forward", [x, e, bias], *x.shape, out=out, shape=(x.shape[0], x.shape[2]))

    def channel_dot_backward(self, dy: Array, x: Array, e: Array) -> tuple[Array, Array, Array]:
        with self.call() as c:
            dx, de, dbias = c.new(x.shape), c.new(e.shape), c.new((1,), "float32", 0.0)
            c("channel_dot_backward", dx, de, dbias, c.up(dy), c.up(x), c.up(e), *x.shape)
            return c.down(dx), c.down(de), c.down(dbias)

    def adversarial_loss(self, logits: Array, loss: str, role: str, weight: float = 1.0) -> tuple[float, Array]:
        kinds = ("hinge", "logistic", "lsgan", "bce").index(loss), ("real", "fake", "generator").index(role)
        with self.call() as c:
            values, dlogits = c.new((3,), "float64"), c.new(logits.shape)
            c("adversarial_loss", values, dlogits, c.up(logits), *kinds, weight, logits.size)
            return float(c.down(values)[0]), c.down(dlogits)

    # ---- random numbers and diffusion --------------------------------------------------------------------------------

    def normal(
        self, shape: Sequence[int], seed: int, purpose: int, step: int = 0, samples: Array | None = None, *, out: Array | None = None
    ) -> Array:
        samples = np.arange(shape[0]) if samples is None else samples
        with self.call() as c:
            y = c.new(shape)
            c("normal", y, RngKey(seed, purpose, step, None), host(samples), shape[0], int(np.prod(shape[1:])))
            return c.down(y, out)

    def renoise(
        self,
        x0: Array,
        t: Array,
        seed: int,
        purpose: int,
        step: int = 0,
        samples: Array | None = None,
        return_noise: bool = False,
        *,
        out: Array | None = None,
    ) -> Any:
        samples = np.arange(len(x0)) if samples is None else samples
        with self.call() as c:
            given, noise = c.up(x0), c.new(x0.shape) if return_noise else None
            y = c.out(out, x0.shape)
            c("renoise", y, noise, given, c.up(t, "float32"), RngKey(seed, purpose, step, None), host(samples), len(x0), x0[0].size)
            return (c.down(y, out), c.down(noise)) if return_noise else c.down(y, out)

    def _rowwise(self, name: str, inputs: Sequence[Array], t: Array, out: Array | None) -> Array:
        with self.call() as c:
            buffers = [c.up(x) for x in inputs]
            y = c.out(out, inputs[0].shape)
            c(name, y, *buffers, c.up(t, "float32"), len(t), inputs[0][0].size)
            return c.down(y, out)

    def interpolate(self, x0: Array, noise: Array, t: Array, *, out: Array | None = None) -> Array:
        return self._rowwise("interpolate", [x0, noise], t, out)

    def predict_x0(self, x: Array, v: Array, t: Array, *, out: Array | None = None) -> Array:
        return self._rowwise("predict_x0", [x, v], t, out)

    def row_scale(self, x: Array, factor: Array, *, out: Array | None = None) -> Array:
        return self._rowwise("row_scale", [x], factor, out)

    def euler_step(self, x: Array, v: Array, sigma: float, sigma_next: float, *, out: Array | None = None) -> Array:
        return self._map("euler_step", [x, v], sigma, sigma_next, x.size, out=out)
