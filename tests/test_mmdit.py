"""MMDiT against float64 oracle and stored diffusers values: forward, every gradient, taps, threads, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from oracle import autodiff as ad
from oracle import mmdit
from support import MMDIT_CASES, mmdit_config, normal, same_bits

import ladd
from ladd import _core

DATA = Path(__file__).parent / "data"
Array = np.ndarray


def core_model(name: str) -> tuple[Any, dict[str, Array]]:
    """The core's model with seeded weights, and these weights."""
    config = MMDIT_CASES[name][0]
    model = _core.MMDiT(config)
    weights = support.seeded_weights(mmdit.parameter_shapes(config), 1)
    assert set(model.trainable_names()) == set(weights)
    support.load(model, weights)
    return model, weights


def arguments(name: str) -> tuple[dict[str, Array], tuple[Array, ...]]:
    inputs = support.mmdit_inputs(name)
    return inputs, tuple(inputs[key] for key in ("latents", "sigma", "context", "pooled"))


def oracle_run(name: str, weights: dict[str, Array], taps: list[int] | None = None) -> tuple[Any, dict[str, ad.Tensor], dict[str, ad.Tensor]]:
    """The oracle's output, its parameters and its inputs; call ad.backward for gradients."""
    config, *_, skip = MMDIT_CASES[name]
    values = support.mmdit_inputs(name)
    leaves = support.leaves(weights)
    table = ad.Tensor(mmdit.position_table(config))
    given = {key: ad.Tensor(values[key]) for key in ("latents", "context", "pooled")}
    out = mmdit.forward(
        config,
        {**leaves, "pos_embed.pos_embed": table},
        given["latents"],
        values["sigma"],
        given["context"],
        given["pooled"],
        skip,
        taps,
    )
    return out, leaves, given


def check_gradients(model: Any, found: tuple[Array | None, ...], leaves: dict[str, ad.Tensor], given: dict[str, ad.Tensor]) -> None:
    gradients = model.gradients()
    references = {name: leaf.grad if leaf.grad is not None else np.zeros(leaf.shape) for name, leaf in leaves.items()}
    # Some gradients are exactly zero but for rounding (the bias of keys): those are measured against the rest.
    floor = 1e-4 * max(np.abs(reference).max() for reference in references.values())
    assert set(gradients) == set(references)
    for name, reference in references.items():
        support.assert_close(gradients[name], reference, support.BACKWARD, f"gradient of {name}", floor)
    for value, (name, leaf) in zip(found, given.items(), strict=True):
        assert value is not None
        reference = leaf.grad if leaf.grad is not None else np.zeros(leaf.shape)
        support.assert_close(value, reference, support.BACKWARD, f"gradient of {name}", floor)


@pytest.mark.parametrize("name", MMDIT_CASES)
def test_velocity_and_all_gradients(name: str) -> None:
    model, weights = core_model(name)
    skip = MMDIT_CASES[name][5]
    inputs, values = arguments(name)
    before = [value.copy() for value in values]
    velocity, saved = model.forward(*values, skip_layers=skip, keep=True)
    wanted, leaves, given = oracle_run(name, weights)
    support.assert_close(velocity, wanted.data, support.FORWARD, "velocity")
    wanted.backward(inputs["cotangent"])
    check_gradients(model, saved.backward(inputs["cotangent"]), leaves, given)
    assert all(same_bits(a, b) for a, b in zip(before, values, strict=True)), "an input was changed"
    with pytest.raises(RuntimeError):
        saved.backward(inputs["cotangent"])


@pytest.mark.parametrize("name", MMDIT_CASES)
def test_equals_diffusers(name: str) -> None:
    """Velocity, input gradients and a fingerprint of every parameter gradient that diffusers computed in float64."""
    with np.load(DATA / f"mmdit_{name}.npz") as file:
        reference = dict(file)
    model, _ = core_model(name)
    inputs, values = arguments(name)
    table = model.tensors()["pos_embed.pos_embed"].reshape(-1, reference["position"].shape[1])
    np.testing.assert_array_equal(table[::17], reference["position"])
    velocity, saved = model.forward(*values, skip_layers=MMDIT_CASES[name][5], keep=True)
    support.assert_close(velocity, reference["velocity"], support.FORWARD, "velocity")
    found = saved.backward(inputs["cotangent"])
    for key, value in zip(("dlatents", "dcontext", "dpooled"), found, strict=True):
        support.assert_close(value, reference[key], support.BACKWARD, key)
    names = [str(n) for n in reference["parameter_names"]]
    prints = support.fingerprint({n: model.gradients()[n] for n in names})
    floor = 1e-4 * reference["parameter_prints"].max()
    for n, wanted in zip(names, reference["parameter_prints"], strict=True):
        support.assert_close(prints[n], wanted, support.BACKWARD, f"gradient of {n}", floor)


TAPS = [("sd3", [0]), ("sd35_medium", [0, 2]), ("sd35_medium", [1]), ("skip_first", [0, 1]), ("patch_1", [0, 1, 2])]


@pytest.mark.parametrize(("name", "taps"), TAPS)
def test_features_and_all_gradients(name: str, taps: list[int]) -> None:
    model, weights = core_model(name)
    _, values = arguments(name)
    skip = MMDIT_CASES[name][5]
    features, saved = model.forward(*values, skip_layers=skip, taps=taps, keep=True)
    wanted, leaves, given = oracle_run(name, weights, taps)
    cotangents = [normal(900 + i, *feature.shape) for i, feature in enumerate(features)]
    assert len(features) == len(wanted) == len(taps)
    for tap, feature, reference in zip(taps, features, wanted, strict=True):
        support.assert_close(feature, reference.data, support.FORWARD, f"features after block {tap}")
    ad.backward(list(zip(wanted, cotangents, strict=True)))
    check_gradients(model, saved.backward(cotangents), leaves, given)


def test_features_stop_at_the_deepest_tap() -> None:
    """Weights behind the deepest tap are not read: NaN there does no harm."""
    model, _ = core_model("sd35_medium")
    _, values = arguments("sd35_medium")
    wanted, _ = model.forward(*values, taps=[1])
    for name, value in model.tensors().items():
        if name.startswith(("transformer_blocks.2.", "norm_out", "proj_out")):
            value[...] = np.nan
    features, _ = model.forward(*values, taps=[1])
    assert same_bits(features[0], wanted[0])


@pytest.mark.parametrize("name", MMDIT_CASES)
def test_one_and_two_threads_give_the_same_bits(name: str) -> None:
    results = []
    before = _core.get_num_threads()
    try:
        for threads in (1, 2):
            _core.set_num_threads(threads)
            model, _ = core_model(name)
            inputs, values = arguments(name)
            velocity, saved = model.forward(*values, skip_layers=MMDIT_CASES[name][5], keep=True)
            results.append([velocity, *saved.backward(inputs["cotangent"]), model.flat_grad.copy()])
    finally:
        _core.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", MMDIT_CASES)
def test_keeping_changes_no_bit(name: str) -> None:
    model, _ = core_model(name)
    _, values = arguments(name)
    skip = MMDIT_CASES[name][5]
    assert same_bits(model.forward(*values, skip_layers=skip)[0], model.forward(*values, skip_layers=skip, keep=True)[0])
    last = MMDIT_CASES[name][0]["num_layers"] - 1
    one, two = (model.forward(*values, skip_layers=skip, taps=[last], keep=keep)[0][0] for keep in (False, True))
    assert same_bits(one, two)


def test_plan_is_what_a_forward_takes() -> None:
    model, _ = core_model("sd35_medium")
    _, height, width, text, batch, _ = MMDIT_CASES["sd35_medium"]
    _, values = arguments("sd35_medium")
    before = _core.memory_in_use()
    _core.empty_cache()
    planned = model.plan(batch, height, width, text, keep=True)
    _, saved = model.forward(*values, keep=True)
    assert _core.memory_in_use() - before == planned
    del saved
    assert _core.memory_in_use() == before
    assert model.plan(batch, height, width, text) < planned


@pytest.mark.parametrize("name", ["sd3", "sd35_medium"])
def test_a_pass_kept_for_inputs_alone_takes_less_and_gives_the_same(name: str) -> None:
    model, _ = core_model(name)
    _, values = arguments(name)
    _, height, width, text, batch, _ = MMDIT_CASES[name]
    whole, less = (model.plan(batch, height, width, text, keep=True, params=params) for params in (True, False))
    assert model.plan(batch, height, width, text) < less < whole
    results = []
    for params in (True, False):
        out, saved = model.forward(*values, keep=True, params=params)
        cotangent = np.ones_like(out)
        if not params:
            for asked in ({"pooled": False}, {"params": False}):
                with pytest.raises(ValueError, match="params, pooled: expected False, for forward was called with params=False"):
                    saved.backward(cotangent, **asked)
        results.append((out, *saved.backward(cotangent, params=False, pooled=False)[:2]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_backward_computes_what_is_asked_for() -> None:
    model, _ = core_model("sd35_medium")
    inputs, values = arguments("sd35_medium")
    whole = model.forward(*values, keep=True)[1].backward(inputs["cotangent"])
    gradient = model.flat_grad.copy()
    model.flat_grad[...] = 0
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        saved = model.forward(*values, keep=True)[1]
        got = saved.backward(inputs["cotangent"], False, *asked)
        assert [value is not None for value in got] == list(asked)
        assert all(a is None or same_bits(a, b) for a, b in zip(got, whole, strict=True))
    assert not model.flat_grad.any(), "frozen, yet a parameter gradient was written"
    assert model.forward(*values, keep=True)[1].backward(inputs["cotangent"], True, False, False, False) == (None,) * 3
    assert same_bits(model.flat_grad, gradient)


def test_parameter_gradients_accumulate() -> None:
    model, _ = core_model("sd3")
    inputs, values = arguments("sd3")
    model.forward(*values, keep=True)[1].backward(inputs["cotangent"])
    once = model.flat_grad.copy()
    model.forward(*values, keep=True)[1].backward(inputs["cotangent"])
    support.assert_close(model.flat_grad, 2 * once.astype(np.float64), 1e-6, "two backwards")


def test_samples_of_a_batch_do_not_meet() -> None:
    model, _ = core_model("sd3")
    _, values = arguments("sd3")
    whole, _ = model.forward(*values)
    for b in range(2):
        alone, _ = model.forward(*(value[b : b + 1].copy() for value in values))
        assert same_bits(alone, whole[b : b + 1])


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "inpainting"])
def test_save_and_load_give_the_same_bits(name: str, tmp_path: Path) -> None:
    config = MMDIT_CASES[name][0]
    model = ladd.MMDiT(config, seed=3)
    model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit.parameter_shapes(config), 1)})
    model.save_pretrained(tmp_path)
    again = ladd.MMDiT.from_pretrained(tmp_path)
    assert again.config == model.config
    _, (latents, *others) = arguments(name)
    assert same_bits(again(latents, *others), model(latents, *others))
    assert all(same_bits(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_public_vjp_equals_the_core() -> None:
    config = MMDIT_CASES["sd3"][0]
    model, public = core_model("sd3")[0], ladd.MMDiT(config)
    public.load_state_dict(model.tensors())
    inputs, values = arguments("sd3")
    velocity, saved = model.forward(*values, keep=True)
    out, pullback = public.vjp(*values)
    assert same_bits(out, velocity) and same_bits(public(*values), velocity)
    wanted, got = saved.backward(inputs["cotangent"]), pullback(inputs["cotangent"])
    assert all(same_bits(a, b) for a, b in zip(wanted, (got.latents, got.context, got.pooled), strict=True))
    assert all(same_bits(value, model.gradients()[key]) for key, value in public.gradients().items())
    public.zero_grad()
    assert not any(value.any() for value in public.gradients().values())
    features = public.features(*values, taps=[0])
    assert same_bits(features[0], model.forward(*values, taps=[0])[0][0])


def test_copy_shares_nothing() -> None:
    model = ladd.MMDiT(MMDIT_CASES["sd3"][0], seed=1)
    twin = model.copy()
    assert all(same_bits(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    twin.load_state_dict({key: value + 1 for key, value in twin.state_dict().items()})
    _, values = arguments("sd3")
    assert not same_bits(model(*values), twin(*values))
    assert same_bits(model(*values), ladd.MMDiT(MMDIT_CASES["sd3"][0], seed=1)(*values))


def test_initialisation_is_the_seed_only() -> None:
    config = MMDIT_CASES["sd35_medium"][0]
    one, two, other = (ladd.MMDiT(config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(same_bits(value, two[key]) for key, value in one.items())
    assert any(not same_bits(value, other[key]) for key, value in one.items())
    assert not one["transformer_blocks.0.norm1.linear.weight"].any() and not one["proj_out.weight"].any()
    assert one["transformer_blocks.0.attn.to_q.weight"].std() > 0.05


BAD_CONFIGS: list[dict[str, Any]] = [
    {"num_layers": 0},
    {"num_attention_heads": 0},
    {"patch_size": -1},
    {"qk_norm": "layer_norm"},
    {"dual_attention_layers": (2,)},
    {"dual_attention_layers": (-1,)},
    {"pos_embed_max_size": 0},
    {"in_channels": 2**31},
    {"depth": 3},
]


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=str)
def test_impossible_configs_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)) as caught:
        _core.MMDiT({**mmdit_config(), **change})
    assert any(word in str(caught.value) for word in change), "the message does not name the setting"


def test_wrong_width_of_captions_is_an_error() -> None:
    with pytest.raises(ValueError, match="caption_projection_dim"):
        _core.MMDiT({**mmdit_config(), "caption_projection_dim": 17})


def test_bad_calls_are_errors_and_change_nothing() -> None:
    model, _ = core_model("sd3")
    _, (latents, sigma, context, pooled) = arguments("sd3")
    good, _ = model.forward(latents, sigma, context, pooled)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((latents[:, :3].copy(), sigma, context, pooled), {}),
        ((latents[0], sigma, context, pooled), {}),
        ((latents.astype(np.float64), sigma, context, pooled), {}),
        ((latents[:, :, :, ::2], sigma, context, pooled), {}),
        ((latents, sigma[:1].copy(), context, pooled), {}),
        ((latents, sigma + 1, context, pooled), {}),
        ((latents, sigma * np.float32(np.nan), context, pooled), {}),
        ((latents, sigma, context[:1].copy(), pooled), {}),
        ((latents, sigma, context[:, :, :5].copy(), pooled), {}),
        ((latents, sigma, context, pooled[:, :5].copy()), {}),
        ((latents, sigma, None, pooled), {}),
        ((normal(1, 2, 4, 1, 8), sigma, context, pooled), {}),
        ((normal(1, 2, 4, 26, 8), sigma, context, pooled), {}),
        ((latents, sigma, context, pooled), {"taps": [2]}),
        ((latents, sigma, context, pooled), {"taps": [1, 0]}),
        ((latents, sigma, context, pooled), {"taps": []}),
        ((latents, sigma, context, pooled), {"skip_layers": [5]}),
    ]
    for positional, named in calls:
        with pytest.raises((ValueError, TypeError)) as caught:
            model.forward(*positional, **named)
        assert len(str(caught.value)) > 20
    _, saved = model.forward(latents, sigma, context, pooled, keep=True)
    for cotangent in (good[:1].copy(), good.astype(np.float64), [good], None):
        with pytest.raises((ValueError, TypeError)):
            saved.backward(cotangent)
    assert saved.backward(good)[0] is not None, "a refused cotangent must not use up what was saved"
    assert same_bits(model.forward(latents, sigma, context, pooled)[0], good)
