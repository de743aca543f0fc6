"""What a loss is."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..registry import Registry
from ..routing import Routing, SiteInput

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router

LOSSES: Registry[type["Loss"]] = Registry("loss")
register_loss = LOSSES.register


class Loss:
    """A penalty on one routing decision, or on the factors of the experts that it is about.

    The total that training minimises is the task loss plus, for each configured loss, its
    coefficient times the mean over the model's routing decisions (a decision shared by several
    sites counts once).

    A subclass implements `__call__`; its keyword-only constructor parameters are what
    `MoloraConfig.losses` may set beside `coefficient`.

    Attributes:
        needs_sparse_gate: the loss is constant when every expert takes part in every token.
        needs: what the batch must bring, of `molora.needs`: checked before the loss is called.
        reads: names of the decision's extras that it reads; only a gate that `leaves` them will do.
        draws: the loss draws random numbers. It is then also formed in passes that have no use for
            it, since what draws next must draw alike when a checkpointed layer is run again.
    """

    needs_sparse_gate = False
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    draws = False

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        """Raise `ValueError` where it can't be formed of the decisions at a site.

        Asked when an adapter is attached, of parts on the meta device.
        """

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        """() in the dtype of the logits; padding doesn't count."""
        raise NotImplementedError


def sample_tokens(routing: Routing, most: int) -> Tensor:
    """(M,) distinct tokens drawn at random, M = min(T, most), for losses too dear for all of them.

    Real ones come first; nothing waits for the device to count them, so padding may be among the
    rest.
    """
    total = routing.weights.shape[0]
    order = torch.rand(total, device=routing.weights.device)
    if routing.mask is not None:
        order = order + ~routing.mask
    return order.topk(min(most, total), largest=False).indices
