"""What the kernels on arrays refuse, strict (`ladd._core`) and friendly (`ladd.kernels`), and what the friendly ones accept.

The table CALLS holds one good call of every kernel; the tests spoil one argument after the other. A refused call names the argument,
says what was expected and changes nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import ByArray, ByDLPack

from ladd import _core, kernels

Array = np.ndarray


def normal(*shape: int) -> Array:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


T = np.array([0.25, 0.75], np.float32)
ONE = np.ones
F = np.float32

# kernel -> a good call. Arrays are made anew for every use, since some are written.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "normal": lambda: {"shape": (2, 3), "seed": 1, "purpose": 2, "step": 3, "samples": np.arange(2), "out": normal(2, 3)},
    "renoise": lambda: {"x0": normal(2, 3), "t": T.copy(), "seed": 1, "purpose": 2, "samples": np.arange(2), "out": normal(2, 3)},
    "interpolate": lambda: {"x0": normal(2, 3), "noise": normal(2, 3), "t": T.copy(), "out": normal(2, 3)},
    "predict_x0": lambda: {"x": normal(2, 3), "v": normal(2, 3), "t": T.copy(), "out": normal(2, 3)},
    "row_scale": lambda: {"x": normal(2, 3), "factor": T.copy(), "out": normal(2, 3)},
    "euler_step": lambda: {"x": normal(2, 3), "v": normal(2, 3), "sigma": 0.5, "sigma_next": 0.25, "out": normal(2, 3)},
    "adversarial_loss": lambda: {"logits": normal(2, 3), "loss": "hinge", "role": "fake", "weight": 0.5},
    "adamw": lambda: {
        **{name: abs(normal(5)) for name in "pmvg"},
        **{"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "step": 1, "grad_scale": 0.5},
    },
    "ema": lambda: {"e": normal(5), "p": normal(5), "decay": 0.9},
    "copy": lambda: {"x": normal(2, 3), "out": normal(2, 3)},
    "add": lambda: {"a": normal(2, 3), "b": normal(2, 3), "out": normal(2, 3)},
    "axpy": lambda: {"y": normal(2, 3), "x": normal(2, 3), "alpha": 0.5},
    "scale": lambda: {"x": normal(2, 3), "alpha": 0.5, "out": normal(2, 3)},
    "layer_norm_modulate_forward": lambda: {
        **{"x": normal(2, 3, 4), "shift": normal(2, 4), "scale": normal(2, 4), "eps": 1e-6, "out": normal(2, 3, 4)}
    },
    "layer_norm_modulate_backward": lambda: {
        **{"dy": normal(2, 3, 4), "x": normal(2, 3, 4), "mean": normal(2, 3), "rstd": ONE((2, 3), F), "scale": normal(2, 4)}
    },
    "gate_residual_forward": lambda: {"x": normal(2, 3, 4), "y": normal(2, 3, 4), "gate": normal(2, 4), "out": normal(2, 3, 4)},
    "gate_residual_backward": lambda: {"dout": normal(2, 3, 4), "y": normal(2, 3, 4), "gate": normal(2, 4)},
    "rms_norm_heads_forward": lambda: {"x": normal(2, 3, 4), "w": normal(4), "eps": 1e-6, "out": normal(2, 3, 4)},
    "rms_norm_heads_backward": lambda: {"dy": normal(2, 3, 4), "x": normal(2, 3, 4), "rstd": ONE((2, 3), F), "w": normal(4)},
    "linear_forward": lambda: {"x": normal(3, 4), "w": normal(5, 4), "bias": normal(5), "out": normal(3, 5)},
    "linear_backward": lambda: {"dy": normal(3, 5), "x": normal(3, 4), "w": normal(5, 4), "input": True},
    "linear_gelu_forward": lambda: {"x": normal(3, 4), "w": normal(5, 4), "bias": normal(5), "out": normal(3, 5)},
    **{f"{name}_forward": lambda: {"x": normal(2, 3), "out": normal(2, 3)} for name in ("gelu", "silu")},
    **{f"{name}_backward": lambda: {"dy": normal(2, 3), "x": normal(2, 3), "out": normal(2, 3)} for name in ("gelu", "silu")},
    "leaky_relu_forward": lambda: {"x": normal(2, 3), "slope": 0.1, "out": normal(2, 3)},
    "leaky_relu_backward": lambda: {"dy": normal(2, 3), "x": normal(2, 3), "slope": 0.1, "out": normal(2, 3)},
    "conv2d_forward": lambda: {
        **{"x": normal(2, 3, 6, 5), "w": normal(4, 3, 3, 2), "bias": normal(4), "stride": 2, "padding": (0, 1, 1, 0)},
        **{"out": normal(2, 4, 3, 3)},
    },
    "conv2d_backward": lambda: {
        **{"dy": normal(2, 4, 3, 3), "x": normal(2, 3, 6, 5), "w": normal(4, 3, 3, 2), "stride": 2, "padding": (0, 1, 1, 0)}
    },
    "group_norm_forward": lambda: {
        **{"x": normal(2, 4, 6), "gamma": normal(4), "beta": normal(4), "groups": 2, "eps": 1e-6, "silu": True, "out": normal(2, 4, 6)}
    },
    "group_norm_backward": lambda: {
        **{"dy": normal(2, 4, 6), "x": normal(2, 4, 6), "mean": normal(2, 2), "rstd": ONE((2, 2), F), "gamma": normal(4)},
        **{"beta": normal(4), "silu": True},
    },
    "upsample2x_forward": lambda: {"x": normal(2, 3, 2, 4), "out": normal(2, 3, 4, 8)},
    "upsample2x_backward": lambda: {"dy": normal(2, 3, 4, 8), "out": normal(2, 3, 2, 4)},
    "spectral_norm_forward": lambda: {"w": normal(3, 4), "u": normal(3), "iterations": 2},
    "spectral_norm_backward": lambda: {"dw_hat": normal(3, 4), "w_hat": normal(3, 4), "u": normal(3), "v": normal(4), "sigma": 2.0},
    "channel_dot_forward": lambda: {"x": normal(2, 3, 4), "e": normal(2, 3), "bias": normal(1), "out": normal(2, 4)},
    "channel_dot_backward": lambda: {"dy": normal(2, 4), "x": normal(2, 3, 4), "e": normal(2, 3)},
    "transpose": lambda: {"x": normal(2, 3, 4), "out": normal(2, 4, 3)},
    "patch_gather": lambda: {"image": normal(2, 3, 4, 6), "patch_size": 2, "channel_last": True},
    "patch_scatter": lambda: {"tokens": normal(2, 6, 12), "channels": 3, "height": 4, "width": 6, "patch_size": 2, "channel_last": True},
    "add_position": lambda: {"x": normal(2, 6, 4), "table": normal(5, 5, 4), "grid": (2, 3)},
    "timestep_features": lambda: {"sigma": T.copy(), "dim": 8},
}
POSITIONAL = {"sum_squares": "x", "zero": "y"}
ANY_SHAPE = {"adversarial_loss", "copy", "scale", "gelu_forward", "silu_forward", "leaky_relu_forward"}  # their input's, not their out's
# Arguments whose last axis may have another size: no other argument carries its letter.
FREE_LAST = {("spectral_norm_forward", "w"), ("patch_gather", "image"), ("timestep_features", "sigma")}
WRITTEN = {"adamw": "pmv", "ema": "e", "axpy": "y", "add_position": "x", "spectral_norm_forward": "u"}


def arrays(call: dict[str, Any]) -> list[str]:
    return [name for name, value in call.items() if isinstance(value, np.ndarray) and value.dtype == np.float32]


def pairs() -> Iterator[Any]:
    for kernel, call in CALLS.items():
        for name in arrays(call()):
            yield pytest.param(kernel, name, id=f"{kernel}-{name}")


each_array = pytest.mark.parametrize(("kernel", "name"), list(pairs()))


def refused(kernel: str, call: dict[str, Any], error: type[Exception] | tuple[type[Exception], ...], message: str) -> None:
    """The call fails with that message, and no array was touched."""
    before = {name: value.tobytes() for name, value in call.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error, match=message):
        getattr(_core, kernel)(**call)
    assert before == {name: value.tobytes() for name, value in call.items() if isinstance(value, np.ndarray)}


def test_the_table_has_every_kernel() -> None:
    functions = {name for name, value in vars(_core).items() if callable(value) and not isinstance(value, type)}
    settings = {"set_num_threads", "get_num_threads", "backend_name", "empty_cache", "memory_in_use", "openblas_config"}
    elsewhere = {"attention_forward", "attention_backward"}  # they take lists: below
    elsewhere |= {"clip_factor", "r1_factors", "adamw_control"}  # float64 in pairs: below
    assert functions - settings - elsewhere == set(CALLS) | set(POSITIONAL)


@pytest.mark.parametrize("kernel", CALLS)
def test_the_good_call_is_good(kernel: str) -> None:
    call = CALLS[kernel]()
    result = getattr(_core, kernel)(**call)
    if "out" in call:
        assert (result[0] if isinstance(result, tuple) else result) is call["out"]
    missing = next(iter(call))
    with pytest.raises(TypeError, match="argument"):
        getattr(_core, kernel)(**{name: value for name, value in call.items() if name != missing})
    with pytest.raises(TypeError, match="argument"):
        getattr(_core, kernel)(**call, nonsense=1)


@each_array
def test_not_an_array(kernel: str, name: str) -> None:
    for value in ([[1.0, 2.0]], 1.0, "text", object()):
        refused(
            kernel,
            {**CALLS[kernel](), name: value},
            TypeError,
            f"^{name}: expected a float32 array of shape .*, got {type(value).__name__}",
        )


@each_array
def test_wrong_dtype(kernel: str, name: str) -> None:
    for dtype in (np.float64, np.float16, np.int32, np.complex64, bool, object, ">f4"):
        call = CALLS[kernel]()
        call[name] = call[name].astype(dtype)
        refused(kernel, call, TypeError, f"^{name}: expected dtype float32, got {np.dtype(dtype)}")


@each_array
def test_wrong_shape(kernel: str, name: str) -> None:
    if kernel in ANY_SHAPE and "out" not in CALLS[kernel]():
        assert arrays(CALLS[kernel]()) == [name]  # alone it sets every size, so nothing can be wrong
        return
    good = CALLS[kernel]()[name]
    wrong = [good[None]] if (kernel, name) in FREE_LAST else [good[None], np.concatenate([good, good], axis=-1)]
    for value in wrong:
        # The first argument sets the sizes, so another one may then be the one that does not fit.
        refused(kernel, {**CALLS[kernel](), name: value}, ValueError, r"expected (shape|\d+ elements|an array of shape|a kernel|an? )")


@each_array
def test_size_zero(kernel: str, name: str) -> None:
    call = CALLS[kernel]()
    call[name] = np.empty((0, *call[name].shape[1:]), np.float32)
    refused(kernel, call, ValueError, rf"^{name}: expected (sizes from 1 to \d+, got \(0|shape|an array of shape)")


@each_array
def test_strided_view(kernel: str, name: str) -> None:
    call = CALLS[kernel]()
    call[name] = np.repeat(call[name], 2, axis=-1)[..., ::2]
    if call[name].size == 1:  # a single number is contiguous at any stride
        getattr(_core, kernel)(**call)
        return
    refused(kernel, call, ValueError, f"^{name}: expected a C-contiguous array, got a strided view")


@each_array
def test_odd_address(kernel: str, name: str) -> None:
    call = CALLS[kernel]()
    good = call[name]
    raw = np.zeros(good.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(good.tobytes(), np.uint8)
    call[name] = raw[1:].view(np.float32).reshape(good.shape)
    refused(kernel, call, ValueError, f"^{name}: expected an aligned array")


@each_array
def test_read_only(kernel: str, name: str) -> None:
    call = CALLS[kernel]()
    call[name].flags.writeable = False
    if name == "out" or name in WRITTEN.get(kernel, ""):
        refused(kernel, call, ValueError, f"^{name}: expected a writeable array, got a read-only one")
    else:
        getattr(_core, kernel)(**call)


@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for kernel, call in CALLS.items() if "out" in call() for name in arrays(call()) if name != "out"]
)
def test_memory_shared_with_the_result(kernel: str, name: str) -> None:
    """The very memory of an input may be `out` where the kernel works element by element; a shifted one never."""
    call = CALLS[kernel]()
    shape, size, size_of_out = call[name].shape, call[name].size, call["out"].size
    room = np.ones(size_of_out + size - 1, np.float32)  # the last element of out is the first of the input
    call["out"], call[name] = room[:size_of_out].reshape(call["out"].shape), room[size_of_out - 1 :].reshape(shape)
    refused(kernel, call, ValueError, f"^out: expected memory apart from {name}")


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("renoise", "x0"),
        ("interpolate", "noise"),
        ("predict_x0", "v"),
        ("row_scale", "x"),
        ("euler_step", "x"),
        ("add", "b"),
        ("scale", "x"),
    ]
    + [(f"{f}_forward", "x") for f in ("gelu", "silu", "leaky_relu")]
    + [(f"{f}_backward", "dy") for f in ("gelu", "silu", "leaky_relu")]
    + [("gate_residual_forward", "x")],
)
def test_in_place(kernel: str, name: str) -> None:
    call = CALLS[kernel]()
    wanted = getattr(_core, kernel)(**call).copy()
    call = CALLS[kernel]()
    call["out"] = call[name]
    assert getattr(_core, kernel)(**call).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kernel", POSITIONAL)
def test_kernels_of_one_array(kernel: str) -> None:
    name, function = POSITIONAL[kernel], getattr(_core, kernel)
    function(normal(2, 3))
    for bad, error, message in (
        ([1.0], TypeError, "expected a float32 array"),
        (np.ones(3), TypeError, "expected dtype float32, got float64"),
        (np.empty(0, np.float32), ValueError, "expected sizes from 1"),
        (normal(4, 4)[:, ::2], ValueError, "expected a C-contiguous array"),
    ):
        with pytest.raises(error, match=f"^{name}: {message}"):
            function(bad)


BAD_SCALARS: list[tuple[str, str, Any, type[Exception], str]] = [
    ("normal", "shape", 3, TypeError, "shape: expected a sequence of integers, got int"),
    ("normal", "shape", (), ValueError, r"shape: expected \(B, ...\), got \(\)"),
    ("normal", "shape", (2, 0), ValueError, "shape: expected an integer from 1 to .*, got 0"),
    ("normal", "shape", (2, 4), ValueError, r"out: expected an array of shape \(2, 4\)"),
    ("normal", "shape", (2, 1 << 40), ValueError, "shape: expected an integer from 1"),
    ("normal", "seed", -1, ValueError, r"seed: expected an integer from 0 to 2\*\*64 - 1, got -1"),
    ("normal", "seed", 1.0, TypeError, "seed: expected an integer, got float"),
    ("normal", "purpose", -1, ValueError, "purpose: expected an integer from 0"),
    ("normal", "step", 1 << 64, ValueError, "step: expected an integer from 0"),
    ("normal", "samples", np.arange(3), ValueError, r"samples: expected a contiguous array of shape \(B=2,\)"),
    ("normal", "samples", np.arange(4)[::2], ValueError, "samples: expected a contiguous array"),
    ("normal", "samples", np.arange(2, dtype=np.int32), TypeError, r"samples: expected an int64 array of shape \(B=2,\)"),
    ("normal", "samples", [0, 1], TypeError, "samples: expected an int64 array"),
    ("renoise", "return_noise", 1, TypeError, "return_noise: expected True or False, got int"),
    ("euler_step", "sigma", math.nan, ValueError, "sigma: expected a finite number, got nan"),
    ("euler_step", "sigma_next", math.inf, ValueError, "sigma_next: expected a finite number, got inf"),
    ("euler_step", "sigma", "0.5", TypeError, "must be real number, not str"),
    ("adversarial_loss", "loss", "wasserstein", ValueError, "loss: expected 'hinge', 'logistic', 'lsgan' or 'bce', got 'wasserstein'"),
    ("adversarial_loss", "loss", 0, TypeError, "str"),
    ("adversarial_loss", "role", "judge", ValueError, "role: expected 'real', 'fake' or 'generator', got 'judge'"),
    ("adversarial_loss", "weight", math.nan, ValueError, "weight: expected a finite number, got nan"),
    ("adamw", "lr", -1.0, ValueError, "lr: expected a number from 0.0"),
    ("adamw", "lr", math.nan, ValueError, "lr: expected a number from 0.0 to 1000000.0, got nan"),
    ("adamw", "beta1", 1.0, ValueError, "beta1: expected a number from 0.0"),
    ("adamw", "m", None, ValueError, r"a first moment m expected, for beta1 is 0\.\d+ and not 0, got none"),
    ("adamw", "beta2", 1.5, ValueError, "beta2: expected a number from 0.0"),
    ("adamw", "eps", -1e-8, ValueError, "eps: expected a number from 0.0"),
    ("adamw", "weight_decay", math.inf, ValueError, "weight_decay: expected a number from 0.0"),
    ("adamw", "step", 0, ValueError, "step: expected an integer from 1"),
    ("adamw", "step", 1.0, TypeError, "step: expected an integer, got float"),
    ("adamw", "grad_scale", math.inf, ValueError, "grad_scale: expected a finite number, got inf"),
    ("ema", "decay", 1.01, ValueError, "decay: expected a number from 0.0 to 1.0, got 1.01"),
    ("axpy", "alpha", math.nan, ValueError, "alpha: expected a finite number, got nan"),
    ("scale", "alpha", None, TypeError, "must be real number, not NoneType"),
    ("layer_norm_modulate_forward", "eps", -1.0, ValueError, "eps: expected a number from 0.0 to 1.0, got -1.0"),
    ("layer_norm_modulate_forward", "shift", None, ValueError, "shift, scale: expected both or neither, got one"),
    ("linear_backward", "input", 1, TypeError, "input: expected True or False, got int"),
    ("leaky_relu_forward", "slope", math.inf, ValueError, "slope: expected a finite number"),
    ("conv2d_forward", "stride", 0, ValueError, "stride: expected an integer from 1"),
    ("conv2d_forward", "stride", (1, 1), TypeError, "stride: expected an integer, got tuple"),
    ("conv2d_forward", "padding", 1, TypeError, "padding: expected a sequence of integers, got int"),
    ("conv2d_forward", "padding", (1, 1), ValueError, r"padding: expected \(top, left, bottom, right\), got \(1, 1\)"),
    ("conv2d_forward", "padding", (1, 1, 1, -1), ValueError, "padding: expected an integer from 0"),
    ("conv2d_forward", "w", normal(4, 3, 8, 2), ValueError, "w: expected a kernel of at most the padded image, 7 x 6, got 8 x 2"),
    ("group_norm_forward", "groups", 3, ValueError, "groups: expected a divisor of the 4 channels, got 3"),
    ("group_norm_forward", "groups", 0, ValueError, "groups: expected an integer from 1"),
    ("group_norm_forward", "silu", 1, TypeError, "silu: expected True or False, got int"),
    ("spectral_norm_forward", "iterations", -1, ValueError, "iterations: expected an integer from 0"),
    ("spectral_norm_backward", "sigma", math.nan, ValueError, "sigma: expected a finite number, got nan"),
    ("upsample2x_backward", "dy", normal(2, 3, 3, 8), ValueError, "dy: expected even height and width, got 3 x 8"),
    ("patch_gather", "patch_size", 5, ValueError, "patch_size: expected 1 to 4, the image's smaller side, got 5"),
    ("patch_gather", "patch_size", 0, ValueError, "patch_size: expected an integer from 1"),
    ("patch_scatter", "height", 6, ValueError, r"tokens: expected shape \(B, N=9, L=12\), got \(2, 6, 12\)"),
    ("patch_scatter", "channels", 0, ValueError, "channels: expected an integer from 1"),
    ("add_position", "grid", (6, 1), ValueError, r"grid: expected \(h, w\) of at most 5 each, got \(6, 1\)"),
    ("add_position", "grid", 6, TypeError, "grid: expected a sequence of integers, got int"),
    ("timestep_features", "dim", 7, ValueError, "dim: expected an even number, got 7"),
    ("timestep_features", "dim", 0, ValueError, "dim: expected an integer from 2"),
]


@pytest.mark.parametrize(("kernel", "name", "value", "error", "message"), BAD_SCALARS)
def test_bad_setting(kernel: str, name: str, value: Any, error: type[Exception], message: str) -> None:
    refused(kernel, {**CALLS[kernel](), name: value}, error, message)


def test_numbers_that_stay_where_they_are_computed() -> None:
    """float64 in pairs of float32, on a multiple of 8 bytes, as many as there must be."""
    one, two, factor = np.zeros(2, F), np.zeros(4, F), np.zeros(1, F)
    good = (factor, one, two, one.copy(), np.ones(6, F), None, 0.5, 1)
    _core.clip_factor(*good)
    names = ("factor", "norm", "failed", "done", "squares", "checked")
    for place, bad, error, message in (
        (0, np.zeros(2, F), ValueError, "factor: expected shape"),
        (1, two, ValueError, r"norm: expected shape \(n=2\), got \(4\)"),
        (2, one, ValueError, "failed: expected shape"),
        (4, np.ones(3, F), ValueError, "squares: expected pairs of float32"),
        (4, np.ones(7, F)[1:], ValueError, "squares: expected pairs of float32"),
        (5, np.ones(2), TypeError, "checked: expected dtype float32, got float64"),
        (6, np.nan, ValueError, "max_norm: expected"),
        *((i, None, TypeError, f"{names[i]}: expected|expected norm") for i in range(5)),
    ):
        with pytest.raises(error, match=message):
            _core.clip_factor(*good[:place], bad, *good[place + 1 :])
    for bad in ((np.zeros(3, F), one, two), (np.zeros(4, F), two, two), (np.zeros(4, F), one, one)):
        with pytest.raises(ValueError, match="expected shape"):
            _core.r1_factors(*bad, 0.1, 1e-4, 1.0)
    x = normal(2, 3)
    with pytest.raises(ValueError, match="values: expected shape"):
        _core.adversarial_loss(x, "hinge", "real", values=two)
    assert _core.adversarial_loss(x, "hinge", "real", values=np.zeros(6, F))[0] is None
    with pytest.raises(ValueError, match="out: expected shape"):
        _core.sum_squares(x, out=two)
    call = CALLS["adamw"]()
    for control, error in ((np.zeros(3, F), ValueError), (np.zeros(4), TypeError), (0.5, TypeError)):
        refused("adamw", {**call, "control": control}, error, "control: expected")
    for rounding in ((1, 2), 3, (1, -2, 3), (1, 2, "x"), (1, 2, np.zeros(3, F))):
        refused("adamw", {**call, "rounding": rounding}, (TypeError, ValueError), "expected|argument")
    refused("ema", {**CALLS["ema"](), "control": np.zeros(3, F)}, ValueError, "control: expected shape")
    refused("renoise", {**CALLS["renoise"](), "step": np.zeros(4, F)}, ValueError, "step: expected shape")


def test_adamw_and_ema_refuse_one_buffer_for_two() -> None:
    call = CALLS["adamw"]()
    refused("adamw", {**call, "m": call["p"]}, ValueError, "out: expected memory apart from m")
    refused("adamw", {**call, "g": call["v"]}, ValueError, "out: expected memory apart from g")
    e = normal(5)
    refused("ema", {"e": e, "p": e, "decay": 0.5}, ValueError, "out: expected memory apart from p")


# ---- attention -----------------------------------------------------------------------------------------------------------------------

Q = normal(2, 3, 2, 4)
OTHER = normal(2, 5, 2, 4)
BAD_STREAMS: list[tuple[Any, type[Exception], str]] = [
    (Q, TypeError, r"streams: expected a list of one or two \(q, k, v\)"),
    ([], TypeError, "streams: expected a list of one or two"),
    ([(Q, Q, Q)] * 3, TypeError, "streams: expected a list of one or two"),
    ([(Q, Q)], ValueError, r"stream: expected 3 arrays \(q, k, v\), got 2"),
    ([Q], TypeError, r"stream: expected a list of 3 arrays \(q, k, v\), got numpy.ndarray"),
    ([(Q, OTHER, OTHER)], ValueError, r"k: expected shape \(B=2, n=3, h=2, d=4\), got \(2, 5, 2, 4\)"),
    ([(Q, Q, Q.astype(np.float64))], TypeError, "v: expected dtype float32, got float64"),
    ([(Q[0], Q[0], Q[0])], ValueError, r"q: expected shape \(B, n, h, d\), got \(3, 2, 4\)"),
    ([(Q[:, :0], Q[:, :0], Q[:, :0])], ValueError, "q: expected sizes from 1"),
    ([(Q, Q, Q), (Q[:1], Q[:1], Q[:1])], ValueError, r"q: expected shape \(B=2, n, h=2, d=4\), got \(1, 3, 2, 4\)"),
    ([(Q, Q, np.asfortranarray(Q))], ValueError, "v: expected dense heads and head_dim axes and positive strides"),
    ([(Q[::-1],) * 3], ValueError, "q: expected dense heads and head_dim axes and positive strides"),
    ([(Q, Q, np.repeat(Q, 2, axis=1)[:, ::2])], ValueError, "v: expected the strides of q, got others"),
]


@pytest.mark.parametrize(("streams", "error", "message"), BAD_STREAMS)
def test_bad_streams(streams: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.attention_forward(streams)


@pytest.mark.parametrize(("scale", "error"), [(math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)])
def test_bad_scale(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _core.attention_forward([(Q, Q, Q)], scale)


def test_bad_attention_backward() -> None:
    (o,), lse = _core.attention_forward([(Q, Q, Q)])
    packed = normal(2, 3, 3, 2, 4)
    views = tuple(packed[:, :, i] for i in range(3))
    good = {"douts": [o], "streams": [(Q, Q, Q)], "outs": [o], "lse": lse}
    _core.attention_backward(**good)
    for change, error, message in (
        ({"douts": o}, TypeError, r"douts: expected a list of 1 arrays \(one a stream\), got numpy.ndarray"),
        ({"douts": []}, ValueError, "douts: expected 1 arrays"),
        ({"douts": [OTHER]}, ValueError, r"dout: expected shape \(B=2, n=3, h=2, d=4\), got \(2, 5, 2, 4\)"),
        ({"outs": [None]}, TypeError, "out: expected a float32 array"),
        ({"lse": lse[:, :, :2].copy()}, ValueError, r"lse: expected shape \(B=2, h=2, S=3\), got \(2, 2, 2\)"),
        ({"streams": [views]}, ValueError, "q, k, v: expected C-contiguous arrays for backward"),
    ):
        with pytest.raises(error, match=message):
            _core.attention_backward(**{**good, **change})


def test_attention_on_slices_of_one_packed_array() -> None:
    packed = normal(2, 7, 3, 2, 4)
    views = tuple(packed[:, :, i] for i in range(3))
    (strided,), _ = _core.attention_forward([views])
    (dense,), _ = _core.attention_forward([tuple(np.ascontiguousarray(view) for view in views)])
    assert strided.tobytes() == dense.tobytes()


# ---- the friendly layer ----------------------------------------------------------------------------------------------------------------

OUT, LSE = kernels.attention_forward(Q, Q, Q)
X = normal(2, 3, 4)
PUBLIC: dict[str, dict[str, Any]] = {
    "attention_forward": {"q": Q, "k": Q, "v": Q},
    "attention_backward": {"d_o": OUT, "q": Q, "k": Q, "v": Q, "o": OUT, "lse": LSE},
    "layer_norm_modulate_forward": {"x": X, "shift": normal(2, 4), "scale": normal(2, 4)},
    "layer_norm_modulate_backward": {"dy": X, "x": X, "mean": normal(2, 3), "rstd": normal(2, 3), "scale": normal(2, 4)},
    "gate_residual_forward": {"x": X, "y": X, "gate": normal(2, 4)},
    "gate_residual_backward": {"dout": X, "y": X, "gate": normal(2, 4)},
    "rms_norm_forward": {"x": X, "weight": normal(4)},
    "rms_norm_backward": {"dy": X, "x": X, "rstd": normal(2, 3), "weight": normal(4)},
    "group_norm_forward": {"x": normal(2, 4, 3, 2), "weight": normal(4), "bias": normal(4), "groups": 2},
    "group_norm_backward": {
        **{"dy": normal(2, 4, 3), "x": normal(2, 4, 3), "mean": normal(2, 2), "rstd": normal(2, 2), "weight": normal(4), "bias": normal(4)}
    },
    "spectral_norm_forward": {"weight": normal(3, 2, 2), "u": normal(3)},
    "spectral_norm_backward": {"dw_hat": normal(3, 2, 2), "w_hat": normal(3, 2, 2), "u": normal(3), "v": normal(4), "sigma": 2.0},
    "linear_forward": {"x": X, "weight": normal(5, 4), "bias": normal(5)},
    "linear_backward": {"dy": normal(2, 3, 5), "x": X, "weight": normal(5, 4)},
    "linear_gelu_forward": {"x": X, "weight": normal(5, 4), "bias": normal(5)},
    "linear_gelu_backward": {"dy": normal(2, 3, 5), "h": normal(2, 3, 5), "x": X, "weight": normal(5, 4)},
    "gelu_forward": {"x": X},
    "gelu_backward": {"dy": X, "x": X},
    "silu_forward": {"x": X},
    "silu_backward": {"dy": X, "x": X},
    "conv2d_forward": {"x": normal(2, 3, 6, 5), "weight": normal(4, 3, 3, 3), "bias": normal(4), "padding": 1},
    "conv2d_backward": {"dy": normal(2, 4, 6, 5), "x": normal(2, 3, 6, 5), "weight": normal(4, 3, 3, 3), "padding": (1, 1, 1, 1)},
    "adversarial_loss": {"logits": X, "loss": "logistic", "role": "real"},
    "renoise_forward": {"x0": X, "t": T, "seed": 3},
    "renoise_backward": {"dout": X, "t": T},
    "normal": {"shape": (2, 3), "seed": 1},
    "joint_attention_forward": {"streams": [(Q, Q, Q), (OTHER, OTHER, OTHER)]},
    "joint_attention_backward": {"d_outs": [OUT], "streams": [(Q, Q, Q)], "outs": [OUT], "lse": LSE},
}


PUBLIC_FREE_LAST = {
    *(("conv2d_forward", "x"), ("conv2d_forward", "weight"), ("group_norm_forward", "x"), ("spectral_norm_forward", "weight")),
    *(("renoise_forward", "x0"), ("renoise_backward", "dout")),
}


def flat(result: Any) -> list[Any]:
    return [part for item in result for part in flat(item)] if isinstance(result, (list, tuple)) else [result]


def same(a: Any, b: Any) -> bool:
    return all(x.tobytes() == y.tobytes() if isinstance(x, np.ndarray) else x == y for x, y in zip(flat(a), flat(b), strict=True))


def test_every_public_kernel_is_tested_and_documented() -> None:
    assert set(PUBLIC) | {"adamw"} == set(kernels.__all__)
    for name in kernels.__all__:
        function = getattr(kernels, name)
        assert function.__doc__ and inspect.signature(function).return_annotation is not inspect.Parameter.empty


def public_pairs() -> list[tuple[str, str]]:
    return [(kernel, name) for kernel, call in PUBLIC.items() for name in arrays(call)]


@pytest.mark.parametrize(("kernel", "name"), public_pairs())
def test_whatever_holds_the_numbers_is_accepted(kernel: str, name: str) -> None:
    call, function = PUBLIC[kernel], getattr(kernels, kernel)
    wanted, value = function(**call), call[name]
    strided, reverse = np.repeat(value, 2, axis=-1)[..., ::2], value[..., ::-1].copy()[..., ::-1]
    odd = np.frombuffer(bytearray(value.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(value.shape)
    odd[...] = value
    odd.flags.writeable = False
    for given in (value.astype(np.float64), value.astype(">f4"), strided, reverse, odd, value.tolist(), ByDLPack(value), ByArray(value)):
        assert same(function(**{**call, name: given}), wanted), type(given)


@pytest.mark.parametrize(("kernel", "name"), public_pairs())
def test_what_holds_no_numbers_is_refused(kernel: str, name: str) -> None:
    call, function = PUBLIC[kernel], getattr(kernels, kernel)
    for given in ("text", object(), call[name].astype(np.complex64), call[name].astype(object), np.array(["a"])):
        with pytest.raises(TypeError, match=r"must (be|hold)"):
            function(**{**call, name: given})


@pytest.mark.parametrize(("kernel", "name"), public_pairs())
def test_shapes_that_do_not_fit_are_refused(kernel: str, name: str) -> None:
    call, function = PUBLIC[kernel], getattr(kernels, kernel)
    good = call[name]
    wrong = [good[:0]]  # empty
    if len(arrays(call)) > 1 and name != "t":
        wrong.append(np.float32(1))  # no axis
    if len(arrays(call)) > 1 and (kernel, name) not in PUBLIC_FREE_LAST:
        wrong.append(np.concatenate([good, good], axis=-1))
    for value in wrong:
        with pytest.raises(ValueError, match=r"expected|have shape"):
            function(**{**call, name: value})


def test_results_are_new_and_inputs_are_left_alone() -> None:
    for kernel, call in PUBLIC.items():
        before = {name: call[name].tobytes() for name in arrays(call)}
        for result in flat(getattr(kernels, kernel)(**call)):
            if isinstance(result, np.ndarray):
                assert result.dtype == np.float32 and result.flags.c_contiguous and result.flags.writeable
                assert not any(np.shares_memory(result, call[name]) for name in before), kernel
        assert before == {name: call[name].tobytes() for name in before}, kernel


@pytest.mark.parametrize(
    ("kernel", "change", "error", "message"),
    [
        ("joint_attention_forward", {"streams": Q}, TypeError, "streams must be a list of one or two"),
        ("joint_attention_forward", {"streams": [(Q, Q)]}, TypeError, "each of streams must be"),
        ("joint_attention_backward", {"d_outs": OUT}, TypeError, "d_outs must be a list of arrays"),
        ("layer_norm_modulate_forward", {"scale": None}, ValueError, "expected both or neither, got one"),
        ("group_norm_forward", {"groups": 3}, ValueError, "groups: expected a divisor of the 4 channels, got 3"),
        ("group_norm_forward", {"x": normal(4)}, ValueError, r"x must have shape \[B, C, ...\], got \[4\]"),
        ("conv2d_forward", {"padding": (1, 1)}, ValueError, "padding: expected"),
        ("conv2d_forward", {"padding": 1.5}, TypeError, "padding: expected a sequence of integers, got float"),
        ("renoise_forward", {"samples": [0.5, 1.5]}, TypeError, "samples must be integers, got dtype float64"),
        ("renoise_forward", {"seed": -3}, ValueError, "seed: expected an integer from 0"),
        ("renoise_forward", {"t": 1.5}, ValueError, r"t must be in \[0, 1\], got \[1.5, 1.5\]"),
        ("renoise_backward", {"t": [0.5, math.nan]}, ValueError, r"t must be in \[0, 1\], got \[0.5, nan\]"),
        ("spectral_norm_backward", {"sigma": 0.0}, ValueError, "sigma must be a finite number above 0, got 0.0"),
        ("adversarial_loss", {"role": "judge"}, ValueError, "role: expected"),
        ("adversarial_loss", {"logits": []}, ValueError, "logits: expected sizes from 1"),
    ],
)
def test_bad_settings_of_public_kernels(kernel: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(kernels, kernel)(**{**PUBLIC[kernel], **change})


def test_public_adamw_writes_in_place_or_refuses() -> None:
    def buffers() -> dict[str, Any]:
        return {"p": normal(3, 4), "m": np.zeros((3, 4), F), "v": np.zeros((3, 4), F), "g": normal(4, 3).T}

    call = buffers()
    kernels.adamw(**call, lr=0.1, step=1, weight_decay=0.0)
    assert np.allclose(call["p"], normal(3, 4) - 0.1 * np.sign(call["g"]), atol=1e-5)  # the first step has length lr
    foreign = buffers()
    kernels.adamw(ByDLPack(foreign["p"]), foreign["m"], foreign["v"], foreign["g"], lr=0.1, step=1, weight_decay=0.0)
    assert foreign["p"].tobytes() == call["p"].tobytes()
    both = [{**buffers(), "m": m} for m in (np.zeros((3, 4), F), None)]
    for given in both:
        kernels.adamw(**given, lr=0.1, step=2, betas=(0.0, 0.9))
    assert both[0]["p"].tobytes() == both[1]["p"].tobytes() != buffers()["p"].tobytes()
    for name, bad, error, message in (
        ("p", normal(3, 4).astype(np.float64), TypeError, "p is updated in place and must be a float32 array, got dtype float64"),
        ("m", [[0.0] * 4] * 3, TypeError, "m is updated in place and must be a float32 array, got list"),
        ("v", np.zeros((3, 8), F)[:, ::2], ValueError, "v is updated in place and must be C-contiguous and writable"),
        ("m", np.zeros(12, F), ValueError, r"m must have shape \[3, 4\], got \[12\]"),
        ("g", normal(12), ValueError, r"g must have shape \[3, 4\], got \[12\]"),
    ):
        with pytest.raises(error, match=message):
            kernels.adamw(**{**buffers(), name: bad}, lr=0.1, step=1)
    with pytest.raises(ValueError, match=r"betas must be two numbers, got \(0.9, 0.99, 0.5\)"):
        kernels.adamw(**buffers(), lr=0.1, step=1, betas=(0.9, 0.99, 0.5))  # type: ignore[arg-type]
