"""Logits from the embeddings of the prompt (Octavius, arXiv 2311.02684)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import register_router
from .sequence import SequenceRouter


@register_router("instruction")
class InstructionRouter(SequenceRouter):
    """z = W_r m for all tokens of a sequence, m the mean of the embeddings of its prompt's tokens.

    It reads nothing of a site, so `router_scope="model"` may let one router decide for all of them.
    The embeddings are those of the base model's table, or `inputs_embeds` where the forward gets
    them; no gradient goes to them. W_r (E, d) starts as N(0, init_std^2), d the model's width,
    which must be d_in of the deciding site.
    """

    needs = ("prompt", "embeddings")
    reads_site = False

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        init_std: float = 1.0,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, pool=pool, temperature=temperature, noise=noise)
        if not init_std > 0:
            raise ValueError(f"router option init_std={init_std!r} must be above 0")
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`.

        Raises:
            ValueError: the embeddings have another width than the deciding site's input.
        """
        assert inputs.tokens is not None, "checked"
        embeddings = inputs.tokens.embeddings
        assert embeddings is not None, "checked"
        if embeddings.shape[-1] != self.in_features:
            raise ValueError(
                f"the router 'instruction' reads embeddings of width {embeddings.shape[-1]}, but "
                f"the site {inputs.deciding_site!r}, which decides, has inputs of width "
                f"{self.in_features}; add a module that reads the residual stream, such as q_proj, "
                "to target_modules."
            )
        return ops.router_logits(self.mean(embeddings, inputs), self.weight, None)
