"""Devices: finding and opening them, and arrays on their way in and out.

The CPU is `None` here and "cpu" in the public interface; a GPU is "cuda" (the first one) or "cuda:1". Work on a GPU is queued on
a stream and runs while Python goes on; what returns numbers to the host waits for it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import _core, attention
from .arrays import Array, as_float32, check_shape

Device = _core.Device
DeviceArray = _core.DeviceArray

DTYPES = ("float32", "bfloat16", "float16")
_CUDA, _CUDA_MANAGED = 2, 13  # DLPack's numbers of device kinds
_open: dict[int, Device] = {}
_lock = threading.Lock()


def get(name: str) -> Device | None:
    """The device of that name, opened once in a process; None for "cpu".

    RuntimeError says what is missing: the extension, a driver (or a newer one), a GPU, kernels for its architecture.
    """
    if name == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<number>', got {name!r}")
    index = int(match[1] or 0)
    with _lock:
        if index not in _open:
            opened = Device(_provider(), index)
            about = opened.info()
            opened.set_attention(attention.rules(about["name"], about["capability"]))
            _open[index] = opened
        return _open[index]


def is_available() -> bool:
    """Whether "cuda" can be used here."""
    try:
        get("cuda")
    except RuntimeError:
        return False
    return True


def _provider() -> Any:
    try:
        return importlib.import_module("._cuda", __package__).provider
    except ModuleNotFoundError:
        raise RuntimeError(
            "device 'cuda': this build of ladd has no CUDA kernels; build it where nvcc is found, with LADD_CUDA=1 (docs/cuda.md)"
        ) from None


def locate_library(name: str) -> str:
    """The path of cublasLt, cudnn or nccl as cuda-pathfinder finds it: in wheels, conda, or the system. The device asks at first use."""
    pathfinder = importlib.import_module("cuda.pathfinder")
    return str(pathfinder.load_nvidia_dynamic_lib(name).abs_path)


def check_dtype(device: Device | None, dtype: str) -> None:
    """The CPU computes in float32, or, where it has AVX512_BF16 (elsewhere an error), with the factors of products and convolutions
    rounded to bfloat16; a GPU in float32, bfloat16 and float16. Sums, statistics and masters are float32 everywhere."""
    allowed = DTYPES if device is not None else DTYPES[:2]
    if dtype not in allowed:
        raise ValueError(f"dtype must be {' or '.join(map(repr, allowed))} on {device or 'cpu'}, got {dtype!r}")


# ---- arrays ---------------------------------------------------------------------------------------------------------------------------


def as_array(
    value: Any,
    name: str,
    shape: Sequence[int | str | None] | None = None,
    *,
    device: Device | None,
    dtype: str = "float32",
    finite: bool = False,
) -> Any:
    """`value` where it is computed with: a float32 ndarray for the CPU, a DeviceArray of `dtype` for a device.

    What is on the device already (DLPack, CUDA array interface) is not copied, unless its type is another. finite: checked for
    arrays that come from the host; on a device the check would wait for it.
    """
    if device is None:
        if isinstance(value, DeviceArray):
            raise ValueError(f"{name} must be on the CPU, got an array on {value.device}; .numpy() copies it")
        return as_float32(value, name, shape, finite=finite)
    given = _on_device(value, name, device)
    if given is None:
        host = as_float32(value, name, shape, finite=finite)
        given = device.empty(host.shape, dtype)
        given[...] = host
        return given
    if shape is not None:
        check_shape(given.shape, name, shape)
    return given if given.dtype == dtype else given.astype(dtype)


def _on_device(value: Any, name: str, device: Device) -> DeviceArray | None:
    """A DeviceArray on the memory of `value`, or None if that is in host memory."""
    if isinstance(value, DeviceArray):
        if value.device is not device:
            raise ValueError(f"{name} must be on {device}, got an array on {value.device}")
        return value
    if isinstance(value, np.ndarray):
        return None
    if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED):
        return device.from_dlpack(value, name)
    described = getattr(value, "__cuda_array_interface__", None)
    if described is None:
        return None
    shape, typestr = tuple(described["shape"]), described["typestr"]
    size = int(typestr[2:]) if typestr[2:].isdigit() else 0
    dense = tuple(size * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
    if described.get("strides") not in (None, dense) or described.get("mask") is not None:
        raise ValueError(f"{name} must be dense and row-major, without a mask")
    return device.from_pointer(value, name, described["data"][0], shape, typestr, described.get("stream"))


def to_host(value: Any) -> Array:
    """The numbers as a float32 ndarray: the array itself on the CPU, a copy from a device (which is waited for)."""
    return value.numpy() if isinstance(value, DeviceArray) else value


def zeros_like(value: Any) -> Any:
    return value.device.empty(value.shape, value.dtype, True) if isinstance(value, DeviceArray) else np.zeros_like(value)


def full_like(value: Any, number: float) -> Any:
    """An array of one number where `value` is."""
    host = np.full(value.shape, number, np.float32)
    return as_array(host, "value", device=value.device, dtype=value.dtype) if isinstance(value, DeviceArray) else host


def sum_squares(value: Any, *, out: Any) -> None:
    """Sum of squares, whatever the type and place, into `out`: a float64 in a pair of float32 there."""
    wide: Any = value.astype("float32") if isinstance(value, DeviceArray) and value.dtype != "float32" else value
    _core.sum_squares(wide, out=out)


def roll_rows(value: Any) -> Any:
    """np.roll(value, 1, axis=0): every row one place down, the last one first."""
    if not isinstance(value, DeviceArray):
        return np.roll(value, 1, axis=0)
    out = value.device.empty(value.shape, value.dtype)
    out[:1] = value[-1:]
    if len(value) > 1:
        out[1:] = value[:-1]
    return out


# ---- streams and graphs ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stream(device: str, handle: int) -> Iterator[None]:
    """Within the block work is queued on a CUDA stream of the caller's, such as torch.cuda.current_stream().cuda_stream."""
    opened = get(device)
    if opened is None:
        raise ValueError("stream() needs a CUDA device, got 'cpu'")
    opened.use_stream(handle)
    try:
        yield
    finally:
        opened.use_stream(None)


class Graph:
    """A recorded sequence of calls: `replay()` queues all of it at once, on the memory that the recording used.

    with ladd.device.record("cuda") as graph:
        v = model(x, 1.0, context, pooled)      # x, context, pooled: DeviceArrays, whose contents later replays read anew
    graph.replay();  v.numpy()

    Run the calls once before recording, so that libraries are open and plans made. What gives a number to the host (a loss, a norm,
    .numpy()) cannot be recorded, and numbers that the host gave (sigma, seeds) stay those of the recording.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._graph: Any = None

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("a graph whose recording has ended expected; its block is still open, or failed")
        self._device.replay(self._graph)


@contextlib.contextmanager
def record(device: str) -> Iterator[Graph]:
    """Within the block calls are recorded and not run; afterwards the graph replays them."""
    opened = get(device)
    if opened is None:
        raise ValueError("record() needs a CUDA device, got 'cpu'")
    graph = Graph(opened)
    opened.capture_begin()
    try:
        yield graph
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the first error tells
            opened.capture_end()
        raise
    graph._graph = opened.capture_end()
