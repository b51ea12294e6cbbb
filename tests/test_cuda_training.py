"""The distillation step on a device without the host: recorded as a graph and replayed, not waited for, and safe against what is not finite."""

from __future__ import annotations

from typing import Any

import cuda_device
import numpy as np
import pytest
import support
from cuda_device import needs_device, needs_emulator
from oracle import mmdit
from support import mmdit_config, normal, same_bits

import ladd
from ladd import _core
from ladd.config import AdamWConfig, LADDConfig

pytestmark = needs_device

BATCH, TEXT = 2, 3
MMDIT = mmdit_config(num_layers=1)
DISC: dict[str, Any] = {"feature_dim": 16, "taps": (0,), "pooled_dim": 10, "width": 8, "num_groups": 2, "condition_dim": 6}
ADAMW = AdamWConfig(lr=3e-3, beta1=0.5, eps=1e-3, weight_decay=0.02, clip_norm=0.7, warmup_steps=3)
ALL_TERMS = {"misaligned_weight": 0.5, "distillation_weight": 0.7, "pair_weight": 0.4, "r1_weight": 0.3, "r1_interval": 2}


@pytest.fixture(autouse=True)
def opened() -> ladd.device.Device:
    return cuda_device.device()


def trainer(dtype: str = "float32", *, device: str = "cuda", cuda_graph: bool = False, **changes: Any) -> ladd.LADD:
    place = {"device": device, "dtype": dtype}
    teacher, student = ladd.MMDiT(MMDIT, **place), ladd.MMDiT(MMDIT, **place)
    for model, seed in ((teacher, 21), (student, 22)):
        model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit.parameter_shapes(MMDIT), seed)})
    heads = ladd.Discriminator(ladd.DiscriminatorConfig(**DISC), seed=5, **place)
    config = LADDConfig(**{"seed": 77, "student": ADAMW, "discriminator": ADAMW, "share_t_hat": False, **changes})
    return ladd.LADD(student, teacher, heads, config, cuda_graph=cuda_graph)


def batch(seed: int) -> dict[str, Any]:
    latents = normal(seed, BATCH, 4, 1, 1) + np.float32(0.3) * normal(seed + 1, BATCH, 4, 4, 4)
    text = normal(seed + 2, BATCH, TEXT, 12), normal(seed + 3, BATCH, 10)
    return {"latents": latents, "context": text[0], "pooled": text[1]}


def step(t: ladd.LADD, number: int) -> Any:
    noise = {"noise": normal(900 + number, BATCH, 4, 4, 4)} if t.config.pair_weight else {}
    return t.step(**batch(10 * number), **noise, rate_scale=1 - 0.1 * number)


def everything(t: ladd.LADD) -> dict[str, Any]:
    return {name: np.array(ladd.device.to_host(x)) for name, x in t.state()[0].items()}


def assert_same(one: ladd.LADD, other: ladd.LADD) -> None:
    a, b = everything(one), everything(other)
    assert all(same_bits(a[name], b[name]) for name in a), [name for name in a if not same_bits(a[name], b[name])]
    assert one.state()[1] == other.state()[1]


@pytest.mark.parametrize(
    ("dtype", "steps", "changes"),
    [("float32", 5, ALL_TERMS), ("bfloat16", 3, {"d_steps": 2})],
    ids=["all terms", "bfloat16, two updates of the heads"],
)
def test_a_recorded_step_gives_the_same_bits(dtype: str, steps: int, changes: dict[str, Any]) -> None:
    """New data, times, noise and rates in every step; R1 in every second one, so there are two recordings."""
    plain, recorded = trainer(dtype, **changes), trainer(dtype, cuda_graph=True, **changes)
    for number in range(1, steps + 1):
        wanted, got = step(plain, number), step(recorded, number)
        assert dict(got) == dict(wanted) and np.isfinite(list(wanted.values())).all(), number
    assert recorded._graphs is not None and all(recorded._graphs.values()) and len(recorded._graphs) == (2 if "r1_weight" in changes else 1)
    assert_same(plain, recorded)
    weights = normal(1, plain.discriminator.num_parameters) * np.float32(0.1)
    for t in (plain, recorded):
        t.discriminator.flat_trainable[:] = weights  # others' writes count at once
    assert dict(step(recorded, 9)) == dict(step(plain, 9))
    assert_same(plain, recorded)


@needs_emulator
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_waits_for_nothing_but_its_metrics(cuda_graph: bool) -> None:
    waits = cuda_device.library().ladd_emulator_waits
    t = trainer("bfloat16", cuda_graph=cuda_graph, misaligned_weight=0.5)
    waits()
    metrics = [step(t, number) for number in range(1, 4)]
    assert waits() == 0
    values = [dict(m) for m in metrics]
    assert waits() == 3, "one copy a step"
    assert values[0] != values[1] and dict(metrics[0]) == values[0] and waits() == 0


def test_what_is_not_finite_stops_all_updates_until_it_is_seen() -> None:
    t, before = trainer(), trainer()
    for one in (t, before):
        step(one, 1)
    good = t.student.state_dict()["proj_out.bias"]
    for one in (t, before):
        one.student._core.tensors()["proj_out.bias"][...] = np.where(np.arange(good.size) == 1, np.nan, good).astype(np.float32)
    kept = {name: x for name, x in everything(before).items() if not name.endswith("_u")}
    broken, later = step(t, 2), step(t, 3)
    with pytest.raises(FloatingPointError, match=r"the discriminator's loss or gradient is not finite at iteration 2 .*nothing was updated"):
        later["loss_d"]
    assert (t.iteration, t.passes, t.discriminator_optimizer.updates, t.ema.updates) == (1, 2, 1, 1), "as after a failure on the CPU"
    now = everything(t)
    trained = t.discriminator.flat_trainable.size
    assert all(same_bits(now[name][:trained] if name == "discriminator.flat" else now[name], kept[name][: len(now[name])][:trained]
                         if name == "discriminator.flat" else kept[name]) for name in kept)  # fmt: skip
    assert np.isnan(dict(broken)["loss_d"]), "told once"
    t.student._core.tensors()["proj_out.bias"][...] = good
    assert np.isfinite(list(step(t, 2).values())).all() and t.iteration == 2


def test_a_failure_of_the_student_alone() -> None:
    """The heads' update stands, as on the CPU; saving tells too."""
    t = trainer(pair_weight=1e45, student_times=(1.0,), student_probabilities=(1.0,))
    step(t, 1)
    with pytest.raises(FloatingPointError, match="the student's loss or gradient is not finite at iteration 1"):
        t.state()
    assert (t.iteration, t.passes, t.discriminator_optimizer.updates, t.student_optimizer.updates) == (0, 1, 1, 0)


def test_graphs_need_a_device() -> None:
    with pytest.raises(ValueError, match="cuda_graph needs models on a CUDA device, got models on the CPU"):
        trainer(device="cpu", cuda_graph=True)


def test_the_clip_is_decided_where_the_gradients_are() -> None:
    """On both tables: the factor, the norm, the first failure, the updates counted; and AdamW and the average by such numbers."""
    device = cuda_device.device()

    def put(x: Any) -> Any:
        return ladd.device.as_array(np.asarray(x, np.float64).view(np.float32), "x", device=device)

    for there in (False, True):
        place = put if there else (lambda x: np.asarray(x, np.float64).view(np.float32).copy())
        factor = ladd.device.as_array(np.zeros(1, np.float32), "f", device=device) if there else np.zeros(1, np.float32)
        norm, failed, done = place([0.0]), place([0.0, 0.0]), place([0.0])
        for squares, checked, limit, wanted in (
            ([9.0, 16.0], [1.0], 2.5, 0.5),
            ([9.0, 16.0], None, 0.0, 1.0),
            ([0.0], None, 1.0, 1.0),
            ([9.0, 16.0], [1.0, np.inf], 2.5, np.nan),
            ([9.0, 16.0], [1.0], 2.5, np.nan),
        ):
            _core.clip_factor(factor, norm, failed, done, place(squares), None if checked is None else place(checked), limit, 2)
            assert np.array_equal(ladd.device.to_host(factor), np.float32([wanted]), equal_nan=True)
        read = [ladd.device.to_host(x).view(np.float64).tolist() for x in (norm, failed, done)]
        assert read == [[5.0], [2.0, 5.0], [3.0]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_r1_stays_in_float32(dtype: str) -> None:
    with pytest.raises(ValueError, match="r1_weight needs models of dtype float32"):
        trainer(dtype, r1_weight=0.1)


def rounded_steps(core: Any, p: Any, g: Any, key: tuple[int, int, Any], **options: Any) -> Any:
    m, v = np.zeros_like(p), np.zeros_like(p)
    core.adamw(p, m, v, g, 1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0, rounding=key, **options)
    return p


def test_stochastic_rounding_keeps_the_mean() -> None:
    """Between two neighbours of bfloat16, each taken with the right probability: five standard errors; other keys, other choices."""
    n = 40_000
    for start in (1.0, -3.0, 0.0417):
        exact = rounded_steps(_core, np.full(n, start, np.float32), np.ones(n, np.float32), None)  # type: ignore[arg-type]
        low = (exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        high = ((low.view(np.uint32) >> 16) + 1 << 16).astype(np.uint32).view(np.float32)
        got = rounded_steps(_core, np.full(n, start, np.float32), np.ones(n, np.float32), (5, 6, 7))
        share = float((exact[0] - low[0]) / (high[0] - low[0]))
        assert 0.05 < share < 0.95 and set(np.unique(got)) == {low[0], high[0]}
        assert abs(float((got == high).mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
        again = rounded_steps(_core, np.full(n, start, np.float32), np.ones(n, np.float32), (5, 6, 7))
        other = rounded_steps(_core, np.full(n, start, np.float32), np.ones(n, np.float32), (5, 6, 8))
        assert same_bits(got, again) and not same_bits(got, other)
    for bad in (np.inf, -np.inf, np.nan):
        assert not np.isfinite(rounded_steps(_core, np.full(5, bad, np.float32), np.ones(5, np.float32), (1, 2, 3))).any()


@pytest.mark.parametrize("n", [4099, 4096])
def test_stochastic_rounding_is_the_same_everywhere(n: int) -> None:
    """CPU and device; a step's number by value and from memory; a buffer that lies off its alignment."""
    device = cuda_device.device()
    values = [normal(i, n + 1) for i in range(3)]
    counter = np.array([123456789012], np.uint64).view(np.float32)
    for shift in (0, 1):
        p, m, g = (x[shift : shift + n].copy() for x in values)
        v = np.square(m)
        numbers = 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 0.5
        _core.adamw(p, m, v, g, *numbers, rounding=(1, 2, 123456789012))
        whole = [ladd.device.as_array(x, "x", device=device) for x in (*values[:2], np.square(values[1]), values[2])]
        there = [x[shift : shift + n] for x in whole]
        _core.adamw(there[0], there[1], there[2], there[3], *numbers, rounding=(1, 2, ladd.device.as_array(counter, "c", device=device)))
        assert all(same_bits(a, b.numpy()) for a, b in zip((p, m, v), there))
        assert not (p.view(np.uint32) & np.uint32(0xFFFF)).any()


def test_a_run_with_stochastic_rounding() -> None:
    """The weights are bfloat16's, a resumed run rounds as an uninterrupted one, and a recorded step as any other."""
    rounding = AdamWConfig(lr=3e-3, eps=1e-3, stochastic_rounding=True)
    runs = [trainer("bfloat16", cuda_graph=graph, student=rounding, discriminator=rounding) for graph in (False, True)]
    for number in range(1, 4):
        assert dict(step(runs[0], number)) == dict(step(runs[1], number))
    assert_same(*runs)
    assert not (ladd.device.to_host(runs[0].student.flat_trainable).view(np.uint32) & np.uint32(0xFFFF)).any()
    resumed = trainer("bfloat16", student=rounding, discriminator=rounding)
    state = runs[0].state()
    resumed.load_state(({name: np.array(ladd.device.to_host(x)) for name, x in state[0].items()}, state[1]))
    for t in (resumed, runs[0]):
        step(t, 4)
    assert_same(resumed, runs[0])
