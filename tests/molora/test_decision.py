"""Handing a decision from the site that makes it to those that follow."""

import gc
import weakref

import pytest
import torch

from molora.decision import SharedDecision
from molora.routing import Routing


def a_routing(tokens: int = 4) -> Routing:
    weights = torch.rand(tokens, 3)
    return Routing(weights, weights, weights)


def test_each_follower_gets_the_very_decision():
    decision = SharedDecision("q", followers=2, same_input=True)
    routing, source = a_routing(), torch.randn(4, 8)
    decision.publish(routing, source)
    assert decision.take("k", source, 4) is routing
    assert decision.take("v", source.view(4, 8), 4) is routing


def test_after_the_last_follower_nothing_is_held():
    decision = SharedDecision("q", followers=2, same_input=True)
    routing, source = a_routing(), torch.randn(4, 8)
    held = [weakref.ref(routing.weights), weakref.ref(source)]
    decision.publish(routing, source)
    decision.take("k", source, 4)
    del routing
    gc.collect()
    assert held[0]() is not None
    decision.take("v", source, 4)
    del source
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_a_new_pass_replaces_a_decision_that_was_not_fetched():
    # a pass that was broken off, or a follower that the model skipped
    decision = SharedDecision("q", followers=2, same_input=True)
    source = torch.randn(4, 8)
    decision.publish(a_routing(), source)
    decision.take("k", source, 4)
    second = a_routing()
    decision.publish(second, source)
    assert decision.take("k", source, 4) is second
    assert decision.take("v", source, 4) is second


def test_following_before_the_decision_is_an_error_that_names_both():
    decision = SharedDecision("q_proj", followers=1, same_input=False)
    with pytest.raises(RuntimeError) as caught:
        decision.take("k_proj", torch.randn(4, 8), 4)
    message = str(caught.value)
    assert "'k_proj'" in message and "'q_proj'" in message and "router_scope='site'" in message


@pytest.mark.parametrize("other", ["equal values", "part of it", "another shape"])
def test_a_block_must_read_the_very_same_input(other):
    decision = SharedDecision("q_proj", followers=1, same_input=True)
    source = torch.randn(4, 8)
    decision.publish(a_routing(), source)
    wrong = {"equal values": source.clone(), "part of it": source[1:], "another shape": source.T}
    with pytest.raises(RuntimeError) as caught:
        decision.take("k_proj", wrong[other], len(wrong[other]))
    message = str(caught.value)
    assert "'k_proj'" in message and "'q_proj'" in message and "router_scope='site'" in message


def test_a_layer_may_read_other_activations_of_as_many_tokens():
    decision = SharedDecision("q_proj", followers=2, same_input=False)
    routing = a_routing()
    decision.publish(routing, torch.randn(4, 8))
    assert decision.take("down_proj", torch.randn(4, 20), 4) is routing
    with pytest.raises(RuntimeError, match=r"same tokens \(5 against 4\)"):
        decision.take("k_proj", torch.randn(5, 8), 5)
