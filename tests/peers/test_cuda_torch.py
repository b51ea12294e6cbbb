"""PyTorch's side of the GPU benchmark, on the CPU at toy size: it is of ladd's size, computes, learns, and its rows are all there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cuda_device
import pytest
import torch

import ladd

pytestmark = pytest.mark.peers


cuda_work, cuda, cuda_torch = (cuda_device.benchmark(name) for name in ("cuda_work", "cuda", "cuda_torch"))


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    cuda_device.device()
    return cuda.Bench(tmp_path / "rows.jsonl", time.time() + 3600, True, "bfloat16")


@pytest.mark.parametrize("name", cuda.MODELS)
def test_the_models_are_of_one_size(name: str) -> None:
    config = cuda.config_of(name, True)
    side = 8
    rival = cuda_torch.Transformer(config, (side // config.patch_size) ** 2)
    theirs = sum(p.numel() for p in rival.parameters() if p.requires_grad)
    model = ladd.MMDiT(config)
    # In the last block nothing of the text goes on: its queries' projection and norm and the projection of its attention are idle there.
    d, dh = config.inner_dim, config.attention_head_dim
    assert theirs - model.flat_trainable.size == d * d + d, (theirs, model.flat_trainable.size, d, dh)


def test_every_row_is_measured(bench: Any) -> None:
    config = cuda.config_of("SD3.5-medium", True)
    cuda_torch.forwards(bench, "SD3.5-medium", config, (8,))
    cuda_torch.ladd_step(bench, *cuda.step_size(bench))
    assert not [row for row in bench.rows if "seconds" not in row], bench.rows
    measured = {(row["what"], row["by"]) for row in bench.rows}
    assert measured == {
        (what, by) for what in ("forward", "sample, 1 step", "sample, 4 steps", "LADD step") for by in ("torch eager", "torch.compile")
    }


def test_a_step_changes_student_heads_and_average(bench: Any) -> None:
    _, config, heads, side = cuda.step_size(bench)
    torch.manual_seed(0)
    step = cuda_torch.trainer(bench, config, heads, side, False)
    parts = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__)))
    before = {name: [p.detach().clone() for p in parts[name].parameters()] for name in ("student", "judges")}
    average = [p.clone() for p in parts["average"]]
    step()
    for name, values in before.items():
        changed = [not torch.equal(a, b) for a, b in zip(values, parts[name].parameters()) if b.requires_grad]
        assert sum(changed) > 0.8 * len(changed), name
    assert any(not torch.equal(a, b) for a, b in zip(average, parts["average"])) and not any(p.requires_grad for p in parts["average"])


def test_the_rivals_spectral_norm_is_one() -> None:
    torch.manual_seed(0)
    weight = cuda_torch.Spectral(8, 3, 5)
    for _ in range(200):
        normed = weight()
    assert torch.linalg.matrix_norm(normed.flatten(1), 2).item() == pytest.approx(1, abs=1e-4)
    normed[0, 0, 0].backward()
    assert weight.weight.grad.abs().sum() > 0


def test_no_block_of_a_compiled_step_runs_eager(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of blocks and heads: more graphs of one function than PyTorch compiles unless told to. Its compiler itself is left out."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    given = {**vars(cuda.config_of("SD3.5-medium", True)), "num_layers": 4, "dual_attention_layers": (0, 1)}
    heads = ladd.DiscriminatorConfig(feature_dim=32, pooled_dim=given["pooled_projection_dim"], taps=(0, 1, 2, 3), width=8, num_groups=2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cuda_torch.trainer(bench, ladd.MMDiTConfig(**given), heads, 8, True)()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] > 8, frames
