"""Routers that know the modality of a token (MoIIE, arXiv 2508.09779; SMAR, arXiv 2506.06406;
MoMa, arXiv 2407.21770; PILL, arXiv 2311.02126)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import HIDDEN, Router, register_router, unknown_id


class ModalityRouter(Router):
    """What reads `modality_ids`, one for each token: 0 for text, which generated tokens are, up to
    num_modalities - 1.
    """

    needs = ("modality_ids",)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_modalities: int = 2,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if num_modalities < 2:
            raise ValueError(f"router option num_modalities={num_modalities!r} must be at least 2")
        self.num_modalities = num_modalities

    def modality_of(self, inputs: SiteInput) -> Tensor:
        """(T,) int64.

        Raises:
            ValueError: an id isn't one of a modality (on an accelerator, torch's own error).
        """
        assert inputs.tokens is not None, "checked"
        ids = inputs.tokens.by_token("modality_ids")
        assert ids is not None, "checked"
        wrong = unknown_id(ids, self.num_modalities)
        if wrong is not None:
            raise ValueError(
                f"there is no modality {wrong}: this router knows {self.num_modalities}, numbered "
                "from 0; see router_options['num_modalities']."
            )
        return ids.long()


@register_router("modality_groups")
class ModalityGroupsRouter(ModalityRouter):
    """z_e = w_{m,e} x for the experts that a token of modality m may use; the others are out of the
    question, whatever the gate.

    The first `own` experts belong to modality 0, the next to modality 1, and so on; the rest are
    for all of them. Each modality has a router of its own over its own experts and the common ones,
    W_m (E, d_in), which starts as the weight of a "linear" router does.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        num_modalities: M.
        own: experts of one modality alone; None is E / (2 M), rounded down, or, without common
            experts, E / M.
        common: whether experts may be left that all modalities share.
        temperature: see `Router`.
        noise: see `Router`.
    """

    visible: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_modalities: int = 2,
        own: int | None = None,
        common: bool = True,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            num_modalities=num_modalities,
            temperature=temperature,
            noise=noise,
        )
        own = num_experts // ((1 + common) * num_modalities) if own is None else own
        if not 0 <= own * num_modalities <= num_experts:
            raise ValueError(
                f"router option own={own!r} for {num_modalities} modalities doesn't fit into "
                f"{num_experts} experts"
            )
        if not common and own * num_modalities != num_experts:
            raise ValueError(
                f"router option common=False leaves {num_experts - own * num_modalities} of "
                f"{num_experts} experts to nobody; give each of {num_modalities} modalities as many"
            )
        self.own = own
        expert = torch.arange(num_experts)
        belongs = expert // max(own, 1)
        shared = expert >= own * num_modalities
        visible = shared | (belongs == torch.arange(num_modalities)[:, None])
        self.register_buffer("visible", visible, persistent=False)
        self.weight = nn.Parameter(torch.empty(num_modalities, num_experts, in_features))

    def reset_parameters(self) -> None:
        for weight in self.weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        modality = self.modality_of(inputs)
        every = ops.router_logits(inputs.hidden, self.weight.flatten(0, 1), None)
        every = every.view(-1, self.num_modalities, self.num_experts)
        index = modality[:, None, None].expand(-1, 1, self.num_experts)
        logits = every.gather(1, index).squeeze(1)
        return logits.masked_fill(~self.visible[modality], HIDDEN)


@register_router("own_modality")
class OwnModalityRouter(ModalityRouter):
    """z_e = 0 for expert m of a token of modality m; the others are out of the question, whatever
    the gate. There is an expert for each modality, and nothing to learn here.
    """

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            num_modalities=num_experts,
            temperature=temperature,
            noise=noise,
        )

    def reset_parameters(self) -> None:
        """Nothing."""

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        dtype = torch.promote_types(inputs.hidden.dtype, torch.float32)
        own = nn.functional.one_hot(self.modality_of(inputs), self.num_experts)
        return HIDDEN * (1 - own).to(dtype)


@register_router("modality_bias")
class ModalityBiasRouter(ModalityRouter):
    """z = W_r x + b_m, with a learned bias b_m (E,) for each modality that starts at 0.

    W_r (E, d_in) starts as the weight of a "linear" router does.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_modalities: int = 2,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            num_modalities=num_modalities,
            temperature=temperature,
            noise=noise,
        )
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.modality_bias = nn.Parameter(torch.empty(num_experts, num_modalities))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.modality_bias)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        logits = ops.router_logits(inputs.hidden, self.weight, None)
        # A product, because what gathers rows adds up their gradients in no fixed order on a GPU.
        modality = nn.functional.one_hot(self.modality_of(inputs), self.num_modalities)
        return logits + modality.to(logits.dtype) @ self.modality_bias.to(logits.dtype).T
