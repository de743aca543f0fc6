"""An expert for each kind of module, and a nonlinear adapter (MoA, arXiv 2506.05928)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .base import Experts, SiteSpec, register_experts
from .factors import LoraFactors
from .start import start_down, start_up


@register_experts("module_adapters")
class ModuleAdapterExperts(Experts):
    """y += w_j s B A x, and at the module `adapter` also + w_a (U silu(D x + d) + u).

    The E experts are those of all modules of a layer together: expert j is the LoRA of the j-th of
    `modules`, and the last, a, the adapter. A site has the parameters of its own alone and reads
    its own weight, so the sites of a layer should follow one decision (router_scope="layer").

    A and D start kaiming-uniform (a = sqrt(5)); B, U and the biases at zero.

    Args:
        modules: names of the modules, in the order of the experts.
        adapter: the one of them that has the adapter too; None leaves it out.
        adapter_size: features of the adapter in between.
    """

    takes_gaussian = True

    def __init__(
        self,
        spec: SiteSpec,
        *,
        modules: Sequence[str],
        adapter: str | None = None,
        adapter_size: int = 16,
    ) -> None:
        super().__init__(spec)
        modules = list(modules)
        if len(set(modules)) < len(modules) or (adapter is not None and adapter not in modules):
            raise ValueError(
                f"expert options modules={modules!r}, adapter={adapter!r}: the names must differ, "
                "and the adapter's be one of them."
            )
        count = len(modules) + (adapter is not None)
        if len(self.ranks) != count or self.shared_ranks:
            raise ValueError(
                f"experts='module_adapters' with modules={modules!r} and adapter={adapter!r} are "
                f"{count}; set num_experts={count} instead of {len(self.ranks)}, and no shared "
                "experts."
            )
        if spec.module and spec.module not in modules:
            raise ValueError(
                f"the module {spec.module!r} has no expert among modules={modules!r}; name it "
                "there, or leave it out of target_modules."
            )
        if adapter_size < 1:
            raise ValueError(f"expert option adapter_size={adapter_size!r} must be at least 1")
        self.place = modules.index(spec.module) if spec.module else 0
        rank, d_in, d_out = self.ranks[self.place], self.in_features, self.out_features
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.has_adapter = adapter is not None and spec.module == adapter
        if self.has_adapter:
            self.D = nn.Parameter(torch.empty(adapter_size, d_in))
            self.d = nn.Parameter(torch.empty(adapter_size))
            self.U = nn.Parameter(torch.empty(d_out, adapter_size))
            self.u = nn.Parameter(torch.empty(d_out))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        downs, ups = [self.A], [self.B]
        if self.has_adapter:
            downs, ups = [self.A, self.D], [self.B, self.U]
            nn.init.zeros_(self.d)
            nn.init.zeros_(self.u)
        for down, up in zip(downs, ups, strict=True):
            start_down(down, init)
            start_up(up, init)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        assert weights is not None, "these experts are always routed"
        x = self.dropout(hidden) if self.training else hidden
        own = weights[:, self.place, None].view(*hidden.shape[:-1], 1)
        scale = self.scaling[self.place]
        rank = (self.A.shape[0],)
        result = ops.routed_lora(x, self.A, self.B, own, scale=scale, out=result, ranks=rank)
        if not self.has_adapter:
            return result
        inner = F.silu(F.linear(x.to(self.D.dtype), self.D, self.d))
        update = F.linear(inner, self.U, self.u)
        return result + (weights[:, -1].view(*hidden.shape[:-1], 1) * update).to(result.dtype)

    def lora_factors(self) -> LoraFactors:
        """The other modules' experts have rank 0 here."""
        if self.has_adapter:
            return super().lora_factors()
        wide = torch.promote_types(self.A.dtype, torch.float32)
        ranks = [0] * len(self.ranks)
        ranks[self.place] = self.A.shape[0]
        B = self.scaling[self.place] * self.B.to(wide)
        return LoraFactors(self.A.to(wide), B, tuple(ranks), len(ranks))
