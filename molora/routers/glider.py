"""GLIDER: PHATGOOSE's scores and a preference of the whole request (UNITES-Lab/glider)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import SiteInput
from .base import register_router
from .phatgoose import PhatgooseRouter


@register_router("glider")
class GliderRouter(PhatgooseRouter):
    """z_e = <LN(x), LN(v_e)> / sqrt(d_in) + c g_e, g the same for all tokens of a sequence.

    The batch brings g as `expert_prior` (batch, E); or, with `description_size`, it brings
    `request_embeddings` (batch, D), and g_e is the cosine of that and the description of expert e.
    The published g compares an instruction that a large model wrote for the request with a
    description of each expert's task, by a text encoder; both are outside of this library.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        prior_scale: c. Published: 100 for tasks that the experts know, 3 or 1000 for others, by
            benchmark; at 100 the request decides nearly alone.
        description_size: D, the width of `descriptions` (E, D), which never train; None without.
        temperature: see `Router`.
        noise: see `Router`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        prior_scale: float = 100.0,
        description_size: int | None = None,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if not 0 <= prior_scale < float("inf"):
            raise ValueError(f"router option prior_scale={prior_scale!r} must not be negative")
        if description_size is not None and description_size < 1:
            raise ValueError(
                f"router option description_size={description_size!r} must be at least 1, or None"
            )
        self.prior_scale = prior_scale
        self.label = "expert_prior" if description_size is None else "request_embeddings"
        self.needs = (self.label,)
        if description_size is not None:
            self.frozen_parameters = (*self.frozen_parameters, "descriptions")
            self.descriptions = nn.Parameter(torch.empty(num_experts, description_size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.label == "request_embeddings":
            nn.init.normal_(self.descriptions)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """See `Router`.

        Raises:
            ValueError: the label has another width than there are experts, or than descriptions.
        """
        logits = super().compute_logits(inputs)
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        wide = self.num_experts
        if self.label == "request_embeddings":
            wide = self.descriptions.shape[1]
        prior = tokens.vectors(self.label, wide).to(logits.dtype)
        if self.label == "request_embeddings":
            described = self.descriptions.to(logits.dtype)
            prior = F.cosine_similarity(prior[:, None], described, dim=-1)
        return logits + self.prior_scale * tokens.spread(prior)
