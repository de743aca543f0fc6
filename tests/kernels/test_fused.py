"""Where the kernels don't run, the router and the operator run one after the other."""

import pytest
import torch

from molora_kernels import routed_lora, routed_lora_with_router, router_logits


def test_equals_its_parts():
    x, A, B = torch.randn(3, 5, 8), torch.randn(12, 8), torch.randn(6, 12)
    weight, bias, out = torch.randn(4, 8), torch.randn(4), torch.randn(3, 5, 6)
    y, logits = routed_lora_with_router(
        x, A, B, weight, bias, torch.sigmoid, 0.5, out.clone(), backend="torch"
    )
    assert torch.equal(logits, router_logits(x, weight, bias))
    expected = routed_lora(x, A, B, logits.sigmoid(), 0.5, out, backend="torch")
    assert torch.equal(y, expected)


def test_a_router_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="bias has shape"):
        routed_lora_with_router(
            torch.ones(2, 4), torch.ones(4, 4), torch.ones(3, 4), torch.ones(2, 4), torch.ones(3),
            torch.sigmoid,
        )  # fmt: skip
