"""What a router is."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..needs import require
from ..registry import Registry
from ..routing import SiteInput
from ..sharing import SitePart

if TYPE_CHECKING:
    from ..experts import Experts
    from ..gates import Gate

ROUTERS: Registry[type["Router"]] = Registry("router")
register_router = ROUTERS.register
# The logit of an expert that a token may not use: every gate's weight for it is 0 to the last bit,
# and unlike -inf it can be multiplied by 0 and passes for a number that hasn't diverged.
HIDDEN = -1e9


def unknown_id(ids: Tensor, count: int) -> int | None:
    """An id outside of [0, count), if there is one. On an accelerator, where looking would wait for
    the device, and where torch.compile traces, None: there torch's own error has to do."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    wrong = ids[(ids < 0) | (ids >= count)]
    return int(wrong[0]) if len(wrong) else None


class Router(SitePart):
    """Maps a site's input, or its output, to logits over its experts.

    A subclass implements `compute_logits`; its keyword-only constructor parameters are what
    `MoloraConfig.router_options` may set. Give it `temperature` and `noise` among them and pass
    them on to get both for free.

    Args:
        in_features: d_in of the site; d_out for a router that `reads_output`, r for one that
            `reads_inner`.
        num_experts: E.
        temperature: the logits are divided by it; below 1 the distribution is sharper.
        noise: standard deviation of Gaussian noise added to the logits in training only
            (Shazeer et al., arXiv 1701.06538, with a constant deviation).

    Attributes:
        needs: what the batch must bring, of "task_ids", "modality_ids", "input_ids", "embeddings",
            "positions" and "prompt" (the sequences of the batch); what is missing is named, with
            how to supply it, before `compute_logits` is called. `inputs.tokens` has it.
        per_sequence: the decision is made once for a sequence and kept for the passes that
            continue it: see `SequenceRouter`.
        per_task: the logits depend on the task of the token's sequence and nothing else: see
            `TaskRouter`.
        reads_site: the logits depend on the site's own input. Only a router that reads nothing of
            the site may decide for the whole model (`router_scope="model"`).
        looks_ahead: it reads the last hidden state of a pass without the adapter, `given.ahead`.
        reads_output: the logits come from the base layer's output, `inputs.output`.
        reads_inner: the logits come from what the one down factor that all experts share makes of
            the input, A x.
        reads_depth: its constructor's third argument is `depth`, the share of the model's layers
            that ends with the site's.
    """

    needs: tuple[str, ...] = ()
    per_sequence = False
    per_task = False
    reads_site = True
    looks_ahead = False

    reads_output = False
    reads_inner = False
    reads_depth = False

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

    def check_fit(self, gate: "Gate", experts: "Experts") -> None:
        """Raise `ValueError` where it can't work with the other parts of a site.

        Asked when an adapter is attached, of parts on the meta device.
        """

    def has_rows(self, num_experts: int, features: int | None = None) -> bool:
        """Whether it has a `weight` with a row for each expert and no others, of so many features
        where that is said."""
        weight = getattr(self, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return False
        return weight.shape == (num_experts, features or weight.shape[1])

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """From the tokens, `inputs.hidden` (T, d_in), to (T, E) in fp32 (fp64 in fp64 models)."""
        raise NotImplementedError

    def logits_of_token(self, hidden: Tensor) -> list[float] | None:
        """What `forward` gives for one token at inference, where that is read from the token alone.

        Args:
            hidden: (d_in,) fp32 or fp64 on the CPU.

        Returns:
            As many logits as `forward` gives; None where this has to be asked.
        """
        return None

    def after_step(self, progress: float | None) -> None:
        """Called after each optimizer step: the only place where a router's own state may change.

        Args:
            progress: share of the training that is done, in [0, 1]; None if unknown.
        """

    def static_weights(self, gate: "Gate", task: int) -> Tensor | None:
        """(E,) the routing weights of every token of a task, by this router and its gate; None
        where tokens of one task may have different ones.

        With them, the experts' `delta_weight` is exactly what the adapter adds to the base weight
        for that task. Routers that read the task alone, `TaskRouter`, have them.

        Raises:
            ValueError: there is no such task.
        """
        return None

    def forward(self, inputs: SiteInput) -> Tensor:
        """(T, E) logits, with temperature and noise."""
        self.check_needs(inputs)
        return self.perturbed_logits(inputs)

    def check_needs(self, inputs: SiteInput) -> None:
        """Raise what the batch doesn't bring, by the router's name in the configuration."""
        if self.needs:
            require(self.needs, inputs, f"the router {ROUTERS.name_of(type(self))!r}")

    def perturbed_logits(self, inputs: SiteInput) -> Tensor:
        """What `compute_logits` gives, with temperature and noise."""
        logits = self.compute_logits(inputs)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}"
