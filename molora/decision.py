"""How sites that share a router get at its decision."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .routing import Routing, SiteInput


class SharedDecision:
    """Hands a routing decision from the site that makes it to the sites that follow.

    In every pass, recomputations included, the deciding site runs first and publishes anew, and
    each follower takes the decision once. After the last of them it is let go, so that no graph and
    no activation outlives the block.

    Args:
        leader: name of the site that decides.
        followers: number of sites that follow, at least one.
        same_input: the followers must read the very input that was routed ("block" scope).
    """

    def __init__(self, leader: str, followers: int, same_input: bool) -> None:
        self.leader = leader
        self.followers = followers
        self.same_input = same_input
        self._routing: Routing | None = None
        self._source: Tensor | None = None
        self._waiting = 0

    def publish(self, routing: Routing, source: Tensor) -> None:
        """Called by the deciding site with what it routed."""
        self._routing, self._waiting = routing, self.followers
        self._source = source if self.same_input else None

    def take(self, site: str, source: Tensor, tokens: int) -> Routing:
        """Called by a follower with its own input and the number of its tokens, T.

        Raises:
            RuntimeError: the deciding site didn't run before it, or the inputs don't match.
        """
        routing = self._routing
        if routing is None:
            raise RuntimeError(
                f"the site {site!r} follows the routing decision of {self.leader!r}, which has not "
                "run before it in this pass; use router_scope='site' for this model."
            )
        different = self.same_input and not _same_tensor(source, self._source)
        if different or routing.weights.shape[0] != tokens:
            raise RuntimeError(
                f"the site {site!r} shares the routing decision of {self.leader!r} but does not "
                f"read the same tokens ({tokens} against {routing.weights.shape[0]}); use "
                "router_scope='site', or exclude one of them."
            )
        self._waiting -= 1
        if self._waiting == 0:
            self._routing = self._source = None
        return routing


class ModelDecision:
    """One decision for all sites of a model, by a router that reads nothing of a site.

    In a pass with gradients each site forms it anew from what the pass was given: the logits are
    the same, and each part of the graph is the site's own, so that checkpointed layers, which run
    again in another order, need nothing of one another. Without gradients it is formed once a pass.

    Args:
        leader: name of the site that holds router and gate, and that losses are formed at.
    """

    def __init__(self, leader: str) -> None:
        self.leader = leader
        self.layer: int | None = None
        self._router: nn.Module | None = None
        self._gate: nn.Module | None = None

    def decided_by(self, router: nn.Module, gate: nn.Module, layer: int | None) -> None:
        """Called when the deciding site, of that layer, has made its router and gate, which stay
        its own."""
        self._router, self._gate, self.layer = router, gate, layer

    @property
    def parts(self) -> list[nn.Module]:
        """Router and gate, which the followers read too."""
        return [part for part in (self._router, self._gate) if part is not None]

    def routing(self, inputs: SiteInput) -> Routing:
        """The decision for the tokens of a site."""
        given = inputs.given
        if given is None or torch.is_grad_enabled() or inputs.rows is not None:
            return self._decide(inputs)
        key = (self.leader, inputs.adapter, inputs.shape, inputs.hidden.device)
        if key not in given.decisions:
            given.decisions[key] = self._decide(inputs)
        return given.decisions[key]

    def _decide(self, inputs: SiteInput) -> Routing:
        assert self._router is not None and self._gate is not None, "the deciding site comes first"
        inputs = replace(inputs, leader=self.leader)
        return self._gate(self._router(inputs), inputs)


def _same_tensor(a: Tensor, b: Tensor | None) -> bool:
    if a is b or torch.compiler.is_compiling():
        return True
    return b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()
