"""The routing record."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from molora.routing import Routing, concatenate


def record(tokens: int, mask: torch.Tensor | None = None, experts: int = 3) -> Routing:
    logits = torch.randn(tokens, experts, requires_grad=True)
    return Routing(logits.sigmoid() * (logits > 0), logits * 2, logits.softmax(-1), mask)


def test_selected_are_the_weights_that_are_not_zero():
    weights = torch.tensor([[0.5, 0.0, -0.0], [1e-30, 0.0, 0.3]])
    routing = Routing(weights, weights, weights)
    assert routing.selected.tolist() == [[True, False, False], [True, False, True]]
    assert routing.num_experts == 3


def test_a_record_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        record(2).weights = torch.zeros(2, 3)  # type: ignore[misc]


def test_a_mask_and_a_detachment_make_a_new_record():
    routing = record(4)
    mask = torch.tensor([True, False, True, True])
    masked = routing.with_mask(mask)
    assert routing.mask is None and masked.mask is mask and masked.weights is routing.weights
    detached = masked.detach()
    assert detached.mask is mask
    for name in ("weights", "logits", "probs"):
        assert getattr(masked, name).requires_grad and not getattr(detached, name).requires_grad
        assert torch.equal(getattr(detached, name), getattr(masked, name))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 2)])
def test_token_mean_is_over_the_real_tokens(shape):
    values = torch.randn(shape, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    for routing, kept in ((record(5), range(5)), (record(5, mask), (0, 2, 3))):
        expected = sum(values[t] for t in kept) / len(kept)
        torch.testing.assert_close(routing.token_mean(values), expected)


@pytest.mark.parametrize(
    "routing", [record(0), record(3, torch.zeros(3).bool())], ids=["no tokens", "only padding"]
)
def test_token_mean_of_nothing_is_zero(routing):
    mean = routing.token_mean(torch.ones(len(routing.weights), 2))
    assert mean.tolist() == [0.0, 0.0]


def test_records_are_joined_along_the_tokens():
    a, b = record(2), record(3)
    joined = concatenate([a, b])
    assert concatenate([a]) is a
    assert joined.mask is None
    for name in ("weights", "logits", "probs"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(a, name), getattr(b, name)]))


def test_a_missing_mask_joins_as_all_real():
    mask = torch.tensor([False, True, False])
    joined = concatenate([record(2), record(3, mask), record(1)])
    assert joined.mask.tolist() == [True, True, False, True, False, True]
