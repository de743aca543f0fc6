"""What StableMoE (arXiv 2204.08396) trains its two routers with, until they are frozen."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("distillation")
class Distillation(Loss):
    """L = token mean of -log softmax(z')_a, a the largest z; 0 once the gate is frozen.

    Published: the sum over the tokens instead of their mean.
    """

    reads = ("distilled", "learns")

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        log_probs = routing.extras["distilled"].log_softmax(-1)
        taught = -log_probs.gather(-1, routing.logits.argmax(-1, keepdim=True)).squeeze(-1)
        return routing.token_mean(taught * routing.extras["learns"])


@register_loss("assignment_balancing")
class AssignmentBalancing(Loss):
    """L = sum over e of (E f_e - 1) times the token mean of w_e; 0 once the gate is frozen.

    f_e is the share of the real tokens that use expert e. It is 0 at perfect balance, and its
    gradient lowers the weight of experts used too much. Published: the sum over the tokens instead
    of their mean, T times this.
    """

    needs_sparse_gate = True

    reads = ("learns",)

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        learns = routing.extras["learns"]
        used = routing.token_mean(routing.selected.to(routing.weights.dtype))
        weight = routing.token_mean(routing.weights * learns[:, None])
        return ((routing.num_experts * used - 1) * weight).sum()
