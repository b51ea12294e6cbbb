"""The models as Python sees them: what they accept and refuse, vector-Jacobian products, and the losses' lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import ByArray, ByDLPack, assert_close, mmdit_config, normal, same_bits, seeded_weights, vae_config

import ladd
from ladd import losses

Array = np.ndarray
LATENTS, CONTEXT, POOLED = normal(1, 2, 4, 6, 8), normal(2, 2, 5, 12), normal(3, 2, 10)


def seeded(model: Any) -> Any:
    """The model with weights none of which is zero."""
    state = model.state_dict()
    for name, tensor in seeded_weights({n: t.shape for n, t in state.items()}, 5).items():
        if name != "pos_embed.pos_embed":
            state[name] = tensor
    model.load_state_dict(state)
    return model


MODEL = seeded(ladd.MMDiT(mmdit_config(qk_norm="rms_norm", num_layers=3)))
HEADS = seeded(ladd.Discriminator(ladd.DiscriminatorConfig(feature_dim=16, taps=(0, 2), pooled_dim=10, width=8)))
VAE = seeded(ladd.AutoencoderKL({**vae_config(), "scaling_factor": 0.5, "shift_factor": 0.25}))


def test_whatever_holds_numbers_is_taken() -> None:
    reference = MODEL(LATENTS, np.float32([0.5, 0.5]), CONTEXT, POOLED)
    wide = np.repeat(LATENTS, 2, axis=3)
    for latents in (
        ByDLPack(LATENTS),
        ByArray(LATENTS),
        LATENTS.astype(np.float64),
        wide[..., ::2],
        LATENTS.tolist(),
        np.asfortranarray(LATENTS),
    ):
        assert same_bits(MODEL(latents, 0.5, CONTEXT, POOLED), reference)
    whole = np.round(LATENTS * 4)
    assert same_bits(MODEL(whole.astype(np.int16), 0.5, CONTEXT, POOLED), MODEL(whole, 0.5, CONTEXT, POOLED))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"latents": LATENTS[0]}, ValueError, r"latents must have shape \[B, 4, H, W\], got \[4, 6, 8\]"),
    "channels": ({"latents": LATENTS[:, :3]}, ValueError, r"latents must have shape \[B, 4, H, W\], got \[2, 3, 6, 8\]"),
    "smaller than a patch": ({"latents": LATENTS[..., :1]}, ValueError, "at least patch_size = 2"),
    "no rows": ({"latents": LATENTS[:0]}, ValueError, "B >= 1"),
    "too large": ({"latents": np.zeros((2, 4, 2, 26))}, ValueError, r"at most pos_embed_max_size \* patch_size = 24 pixels a side, got 2 x 26"),
    "complex": ({"latents": LATENTS.astype(complex)}, TypeError, "latents must hold real numbers"),
    "bools": ({"latents": LATENTS > 0}, TypeError, "latents must hold real numbers .* bool"),
    "words": ({"latents": "noise"}, TypeError, "latents must be an array .* got str"),
    "nothing": ({"latents": None}, TypeError, "latents must be an array .* got NoneType"),
    "ragged": ({"latents": [[1, 2], [3]]}, TypeError, "latents cannot become a float32 array"),
    "sigma above 1": ({"sigma": [0.5, 1.5]}, ValueError, r"sigma must be in \[0, 1\]"),
    "sigma of steps": ({"sigma": 500}, ValueError, r"sigma must be in \[0, 1\], got \[500.0, 500.0\]"),
    "sigma NaN": ({"sigma": float("nan")}, ValueError, "sigma must be in"),
    "sigma of another batch": ({"sigma": [0.5]}, ValueError, r"sigma must be a number or have shape \[2\], got \[1\]"),
    "context of another batch": ({"context": CONTEXT[:1]}, ValueError, r"context must have shape \[2, T, 12\], got \[1, 5, 12\]"),
    "no tokens": ({"context": CONTEXT[:, :0]}, ValueError, "context must have at least one token"),
    "pooled width": ({"pooled": POOLED[:, :9]}, ValueError, r"pooled must have shape \[2, 10\], got \[2, 9\]"),
    "skip of a block that is not there": ({"skip_layers": (3,)}, ValueError, r"skip_layers must be block indices in \[0, 3\), got \[3\]"),
    "NaN latents": (
        {"latents": np.where(LATENTS > 2, np.nan, LATENTS)},
        ValueError,
        "latents must be finite, got [0-9]+ NaN or infinite of 384",
    ),
    "infinite context": ({"context": np.full_like(CONTEXT, np.inf)}, ValueError, "context must be finite"),
    "infinite pooled": ({"pooled": np.full_like(POOLED, -np.inf)}, ValueError, "pooled must be finite"),
    "one skip": ({"skip_layers": 1}, TypeError, "skip_layers must be a sequence of block indices, got 1"),
    "skip order": ({"skip_layers": (1, 0)}, ValueError, "ascending order"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, kind, message = BAD[name]
    values: dict[str, Any] = {"latents": LATENTS, "sigma": 0.5, "context": CONTEXT, "pooled": POOLED, **changes}
    with pytest.raises(kind, match=message):
        MODEL(**values)
    MODEL(LATENTS, 0.5, CONTEXT, POOLED)  # still usable


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        ladd.MMDiT(mmdit_config(), device="gpu")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16' on cpu, got 'float16'"):
        ladd.MMDiT(mmdit_config(), dtype="float16")
    with pytest.raises(TypeError, match="config must be a MMDiTConfig or a dict, got AutoencoderKLConfig"):
        ladd.MMDiT(ladd.AutoencoderKLConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="taps must name at least one block"):
        MODEL.features(LATENTS, 0.5, CONTEXT, POOLED, taps=())
    with pytest.raises(ValueError, match=r"taps must be block indices in \[0, 3\)"):
        MODEL.features(LATENTS, 0.5, CONTEXT, POOLED, taps=(0, -1))


def test_bytes_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\] \(x / 127.5 - 1 of bytes\), got values from 0 to 255"):
        VAE.encode(np.linspace(0, 255, 3 * 64, dtype=np.uint8).reshape(1, 3, 8, 8))


def test_a_grid_is_two_numbers() -> None:
    features = MODEL.features(LATENTS, 0.5, CONTEXT, POOLED, taps=(0, 2))
    for grid in (12, (3,), (3, 0), (3.0, 4.0)):
        with pytest.raises(ValueError, match=r"grid must be \(rows, columns\) of tokens, each at least 1, got "):
            HEADS(features, 0.5, POOLED, grid=grid)  # type: ignore[arg-type]


def test_rows_that_do_not_fill_a_patch_are_left_out() -> None:
    latents = normal(7, 2, 4, 7, 9)
    out, pullback = MODEL.vjp(latents, 0.5, CONTEXT, POOLED)
    assert out.shape == (2, 4, 6, 8)
    assert same_bits(out, MODEL(latents, 0.5, CONTEXT, POOLED)) and same_bits(out, MODEL(latents[:, :, :6, :8].copy(), 0.5, CONTEXT, POOLED))
    gradient = pullback(np.ones_like(out), params=False).latents
    assert gradient.shape == latents.shape and gradient[:, :, :6, :8].any()
    assert not gradient[:, :, 6:].any() and not gradient[:, :, :, 8:].any()


def test_seeds_give_different_models_and_the_same_twice() -> None:
    flats = [ladd.MMDiT(mmdit_config(), seed=seed).flat for seed in (0, 0, 1)]
    assert same_bits(flats[0], flats[1]) and not same_bits(flats[0], flats[2])


def check_vjp(function: Any, inputs: dict[str, Array], gradients: dict[str, Array | None], cotangent: Array, names: list[str]) -> None:
    """Gradients against central differences along one direction for each input, in float32."""
    for i, name in enumerate(names):
        direction = normal(30 + i, *inputs[name].shape)
        step = 1e-2
        ends = [function(**{**inputs, name: inputs[name] + sign * step * direction}).astype(np.float64) for sign in (1, -1)]
        expected = float(((ends[0] - ends[1]) * cotangent).sum() / (2 * step))
        given = float((np.asarray(gradients[name], np.float64) * direction).sum())
        assert abs(given - expected) <= 2e-2 * max(abs(expected), 1.0), f"{name}: {given} here, {expected} by differences"


def test_mmdit_vjp() -> None:
    inputs = {"latents": LATENTS, "context": CONTEXT, "pooled": POOLED}
    out, pullback = MODEL.vjp(LATENTS, 0.5, CONTEXT, POOLED)
    assert same_bits(out, MODEL(LATENTS, 0.5, CONTEXT, POOLED))
    cotangent = normal(9, *out.shape)
    MODEL.zero_grad()
    g = pullback(cotangent)
    assert any(x.any() for x in MODEL.gradients().values())
    check_vjp(lambda **v: MODEL(sigma=0.5, **v), inputs, vars(g), cotangent, list(inputs))
    with pytest.raises(RuntimeError):
        pullback(cotangent)


def test_mmdit_vjp_computes_only_what_is_asked_for() -> None:
    MODEL.zero_grad()
    features, pullback = MODEL.vjp(LATENTS, [0.2, 0.9], CONTEXT, POOLED, taps=(0, 1))
    plain = MODEL.features(LATENTS, [0.2, 0.9], CONTEXT, POOLED, taps=(0, 1))
    assert [f.shape for f in features] == [(2, 12, 16)] * 2 and all(map(same_bits, features, plain))
    g = pullback([np.ones_like(f) for f in features], params=False, context=False, pooled=False)
    assert g.context is None and g.pooled is None and g.latents.shape == LATENTS.shape
    assert not MODEL.flat_grad.any()
    _, pullback = MODEL.vjp(LATENTS, 0.5, CONTEXT, POOLED, taps=(0, 1))
    with pytest.raises(ValueError, match="cotangent must be a list of 2 arrays"):
        pullback([np.ones_like(features[0])])
    with pytest.raises(ValueError, match=r"cotangent\[1\] must have shape \[2, 12, 16\]"):
        pullback([np.ones_like(features[0]), np.ones(3)])


def test_gradients_accumulate_until_they_are_cleared() -> None:
    MODEL.zero_grad()
    for times in (1, 2):
        out, pullback = MODEL.vjp(LATENTS, 0.5, CONTEXT, POOLED)
        pullback(np.ones_like(out))
        if times == 1:
            once = MODEL.flat_grad.copy()
    np.testing.assert_allclose(MODEL.flat_grad, 2 * once, rtol=1e-5, atol=1e-5 * np.abs(once).max())
    MODEL.zero_grad()
    assert not MODEL.flat_grad.any() and once.any()


def test_discriminator() -> None:
    features, grid = [normal(11, 2, 12, 16), normal(12, 2, 12, 16)], (3, 4)
    logits = HEADS(features, 0.3, POOLED, grid=grid)
    assert [x.shape for x in logits] == [(2, 3, 4)] * 2
    out, pullback = HEADS.vjp(features, 0.3, POOLED, grid=grid)
    assert all(map(same_bits, out, logits))
    first = pullback([np.ones_like(x) for x in out], params=False)
    again = pullback([np.ones_like(x) for x in out], features=False)
    assert again is None and HEADS.flat_grad.any() and [d.shape for d in first] == [f.shape for f in features]
    for values, message in (
        ((features[:1], 0.3, POOLED), "features must be a list of 2 arrays"),
        ((features[0], 0.3, POOLED), "features must be a list of 2 arrays, one for each tap, got ndarray"),
        (([features[0], features[1][:, :6]], 0.3, POOLED), r"features\[1\] must have shape \[2, 12, 16\], got \[2, 6, 16\]"),
        ((features, 0.3, None), "pooled must be given"),
        ((features, 2.0, POOLED), "sigma must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            HEADS(*values, grid=grid)
    with pytest.raises(ValueError, match=r"features\[0\] must have shape \[B, 9, 16\], got \[2, 12, 16\]"):
        HEADS(features, 0.3, POOLED, grid=(3, 3))


def test_autoencoder_scales_and_shifts() -> None:
    images = np.tanh(normal(13, 2, 3, 8, 12))
    moments, _ = VAE._core.encode(images)
    latents = VAE.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    np.testing.assert_allclose(latents, (moments[:, :4] - 0.25) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(VAE.decode(latents), VAE._core.decode(np.ascontiguousarray(moments[:, :4]))[0], atol=1e-5)


def test_autoencoder_samples_by_seed() -> None:
    images = np.tanh(normal(13, 2, 3, 8, 8))
    both = VAE.encode(images, sample=True, seed=[3, 4])
    assert same_bits(both, VAE.encode(images, sample=True, seed=3))
    np.testing.assert_allclose(both[1], VAE.encode(images[1:], sample=True, seed=[4])[0], atol=1e-5)
    assert np.abs(both - VAE.encode(images)).max() > 1e-3
    with pytest.raises(ValueError, match="needs a seed"):
        VAE.encode(images, sample=True)


def test_autoencoder_refuses() -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    images[0, 0, 0, 0] = np.nan
    for bad, message in (
        (images, "images must be finite, got 1 NaN"),
        (np.zeros((1, 3, 8, 7)), "multiples of 2"),
        (np.zeros((1, 8, 8, 3)), r"images must have shape \[B, 3, H, W\], got \[1, 8, 8, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            VAE.encode(bad)
    with pytest.raises(ValueError, match=r"latents must have shape \[B, 4, h, w\]"):
        VAE.decode(np.zeros((1, 3, 4, 4)))
    with pytest.raises(ValueError, match="latents must be finite"):
        VAE.decode(np.full((1, 4, 4, 4), np.inf))


def test_autoencoder_vjp() -> None:
    images = np.tanh(normal(13, 1, 3, 8, 8))
    weights = {
        name: normal(20 + i, *shape)
        for i, (name, shape) in enumerate((("images", (1, 3, 8, 8)), ("mean", (1, 4, 4, 4)), ("logvar", (1, 4, 4, 4))))
    }

    def value(images: Array) -> Array:
        out, _ = VAE.vjp(images, sample=True, seed=5)
        return np.float64(sum(float((getattr(out, n).astype(np.float64) * w).sum()) for n, w in weights.items()))

    VAE.zero_grad()
    _, pullback = VAE.vjp(images, sample=True, seed=5)
    gradient = pullback(weights["images"], weights["mean"], weights["logvar"])
    assert VAE.flat_grad.any()
    check_vjp(value, {"images": images}, {"images": gradient}, np.float64(1), ["images"])
    _, pullback = VAE.vjp(images)
    assert pullback(weights["images"], input=False) is None


# ---- losses ----------------------------------------------------------------------------------------------------------------------


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


FORMULAS = {
    "hinge": (lambda x: np.maximum(0, 1 - x), lambda x: np.maximum(0, 1 + x), lambda x: -x),
    "logistic": (lambda x: softplus(-x), softplus, lambda x: softplus(-x)),
    "lsgan": (lambda x: (x - 1) ** 2 / 2, lambda x: x**2 / 2, lambda x: (x - 1) ** 2 / 2),
    "bce": (lambda x: softplus(-x), softplus, lambda x: softplus(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_average_over_tokens_then_heads(name: str) -> None:
    loss, (on_real, on_fake, on_generator) = losses.by_name(name), FORMULAS[name]
    real = [2 * normal(1, 2, 3, 3), 2 * normal(2, 2, 5, 4)]
    fake = [2 * normal(3, 2, 3, 3), 2 * normal(4, 2, 5, 4)]
    value, dreal, dfake = loss.discriminator(real, fake)
    wide = [x.astype(np.float64) for x in real], [x.astype(np.float64) for x in fake]
    assert value == pytest.approx(sum(np.mean([on(x).mean() for x in xs]) for on, xs in zip((on_real, on_fake), wide)), rel=1e-6)
    gvalue, dgenerator = loss.generator(fake)
    assert gvalue == pytest.approx(np.mean([on_generator(x).mean() for x in wide[1]]), rel=1e-6)
    for on, xs, ds in ((on_real, wide[0], dreal), (on_fake, wide[1], dfake), (on_generator, wide[1], dgenerator)):
        for x, d in zip(xs, ds):
            slope = (on(x + 1e-6) - on(x - 1e-6)) / 2e-6
            assert_close(d, slope / (2 * x.size), 1e-5, f"{name} gradient")
    single = loss.generator(fake[0])
    assert isinstance(single[1], np.ndarray) and single[0] == pytest.approx(on_generator(wide[1][0]).mean(), rel=1e-6)


def test_bad_losses() -> None:
    with pytest.raises(ValueError, match="loss must be one of hinge, logistic, lsgan, bce, got 'wgan'"):
        losses.by_name("wgan")
    with pytest.raises(ValueError, match="at least one, got an empty list"):
        losses.hinge.generator([])
    with pytest.raises(ValueError, match=r"logits\[0\] \(generator\) must not be empty"):
        losses.hinge.generator(np.zeros((0, 3)))
