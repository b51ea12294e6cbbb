"""Live comparison with PyTorch of what is no model: optimizer, losses, spectral norm, attention, random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import support
import torch
from torch.nn import functional

from ladd import _core
from ladd.sampling import TorchNoise

pytestmark = pytest.mark.peers


def double(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double()


def test_adamw_over_many_steps() -> None:
    p, m, v = support.normal(1, 500), np.zeros(500, np.float32), np.zeros(500, np.float32)
    peer = double(p).requires_grad_()
    optimizer = torch.optim.AdamW([peer], lr=1e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.03)
    for step in range(1, 31):
        g = support.normal(step, 500)
        peer.grad = double(g)
        optimizer.step()
        _core.adamw(p, m, v, g, 1e-2, 0.8, 0.95, 1e-8, 0.03, step)
    support.assert_close(p, peer.detach().numpy(), 1e-5, "parameters after 30 steps")


@pytest.mark.parametrize("name", ["logistic", "bce"])
def test_losses(name: str) -> None:
    logits = support.normal(2, 3, 4, 4) * 3
    for role, target in (("real", 1.0), ("fake", 0.0), ("generator", 1.0)):
        x = double(logits).requires_grad_()
        wanted = functional.binary_cross_entropy_with_logits(x, torch.full_like(x, target))
        wanted.backward()
        value, gradient = _core.adversarial_loss(logits, name, role)
        assert abs(value - wanted.item()) < 1e-6 * wanted.item()
        support.assert_close(gradient, x.grad.numpy(), 1e-6, f"{name} {role}")


def test_spectral_norm_in_training_mode() -> None:
    layer = torch.nn.utils.spectral_norm(torch.nn.Conv2d(5, 7, 3).double(), eps=1e-30)
    w = layer.weight_orig.detach().numpy().astype(np.float32)
    u = layer.weight_u.numpy().astype(np.float32)
    layer.weight_orig.data, layer.weight_u.data = double(w), double(u)
    layer.train()
    layer(torch.zeros(1, 5, 3, 3, dtype=torch.float64))
    # PyTorch computes v from the old u, then u from v, and sigma = u^T W v with that v; here v is taken from the new u.
    _core.spectral_norm_forward(w.reshape(7, -1), u, 1)
    support.assert_close(u, layer.weight_u.numpy(), 1e-5, "u after one power iteration")


@pytest.mark.parametrize(("batch", "tokens", "heads", "dh"), [(2, (17, 5), 3, 16), (1, (64, 77), 2, 64)])
def test_joint_attention(batch: int, tokens: tuple[int, int], heads: int, dh: int) -> None:
    streams = [tuple(support.normal(10 * s + j, batch, n, heads, dh) for j in range(3)) for s, n in enumerate(tokens)]
    outs, _ = _core.attention_forward(streams)
    q, k, v = (torch.cat([double(stream[j]) for stream in streams], 1).transpose(1, 2) for j in range(3))
    wanted = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).numpy()
    support.assert_close(np.concatenate(outs, axis=1), wanted, 3e-6, "attention")


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**32 - 1, 2**33 + 5])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (16,), (17,), (4, 16, 16), (3, 33)])
def test_normal_numbers(seed: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = TorchNoise([seed])
    drawn = [noise.start(shape), noise.fresh(shape, 1), noise.fresh((5, 5), 2), noise.fresh(shape, 3)]
    wanted = [torch.randn(1, *size, generator=generator).numpy() for size in (shape, shape, (5, 5), shape)]
    for ours, theirs in zip(drawn, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
