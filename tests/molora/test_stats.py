"""Statistics against counts made token by token."""

import math

import pytest
import torch

from molora.routing import Routing
from molora.stats import RoutingStatistics, SiteStatistics


def a_routing(tokens: int, experts: int, seed: int, masked: bool) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    probs = logits.softmax(-1)
    mask = torch.rand(tokens, generator=generator) > 0.3 if masked else None
    return Routing(probs * (probs > 0.3), logits, probs, mask)


def summary_of(*routings: Routing) -> SiteStatistics:
    statistics = RoutingStatistics()
    for routing in routings:
        statistics.update("site", routing, {})
    return statistics.summarize()["site"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_summary_is_what_counting_gives(masked):
    routings = [a_routing(tokens, 4, seed, masked) for seed, tokens in enumerate((9, 5, 12))]
    counts, mass, entropy, tokens = [0] * 4, [0.0] * 4, 0.0, 0
    for routing in routings:
        for t in range(len(routing.weights)):
            if routing.mask is not None and not routing.mask[t]:
                continue
            tokens += 1
            for e in range(4):
                p = routing.probs[t, e].item()
                counts[e] += int(routing.weights[t, e] != 0)
                mass[e] += p
                entropy -= p * math.log(p)
    seen = summary_of(*routings)
    torch.testing.assert_close(seen.share, torch.tensor(counts) / sum(counts))
    torch.testing.assert_close(seen.probability, torch.tensor(mass) / tokens)
    assert seen.entropy == pytest.approx(entropy / tokens / math.log(4), rel=1e-5)
    assert seen.mean_active == pytest.approx(sum(counts) / tokens, rel=1e-6)
    assert seen.largest_share == pytest.approx(max(counts) / sum(counts), rel=1e-6)


def test_entropy_is_one_when_uniform_and_zero_when_certain():
    uniform = torch.full((3, 5), 0.2)
    certain = torch.eye(5)[:3]
    assert summary_of(Routing(uniform, uniform, uniform)).entropy == pytest.approx(1.0, rel=1e-6)
    assert summary_of(Routing(certain, certain, certain)).entropy == pytest.approx(0.0, abs=1e-6)


def test_dead_experts_are_those_that_no_real_token_selected():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([True, False])
    assert summary_of(Routing(weights, weights, weights)).dead_experts == [1]
    assert summary_of(Routing(weights, weights, weights, mask)).dead_experts == [1, 2]


def test_only_padding_gives_zeros_and_no_division_by_zero():
    seen = summary_of(a_routing(4, 3, 0, False).with_mask(torch.zeros(4).bool()))
    assert seen.share.tolist() == [0.0] * 3
    assert (seen.entropy, seen.mean_active, seen.largest_share) == (0.0, 0.0, 0.0)


def test_losses_are_averaged_over_passes_and_sites_kept_apart():
    statistics = RoutingStatistics()
    routing = a_routing(4, 3, 0, False)
    statistics.update("a", routing, {"z_loss": torch.tensor(1.0, requires_grad=True)})
    statistics.update("a", routing, {"z_loss": torch.tensor(4.0)})
    statistics.update("b", routing, {"z_loss": torch.tensor(7.0)})
    assert statistics.sites() == ["a", "b"]
    summary = statistics.summarize()
    assert (summary["a"].losses, summary["b"].losses) == ({"z_loss": 2.5}, {"z_loss": 7.0})


def test_reset_forgets_everything():
    statistics = RoutingStatistics()
    statistics.update("a", a_routing(4, 3, 0, False), {"z_loss": torch.tensor(1.0)})
    statistics.reset()
    assert statistics.sites() == [] and statistics.summarize() == {}


def test_update_keeps_no_graph():
    statistics = RoutingStatistics()
    logits = torch.randn(4, 3, requires_grad=True)
    routing = Routing(logits.softmax(-1), logits, logits.softmax(-1))
    statistics.update("a", routing, {"z_loss": logits.sum()})
    assert not statistics.summarize()["a"].share.requires_grad
    tensors = [*statistics._sums.values(), *statistics._losses["a"].values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_update_brings_nothing_to_the_host():
    # on the meta device every read of a value fails
    routing = a_routing(4, 3, 0, True)
    meta = Routing(*(t.to("meta") for t in (routing.weights, routing.logits, routing.probs)))
    RoutingStatistics().update("a", meta.with_mask(routing.mask.to("meta")), {})
