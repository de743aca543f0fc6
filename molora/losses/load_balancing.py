"""Load balancing (arXiv 1701.06538; Switch Transformer, arXiv 2101.03961, eq. 4)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("load_balancing")
class LoadBalancing(Loss):
    """L = (E / k) * sum over e of f_e P_e, which is 1 at perfect balance.

    f_e is the share of the real tokens that use expert e, P_e the mean of the router's probability
    for e over the real tokens, and k = sum of f_e the mean number of experts a token uses. The
    gradient flows through P alone.

    Published conventions are multiples of it: Mixtral's and AdaMoLE's k * L, MoLA's L summed over
    the layers instead of averaged, LLaVA-MoLE's L / E.
    """

    needs_sparse_gate = True

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        used = routing.token_mean(routing.selected.to(routing.probs.dtype))
        probability = routing.token_mean(routing.probs)
        mean_active = used.sum().clamp(min=1e-9)
        return routing.num_experts / mean_active * (used * probability).sum()
