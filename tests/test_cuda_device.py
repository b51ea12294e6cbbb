"""Devices and their arrays: what comes in and goes out, memory, errors that say what is wrong and leave the device usable."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_core
import cuda_device
import cuda_emulator
import numpy as np
import pytest
from cuda_device import needs_device, needs_emulator
from support import normal

import ladd
from ladd import _core

pytestmark = needs_device


def put(array: np.ndarray, dtype: str = "float32") -> ladd.DeviceArray:
    return ladd.device.as_array(array, "array", device=cuda_device.device(), dtype=dtype)


def test_names_of_devices() -> None:
    device = cuda_device.device()
    assert ladd.device.get("cpu") is None
    assert ladd.device.get("cuda:0") is device and str(device) == "cuda:0" and device.index == 0
    assert ladd.device.is_available()
    info = device.info()
    assert info["capability"] >= 80 and 0 < info["memory_free"] <= info["memory_total"]
    for name in ("gpu", "cuda:", "cuda:x", 0):
        with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or"):
            ladd.device.get(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device: cuda:0 to cuda:\d+ expected, got cuda:99"):
        ladd.device.get("cuda:99")


@pytest.mark.parametrize("dtype", ladd.device.DTYPES)
def test_host_arrays_go_there_and_back(dtype: str) -> None:
    x = normal(1, 3, 5, 7)
    a = put(x, dtype)
    assert a.shape == (3, 5, 7) and a.ndim == 3 and a.size == 105 and len(a) == 3 and a.dtype == dtype
    assert a.nbytes == 105 * (4 if dtype == "float32" else 2) and a.device is cuda_device.device()
    assert repr(a) == f"<ladd.DeviceArray (3, 5, 7) {dtype} on cuda:0>"
    back = a.numpy()
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, x, rtol={"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}[dtype])
    again = put(back, dtype)
    assert np.array_equal(again.numpy(), back), "numbers of the type itself pass unchanged"


def test_large_arrays_do_not_go_through_the_ring() -> None:
    x = normal(2, 70_001)
    assert np.array_equal(put(x).numpy(), x)


def test_views_and_assignment() -> None:
    x = normal(3, 4, 6)
    a = put(x)
    assert np.array_equal(a[1].numpy(), x[1]) and np.array_equal(a[-1].numpy(), x[-1]) and np.array_equal(a[1:3].numpy(), x[1:3])
    assert np.array_equal(a.reshape(2, -1).numpy(), x.reshape(2, 12)) and a.reshape((3, 8)).shape == (3, 8)
    a[1:3] = x[:2]
    a[0] = 0
    a.reshape(24)[18:20] = put(np.ones(2, np.float32), "bfloat16")
    x[1:3] = x[:2].copy()
    x[0], x[3, :2] = 0, 1
    assert np.array_equal(a.numpy(), x)
    b = a.copy()
    b[...] = 0
    assert np.array_equal(a.numpy(), x) and not b.numpy().any()
    half = a.astype("float16")
    half[:] = a.astype("bfloat16")
    assert np.array_equal(half.numpy(), a.astype("bfloat16").astype("float16").numpy())
    assert np.array_equal(ladd.device.roll_rows(a).numpy(), np.roll(x, 1, axis=0))
    part = a[2:]
    del a
    gc.collect()
    assert np.array_equal(part.numpy(), x[2:]), "a view keeps the memory"


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda a: a[4], IndexError, r"a row in \[0, 4\) expected, got 4"),
        (lambda a: a[::2], ValueError, "a slice of step 1 expected"),
        (lambda a: a[1, 2], TypeError, "a slice or number of the first axis expected"),
        (lambda a: a.reshape(5, 5), ValueError, "sizes whose product is 24"),
        (lambda a: a.astype("int8"), ValueError, "dtype: expected 'float32', 'bfloat16' or 'float16'"),
        (lambda a: a.__setitem__(slice(None), np.ones((4, 5), np.float32)), ValueError, "a value of the shape of <ladd.DeviceArray"),
        (lambda a: a.__setitem__(slice(None), 2.0), ValueError, "or 0, expected"),
        (np.asarray, TypeError, r"an array in host memory expected, got one on cuda:0; \.numpy\(\) copies it"),
        (lambda a: _core.add(a, np.ones((4, 6), np.float32)), ValueError, "b: expected an array on cuda:0, got one on the CPU"),
        (lambda a: _core.add(np.ones((4, 6), np.float32), a), ValueError, "b: expected an array on the CPU, got one on cuda:0"),
        (lambda a: _core.add(a, a.astype("bfloat16")), TypeError, "b: expected dtype float32, got bfloat16"),
        (lambda a: _core.row_scale(a, a[0].astype("float16")), TypeError, "factor: expected dtype float32, got float16"),
        (lambda a: _core.sum_squares(a.astype("float16")), TypeError, "x: expected dtype float32, got float16"),
        (lambda a: a.__dlpack__(stream=0), ValueError, "stream: expected None, 1, 2, -1 or a handle, got 0"),
        (lambda a: a.__dlpack__(dl_device=(1, 0)), BufferError, r"dl_device: expected None or \(2, 0\)"),
        (lambda a: a.__dlpack__(copy=True), BufferError, "copy: expected None or False, got True"),
    ],
)
def test_bad_use(act: Any, error: type[Exception], message: str) -> None:
    x = normal(4, 4, 6)
    a = put(x)
    with pytest.raises(error, match=message):
        act(a)
    assert np.array_equal(a.numpy(), x)


def test_arrays_on_the_wrong_device() -> None:
    model = ladd.MMDiT(ladd.MMDiTConfig(**CONFIG))
    with pytest.raises(ValueError, match=r"latents must be on the CPU, got an array on cuda:0; \.numpy\(\) copies it"):
        model(put(normal(1, 1, 4, 4, 4)), 0.5, normal(2, 1, 3, 8), normal(3, 1, 8))


CONFIG: dict[str, Any] = {
    "sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
    "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 4,
}  # fmt: skip


class Foreign:
    """An array of another library: DLPack passed on, or the CUDA array interface, and whether it was let go."""

    def __init__(self, array: ladd.DeviceArray, protocol: str) -> None:
        self.array, self.streams = array, []  # type: ignore[var-annotated]
        if protocol == "dlpack":
            self.__dlpack_device__ = array.__dlpack_device__
        else:
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    def __dlpack__(self, *, stream: Any) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream)


class Speaker(Foreign):
    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_foreign_arrays_come_in_without_a_copy(protocol: str) -> None:
    x = normal(5, 2, 3)
    a = put(x)
    foreign: Any = Speaker(a, protocol) if protocol == "dlpack" else Foreign(a, protocol)
    taken = ladd.device.as_array(foreign, "x", ("B", 3), device=cuda_device.device())
    assert taken.__cuda_array_interface__["data"] == a.__cuda_array_interface__["data"]
    if protocol == "dlpack":
        assert foreign.streams == [cuda_device.device().stream], "the producer is told which stream waits for him"
    a[0] = 0
    assert not taken.numpy()[0].any() and np.array_equal(taken.numpy()[1], x[1])
    before = sys.getrefcount(a)
    del taken
    gc.collect()
    cuda_device.device().wait()
    assert sys.getrefcount(a) == before - (protocol == "dlpack"), "the lease on it ended"
    assert ladd.device.as_array(a, "x", device=cuda_device.device(), dtype="bfloat16").dtype == "bfloat16"


def test_what_others_are_given() -> None:
    a = put(normal(6, 3, 2))
    assert a.__dlpack_device__() == (2, 0)
    assert "dltensor" in repr(a.__dlpack__(stream=-1)) and "dltensor" in repr(a.__dlpack__())
    described = a.__cuda_array_interface__
    assert described["shape"] == (3, 2) and described["typestr"] == "<f4" and described["version"] == 3 and described["strides"] is None
    assert described["stream"] not in (0, None) and described["data"][1] is False
    assert a.astype("float16").__cuda_array_interface__["typestr"] == "<f2"
    assert not hasattr(a.astype("bfloat16"), "__cuda_array_interface__"), "the protocol has no bfloat16"


def test_bad_foreign_arrays() -> None:
    device = cuda_device.device()
    a = put(normal(7, 4, 4))
    described = dict(a.__cuda_array_interface__)

    def interface(**changes: Any) -> Any:
        return type("Other", (), {"__cuda_array_interface__": {**described, **changes}})()

    with pytest.raises(ValueError, match="x must be dense and row-major"):
        ladd.device.as_array(interface(strides=(4, 16)), "x", device=device)
    with pytest.raises(TypeError, match="x: expected float32 or float16"):
        ladd.device.as_array(interface(typestr="<f8"), "x", device=device)
    with pytest.raises(ValueError, match="x: expected an array on cuda:0, got host memory"):
        ladd.device.as_array(interface(data=(np.zeros(16, np.float32).ctypes.data, False)), "x", device=device)
    elsewhere = type("Other", (), {"__dlpack_device__": lambda self: (2, 5), "__dlpack__": None})()
    with pytest.raises(ValueError, match=r"x: expected an array on cuda:0, got one on DLPack device \(2, 5\)"):
        ladd.device.as_array(elsewhere, "x", device=device)


@needs_emulator
def test_running_out_of_memory_leaves_everything_usable() -> None:
    device = cuda_device.device()
    a = put(normal(8, 5))
    with pytest.raises(MemoryError, match=r"cuda:0 is out of memory: expected \d+.0 MiB, the device has .* MiB left; it stays usable"):
        device.empty((1 << 20, 1 << 14))
    model = ladd.MMDiT(ladd.MMDiTConfig(**CONFIG), device="cuda")
    inputs = normal(1, 1, 4, 4, 4), 0.5, normal(2, 1, 3, 8), normal(3, 1, 8)
    before = model(*inputs).numpy()
    with pytest.raises(MemoryError, match="cuda:0 is out of memory"):
        model(normal(1, 100, 4, 8, 8), 0.5, normal(2, 100, 4000, 8), normal(3, 100, 8))
    assert np.array_equal(model(*inputs).numpy(), before) and np.array_equal(a.numpy(), normal(8, 5))


ERRORS = {
    "no driver": ((1, 0, 0, 0), "an NVIDIA driver expected, but libcuda.so.1 is not there"),
    "driver too old": (
        (1, 12040, 0, 0),
        r"a driver for CUDA 13\.0 expected \(this build's runtime\), the installed one is for 12\.4; update it",
    ),
    "no GPU": ((0, 13000, 0, 0), "an NVIDIA GPU expected, the driver shows none"),
    "architecture not built": ((1, 13000, 209, 0), r"compute capability 9\.0, and this build has kernels for .*LADD_CUDA_ARCHS=sm_90"),
}


@needs_emulator
@pytest.mark.parametrize("name", ERRORS)
def test_opening_says_what_is_missing(name: str) -> None:
    library = cuda_device.library()
    pretended, message = ERRORS[name]
    try:
        library.ladd_emulator_pretend(*pretended)
        with pytest.raises(RuntimeError, match=message):
            _core.Device(ladd.device._provider(), 0)
    finally:
        library.ladd_emulator_pretend(1, 13000, 0, 0)
    assert _core.Device(ladd.device._provider(), 0).info()["name"] == "emulator"


@needs_emulator
@pytest.mark.parametrize(("code", "sticky"), [(1, False), (700, True), (719, True)])
def test_failures_say_whether_the_device_is_lost(code: int, sticky: bool) -> None:
    library = cuda_device.library()
    device = _core.Device(ladd.device._provider(), 0)
    a = device.empty((3,), zeroed=True)
    try:
        library.ladd_emulator_pretend(1, 13000, 0, code)
        with pytest.raises(RuntimeError, match="the device is unusable until this process ends" if sticky else "cudaMemcpyAsync.* failed"):
            a.numpy()
    finally:
        library.ladd_emulator_pretend(1, 13000, 0, 0)
    if sticky:
        with pytest.raises(RuntimeError, match="cuda:0 is unusable since an earlier error in this process; restart it"):
            device.empty((3,))
    else:
        assert not a.numpy().any()


def test_recorded_calls_replay_on_new_inputs() -> None:
    """Host numbers stay those of the recording, arrays on the device are read anew, and others' memory stays out of it."""
    x, t = put(normal(1, 3, 40)), np.array([0.1, 0.5, 0.9], np.float32)

    def work() -> Any:
        y, _, _ = _core.layer_norm_modulate_forward(x.reshape(1, 3, 40), None, None)
        return _core.renoise(_core.scale(y.reshape(3, 40), 2.0), t, 7, 1, 2)

    first = work().numpy()
    with ladd.device.record("cuda") as graph:
        result = work()
    graph.replay()
    assert np.array_equal(result.numpy(), first)
    t[:] = 0
    x[...] = normal(2, 3, 40)
    others = [put(normal(3, 3, 40)) for _ in range(8)]
    graph.replay()
    t[:] = [0.1, 0.5, 0.9]
    assert np.array_equal(result.numpy(), work().numpy()) and not np.array_equal(result.numpy(), first)
    assert all(np.array_equal(other.numpy(), normal(3, 3, 40)) for other in others)


def test_a_recorded_forward_replays_on_new_inputs() -> None:
    model = ladd.MMDiT(ladd.MMDiTConfig(**CONFIG), seed=1, device="cuda")
    model.load_state_dict({**model.state_dict(), "proj_out.weight": normal(1, 16, 16)})
    shapes = (2, 4, 4, 4), (2, 3, 8), (2, 8)
    z, y, p = (put(normal(10 + i, *shape)) for i, shape in enumerate(shapes))
    model(z, 0.4, y, p)
    with ladd.device.record("cuda") as graph:
        v, pullback = model.vjp(z, 0.4, y, p)
        g = pullback(v, params=False)
    for seed in (20, 30):
        for i, array in enumerate((z, y, p)):
            array[...] = normal(seed + i, *array.shape)
        graph.replay()
        wanted, pull_wanted = model.vjp(z, 0.4, y, p)
        assert wanted.numpy().any() and np.array_equal(v.numpy(), wanted.numpy())
        assert np.array_equal(g.latents.numpy(), pull_wanted(wanted, params=False).latents.numpy())


def test_what_cannot_be_recorded_is_an_error() -> None:
    a = put(normal(1, 5))
    with pytest.raises(RuntimeError, match="no number for the host expected while a graph is recorded"), ladd.device.record("cuda") as graph:
        _core.sum_squares(a)
    with pytest.raises(RuntimeError, match="a graph whose recording has ended expected"):
        graph.replay()
    with pytest.raises(RuntimeError, match="one recording at a time"), ladd.device.record("cuda"), ladd.device.record("cuda"):
        pass
    with pytest.raises(ValueError, match="needs a CUDA device"), ladd.device.record("cpu"):
        pass
    assert np.array_equal(a.numpy(), normal(1, 5)), "the device goes on as before"


def test_streams_of_the_caller() -> None:
    device = cuda_device.device()
    own = device.stream
    with ladd.device.stream("cuda", 1):
        assert device.stream == 1
        a = put(normal(9, 4))
    assert device.stream == own and np.array_equal(a.numpy(), normal(9, 4))
    with pytest.raises(ValueError, match="needs a CUDA device"), ladd.device.stream("cpu", 1):
        pass


# ---- what goes on beside ladd in the same process ------------------------------------------------------------------------------------


@needs_emulator
def test_the_callers_context_stays_current() -> None:
    """Other users of CUDA in a thread find the device that they chose, whatever was called, refused or given back."""
    library = cuda_device.library()
    library.ladd_emulator_context.restype = ctypes.c_void_p
    library.ladd_emulator_set_context.argtypes = [ctypes.c_void_p]
    before = library.ladd_emulator_context()
    try:
        for chosen in (0x1230, None):
            library.ladd_emulator_set_context(chosen)
            a = put(normal(1, 3))
            taken = ladd.device.as_array(Speaker(a, "dlpack"), "x", device=cuda_device.device())
            with pytest.raises(MemoryError):
                cuda_device.device().empty((1 << 20, 1 << 14))
            with ladd.device.record("cuda") as graph:
                _core.scale(a, 2.0)
            graph.replay()
            assert _core.Device(ladd.device._provider(), 0).info()["name"] == "emulator"
            del graph, taken, a
            gc.collect()
            cuda_device.device().wait()
            assert library.ladd_emulator_context() == chosen
    finally:
        library.ladd_emulator_set_context(before)


@needs_emulator
def test_memory_that_was_lent_waits_for_its_consumer() -> None:
    library = cuda_device.library()
    library.ladd_emulator_orderings.restype = ctypes.c_char_p
    a = put(normal(1, 4, 3))
    library.ladd_emulator_orderings()
    for array in (a, a[1:], a.reshape(12)):
        for stream, name in ((None, "1"), (1, "1"), (2, "2"), (77, "77")):
            capsule = array.__dlpack__(stream=stream)
            assert library.ladd_emulator_orderings().decode() == f"0>{name} ", "the consumer waits for what was queued"
            del capsule
            assert library.ladd_emulator_orderings().decode() == f"{name}>0 ", "and what is queued later for the consumer"
        array.__dlpack__(stream=-1)
        assert not library.ladd_emulator_orderings()
    del array
    view = a[:2]
    assert view.__cuda_array_interface__["shape"] == (2, 3)
    del view
    assert library.ladd_emulator_orderings().decode() == "1>0 "


def test_a_recording_is_kept_from_others() -> None:
    device = cuda_device.device()
    a, given, lent = (put(normal(i, 4)) for i in range(3))
    guest = ladd.device.as_array(Speaker(given, "dlpack"), "x", device=device)
    references = sys.getrefcount(given)
    capsule = lent.__dlpack__(stream=1)
    with ladd.device.record("cuda") as graph:
        del guest, capsule, lent  # neither the end of a lease nor of a guest may enter the graph
        gc.collect()
        with pytest.raises(RuntimeError, match="x: expected a DeviceArray made before the recording began"):
            ladd.device.as_array(Speaker(a, "dlpack"), "x", device=device)
        with pytest.raises(RuntimeError, match="x: expected a DeviceArray made before the recording began"):
            ladd.device.as_array(Foreign(a, "interface"), "x", device=device)
        result = _core.scale(a, 2.0)
    device.wait()
    gc.collect()
    assert sys.getrefcount(given) == references - 1, "the guest was given back after the recording"
    graph.replay()
    assert np.array_equal(result.numpy(), 2 * normal(0, 4))
    with ladd.device.record("cuda") as second, pytest.raises(RuntimeError, match="no replay expected while a graph is recorded"):
        graph.replay()
    second.replay()


@needs_emulator
def test_copies_under_way_are_no_errors() -> None:
    """A question after unfinished work leaves "not ready" as CUDA's last error, which the next launch must not meet."""
    library, device = cuda_device.library(), cuda_device.device()
    x = normal(1, 30_000)
    kept = put(x)
    try:
        for busy in (1, 1, 2):  # a second block, then the second of two, then a third
            library.ladd_emulator_set_busy(busy)
            assert np.array_equal(_core.scale(put(x), 2.0).numpy(), 2 * x)
        taken = ladd.device.as_array(Speaker(kept, "dlpack"), "x", device=device)
        library.ladd_emulator_set_busy(1)
        del taken
        assert np.array_equal(_core.scale(kept, 2.0).numpy(), 2 * x)
    finally:
        library.ladd_emulator_set_busy(0)


def test_a_forked_process_is_told() -> None:
    device = cuda_device.device()
    child = os.fork()
    if not child:
        try:
            device.empty((3,))
        except RuntimeError as error:
            os._exit(0 if "opened before this process was forked off" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_addresses_that_no_kernel_can_read() -> None:
    a = put(normal(7, 4, 4))
    described = {**a.__cuda_array_interface__, "data": (a.__cuda_array_interface__["data"][0] + 2, False), "shape": (3,)}
    with pytest.raises(ValueError, match="x: expected an aligned array, got one at an odd address"):
        ladd.device.as_array(type("Other", (), {"__cuda_array_interface__": described})(), "x", device=cuda_device.device())
    with pytest.raises(ValueError, match="stream: expected None, 1, 2, -1 or a handle, got -2"):
        a.__dlpack__(stream=-2)


def test_libraries_are_found_by_pathfinder(monkeypatch: pytest.MonkeyPatch) -> None:
    found = type("Found", (), {"abs_path": "/somewhere/libcublasLt.so.13"})
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", type("Module", (), {"load_nvidia_dynamic_lib": staticmethod(lambda name: found)}))  # type: ignore[misc]
    assert ladd.device.locate_library("cublasLt") == "/somewhere/libcublasLt.so.13"


@needs_emulator
@pytest.mark.parametrize(("number", "name", "soname"), [(0, "cublasLt", "libcublasLt.so.13"), (1, "cudnn", "libcudnn.so.9")])
def test_a_missing_library_says_what_was_tried_and_what_helps(number: int, name: str, soname: str) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL(soname)
        pytest.skip(f"{soname} is installed")
    device, symbol = cuda_core.device(), cuda_emulator.library("kernels").ladd_cuda_symbol
    symbol.restype = ctypes.c_void_p
    assert symbol(number, b"anything") is None
    assert device.message.startswith(
        f"the library {name} expected: cuda-pathfinder found none in wheels, conda or the system; the loader knows "
    )
    assert soname in device.message and 'pip install "ladd[cuda]"' in device.message


def test_without_the_extension() -> None:
    """What a build without CUDA says."""
    code = (
        "import sys; sys.modules['ladd._cuda'] = None\n"
        "import ladd\n"
        "try: ladd.MMDiT({}, device='cuda')\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert "this build of ladd has no CUDA kernels" in done.stdout
