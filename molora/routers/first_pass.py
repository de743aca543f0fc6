"""Logits from the last hidden state of a first pass without the adapter (X-LoRA, 2402.07148)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("first_pass")
class FirstPassRouter(Router):
    """z = W_2 relu(W_1 H + b_1) + b_2, or W H + b without `hidden_size`, for each token, in fp32.

    H (T, d) is the last hidden state of the base model, without its adapters, for the same tokens;
    no gradient goes to it. It reads nothing of a site, so `router_scope="model"` lets one router
    decide for all of them. With "site" each has its own, which needs sites of width d only. The
    base model runs once more for each pass, and keeps a second KV cache when it generates.

    Args:
        in_features: d, the width of the model, which must be d_in of the deciding site.
        num_experts: see `Router`.
        hidden_size: width of the hidden layer; None for none.
        temperature: see `Router`.
        noise: see `Router`.
    """

    reads_site = False
    looks_ahead = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        hidden_size: int | None = None,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if hidden_size is not None and hidden_size < 1:
            raise ValueError(
                f"router option hidden_size={hidden_size!r} must be at least 1, or None"
            )
        sizes = [in_features, num_experts]
        if hidden_size is not None:
            sizes.insert(1, hidden_size)
        self.weights = nn.ParameterList(
            torch.empty(b, a) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.biases = nn.ParameterList(torch.empty(b) for b in sizes[1:])

    def reset_parameters(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            nn.init.uniform_(bias, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """See `Router`.

        Raises:
            RuntimeError: the site runs outside of the base model's forward, or reads other tokens.
            ValueError: the deciding site isn't as wide as the model.
        """
        hidden = self._hidden(inputs)
        for last, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), 1):
            hidden = ops.router_logits(hidden, weight, bias)
            if last < len(self.weights):
                hidden = hidden.relu()
        return hidden

    def _hidden(self, inputs: SiteInput) -> Tensor:
        ahead = None if inputs.given is None else inputs.given.ahead
        if ahead is not None and inputs.rows is not None:
            ahead = ahead[inputs.rows.to(ahead.device)]
        if ahead is None or ahead.shape[:-1].numel() != inputs.hidden.shape[0]:
            found = "none" if ahead is None else str(ahead.shape[:-1].numel())
            raise RuntimeError(
                f"the router 'first_pass' decides for the tokens of the base model's forward; the "
                f"site {inputs.site!r} reads {inputs.hidden.shape[0]} tokens, the first pass "
                f"{found}."
            )
        if ahead.shape[-1] != self.in_features:
            raise ValueError(
                f"the router 'first_pass' reads hidden states of width {ahead.shape[-1]}, but the "
                f"site {inputs.deciding_site!r}, which decides, has inputs of width "
                f"{self.in_features}; use router_scope='model' with a module that reads the "
                "residual stream, such as q_proj, among target_modules."
            )
        return ahead.flatten(0, -2).to(inputs.hidden.device)
