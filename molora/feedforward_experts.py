"""The experts of a feed-forward network: a bank of them for each of its linear modules."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from .experts import Experts, SiteSpec
from .experts.factors import LoraFactors
from .feedforward_roles import Roles
from .slots import Slots, fill_slots


class FeedForwardExperts(Experts):
    """y = sum over e of w_e FFN_e(x), where FFN_e uses W + s_e B_e A_e for each W it adapts.

    (MixLoRA, arXiv 2404.15159.) A token runs the experts that it chose, each in a slot:

    - W_gate x and W_up x are the same for all experts: computed once for each token.
    - W_down is linear: sum of w_e W_down h_e = W_down (sum of w_e h_e) is one product too.
    - What differs is of low rank, and each slot is a row that routes to one expert with weight 1.

    So no tensor has a row for an expert that isn't chosen. A token that no expert takes gets
    FFN_0(x), the base network's output. Weights that don't sum to 1 scale the whole output. Shared
    experts are part of every FFN_e, and of FFN_0.

    Args:
        linears: the experts of each adapted linear module, by its name in the network.
        features: d_in and d_out of the network.
        slots: the most experts that a token uses; None where only the weights tell.
        keep_zeros: experts with weight zero take part in the gradient, so all of them run.
    """

    def __init__(
        self,
        linears: Mapping[str, Experts],
        features: tuple[int, int],
        slots: int | None,
        keep_zeros: bool,
    ) -> None:
        ranks = [part.ranks for part in linears.values()]
        shared_ranks = [part.shared_ranks for part in linears.values()]
        super().__init__(SiteSpec(*features, _added(ranks), _added(shared_ranks), ()))
        self.slots, self.keep_zeros = slots, keep_zeros
        self.linears = nn.ModuleDict(linears)
        for part in linears.values():
            part.active = 1
            part.overwrites = True  # the rows of slots are made for them

    def reorder(self, order: Sequence[int]) -> None:
        for part in self.linears.values():
            cast(Experts, part).reorder(order)

    def after_step(self, progress: float | None) -> None:
        for part in self.linears.values():
            cast(Experts, part).after_step(progress)

    def down_factor(self) -> Tensor:
        raise ValueError(
            "with mixing='feed_forward' an expert has several down factors, one in each linear "
            "module, so none to route by or to penalise; use another router or loss, or "
            "mixing='linear'."
        )

    def lora_factors(self) -> LoraFactors:
        raise ValueError(
            "whole feed-forward networks are mixed (mixing='feed_forward'), which no LoRA on a "
            "linear module equals: this adapter can't be merged, calibrated or exported as one. "
            "Keep it as it is (save_pretrained), or write it as a mixture-of-experts model "
            "(molora.export_moe)."
        )

    def mix(self, network: nn.Module, roles: Roles, x: Tensor, weights: Tensor) -> Tensor:
        """The network's output with these experts.

        Args:
            network: the base network, whose linear modules run as they are.
            roles: what they do in it.
            x: (..., d_in) its input.
            weights: (T, E) routing weights of the T tokens.

        Returns:
            (..., d_out) in the dtype that the network gives.
        """
        hidden = x.reshape(-1, x.shape[-1])
        slots = fill_slots(weights, self.slots, self.keep_zeros)
        rows = slots.rows(hidden)

        def project(name: str) -> Tensor:
            base = slots.rows(getattr(network, name)(hidden))
            return self._adapted(name, rows, slots, base)

        h = roles.inner(network, project)
        y = self._down(network, roles, h, slots)
        return roles.finish(network, y.unflatten(0, x.shape[:-1]))

    def _down(self, network: nn.Module, roles: Roles, h: Tensor, slots: Slots) -> Tensor:
        """(T K, d_inner) -> (T, d_out)."""
        y = roles.project_down(network, slots.combine(h))
        bias = getattr(getattr(network, roles.down), "bias", None)
        if bias is not None:  # it came once, but belongs to each expert's output
            missing = slots.weights.sum(-1, keepdim=True) - 1
            y = y + (missing * bias).to(y.dtype)
        if roles.down not in self.linears:
            return y
        nothing = y.new_zeros(1, 1).expand(h.shape[0], y.shape[-1])
        return y + slots.combine(self._adapted(roles.down, h, slots, nothing))

    def _adapted(self, name: str, rows: Tensor, slots: Slots, result: Tensor) -> Tensor:
        """(T K, d) `result` plus what the experts of that module make of the rows."""
        if name not in self.linears:
            return result
        return self.linears[name](rows, slots.one_hot, result)


def _added(ranks: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*ranks, strict=True)))
