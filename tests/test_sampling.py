"""Time lists, samplers, guidance, seeds, pictures to start from, masks, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support import mmdit_config, normal, same_bits

import ladd
from ladd import _core
from ladd.sampling import METHODS, PhiloxNoise, State, noise

Array = np.ndarray
CONTEXT, POOLED = normal(1, 3, 5, 12), normal(2, 3, 10)


def random_model(seed: int = 0) -> ladd.MMDiT:
    """A small transformer whose velocity depends on everything it is given."""
    model = ladd.MMDiT(mmdit_config(qk_norm="rms_norm"))
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.startswith("pos_embed.pos_embed"):
            tensor[...] = rng.standard_normal(tensor.shape) * (0.1 if tensor.ndim == 1 else tensor[0].size ** -0.5)
    model.load_state_dict(state)
    return model


MODEL = random_model()


def toward(target: Array) -> Any:
    """The exact velocity of a flow all of whose pictures are `target`: along it x = (1 - sigma) target + sigma noise."""

    def model(x: Array, sigma: Array, context: Array, pooled: Array) -> Array:
        return (x - target) / sigma[:, None, None, None]

    return model


# ---- time lists ------------------------------------------------------------------------------------------------------------------

# (steps, shift, schedule) -> the list, to the digits that are published
LISTS: dict[tuple[int, float, str], list[float]] = {
    (1, 3, "uniform"): [1, 0],
    (2, 3, "uniform"): [1, 0.75, 0],
    (4, 3, "uniform"): [1, 0.9, 0.75, 0.5, 0],
    (8, 3, "uniform"): [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0],
    (4, 1, "uniform"): [1, 0.75, 0.5, 0.25, 0],
    (4, 5, "uniform"): [1, 0.9375, 0.8333, 0.625, 0],
    (1, 3, "diffusers"): [1, 0],
    (2, 3, "diffusers"): [1, 0.00892857, 0],
    (2, 1, "diffusers"): [1, 0.001, 0],
    (4, 3, "diffusers"): [1, 0.8576923, 0.60215056, 0.00892857, 0],
    (8, 3, "diffusers"): [1, 0.94754255, 0.88278776, 0.80083734, 0.69379312, 0.54804558, 0.33797216, 0.00892857, 0],
}


@pytest.mark.parametrize("key", LISTS, ids=str)
def test_published_lists(key: tuple[int, float, str]) -> None:
    steps, shift, schedule = key
    given = ladd.sigmas(steps, schedule=schedule, shift=shift)
    assert given.dtype == np.float32 and given.shape == (steps + 1,)
    np.testing.assert_allclose(given, LISTS[key], rtol=0, atol=5e-5 if schedule == "uniform" else 6e-8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be an integer in"),
        ({"steps": 2.5}, "got 2.5"),
        ({"steps": True}, "got True"),
        ({"steps": 4, "shift": 0}, "shift must be a number above 0, got 0"),
        ({"steps": 4, "shift": float("nan")}, "shift must be"),
        ({"steps": 4, "schedule": "karras"}, "schedule must be one of uniform, diffusers, got 'karras'"),
    ],
)
def test_bad_lists(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladd.sigmas(**values)


# ---- methods ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_flow_is_followed_exactly(method: str, steps: int) -> None:
    target, start = normal(3, 3, 4, 6, 5), normal(4, 3, 4, 6, 5)
    states: list[State] = []
    out = ladd.sample(
        toward(target), CONTEXT, POOLED, steps=steps, method=method, latents=start, seeds=[1, 2, 3], callback=lambda s: states.append(dict(s))
    )
    np.testing.assert_allclose(out, target, atol=1e-5)
    assert [s["step"] for s in states] == list(range(steps))
    for state in states:
        assert set(state) == set(State.__annotations__)
        np.testing.assert_allclose(state["denoised"], target, atol=1e-5)
        if method == "euler":
            line = (1 - state["sigma_next"]) * target + state["sigma_next"] * start
            np.testing.assert_allclose(state["latents"], line, atol=1e-5)
    assert states[-1]["sigma_next"] == 0 and same_bits(states[-1]["latents"], out)


def test_a_linear_field_is_one_product_of_euler_factors() -> None:
    """v = a x: each step multiplies by 1 + a (sigma_next - sigma), whatever the list."""
    start, times = normal(5, 1, 2, 3, 3), np.float32([1, 0.7, 0.2, 0])
    out = ladd.sample(lambda x, *_: 0.5 * x, CONTEXT[:1], POOLED[:1], sigmas=times, latents=start)
    factor = np.prod(1 + 0.5 * np.diff(times.astype(np.float64)))
    np.testing.assert_allclose(out, factor * start, rtol=1e-6)


def test_renoise_uses_fresh_noise_of_each_seed() -> None:
    target = normal(3, 3, 4, 6, 5)
    latents = [
        s["latents"].copy() for s in ladd.iterate(toward(target), CONTEXT, POOLED, steps=3, method="renoise", latents=target, seeds=[5, 6, 5])
    ]
    fresh = [(x - (1 - t) * target) / t for x, t in zip(latents[:2], (2 / 3, 1 / 3))]
    for e in fresh:
        assert abs(e.mean()) < 0.2 and 0.8 < e.std() < 1.2
    assert np.abs(fresh[0] - fresh[1]).max() > 0.5
    assert np.abs(fresh[0][0] - fresh[0][1]).max() > 0.5
    x = ladd.sample(toward(target), CONTEXT, POOLED, steps=3, method="renoise", latents=target, seeds=[5, 6, 5])
    np.testing.assert_allclose(x, target, atol=1e-5)


def test_sampling_is_what_a_plain_loop_gives() -> None:
    times = ladd.sigmas(3, shift=3.0)
    x = noise((3, 4, 6, 8), [1, 2, 3])
    for sigma, following in pairwise(times):
        x = x + (following - sigma) * MODEL(x, sigma, CONTEXT, POOLED)
    out = ladd.sample(MODEL, CONTEXT, POOLED, size=(6, 8), sigmas=times, seeds=[1, 2, 3])
    np.testing.assert_allclose(out, x, atol=1e-5)


def test_guidance_is_linear_in_one_batch_of_negative_and_positive() -> None:
    batches = []

    def model(x: Array, sigma: Array, context: Array, pooled: Array) -> Array:
        batches.append((x.copy(), context.copy(), pooled.copy()))
        return context[:, :1, :1, None] * np.ones_like(x)

    negative = np.float32(7) + CONTEXT[:1], POOLED[:1]
    start = normal(6, 3, 4, 4, 4)
    out = ladd.sample(model, CONTEXT, POOLED, steps=1, latents=start, guidance_scale=3.0, negative=negative)
    low, high = negative[0][:, :1, :1, None], CONTEXT[:, :1, :1, None]
    np.testing.assert_allclose(out, start - (low + 3 * (high - low)), atol=1e-4)
    (x, context, pooled) = batches[0]
    assert len(batches) == 1 and same_bits(x, np.concatenate([start, start]))
    assert same_bits(context, np.concatenate([np.repeat(negative[0], 3, 0), CONTEXT]))
    assert same_bits(pooled, np.concatenate([np.repeat(negative[1], 3, 0), POOLED]))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_that_is_off_costs_nothing(scale: float) -> None:
    sizes = []

    def model(x: Array, *_: Array) -> Array:
        sizes.append(len(x))
        return x

    ladd.sample(model, CONTEXT, POOLED, steps=2, latents=normal(6, 3, 4, 4, 4), guidance_scale=scale)
    assert sizes == [3, 3]


# ---- seeds -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_a_picture_depends_on_its_own_seed_only(method: str, rng: Any) -> None:
    options: dict[str, Any] = {"size": (6, 6), "steps": 3, "method": method, "rng": rng}
    seeds = [11, 5, 11 << 32]
    together = ladd.sample(MODEL, CONTEXT, POOLED, seeds=seeds, **options)
    for i, seed in enumerate(seeds):
        alone = ladd.sample(MODEL, CONTEXT[i : i + 1], POOLED[i : i + 1], seeds=[seed], **options)
        assert same_bits(alone[0], together[i])
    swapped = ladd.sample(MODEL, CONTEXT[::-1], POOLED[::-1], seeds=seeds[::-1], **options)
    assert same_bits(swapped[::-1], together)
    other = ladd.sample(MODEL, CONTEXT, POOLED, seeds=[11, 6, 11 << 32], **options)
    assert same_bits(other[0], together[0])
    assert np.abs(other[1] - together[1]).max() > 0.1
    if rng == "philox":  # a Mersenne twister only takes the low 32 bits of a seed
        assert np.abs(noise((3, 4, 6, 6), seeds)[0] - noise((3, 4, 6, 6), seeds)[2]).max() > 0.1


def test_noise_of_a_seed_has_the_same_bits_in_every_batch() -> None:
    together = noise((4, 4, 5, 3), [9, 1, 9, 2])
    assert same_bits(together[0], together[2])
    assert all(same_bits(together[i], noise((1, 4, 5, 3), [seed])[0]) for i, seed in enumerate([9, 1, 9, 2]))


def test_one_seed_counts_up() -> None:
    assert same_bits(noise((3, 4, 5, 5), 7), noise((3, 4, 5, 5), [7, 8, 9]))
    given = ladd.sample(MODEL, CONTEXT, POOLED, size=(4, 4), steps=1, seeds=7)
    assert same_bits(given, ladd.sample(MODEL, CONTEXT, POOLED, size=(4, 4), steps=1, seeds=[7, 8, 9]))


def test_the_stream_of_torch_goes_on_from_step_to_step() -> None:
    """Start and re-noising draw from one generator an image, as one torch.Generator would."""
    from ladd.sampling import TorchNoise

    apart, whole = TorchNoise([3]), TorchNoise([3])
    parts = np.concatenate([apart.start((1, 4, 4)).ravel(), apart.fresh((1, 4, 4), 0).ravel()])
    assert same_bits(parts, whole.start((2, 4, 4)).ravel())


def test_threads_do_not_change_a_bit() -> None:
    options: dict[str, Any] = {"size": (10, 8), "steps": 2, "guidance_scale": 2.0, "negative": (CONTEXT, POOLED)}
    threads, results = ladd.get_num_threads(), []
    try:
        for n in (1, 2):
            ladd.set_num_threads(n)
            results.append(ladd.sample(MODEL, CONTEXT, POOLED, **options))
    finally:
        ladd.set_num_threads(threads)
    assert same_bits(*results)


# ---- pictures to start from ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "run"), [(0.0, 0), (0.1, 1), (0.7, 7), (0.25, 3), (1.0, 10)])
def test_strength_runs_a_share_of_the_steps(strength: float, run: int) -> None:
    picture, times = normal(7, 3, 4, 4, 4), ladd.sigmas(10)
    states = list(ladd.iterate(toward(picture), CONTEXT, POOLED, sigmas=times, latents=picture, strength=strength, seeds=3))
    assert [s["sigma"] for s in states] == times[10 - run : 10].tolist()
    out = ladd.sample(toward(picture), CONTEXT, POOLED, sigmas=times, latents=picture, strength=strength, seeds=3)
    np.testing.assert_allclose(out, picture, atol=1e-5)


def test_strength_noises_the_picture_to_where_it_starts() -> None:
    picture, seen = normal(7, 3, 4, 4, 4), []

    def model(x: Array, sigma: Array, *_: Array) -> Array:
        seen.append((x.copy(), sigma.copy()))
        return np.zeros_like(x)

    ladd.sample(model, CONTEXT, POOLED, steps=4, latents=picture, strength=0.5, seeds=[1, 2, 3])
    x, sigma = seen[0]
    assert sigma.tolist() == [0.5] * 3
    np.testing.assert_allclose(x, 0.5 * picture + 0.5 * noise((3, 4, 4, 4), [1, 2, 3]), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_keeps_what_it_does_not_cover(method: str) -> None:
    picture, target = normal(8, 1, 4, 6, 6), normal(9, 1, 4, 6, 6)
    mask = np.zeros((6, 6), np.float32)
    mask[:, 3:] = 1
    states = list(ladd.iterate(toward(target), CONTEXT[:1], POOLED[:1], steps=4, method=method, latents=picture, mask=mask, seeds=4))
    out = states[-1]["latents"]
    assert same_bits(out[..., :3], picture[..., :3])
    np.testing.assert_allclose(out[..., 3:], target[..., 3:], atol=1e-5)
    # Outside, the picture at the step's time: with the start's own noise, or with the fresh noise of re-noising.
    added = noise((1, 4, 6, 6), 4) if method == "euler" else PhiloxNoise([4]).fresh((4, 6, 6), 1)
    np.testing.assert_allclose(states[1]["latents"][..., :3], (0.5 * picture + 0.5 * added)[..., :3], atol=1e-6)


def test_one_guidance_scale_an_image() -> None:
    options: dict[str, Any] = {"size": (4, 4), "steps": 3, "negative": (CONTEXT[:1], POOLED[:1]), "seeds": 4}
    mixed = ladd.sample(MODEL, CONTEXT, POOLED, guidance_scale=[1.0, 2.5, 0.0], **options)
    plain, guided = (ladd.sample(MODEL, CONTEXT, POOLED, guidance_scale=scale, **options) for scale in (1.0, 2.5))
    assert same_bits(mixed, np.stack([plain[0], guided[1], plain[2]]))
    assert np.abs(plain[1] - guided[1]).max() > 0.01


def test_steering_through_the_state() -> None:
    start = normal(6, 3, 4, 4, 4)

    def zero(state: State) -> None:
        state["latents"][:] = 0

    out = ladd.sample(lambda x, *_: x, CONTEXT, POOLED, steps=3, latents=start, callback=zero)
    assert not out.any() and start.any()


# ---- what is refused -------------------------------------------------------------------------------------------------------------

START = normal(6, 3, 4, 4, 4)
NAN = START.copy()
NAN[1, 2, 3, 0] = np.nan
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no size": ({"size": None}, ValueError, r"size=\(H, W\) must be given"),
    "bad size": ({"size": (4, 0)}, ValueError, "size must be"),
    "neither steps nor sigmas": ({"steps": None}, ValueError, "either sigmas or steps"),
    "both": ({"sigmas": [1, 0]}, ValueError, "either sigmas or steps"),
    "ascending": ({"steps": None, "sigmas": [0, 1]}, ValueError, "must descend"),
    "does not end in 0": ({"steps": None, "sigmas": [1, 0.5]}, ValueError, "must descend from at most 1 to 0"),
    "above 1": ({"steps": None, "sigmas": [1.5, 0]}, ValueError, "must descend"),
    "NaN time": ({"steps": None, "sigmas": [1, np.nan, 0]}, ValueError, "sigmas must be finite"),
    "starts late": ({"steps": None, "sigmas": [0.5, 0]}, ValueError, "must start at 1"),
    "method": ({"method": "dpm"}, ValueError, "method must be one of euler, renoise, got 'dpm'"),
    "rng": ({"rng": "cuda"}, ValueError, "rng must be philox or torch"),
    "guidance below 1": ({"guidance_scale": 0.5}, ValueError, "guidance_scale must be 0 or 1 .* got 0.5"),
    "guidance NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be"),
    "guidance of another batch": ({"guidance_scale": [2.0, 3.0]}, ValueError, r"one an image, shape \[3\], got \[2\]"),
    "guidance of one image below 1": ({"guidance_scale": [2.0, 0.5, 1.0]}, ValueError, "guidance_scale must be"),
    "guidance is a word": ({"guidance_scale": "3"}, ValueError, "guidance_scale must be .* got '3'"),
    "no negative": ({"guidance_scale": 2.0}, ValueError, "needs negative"),
    "negative of another batch": ({"guidance_scale": 2.0, "negative": (CONTEXT[:2], POOLED)}, ValueError, "negative context must have shape"),
    "negative is one array": ({"guidance_scale": 2.0, "negative": CONTEXT}, TypeError, "negative must be"),
    "context of rank 2": ({"context": CONTEXT[0]}, ValueError, r"context must have shape \[B, T, J\], got \[5, 12\]"),
    "context of another width": ({"context": CONTEXT[..., :7]}, ValueError, r"context must have shape \[3, T, 12\]"),
    "pooled of another batch": ({"pooled": POOLED[:2]}, ValueError, r"pooled must have shape \[3, P\], got \[2, 10\]"),
    "too few seeds": ({"seeds": [1, 2]}, ValueError, "expected 3, got 2"),
    "negative seed": ({"seeds": [1, 2, -3]}, ValueError, "got -3"),
    "seed too large": ({"seeds": [1, 2, 1 << 63]}, ValueError, r"seeds must be in \[0, 2\*\*63\), got 9223372036854775808"),
    "seed is a fraction": ({"seeds": [1, 2, 3.5]}, TypeError, "got 3.5"),
    "seed is a word": ({"seeds": "123"}, TypeError, "seeds must be"),
    "NaN latents": ({"latents": NAN}, ValueError, "latents must be finite, got 1 NaN or infinite of 192 values"),
    "latents of other channels": ({"latents": START[:, :3]}, ValueError, r"latents must have shape \[B, 4, H, W\]"),
    "latents of another batch": ({"latents": START[:2]}, ValueError, "batch 1 or 3"),
    "size against latents": ({"latents": START, "size": (5, 4)}, ValueError, "size must be that of latents"),
    "strength without latents": ({"strength": 0.5}, ValueError, "strength needs latents"),
    "strength of 2": ({"latents": START, "strength": 2}, ValueError, r"strength must be a number in \[0, 1\], got 2"),
    "mask without latents": ({"mask": np.ones((4, 4))}, ValueError, "mask needs latents"),
    "mask of another size": ({"latents": START, "mask": np.ones((3, 4))}, ValueError, r"mask must broadcast to \[3, 1, 4, 4\]"),
    "mask of 255": ({"latents": START, "mask": np.full((4, 4), 255)}, ValueError, r"mask must be in \[0, 1\]"),
    "position table too small": ({"size": (40, 4)}, ValueError, "pos_embed_max_size"),
    "not a whole patch": ({"size": (5, 4)}, ValueError, "size must be multiples of the model's patch_size = 2, got 5 x 4"),
    "latents of half a patch": ({"latents": START[..., :3]}, ValueError, "multiples of the model's patch_size = 2, got 4 x 3"),
    "masked latents for any model": ({"masked_latents": START, "mask": np.ones((4, 4))}, ValueError, "takes 4 and gives 4: leave them out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changes, kind, message = BAD[name]
    values: dict[str, Any] = {"context": CONTEXT, "pooled": POOLED, "steps": 2, "size": None if "latents" in changes else (4, 4)}
    values.update(changes)
    with pytest.raises(kind, match=message):
        ladd.sample(MODEL, **values)


def test_arguments_are_checked_before_the_first_step_is_asked_for() -> None:
    with pytest.raises(ValueError, match="method must be"):
        ladd.iterate(MODEL, CONTEXT, POOLED, size=(4, 4), steps=1, method="dpm")


def test_a_model_that_gives_nan_is_caught_at_once() -> None:
    calls = []

    def model(x: Array, *_: Array) -> Array:
        calls.append(1)
        return x if len(calls) < 2 else np.full_like(x, np.nan)

    with pytest.raises(FloatingPointError, match=r"NaN or infinite values in step 2 of 4 \(sigma 0.75\)"):
        ladd.sample(model, CONTEXT, POOLED, steps=4, latents=START)
    assert len(calls) == 2


INPAINTING = ladd.MMDiT(mmdit_config(in_channels=9, out_channels=4), seed=3)
INPAINTING.load_state_dict({**INPAINTING.state_dict(), "proj_out.weight": normal(11, *INPAINTING.state_dict()["proj_out.weight"].shape)})
MASK = np.zeros((4, 4), bool)
MASK[1:3, 1:] = True


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_an_inpainting_transformer_is_fed_mask_and_masked_picture(guidance: float, strength: float | None) -> None:
    """Against the loop written out: no blending, the same extra channels for both halves of a guided batch."""
    masked, picture = normal(12, 1, 4, 4, 4), normal(13, 3, 4, 4, 4)
    negative = (normal(14, 1, 5, 12), normal(15, 1, 10))
    given = {} if strength is None else {"latents": picture, "strength": strength}
    out = ladd.sample(
        INPAINTING, CONTEXT, POOLED, steps=4, mask=MASK, masked_latents=masked, seeds=5, guidance_scale=guidance, negative=negative, **given
    )
    start = noise((3, 4, 4, 4), 5)
    times = ladd.sigmas(4) if strength is None else ladd.sigmas(4)[2:]
    x = start if strength is None else 0.5 * picture + 0.5 * start
    beside = np.concatenate([np.broadcast_to(MASK.astype(np.float32), (3, 1, 4, 4)), np.broadcast_to(masked, x.shape)], axis=1)
    for sigma, after in pairwise(times):
        fed = np.concatenate([x, beside], axis=1)
        v = INPAINTING(fed, float(sigma), CONTEXT, POOLED)
        if guidance > 1:
            without = INPAINTING(fed, float(sigma), np.broadcast_to(negative[0], CONTEXT.shape), np.broadcast_to(negative[1], POOLED.shape))
            v = without + guidance * (v - without)
        x = x + (after - sigma) * v
    np.testing.assert_allclose(out, x, atol=2e-5)
    assert np.abs(out - start).max() > 0.1


def test_what_an_inpainting_transformer_needs() -> None:
    args: tuple[Any, ...] = (INPAINTING, CONTEXT, POOLED)
    with pytest.raises(ValueError, match="as many channels as it takes, got 4 from 9; an inpainting transformer needs mask and masked_latents"):
        ladd.sample(*args, size=(4, 4), steps=1)
    with pytest.raises(ValueError, match="masked_latents need mask"):
        ladd.sample(*args, masked_latents=START, steps=1)
    with pytest.raises(ValueError, match="strength needs latents"):
        ladd.sample(*args, masked_latents=START, mask=MASK, steps=1, strength=0.5)
    with pytest.raises(ValueError, match=r"masked_latents must have the shape of latents, \[B, 4, 4, 4\], got \[3, 4, 4, 2\]"):
        ladd.sample(*args, latents=START, masked_latents=START[..., :2], mask=MASK, steps=1)
    with pytest.raises(ValueError, match="masked_latents must be finite"):
        ladd.sample(*args, masked_latents=NAN, mask=MASK, steps=1)


def test_memory_is_given_back() -> None:
    before = _core.memory_in_use()
    ladd.sample(MODEL, CONTEXT, POOLED, size=(6, 6), steps=2)
    assert _core.memory_in_use() == before
