"""What a loss is."""

from torch import Tensor

from ..registry import Registry
from ..routing import Routing, SiteInput

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
    """

    needs_sparse_gate = False

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        """() in the dtype of the logits; padding doesn't count."""
        raise NotImplementedError
