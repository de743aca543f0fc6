"""How sites that share a router get at its decision."""

import torch
from torch import Tensor

from .routing import Routing


class SharedDecision:
    """Hands a routing decision from the site that makes it to the sites that follow.

    In every pass, recomputations included, the deciding site runs first and publishes anew, and
    each follower takes the decision once. After the last of them it is let go, so that no graph and
    no activation outlives the block.

    Args:
        leader: name of the site that decides.
        followers: number of sites that follow.
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
        if self._waiting == 0:
            self._clear()

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
            self._clear()
        return routing

    def _clear(self) -> None:
        self._routing = self._source = None


def _same_tensor(a: Tensor, b: Tensor | None) -> bool:
    if a is b or torch.compiler.is_compiling():
        return True
    return b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()
