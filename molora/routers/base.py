"""What a router is."""

import torch
from torch import Tensor

from ..registry import Registry
from ..routing import SiteInput
from ..sharing import SitePart

ROUTERS: Registry[type["Router"]] = Registry("router")
register_router = ROUTERS.register


class Router(SitePart):
    """Maps a site's input to logits over its experts.

    A subclass implements `compute_logits`; its keyword-only constructor parameters are what
    `MoloraConfig.router_options` may set. Give it `temperature` and `noise` among them and pass
    them on to get both for free.

    Args:
        in_features: d_in of the site.
        num_experts: E.
        temperature: the logits are divided by it; below 1 the distribution is sharper.
        noise: standard deviation of Gaussian noise added to the logits in training only
            (Shazeer et al., arXiv 1701.06538, with a constant deviation).
    """

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"router option temperature={temperature!r} must be above 0")
        if not noise >= 0:
            raise ValueError(f"router option noise={noise!r} must not be negative")
        self.in_features = in_features
        self.num_experts = num_experts
        self.temperature = temperature
        self.noise = noise

    def reset_parameters(self) -> None:
        """Initialise the parameters; called once, when the adapter is created."""
        raise NotImplementedError

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """From the tokens, `inputs.hidden` (T, d_in), to (T, E) in fp32 (fp64 in fp64 models)."""
        raise NotImplementedError

    def after_step(self, progress: float | None) -> None:
        """Called after each optimizer step: the only place where a router's own state may change.

        Args:
            progress: share of the training that is done, in [0, 1]; None if unknown.
        """

    def forward(self, inputs: SiteInput) -> Tensor:
        logits = self.compute_logits(inputs)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}"
