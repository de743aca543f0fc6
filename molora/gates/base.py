"""What a gate is, and the selection that several gates share."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..plain_memory import in_plain_memory
from ..registry import Registry
from ..routing import Routing, SiteInput

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router

GATES: Registry[type["Gate"]] = Registry("gate")
register_gate = GATES.register
FEW = 32  # tokens; of more, looking at the numbers one by one takes longer than sorting


class Gate(nn.Module):
    """Turns router logits into routing weights.

    A subclass implements `forward`; its keyword-only constructor parameters are what
    `MoloraConfig.gate_options` may set.

    Attributes:
        takes_top_k: the gate selects a fixed number of experts, so `MoloraConfig.top_k` applies.
        default_top_k: that number when the config leaves it open.
        at_most_top_k: a token uses top_k experts at most, and no gradient goes to the weights of
            the others, so the operator may leave them out altogether.
        omits_zeros: no gradient goes to a weight of zero, so its expert may be left out where that
            pays; a gate with at_most_top_k says so already.
        fixed_top_k: the only number the gate allows, or None.
        needs_two_active: with K = 1 the weight would be constantly 1 and the router would get no
            gradient from the task, so the config refuses it.
        sparse: some experts get weight zero; a load-balancing loss needs that.
        constant_for_one_expert: with E = 1 the weight is 1 whatever the logits say, so a site with
            one expert needs no router and equals plain LoRA.
        task_trains_router: the router gets a gradient from the task. Where it doesn't, the config
            wants a loss that trains it.
        needs_loss: the loss that alone trains some of its parameters; the config insists on it.
        weighs_shared_expert: the gate weighs the shared expert too, so a site needs exactly one.
        draws: the gate draws random numbers in training.
        mixes_tokens: it goes with experts that read several tokens at once, later ones too.
        leaves: names of the extras in its decisions, for losses that read them.
        constant: at inference all tokens get the same weights whatever the logits, so the experts
            can be merged; `constant_weights` gives them.
    """

    takes_top_k = False
    at_most_top_k = False
    omits_zeros = False
    default_top_k: int | None = None
    fixed_top_k: int | None = None
    needs_two_active = False
    sparse = True
    constant_for_one_expert = True
    task_trains_router = True
    needs_loss: str | None = None
    weighs_shared_expert = False
    draws = False
    mixes_tokens = False
    leaves: tuple[str, ...] = ()
    constant = False

    def __init__(self, num_experts: int, top_k: int | None, in_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k

    @property
    def num_logits(self) -> int:
        """Number of logits the router must give; more than E where a token may decline."""
        return self.num_experts

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """Decide.

        Args:
            logits: (T, E) fp32 (fp64 in fp64 models).
            inputs: what else is known of the tokens, for gates whose threshold depends on it.

        Returns:
            Routing with weights, logits and probs of shape (T, E), in the dtype of the logits.
        """
        raise NotImplementedError

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        """Raise `ValueError` where it can't work with the other parts of a site.

        Asked when an adapter is attached, of parts on the meta device.
        """

    def weights_of_token(self, logits: list[float]) -> list[tuple[int, float]] | None:
        """What `forward` decides for one token at inference, where the logits say all.

        Args:
            logits: `num_logits` of them.

        Returns:
            The experts that the token uses, by number, and the weight of each; None where `forward`
            has to be asked.
        """
        return None

    def constant_weights(self) -> Tensor:
        """(E,) fp64 what every token gets at inference; only of gates that are `constant`."""
        return torch.full((self.num_experts,), 1 / self.num_experts, dtype=torch.float64)

    def after_step(self, progress: float | None) -> None:
        """Called after each optimizer step: the only place where a gate's own state may change.

        Args:
            progress: share of the training that is done, in [0, 1]; None if unknown.
        """

    def extra_repr(self) -> str:
        top_k = "" if self.top_k is None else f", top_k={self.top_k}"
        return f"num_experts={self.num_experts}{top_k}"


def select_top_k(scores: Tensor, k: int) -> Tensor:
    """(T, E) bool: the K largest scores of each token; of equal scores the first expert's wins.

    `torch.topk` leaves the order of ties open, which would let the batch size change a token's
    experts; a stable sort doesn't.
    """
    _, order = _largest(scores, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(T, K) the K largest scores of each token and whose they are; ties as `select_top_k`.

    Of few tokens on a CPU `torch.topk` takes less than sorting, even with a look at whether each
    token's K-th largest score is above the next; a NaN is above none.
    """
    few = scores.dim() == 2 and len(scores) <= FEW and k < scores.shape[-1]
    if few and in_plain_memory(scores):
        values, order = torch.topk(scores, k + 1)
        rows: list[list[float]] = values.tolist()
        if all(row[k - 1] > row[k] for row in rows):
            return values[..., :k], order[..., :k]
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], order[..., :k]


def select_top_p(probs: Tensor, p: float, at_least: int = 1) -> Tensor:
    """(T, E) bool: the likeliest experts of each token until their probabilities reach `p`.

    The expert that crosses `p` belongs to them, and there are `at_least` of them; ties as
    `select_top_k`.
    """
    ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    added = ordered.cumsum(-1) - ordered < p
    added[..., :at_least] = True
    return torch.zeros_like(added).scatter_(-1, order, added)


def softmax_top_k(logits: Tensor, k: int) -> Tensor:
    """(T, E) softmax over each token's K largest logits, exactly 0 elsewhere.

    It equals the softmax over all experts, cut to those K and normalised; ties as `select_top_k`.
    """
    values, order = _largest(logits, k)
    return torch.zeros_like(logits).scatter_(-1, order, values.softmax(-1))


def softmax_of_token(
    logits: list[float], k: int, normalized: bool = True
) -> list[tuple[int, float]] | None:
    """The k likeliest experts of one token and the softmax of its logits there, over those k or,
    unnormalised, over all; None where a logit isn't finite. Ties as `select_top_k`."""
    if not all(map(math.isfinite, logits)):
        return None
    best = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[:k]  # a stable sort
    largest = logits[best[0]]
    shares = [math.exp(logits[expert] - largest) for expert in best]
    total = sum(shares) if normalized else sum(math.exp(logit - largest) for logit in logits)
    return [(expert, share / total) for expert, share in zip(best, shares, strict=True)]


def sum_over_processes(*counts: Tensor) -> None:
    """Add up in place what each process of a distributed run has counted; one process alone keeps
    its own.

    For `after_step`, which every process calls equally often: with zeros where it counted nothing.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for count in counts:
            torch.distributed.all_reduce(count)


def normalize(weights: Tensor) -> Tensor:
    """Scale each token's weights to sum to 1; a token without any keeps zeros."""
    smallest = torch.finfo(weights.dtype).tiny
    return weights / weights.sum(-1, keepdim=True).clamp_min(smallest)
