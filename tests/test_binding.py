"""ladd._core as a Python extension: what it refuses and how it says so, who owns memory, threads, Ctrl-C, leaks.

What the numbers are is tested by test_kernels.py and the tests of each model.
"""

from __future__ import annotations

import copy
import gc
import importlib.machinery
import importlib.util
import os
import pickle
import platform
import subprocess
import sys
import textwrap
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ladd import _core

Array = np.ndarray

MMDIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 6,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 2),
}
VAE = {
    "in_channels": 3,
    "out_channels": 2,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
HEADS = {
    "feature_dim": 16,
    "taps": (0, 2),
    "pooled_dim": 10,
    "width": 8,
    "kernel_size": 3,
    "norm": "group",
    "num_groups": 2,
    "spectral_norm": True,
    "condition_sigma": True,
    "condition_pooled": True,
    "condition_dim": 4,
}
MODELS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "MMDiT": (_core.MMDiT, MMDIT),
    "AutoencoderKL": (_core.AutoencoderKL, VAE),
    "Discriminator": (_core.Discriminator, HEADS),
}
each_model = pytest.mark.parametrize("name", MODELS)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def make(name: str, seed: int = 1) -> Any:
    cls, config = MODELS[name]
    model = cls(config)
    model.init(seed)
    model.flat_trainable[:] += 0.05 * normal(model.flat_trainable.size, seed=seed)
    return model


def inputs(name: str) -> tuple[str, dict[str, Any]]:
    """A forward method and arguments that it takes."""
    sigma = np.array([0.3, 0.9], np.float32)
    if name == "MMDiT":
        return "forward", {"latents": normal(2, 4, 6, 8), "sigma": sigma, "context": normal(2, 5, 12), "pooled": normal(2, 10)}
    if name == "AutoencoderKL":
        return "encode", {"images": normal(2, 3, 8, 6)}
    features = [normal(2, 12, 16, seed=i) for i in range(2)]
    return "forward", {"features": features, "sigma": sigma, "pooled": normal(2, 10), "grid": (3, 4)}


def forward(model: Any, name: str, **changes: Any) -> tuple[Any, Any]:
    method, arguments = inputs(name)
    return getattr(model, method)(**{**arguments, **changes})


def ones_like(output: Any) -> Any:
    return [np.ones_like(part) for part in output] if isinstance(output, list) else np.ones_like(output)


def as_bytes(output: Any) -> bytes:
    return b"".join(part.tobytes() for part in output) if isinstance(output, list) else output.tobytes()


def run_script(script: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- configurations ------------------------------------------------------------------------------------------------------------


@each_model
def test_config_comes_back(name: str) -> None:
    cls, config = MODELS[name]
    assert cls(config).config == config
    assert cls(types.MappingProxyType(config)).config == config


def test_missing_keys_take_the_defaults_of_diffusers() -> None:
    config = _core.AutoencoderKL({}).config
    assert config["block_out_channels"] == (64,) and config["norm_num_groups"] == 32 and config["use_quant_conv"] is True
    small = {key: MMDIT[key] for key in ("num_attention_heads", "attention_head_dim", "caption_projection_dim", "num_layers")}
    config = _core.MMDiT({**small, "joint_attention_dim": 8, "pooled_projection_dim": 8, "out_channels": None, "in_channels": 5}).config
    assert (config["patch_size"], config["pos_embed_max_size"], config["out_channels"], config["qk_norm"]) == (2, 96, 5, None)


BAD_CONFIGS: list[tuple[str, Any, type[Exception], str]] = [
    ("MMDiT", 3, TypeError, "expected a mapping of settings, got int"),
    ("MMDiT", "abc", TypeError, "expected a mapping of settings, got str"),
    ("MMDiT", [("patch_size", 2)], TypeError, "expected a mapping of settings, got list"),
    ("MMDiT", {"patchsize": 2}, ValueError, r"unknown ones: \['patchsize'\]"),
    ("MMDiT", {3: 2}, ValueError, r"unknown ones: \[3\]"),
    ("MMDiT", {"patch_size": 0}, ValueError, "patch_size: expected an integer from 1"),
    ("MMDiT", {"patch_size": -1}, ValueError, "patch_size: expected an integer from 1"),
    ("MMDiT", {"patch_size": 2.0}, TypeError, "patch_size: expected an integer, got float"),
    ("MMDiT", {"patch_size": True}, TypeError, "patch_size: expected an integer, got bool"),
    ("MMDiT", {"patch_size": None}, TypeError, "patch_size: expected an integer, got NoneType"),
    ("MMDiT", {"num_layers": 10**30}, ValueError, "num_layers: expected an integer from 1 to 128"),
    ("MMDiT", {"num_layers": 129}, ValueError, "num_layers: expected an integer from 1 to 128, got 129"),
    ("MMDiT", {"out_channels": "4"}, TypeError, "out_channels: expected an integer, got str"),
    ("MMDiT", {"qk_norm": "layer_norm"}, ValueError, "qk_norm: expected None or 'rms_norm', got 'layer_norm'"),
    ("MMDiT", {"qk_norm": 1}, ValueError, "qk_norm: expected None or 'rms_norm', got 1"),
    ("MMDiT", {"dual_attention_layers": (3,)}, ValueError, "dual_attention_layers: expected an integer from 0 to 2, got 3"),
    ("MMDiT", {"dual_attention_layers": 1}, TypeError, "dual_attention_layers: expected a sequence of integers, got int"),
    ("MMDiT", {"caption_projection_dim": 17}, ValueError, "caption_projection_dim"),
    ("AutoencoderKL", {"block_out_channels": ()}, ValueError, "block_out_channels: expected 1 to 8 widths, got none"),
    ("AutoencoderKL", {"block_out_channels": (4,) * 9}, ValueError, "block_out_channels: expected at most 8 integers, got 9"),
    ("AutoencoderKL", {"block_out_channels": "88"}, TypeError, "block_out_channels: expected a sequence of integers, got str"),
    ("AutoencoderKL", {"block_out_channels": (6, 8)}, ValueError, "multiple|divi"),
    ("AutoencoderKL", {"act_fn": "relu"}, ValueError, "act_fn: expected 'silu', got 'relu'"),
    ("AutoencoderKL", {"down_block_types": ("DownBlock2D",)}, ValueError, "down_block_types: expected 2 times 'DownEncoderBlock2D'"),
    ("AutoencoderKL", {"up_block_types": 5}, ValueError, "up_block_types: expected 2 times 'UpDecoderBlock2D', got 5"),
    ("AutoencoderKL", {"use_quant_conv": 1}, TypeError, "use_quant_conv: expected True or False, got int"),
    ("AutoencoderKL", {"scale": 1}, ValueError, r"unknown ones: \['scale'\]"),
    ("Discriminator", {"norm": "batch"}, ValueError, "norm: expected 'group' or 'none', got 'batch'"),
    ("Discriminator", {"norm": None}, ValueError, "norm: expected 'group' or 'none', got None"),
    ("Discriminator", {"taps": ()}, ValueError, "tap"),
    ("Discriminator", {"taps": (-1,)}, ValueError, "taps: expected an integer from 0"),
    ("Discriminator", {"kernel_size": 2}, ValueError, "odd"),
    ("Discriminator", {"num_groups": 3}, ValueError, "num_groups|groups"),
    ("Discriminator", {"pooled_dim": 0}, ValueError, "pooled"),
    ("Discriminator", {"spectral_norm": None}, TypeError, "spectral_norm: expected True or False, got NoneType"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_CONFIGS)
def test_bad_config(name: str, change: Any, error: type[Exception], message: str) -> None:
    cls, config = MODELS[name]
    with pytest.raises(error, match=message):
        cls({**config, **change} if isinstance(change, dict) else change)


@pytest.mark.parametrize("key", HEADS)
def test_discriminator_requires_every_key(key: str) -> None:
    config = {k: v for k, v in HEADS.items() if k != key}
    with pytest.raises(ValueError, match=f"expected a setting {key}, got none"):
        _core.Discriminator(config)


def test_a_model_larger_than_memory_is_a_memory_error() -> None:
    huge = {"num_attention_heads": 4096, "attention_head_dim": 1024, "caption_projection_dim": 1 << 22, "num_layers": 128}
    with pytest.raises((MemoryError, ValueError)):
        _core.MMDiT(huge)


# ---- forward and backward ------------------------------------------------------------------------------------------------------


class Odd:
    """Neither an array nor a number."""


BAD_FORWARDS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("MMDiT", {"latents": None}, TypeError, r"latents: expected a float32 array of shape \(B, C=4, H, W\), got NoneType"),
    ("MMDiT", {"latents": normal(2, 4, 6, 8).tolist()}, TypeError, "latents: expected a float32 array of shape .*, got list"),
    ("MMDiT", {"latents": normal(2, 4, 6, 8).astype(np.float64)}, TypeError, "latents: expected dtype float32, got float64"),
    ("MMDiT", {"latents": normal(2, 4, 6, 8).astype(">f4")}, TypeError, "latents: expected dtype float32, got >f4"),
    ("MMDiT", {"latents": normal(2, 5, 6, 8)}, ValueError, r"latents: expected shape \(B, C=4, H, W\), got \(2, 5, 6, 8\)"),
    ("MMDiT", {"latents": normal(4, 6, 8)}, ValueError, r"latents: expected shape \(B, C=4, H, W\), got \(4, 6, 8\)"),
    ("MMDiT", {"latents": normal(0, 4, 6, 8)}, ValueError, r"latents: expected sizes from 1 to \d+, got \(0, 4, 6, 8\)"),
    ("MMDiT", {"latents": normal(2, 4, 8, 6).swapaxes(2, 3)}, ValueError, "latents: expected a C-contiguous array"),
    ("MMDiT", {"latents": normal(2, 4, 1, 8)}, ValueError, "latents: expected height and width from 2 to 17 .*, got 1 x 8"),
    ("MMDiT", {"latents": normal(2, 4, 6, 18)}, ValueError, "latents: expected height and width from 2 to 17 .*, got 6 x 18"),
    ("MMDiT", {"sigma": 0.5}, TypeError, r"sigma: expected a float32 array of shape \(B=2\), got float"),
    ("MMDiT", {"sigma": normal(3)}, ValueError, r"sigma: expected shape \(B=2\), got \(3\)"),
    ("MMDiT", {"context": normal(2, 5, 11)}, ValueError, r"context: expected shape \(B=2, T, J=12\), got \(2, 5, 11\)"),
    ("MMDiT", {"context": normal(1, 5, 12)}, ValueError, r"context: expected shape \(B=2, T, J=12\), got \(1, 5, 12\)"),
    ("MMDiT", {"context": normal(2, 0, 12)}, ValueError, "context: expected sizes from 1"),
    ("MMDiT", {"pooled": normal(2, 9)}, ValueError, r"pooled: expected shape \(B=2, P=10\), got \(2, 9\)"),
    ("MMDiT", {"skip_layers": 1}, TypeError, "skip_layers: expected a sequence of integers, got int"),
    ("MMDiT", {"skip_layers": "1"}, TypeError, "skip_layers: expected a sequence of integers, got str"),
    ("MMDiT", {"skip_layers": (3,)}, ValueError, "skip_layers: expected an integer from 0 to 2, got 3"),
    ("MMDiT", {"skip_layers": (0.5,)}, TypeError, "skip_layers: expected an integer, got float"),
    ("MMDiT", {"taps": (-1,)}, ValueError, "taps: expected an integer from 0 to 2, got -1"),
    ("MMDiT", {"taps": (1, 0)}, ValueError, r"taps: expected None or ascending block indices, each once, got \(1, 0\)"),
    ("MMDiT", {"taps": (1, 1)}, ValueError, "taps: expected None or ascending"),
    ("MMDiT", {"taps": ()}, ValueError, "taps: expected None or ascending"),
    ("MMDiT", {"taps": Odd()}, TypeError, "taps: expected a sequence of integers, got Odd"),
    ("MMDiT", {"keep": 1}, TypeError, "keep: expected True or False, got int"),
    ("MMDiT", {"color": 1}, TypeError, "color"),
    ("AutoencoderKL", {"images": normal(2, 3, 7, 6)}, ValueError, "images: expected height and width that are multiples of 2, got 7 x 6"),
    ("AutoencoderKL", {"images": normal(2, 4, 8, 6)}, ValueError, r"images: expected shape \(B, C=3, H, W\), got \(2, 4, 8, 6\)"),
    ("AutoencoderKL", {"keep": None}, TypeError, "keep: expected True or False, got NoneType"),
    (
        "Discriminator",
        {"features": normal(2, 12, 16)},
        TypeError,
        r"features: expected a list of 2 arrays \(one a tap\), got numpy.ndarray",
    ),
    ("Discriminator", {"features": [normal(2, 12, 16)]}, ValueError, r"features: expected 2 arrays \(one a tap\), got 1"),
    ("Discriminator", {"features": [normal(2, 12, 16), normal(2, 11, 16)]}, ValueError, r"features: expected shape \(B=2, N=12, D=16\)"),
    ("Discriminator", {"grid": (3, 5)}, ValueError, r"features: expected shape \(B=2, N=15, D=16\), got \(2, 12, 16\)"),
    ("Discriminator", {"grid": (12,)}, ValueError, r"grid: expected \(h, w\)"),
    ("Discriminator", {"grid": (3, 4, 1)}, ValueError, "grid: expected at most 2 integers, got 3"),
    ("Discriminator", {"grid": (1 << 30, 1 << 30)}, ValueError, r"grid: expected \(h, w\)"),
    ("Discriminator", {"pooled": None}, ValueError, r"pooled: expected an array of shape \(B=2, P=10\), got None"),
    ("Discriminator", {"update_u": 0}, TypeError, "update_u: expected True or False, got int"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_FORWARDS)
def test_bad_forward(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    """An exception, and the model is as before: same parameters, same result of a good call, nothing held."""
    model = make(name)
    weights, in_use, good = model.flat.tobytes(), _core.memory_in_use(), as_bytes(forward(model, name)[0])
    with pytest.raises(error, match=message):
        forward(model, name, **change)
    assert model.flat.tobytes() == weights and as_bytes(forward(model, name)[0]) == good
    assert _core.memory_in_use() == in_use


def test_heads_without_the_text_condition_take_none() -> None:
    model = _core.Discriminator({**HEADS, "condition_pooled": False})
    model.init(0)
    (a, _), (b, _) = forward(model, "Discriminator", pooled=None), forward(model, "Discriminator", pooled=normal(2, 3))
    assert as_bytes(a) == as_bytes(b)


@each_model
def test_backward_refuses_bad_cotangents_and_then_takes_a_good_one(name: str) -> None:
    model = make(name)
    output, saved = forward(model, name, keep=True)
    good = ones_like(output)
    wrong_shape = [np.ones((1, 1, 1), np.float32)] * 2 if isinstance(output, list) else np.ones((1, 1), np.float32)
    wrong_type = [part.astype(np.float64) for part in good] if isinstance(output, list) else good.astype(np.float64)
    for bad, error in ((wrong_shape, ValueError), (wrong_type, TypeError), (None, TypeError), ([], (TypeError, ValueError))):
        with pytest.raises(error, match="expected"):
            saved.backward(bad)
    with pytest.raises(TypeError, match="params: expected True or False, got int"):
        saved.backward(good, params=1)
    assert not model.flat_grad.any()
    saved.backward(good)
    assert model.flat_grad.any()


@pytest.mark.parametrize("name", ["MMDiT", "AutoencoderKL"])
def test_second_backward_is_refused(name: str) -> None:
    model = make(name)
    output, saved = forward(model, name, keep=True)
    saved.backward(ones_like(output))
    gradient = model.flat_grad.copy()
    with pytest.raises(RuntimeError, match="expected the first call for this forward, got a second one"):
        saved.backward(ones_like(output))
    assert np.array_equal(model.flat_grad, gradient)


def test_discriminator_backward_may_be_called_again() -> None:
    model = make("Discriminator")
    output, saved = forward(model, "Discriminator", keep=True)
    first = saved.backward(ones_like(output))
    gradient = model.flat_grad.copy()
    assert as_bytes(saved.backward(ones_like(output), params=False)) == as_bytes(first)
    assert np.array_equal(model.flat_grad, gradient)
    saved.backward(ones_like(output), features=False)
    assert np.allclose(model.flat_grad, 2 * gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_backward_gives_only_what_is_asked_for() -> None:
    model = make("MMDiT")
    output, saved = forward(model, "MMDiT", keep=True)
    everything = saved.backward(ones_like(output))
    for i, part in enumerate(("latents", "context", "pooled")):
        _, saved = forward(model, "MMDiT", keep=True)
        flags = {other: other == part for other in ("latents", "context", "pooled")}
        some = saved.backward(ones_like(output), params=False, **flags)
        assert [g is not None for g in some] == [i == j for j in range(3)]
        assert some[i].tobytes() == everything[i].tobytes()


def test_taps_stop_at_the_deepest_and_agree_with_each_other() -> None:
    model = make("MMDiT")
    features, none = forward(model, "MMDiT", taps=[0, 1, 2])
    assert none is None and [part.shape for part in features] == [(2, 12, 16)] * 3
    assert forward(model, "MMDiT", taps=(1,))[0][0].tobytes() == features[1].tobytes()
    assert model.plan(2, 6, 8, 5, taps=[0], keep=True) < model.plan(2, 6, 8, 5, taps=[0, 1, 2], keep=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch: expected an integer from 1"),
        ({"height": 6.0}, TypeError, "height: expected an integer, got float"),
        ({"width": 1}, ValueError, "width"),
        ({"text_tokens": 1 << 40}, ValueError, "text_tokens: expected an integer from 1"),
        ({"batch": (1 << 31) - 1, "text_tokens": (1 << 31) - 1}, (ValueError, MemoryError), "expected"),
        ({"taps": (9,)}, ValueError, "taps: expected an integer from 0 to 2, got 9"),
    ],
)
def test_bad_plan(change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make("MMDiT").plan(**{"batch": 2, "height": 6, "width": 8, "text_tokens": 5, **change})


def test_plan_is_what_forward_takes() -> None:
    model = make("MMDiT")
    _core.empty_cache()
    before = _core.memory_in_use()
    _, saved = forward(model, "MMDiT", keep=True)
    assert _core.memory_in_use() - before == model.plan(2, 6, 8, 5, keep=True)
    del saved
    assert _core.memory_in_use() == before


@each_model
def test_nan_inputs_compute_and_show(name: str) -> None:
    """NaN is the caller's to judge: it passes through, and the model is as good as before."""
    model = make(name)
    good = as_bytes(forward(model, name)[0])
    method, arguments = inputs(name)
    first = next(iter(arguments))
    bad = copy.deepcopy(arguments[first])
    (bad[0] if isinstance(bad, list) else bad).ravel()[0] = np.nan
    output, _ = getattr(model, method)(**{**arguments, first: bad})
    assert not all(np.isfinite(part).all() for part in (output if isinstance(output, list) else [output]))
    assert as_bytes(forward(model, name)[0]) == good


# ---- memory ----------------------------------------------------------------------------------------------------------------------


@each_model
def test_tensors_are_views_of_the_flat_buffer(name: str) -> None:
    model = make(name)
    tensors, gradients = model.tensors(), model.gradients()
    assert list(gradients) == model.trainable_names() == list(tensors)[: len(gradients)]
    assert sum(t.size for t in tensors.values()) == model.flat.size
    assert sum(g.size for g in gradients.values()) == model.flat_grad.size == model.flat_trainable.size
    for i, (tensor, gradient) in enumerate(zip(tensors.values(), gradients.values(), strict=False)):
        tensor[...], gradient[...] = i, -i
        assert tensor.flags.c_contiguous and tensor.shape == gradient.shape
    flat = np.concatenate([np.full(g.size, i, np.float32) for i, g in enumerate(gradients.values())])
    assert np.array_equal(model.flat_trainable, flat) and np.array_equal(model.flat_grad, -flat)
    assert np.shares_memory(model.flat, model.flat_trainable)


@each_model
def test_views_keep_the_model_alive(name: str) -> None:
    model = make(name)
    wanted = model.flat.copy()
    views = [model.flat, model.flat_grad, *model.tensors().values()]
    del model
    gc.collect()
    make(name, seed=2)  # takes the memory, had it been freed
    assert np.array_equal(views[0], wanted) and not views[1].any()
    assert np.array_equal(np.concatenate([v.ravel() for v in views[2:]]), wanted)


@each_model
def test_saved_keeps_the_model_alive(name: str) -> None:
    model = make(name)
    output, saved = forward(model, name, keep=True)
    wanted = saved.backward(ones_like(output))
    output, saved = forward(model, name, keep=True)
    del model
    gc.collect()
    make(name, seed=2)
    got = saved.backward(ones_like(output))
    for a, b in zip(*(part if isinstance(part, (list, tuple)) else [part] for part in (wanted, got)), strict=True):
        assert a.tobytes() == b.tobytes()


@each_model
def test_memory_of_a_forward_is_given_back(name: str) -> None:
    model = make(name)
    before = _core.memory_in_use()
    kept = [forward(model, name, keep=True) for _ in range(3)]
    assert _core.memory_in_use() > before
    output, saved = kept.pop()
    saved.backward(ones_like(output))
    del kept, saved
    gc.collect()
    assert _core.memory_in_use() == before


def test_inputs_may_be_read_only_and_are_left_alone() -> None:
    model = make("MMDiT")
    wanted, _ = forward(model, "MMDiT")
    _, arguments = inputs("MMDiT")
    for array in arguments.values():
        array.flags.writeable = False
    assert model.forward(**arguments)[0].tobytes() == wanted.tobytes()


LEAK = """
    import ctypes, gc, statistics, sys
    sys.path.insert(0, {tests!r})
    import numpy as np
    import test_binding as t
    from ladd import _core, kernels

    def refused(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError):
            return
        raise SystemExit(f"{{call}} took what it should refuse")

    class MallInfo(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype, libc.malloc.restype = MallInfo, ctypes.c_void_p
    models = {{name: t.make(name) for name in t.MODELS}}
    arguments = {{name: t.inputs(name)[1] for name in t.MODELS}}
    x, w, small = t.normal(2, 6, 8), t.normal(4, 8), t.normal(2, 3, 8, 8)

    def round():
        for name, model in models.items():
            cls, config = t.MODELS[name]
            cls(config).config
            refused(cls, {{**config, "nonsense": 1}})
            refused(cls, {{**config, next(iter(config)): "wrong"}})
            output, saved = t.forward(model, name, keep=True)
            refused(saved.backward, None)
            saved.backward(t.ones_like(output))
            if name != "Discriminator":
                refused(saved.backward, t.ones_like(output))
            refused(t.forward, model, name, keep=3)
            refused(t.forward, model, name, **{{next(iter(arguments[name])): [x, x]}})
            model.tensors(), model.gradients(), model.trainable_names(), model.flat_grad, model.config
        features, saved = t.forward(models["MMDiT"], "MMDiT", taps=(0, 1), keep=True)
        refused(saved.backward, [features[0], None])
        saved.backward(features, context=False)
        q = small.transpose(0, 2, 1, 3).copy()
        o, lse = kernels.attention_forward(q, q, q)
        kernels.attention_backward(o, q, q, q, o, lse)
        refused(_core.attention_forward, [(q, q, x)])
        refused(_core.attention_backward, [o], [(q, q, q)], [None], lse)
        kernels.linear_gelu_backward(*(lambda y, h: (y, h))(*kernels.linear_gelu_forward(x, w)), x, w)
        refused(_core.linear_forward, x[0], w, out=x)
        y, mean, rstd = kernels.group_norm_forward(small, np.ones(3), np.ones(3), 1)
        kernels.group_norm_backward(y, small, mean, rstd, np.ones(3), np.ones(3))
        kernels.renoise_forward(x, 0.5, seed=1, samples=[3, 4])
        refused(_core.normal, (2, 3), 1, 2, 0, np.arange(3))
        refused(_core.normal, (2, 3), 1, 2, out=x)
        kernels.adversarial_loss(x, "hinge", "real")
        refused(_core.adversarial_loss, x, "hinge", "none")
        kernels.spectral_norm_forward(w, np.ones(4))
        kernels.conv2d_forward(small, t.normal(2, 3, 3, 3), padding=1)
        refused(_core.conv2d_forward, small, t.normal(2, 3, 9, 9))

    def memory():
        # What is alive, in three measures that come and go by themselves, and the references to objects that nobody else has.
        gc.collect()
        gc.collect()  # once more for what the finalizers of the first let go
        # The C library's own count. The pages of the process say little: the system takes pages of code away and brings them back later, and a
        # block that was mapped by itself may come back as a part of the heap, megabytes at once.
        info = libc.mallinfo2()
        kilobytes = (info.uordblks + info.hblkhd) / 1024
        own = [sys.getrefcount(thing) for thing in (x, w, small, *models.values(), *map(type, models.values()))]
        return (sys.getallocatedblocks(), kilobytes, sys.getrefcount(None)), own

    {planted}
    for _ in range(60):
        round()
    seen = [memory()]
    for _ in range(5):
        for _ in range(200):
            round()
        seen.append(memory())
    # What leaks once a round shows in every window. A cache that fills and a thread that gets its first turn late show in one or two of them;
    # CPython 3.11's cache of methods, for one, holds None in every place that is still free.
    for i, (what, least) in enumerate((("blocks", 150), ("kB", 20), ("references to None", 150))):
        change = [b[0][i] - a[0][i] for a, b in zip(seen, seen[1:])]
        assert abs(statistics.median(change)) < least, f"{{change}} {{what}} more"
    change = [b - a for a, b in zip(seen[0][1], seen[-1][1])]
    assert not any(change), f"references: {{change}}"
"""
PLANTS = {
    "a reference to None": ("ctypes.pythonapi.Py_IncRef(ctypes.py_object(None))", "references to None more"),
    "a reference to None too few": ("ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))", "references to None more"),
    "a reference": ("ctypes.pythonapi.Py_IncRef(ctypes.py_object(x))", "references: "),
    "an object": ("ctypes.pythonapi.Py_IncRef(ctypes.py_object(object()))", "blocks more"),
    "512 bytes": ("libc.malloc(512)", "kB more"),
}


def leaks(planted: str = "") -> str:
    """What the five windows show; "" when nothing leaks."""
    script = LEAK.format(tests=os.path.dirname(__file__), planted=planted)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    return done.stderr if done.returncode else ""


counts_memory = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory in use is told by glibc's mallinfo2")


@counts_memory
def test_nothing_leaks_in_1000_rounds() -> None:
    assert leaks() == ""


@counts_memory
@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_leak_is_found(what: str) -> None:
    call, told = PLANTS[what]
    assert told in leaks(f"sound = round; round = lambda: (sound(), {call})")


# ---- types and module ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Model", "MMDiTSaved", "AutoencoderKLSaved", "DiscriminatorSaved"])
def test_not_to_be_made_directly(name: str) -> None:
    with pytest.raises(TypeError, match="cannot create"):
        getattr(_core, name)()


@each_model
def test_models_are_models_without_attributes_copies_or_pickles(name: str) -> None:
    model = make(name)
    assert isinstance(model, _core.Model) and type(model).__module__ == "ladd._core"
    with pytest.raises(AttributeError):
        model.flat = model.flat
    with pytest.raises(AttributeError):
        model.note = 1
    with pytest.raises(TypeError, match="immutable"):
        type(model).note = 1
    for refused in (copy.copy, copy.deepcopy, pickle.dumps, weakref.ref):
        with pytest.raises(TypeError, match="cannot"):
            refused(model)


def test_a_second_module_object_has_types_of_its_own() -> None:
    spec = importlib.util.spec_from_file_location("ladd._core", _core.__file__)
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other is not _core and other.MMDiT is not _core.MMDiT
    model = other.MMDiT(MMDIT)
    model.init(1)
    _, saved = forward(model, "MMDiT", keep=True)
    assert type(saved) is other.MMDiTSaved
    del other, model, saved
    gc.collect()
    forward(make("MMDiT"), "MMDiT")


def test_stub_names_what_the_module_has() -> None:
    import ast

    stub = os.path.join(os.path.dirname(importlib.util.find_spec("ladd").origin), "_core.pyi")  # type: ignore[union-attr,type-var]
    tree = ast.parse(open(stub, encoding="utf-8").read())
    named: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            named[""].add(node.name)
        elif isinstance(node, ast.ClassDef):
            named[""].add(node.name)
            named[node.name] = {f.name for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("__")}
    assert {name for name in vars(_core) if not name.startswith("__")} == named.pop("")
    for name, methods in named.items():
        assert {m for m in vars(getattr(_core, name)) if not m.startswith("__")} == methods


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1 << 40, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_number_of_threads(value: Any, error: type[Exception]) -> None:
    before = _core.get_num_threads()
    with pytest.raises(error, match="num_threads: expected an integer"):
        _core.set_num_threads(value)
    assert _core.get_num_threads() == before


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1 << 64, ValueError), (0.5, TypeError), ("1", TypeError), (False, TypeError)])
def test_bad_seed(value: Any, error: type[Exception]) -> None:
    model = make("MMDiT")
    before = model.flat.copy()
    with pytest.raises(error, match="seed: expected an integer"):
        model.init(value)
    assert np.array_equal(model.flat, before)


def test_seeds_reach_64_bits() -> None:
    model, other = make("MMDiT"), make("MMDiT")
    model.init((1 << 64) - 1)
    other.init(np.uint64((1 << 64) - 1))
    assert np.array_equal(model.flat, other.flat)
    other.init((1 << 32) - 1)
    assert not np.array_equal(model.flat, other.flat)


def test_instruction_set_that_is_not_there() -> None:
    out = run_script(
        """
        import numpy as np
        from ladd import _core
        for call in (_core.backend_name, lambda: _core.scale(np.ones(3, np.float32), 2.0)):
            try:
                call()
            except ValueError as error:
                print(error)
        """,
        LADD_CPU="z80",
    )
    assert out.count("LADD_CPU is z80; expected avx512bf16, avx512, avx2 or plain") == 2
