"""A router that prefers the expert whose data a sequence is like (TTMM, arXiv 2505.14136)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import unknown_name_message
from ..routing import SiteInput
from .base import register_router
from .sequence import SequenceRouter

SOURCES = ("tokens", "request")


@register_router("centroid")
class CentroidRouter(SequenceRouter):
    """z_e = cos(v, c_e) / temperature for all tokens of a sequence; the centroids c never train.

    v is the mean of the embeddings of the prompt's first tokens (source="tokens"), by the base
    model's table, or what the batch brings as `request_embeddings` (batch, D) (source="request"),
    from an encoder of your own. It reads nothing of a site, so `router_scope="model"` may let one
    router decide for all of them.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        source: where v comes from.
        first: tokens of the prompt that count, for source="tokens".
        embedding_size: D, the width of the centroids (E, D); None for `in_features`.
        pool: see `SequenceRouter`.
        temperature: see `Router`.
        noise: see `Router`; one draw for a sequence.
    """

    frozen_parameters = ("centroids",)
    reads_site = False

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        source: str = "tokens",
        first: int = 50,
        embedding_size: int | None = None,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, pool=pool, temperature=temperature, noise=noise)
        if source not in SOURCES:
            raise ValueError(unknown_name_message("router option source", source, SOURCES))
        for name, value in (("first", first), ("embedding_size", embedding_size)):
            if value is not None and value < 1:
                raise ValueError(f"router option {name}={value!r} must be at least 1")
        self.source = source
        self.first = first
        self.needs = ("prompt", "embeddings") if source == "tokens" else ("request_embeddings",)
        self.centroids = nn.Parameter(torch.empty(num_experts, embedding_size or in_features))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.centroids)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`.

        Raises:
            ValueError: the embeddings have another width than the centroids.
        """
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        wide = self.centroids.shape[1]
        if self.source == "request":
            found = tokens.vectors("request_embeddings", wide)
        else:
            embeddings = tokens.embeddings
            assert embeddings is not None, "checked"
            if embeddings.shape[-1] != wide:
                raise ValueError(
                    f"the router 'centroid' has centroids of width {wide}, but the model's "
                    f"embeddings have {embeddings.shape[-1]}; fit them with this model, or give "
                    "request_embeddings with router_options={'source': 'request'}."
                )
            early = self.chosen(inputs) & (tokens.positions < self.first)
            found = tokens.mean(embeddings, early)
        found = found.to(torch.promote_types(inputs.hidden.dtype, torch.float32))
        return F.cosine_similarity(found[:, None], self.centroids.to(found.dtype), dim=-1)
