"""The benchmark beside PyTorch without PyTorch: its rows, its clock, the operations it counts, and its words."""

from __future__ import annotations

import fnmatch
import time
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
from cuda_device import benchmark

import ladd

sizes, measure, ours, report, kernels, figures, vs_pytorch = (
    benchmark(name) for name in ("sizes", "measure", "ours", "report", "kernels", "figures", "vs_pytorch")
)


def rows(*, threads: int = 2, no_compile: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = vs_pytorch.all_rows(Namespace(threads=threads, no_compile=no_compile))
    return made


@pytest.mark.parametrize(
    ("pattern", "count", "targets"),
    [
        ("demo/step/float32*", 2, {"eager": 1.8, "compile": 1.6}),
        ("demo/step/bfloat16*", 2, {"eager": 2.0, "compile": 1.8}),
        ("S/step/float32*", 2, {"eager": 1.8, "compile": 1.6}),
        ("S/step/bfloat16*", 2, {"eager": 2.0, "compile": 1.8}),
        ("SD3/step/float32*", 1, {"eager": 1.7}),
        ("SD3/step/bfloat16*", 1, {"eager": 1.8}),
        ("[!a]*/forward*/float32*", 12, {"eager": 1.5, "compile": 1.3}),
        ("[!a]*/forward*/bfloat16*", 12, {"eager": 1.7, "compile": 1.4}),
        ("attention-*", 28, {"eager": 1.3}),
        ("VAE-*", 1, {"eager": 1.2}),
    ],
)
def test_the_rows_and_their_targets(pattern: str, count: int, targets: dict[str, float]) -> None:
    chosen = {n: r for n, r in rows().items() if fnmatch.fnmatchcase(n, pattern)}
    assert len(chosen) == count
    for name, row in chosen.items():
        rival = "compile" if name.endswith("/compile") else "eager"
        assert row.target == {rival: targets[rival]}


def test_the_rows_of_most_weight_come_first() -> None:
    names = list(rows())
    compiled = [i for i, n in enumerate(names) if n.endswith("/compile")]
    growth = [i for i, n in enumerate(names) if n.startswith("growth/")]
    assert names[0] == "demo/step/float32" and max(growth) < min(compiled)
    assert all(name in names[: min(growth)] for name in ("demo/second-thread", "demo/memory", "wheel-without-model"))
    assert list(rows(no_compile=True)) == [n for n in names if not n.endswith("/compile")]
    assert set(names) - set(rows(threads=1)) == {"demo/second-thread", "demo/busy-core"}


def test_a_plan_grows_with_the_work() -> None:
    every = rows()
    assert every["demo/step/float32"].planned(60) - every["demo/step/float32"].planned(6) == pytest.approx(54)
    assert every["SD3/step/float32"].planned(6) > every["demo/step/float32"].planned(6)
    assert every["demo/step/float32/compile"].planned(6) > every["demo/step/float32"].planned(6)
    said = vs_pytorch.plan({"import": every["import"]}, Namespace(seconds=599.0))
    assert said == "1 rows, about 10 minutes on two quiet cores"


def test_the_operations_of_a_forward_are_those_of_its_weights() -> None:
    size = sizes.Size(3, 2, 8, 5, 4, 2, 48, 40, 16, "rms_norm")
    counted = 4.0 * size.depth * size.batch * (size.tokens + size.text) ** 2 * size.width  # attention
    for name, weight in ours.model(size).state_dict().items():
        if weight.ndim > 1 and not name.startswith(("pos_embed.pos", "time_text_embed")):
            text = any(part in name for part in ("context_embedder", "ff_context", "add_", "_add"))
            rows = 1 if "norm" in name else size.text if text else size.tokens
            counted += 2.0 * size.batch * rows * weight.size
    # Not counted: the embedding of sigma and of the pooled text, one row a picture.
    assert kernels.operations(size)["forward"] == counted


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: side("a", 0.02), "b": lambda: side("b", 0.03)}
    times = measure.in_turns(calls, 0.0, least=3)
    assert order == ["a", "b"] * 3 and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert measure.summary(times["b"])["fastest"] >= 0.03
    order.clear()
    short = measure.in_turns({"a": lambda: order.append("a")}, 0.0, least=2)
    assert len(order) == 201 and len(short["a"]) == 2  # one call says how long a call takes, then a hundred a timing


def test_what_takes_too_long_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="more than 0 s"), vs_pytorch.at_most(0.05):
        time.sleep(5)
    with vs_pytorch.at_most(0.05):
        pass
    time.sleep(0.1)  # and nothing rings afterwards


def result(ladd: float, rival: float, target: float, side: str = "eager") -> dict[str, Any]:
    seconds = {"ladd": measure.summary([ladd]), side: measure.summary([rival])}
    return {"seconds": seconds, "ratio": {side: rival / ladd}, "target": {side: target}, "notes": {}}


def test_words() -> None:
    assert [measure.si(x) for x in (2.5, 0.012, 3.4e-5)] == ["2.5 s", "12 ms", "34 us"]
    assert report.line("row", result(0.5, 1.0, 1.8)).endswith("ladd 500 ms; eager 1 s ratio 2.00 (target 1.8: met)")
    failed = {**result(0.5, 1.0, 1.8), "ratio": {}, "target": {"compile": 1.6}, "notes": {"compile": "not compiled within 400 s"}}
    assert report.line("row", failed).endswith("ladd 500 ms; compile: not compiled within 400 s")
    figure = {"value": 0.81, "unit": "%", "bound": "at least", "target": 0.85, "detail": {"seconds": 0.25}}
    table = report.markdown(
        {
            "machine": "this one",
            "rows": {
                "demo/step/float32": result(0.5, 1.0, 1.8),
                "demo/step/float32/compile": result(0.5, 0.7, 1.6, "compile"),
                "S/step/float32/compile": failed,
                "demo/share": figure,
                "import": {"reason": "no such thing"},
                "growth/depth-1/step": {**result(1.0, 2.0, 0.0), "target": {}, "growth": {"along": "depth", "x": 1, "what": "step"}},
            },
        }
    )
    assert "| demo, step, float32 | 500 ms | 1 s | 2.00 | 1.8, met | 700 ms | 1.40 | 1.6, not met |" in table
    assert "| S, step, float32, compile | 500 ms | - | - | - | not compiled within 400 s | - | - |" in table
    assert "| demo, share | 81% | at least 85%, not met |" in table and "- import: no such thing" in table
    assert "| growth, depth-1, step | 1 s | 2 s | 2.00 | - |" in table and table.endswith("1 targets met, 2 not met.")


def test_ours_is_what_it_is_said_to_be() -> None:
    size = sizes.Size(2, 1, 4, 3, 4, 2, 32, 32, 8, "rms_norm")
    model = ours.model(size)
    assert np.abs(model(*size.inputs().values())).max() > 0  # not the zeros of a fresh model
    ours.forward_backward(model, size.inputs())()
    assert all(np.abs(g).max() > 0 for name, g in model.gradients().items() if name.startswith("transformer_blocks.0"))
    trainer = ours.trainer(size, "float32")
    before = trainer.student.flat_trainable.copy(), trainer.teacher.flat_trainable.copy()
    trainer.step(*ours.batch(size))
    assert not np.array_equal(before[0], trainer.student.flat_trainable) and np.array_equal(before[1], trainer.teacher.flat_trainable)


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "demo", sizes.Size(1, 1, 4, 3, 4, 1, 32, 32, 8, None))
    threads = ladd.get_num_threads()
    gain, detail = figures.second_thread(0.0, 1)
    assert gain == detail["1 thread"] / detail["2 threads"] > 0 and ladd.get_num_threads() == threads
    assert figures.import_time(1)[0] > 0
