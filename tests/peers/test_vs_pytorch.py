"""The benchmark beside PyTorch at toy size: both sides are the same networks, every kind of row is measured, and what fails is said."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
from cuda_device import benchmark

import ladd
from ladd import _core

sizes, measure, ours, report, kernels, figures, peer, vs_pytorch = (
    benchmark(name) for name in ("sizes", "measure", "ours", "report", "kernels", "figures", "peer", "vs_pytorch")
)
pytestmark = pytest.mark.peers
TOY = sizes.Size(2, 1, 8, 3, 4, 2, 32, 32, 8, "rms_norm")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sizes.SIZES:
        monkeypatch.setitem(sizes.SIZES, name, TOY)


def test_the_heads_are_the_same() -> None:
    heads = ladd.Discriminator(TOY.discriminator())
    state = {name: support.normal(i, *x.shape) for i, (name, x) in enumerate(heads.state_dict().items())}
    theirs: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        layer, _, what = name.rpartition(".")
        layer = layer.replace("sigma_embedder.linear_1", "embedder.0").replace("sigma_embedder.linear_2", "embedder.2")
        if what == "weight_u":  # the largest singular vectors, which another iteration leaves where they are
            weight = state[f"{layer}.weight"]
            u, _, v = np.linalg.svd(weight.reshape(len(weight), -1), full_matrices=False)
            state[name] = np.ascontiguousarray(u[:, 0])
            parametrization = f"{layer}.parametrizations.weight"
            theirs[f"{parametrization}.original"] = theirs.pop(f"{layer}.weight")
            theirs[f"{parametrization}.0._u"], theirs[f"{parametrization}.0._v"] = torch.tensor(u[:, 0]), torch.tensor(v[0])
        elif what == "condition_bias":
            theirs[f"{layer}.condition_sigma.bias"] = torch.from_numpy(value)
        else:
            theirs[f"{layer}.{what}"] = torch.from_numpy(value)
    heads.load_state_dict(state)
    rival = peer.Heads(TOY)
    rival.load_state_dict(theirs)
    taps = [support.normal(50 + i, TOY.batch, TOY.tokens, TOY.width) for i in range(TOY.depth)]
    inputs = TOY.inputs()
    mine = heads(taps, inputs["sigma"], inputs["pooled"], grid=(TOY.side // 2, TOY.side // 2))
    his = rival([torch.from_numpy(tap) for tap in taps], *map(torch.from_numpy, (inputs["sigma"], inputs["pooled"])))
    for a, b in zip(mine, his, strict=True):
        support.assert_close(a, b.detach().numpy(), 2e-5, "logits")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("update", ["step", "sharing_step"])
def test_an_update_of_the_rival(update: str, bf16: bool) -> None:
    trainer = peer.Trainer(TOY, ours.model(TOY).state_dict(), compiled=False, bf16=bf16)
    models = {"student": trainer.student, "teacher": trainer.teacher, "heads": trainer.heads}
    before = {name: [p.detach().clone() for p in model.parameters()] for name, model in models.items()}
    getattr(trainer, update)(*map(torch.from_numpy, ours.batch(TOY)))
    for name, model in models.items():
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before[name], strict=True)]
        assert all(same) if name == "teacher" else not any(same[:4]), name
    assert {p.dtype for p in trainer.teacher.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}


def test_the_rivals_gradients_are_ladds() -> None:
    model, inputs = ours.model(TOY), TOY.inputs()
    rival = peer.transformer(TOY, model.state_dict())
    peer.forward_backward(rival, peer.tensors(inputs), compiled=False, bf16=False)()
    ours.forward_backward(model, inputs)()
    wanted = {name: p.grad.numpy() for name, p in rival.named_parameters() if p.grad is not None}
    for name, gradient in model.gradients().items():
        if name in wanted:
            support.assert_close(gradient, wanted[name], 1e-4, name)
    assert len(wanted) > 40


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["vs_pytorch.py", *arguments, "--quick", "--threads", "1", "--json", str(path)])
    assert vs_pytorch.main() == 0
    rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    return rows


def test_the_fastest_way_is_taken() -> None:
    asked: list[str] = []
    best, name = peer.fastest({"slow": lambda: (asked.append("slow"), time.sleep(0.1)), "quick": lambda: asked.append("quick")})
    assert name == "quick" and asked == ["slow", "slow", "quick", "quick"]
    best()
    assert asked[-1] == "quick"


@pytest.mark.parametrize("bf16", [False, True])
def test_attention_of_both_kernels(bf16: bool) -> None:
    streams = sizes.attention_inputs(2, 6, 3, 2)
    dtype = "bfloat16" if bf16 else "float32"
    outs, lse = _core.attention_forward(streams)
    support.assert_close(
        np.concatenate(outs, axis=1), peer.attention(streams, bf16)().float().numpy().swapaxes(1, 2), 2e-2 if bf16 else 1e-5, dtype
    )
    backward, kernel = peer.attention_backward(streams, bf16)
    wanted = _core.attention_backward([np.ones_like(o) for o in outs], streams, outs, lse)
    for i, gradient in enumerate(backward()):
        mine = np.concatenate([stream[i] for stream in wanted], axis=1)
        support.assert_close(mine, gradient.float().numpy().swapaxes(1, 2), 5e-2 if bf16 else 1e-4, f"gradient {i}")
    assert kernel in ("flash", "math")


def test_a_run_and_its_continuation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    first = run(monkeypatch, path, "demo/forward/*", "demo/step/float32", "attention-32x(64+16)x64/*/float32", "--no-compile")
    assert list(first) == ["demo/step/float32", "demo/forward/float32", "demo/forward/bfloat16"] + [
        f"attention-32x(64+16)x64/{what}/float32" for what in ("forward", "backward")
    ]
    assert "5 rows, about" in capsys.readouterr().out
    for name, row in first.items():
        if name != "demo/forward/bfloat16":  # what a processor without bfloat16 has no row of
            assert row["ratio"]["eager"] == pytest.approx(row["seconds"]["eager"]["median"] / row["seconds"]["ladd"]["median"])
    second = run(monkeypatch, path, "demo/forward/*", "S/forward/float32", "--no-compile", "--resume")
    assert {name: second[name] for name in first} == first and set(second) - set(first) == {"S/forward/float32"}
    said = capsys.readouterr().out
    assert "1 rows, about" in said and "| demo, step, float32 |" in said  # the report is of all that the JSON holds


def test_a_failed_compilation_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(model: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no graph of this\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    (row,) = run(monkeypatch, tmp_path / "results.json", "demo/forward/float32/compile").values()
    assert row["notes"] == {"compile": "not compiled for RuntimeError: no graph of this"}
    assert row["ratio"] == {} and set(row["seconds"]) == {"ladd"}


def test_a_row_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with monkeypatch.context() as broken:
        broken.setattr(peer, "forward", lambda *_, **__: lambda: torch.zeros(2, 4, 8, 8))
        first = run(monkeypatch, path, "demo/forward/float32", "one-picture", "--no-compile")
    assert first["demo/forward/float32"]["reason"].startswith("AssertionError: both sides must compute the same")
    assert first["one-picture"]["value"] > 0
    again = run(monkeypatch, path, "demo/forward/float32", "--no-compile", "--resume")
    assert "ratio" in again["demo/forward/float32"] and again["one-picture"] == first["one-picture"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {}
    for along in ("image tokens", "depth"):
        for x in (1, 2, 4):
            for what in ("step", "forward"):
                seconds = {side: measure.summary([x * 0.1]) for side in ("ladd", "eager")}
                rows[f"{along} {x} {what}"] = {"growth": {"along": along, "x": x, "what": what}, "seconds": seconds}
    report.plot({"threads": 2, "machine": "this one", "rows": rows}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
