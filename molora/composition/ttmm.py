"""TTMM (arXiv 2505.14136): by how near a prompt is to the data of each adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config_checks import check_alpha, check_count
from ..routers import Router
from ..sites import Site
from .base import NOTHING, Composer, matrix, one_for_each, register_composer
from .fitting import Batches
from .sources import LoraAdapter

FIRST = 50  # tokens of a sequence that count


@register_composer("ttmm")
class Ttmm(Composer):
    """w_e = exp(-(1 - cos(v, c_e)) / beta^2) over its sum, dropped where it is below `threshold` or
    not among the `most` largest, and the rest renormalised; where none is left, the base model. It
    is decided once for a prompt and kept while it is decoded, the same for all modules.

    v and the centroids c are means of the base model's own token embeddings by default
    (`fit_centroids`). Published: a sentence encoder, which tells more; for that, give its centroids
    and source="request", and `request_embeddings` (batch, D) with every batch or, around generate,
    by `molora.routing_labels`. Published, too: hundreds of adapters, one for each cluster of the
    data. Of fewer than 1 / threshold adapters, one at least is always used. The defaults are those
    of the authors' code (rbertolissi/ttmerge).

    Args:
        centroids: (E, D); of any length.
        beta: see above.
        threshold: see above.
        most: see above.
        source: "tokens" or "request"; see `CentroidRouter`.
        first: tokens of the prompt that count, for source="tokens".
        pool: see `SequenceRouter`.
    """

    data = "each"
    fitted = "centroids"

    def __init__(
        self,
        *,
        centroids: Tensor | None = None,
        beta: float = 0.2,
        threshold: float = 0.01,
        most: int = 50,
        source: str = "tokens",
        first: int = FIRST,
        pool: str = "prompt",
    ) -> None:
        check_alpha("beta", beta)
        self.centroids = None if centroids is None else matrix("centroids", centroids)
        self.router_options = {
            "temperature": beta**2, "source": source, "first": first, "pool": pool,
        }  # fmt: skip
        self.gate_options = {"threshold": threshold, "most": most}

    @classmethod
    def fit(
        cls,
        base_model: nn.Module,
        adapters: Sequence[str],
        batches: Sequence[Batches],
        chosen: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        if chosen.get("source", "tokens") != "tokens":
            raise ValueError(
                "with source='request' the centroids are of your own encoder: give them to "
                "molora.compose, and no data to fit them to."
            )
        first = chosen.get("first", FIRST)
        return {"centroids": fit_centroids(base_model, batches, first=first)}

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        if self.centroids is None:
            raise ValueError(
                f"router={self.name!r} needs centroids: a row for each adapter, which "
                "molora.fit_centroids makes of their data."
            )
        one_for_each("centroids", self.centroids, adapters)
        empty = (self.centroids == 0).all(-1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"centroids[{empty[0]}] is 0, and has no direction.")

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        size = None if self.centroids is None else self.centroids.shape[1]
        return {
            "router": "centroid",
            "router_options": {**self.router_options, "embedding_size": size},
            "router_scope": "model",
            "gate": "threshold",
            "gate_options": self.gate_options,
        }

    def fill(self, router: Router, site: str, adapters: Sequence[LoraAdapter]) -> None:
        assert self.centroids is not None, "checked"
        router.get_parameter("centroids").copy_(self.centroids)


@torch.no_grad()
def fit_centroids(
    base_model: nn.Module, batches: Sequence[Batches], *, first: int = FIRST
) -> Tensor:
    """TTMM's centroids: for each adapter the mean direction of its data's sequences.

    A sequence is the mean of the model's input embeddings of its first real tokens, brought to
    length 1; so is their mean. Nothing is run but the embedding.

    Args:
        base_model: the model that the adapters were trained on.
        batches: for each adapter, batches of its own data with `input_ids` (batch, sequence), and
            `attention_mask` where rows are padded.
        first: tokens of a sequence that count.

    Returns:
        (E, d) in fp32 (fp64 of fp64 models), on the CPU, for `molora.compose(centroids=...)`.

    Raises:
        ValueError: there is no adapter, no batch of one, or one without `input_ids`.
    """
    check_count(1)("first", first)
    if not batches:
        raise ValueError("batches is empty: give batches of each adapter's own data.")
    rows = []
    for e, given in enumerate(batches):
        found = [_directions(base_model, batch, first) for batch in given]
        if not found:
            raise ValueError(f"batches[{e}] is empty: there is nothing to fit to.")
        rows.append(F.normalize(torch.cat(found).mean(0), dim=0))
    return torch.stack(rows)


def _directions(model: nn.Module, batch: Mapping[str, Any], first: int) -> Tensor:
    """(batch, d) of length 1."""
    ids = batch.get("input_ids")
    if ids is None:
        raise ValueError("a batch has no input_ids, which centroids are made of.")
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedded = table(ids)
    wide = torch.promote_types(embedded.dtype, torch.float32)
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    early = (real & (real.cumsum(-1) <= first)).to(wide)
    return F.normalize((early[:, None] @ embedded.to(wide)).squeeze(1), dim=-1).cpu()
