"""Logits are formed in full precision, and only x as it came is kept for the backward."""

import pytest
import torch

from molora_kernels import router_logits


def test_gradcheck_and_double_result():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert router_logits(x, weight, bias).dtype == torch.float64
    assert torch.autograd.gradcheck(router_logits, (x, weight, bias))
    assert torch.autograd.gradcheck(router_logits, (x, weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_input_gives_fp32_products(autocast):
    x = torch.randn(7, 64).bfloat16().requires_grad_()
    weight = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = router_logits(x, weight)
        logits.sum().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.T)
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, x.detach().float().sum(0).expand(4, 64))


def test_only_x_and_weight_are_saved():
    x = torch.randn(7, 64).bfloat16().requires_grad_()
    weight = torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        router_logits(x, weight)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


def test_no_tokens():
    x = torch.randn(0, 5, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    logits = router_logits(x, weight)
    logits.sum().backward()
    assert logits.shape == (0, 4)
    assert not weight.grad.any()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="must be"):
        router_logits(torch.ones(3, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match="bias has shape"):
        router_logits(torch.ones(3, 4), torch.ones(2, 4), torch.ones(3))
