"""The loss in chunks against PyTorch's own on all logits at once."""

import pytest
import torch
import torch.nn.functional as F

import torch_ref.loss
from torch_ref.loss import cross_entropy

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # bf16 has 8 bits, fp16 11


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(3, 10, 16, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(50, 16, generator=generator).requires_grad_()
    return x_BTD, weight_VD, torch.randint(0, 50, (3, 10), generator=generator)


def differentiated(loss, *leaves, scale=1.0):
    """The loss, and its gradients as if it had been scaled for float16 and scaled back."""
    gradients = torch.autograd.grad(loss * scale, leaves)
    return [loss.detach(), *(gradient.float() / scale for gradient in gradients)]


@pytest.mark.parametrize("chunk", [1, 120, 350, 1 << 25], ids=["a row", "2 rows", "7 rows, the last shorter", "all"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_loss_and_gradients(dtype, chunk, monkeypatch):
    monkeypatch.setitem(torch_ref.loss.TORCH_LOGITS, "cpu", chunk)
    x_BTD, weight_VD, targets_BT = inputs(dtype)
    loss = cross_entropy(x_BTD, weight_VD, targets_BT)
    logits_NV = F.linear(x_BTD.float(), weight_VD.to(dtype).float()).flatten(0, 1)
    expected = F.cross_entropy(logits_NV, targets_BT.flatten())
    assert loss.dtype is torch.float32
    ours = differentiated(loss, x_BTD, weight_VD, scale=64.0)
    for one, other in zip(ours, differentiated(expected, x_BTD, weight_VD), strict=True):
        assert (one - other).norm() < LIMITS[dtype] * other.norm()


def test_without_gradients():
    x_BTD, weight_VD, targets_BT = inputs()
    with torch.no_grad():
        loss = cross_entropy(x_BTD, weight_VD, targets_BT)
    assert not loss.requires_grad
    assert loss == cross_entropy(x_BTD, weight_VD, targets_BT)


def test_logits_never_all_stand_in_memory(monkeypatch):
    monkeypatch.setitem(torch_ref.loss.TORCH_LOGITS, "cpu", 100)
    x_BTD, weight_VD, targets_BT = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cross_entropy(x_BTD, weight_VD, targets_BT).backward()
    largest = max(event.self_cpu_memory_usage / max(event.count, 1) for event in profile.key_averages())
    assert largest <= 4 * max(x_BTD.numel(), weight_VD.numel())
