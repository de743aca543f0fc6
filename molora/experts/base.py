"""What a bank of experts is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..registry import Registry
from ..routing import Routing
from ..sharing import SitePart
from .factors import LoraFactors

EXPERTS: Registry[type["Experts"]] = Registry("experts")
register_experts = EXPERTS.register


@dataclass(frozen=True)
class SiteSpec:
    """What the experts of one site are built from.

    Attributes:
        in_features: d_in.
        out_features: d_out.
        ranks: rank of each of the E routed experts.
        shared_ranks: rank of each shared expert, always on with weight 1.
        scaling: factor on the output of each routed, then each shared expert.
        dropout: probability of dropping an input feature of the experts in training.
        sites: sites of the adapter that are alike: the same module of other layers, of equal sizes
            and ranks. They may share parameters (`SitePart`).
        position: this site's place among them, from 0.
        module: the module's own name, such as "q_proj"; empty where no model is known yet.
    """

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    shared_ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    dropout: float = 0.0
    sites: int = 1
    position: int = 0
    module: str = ""


class Experts(SitePart):
    """All experts of one site, routed and shared, in stacked parameters.

    Stacked means that every expert gets a gradient in every step (zero when no token used it),
    which data-parallel training needs. A subclass's keyword-only constructor parameters are what
    `MoloraConfig.expert_options` may set.

    Args:
        spec: sizes, ranks and scaling; its fields are attributes of the experts too.

    Attributes:
        active: the most routed experts that a token uses, where the others may be left out of the
            computation; None where each of their weights takes part in the gradient.
        overwrites: the result that `forward` adds to is made for these experts and kept by nobody.
        mixes_tokens: an expert reads several tokens at once, by the extras that a gate of the same
            attribute leaves; then `mix_tokens` is called instead of `forward`.
        takes_gaussian: `init_lora_weights="gaussian"` says how they start; others refuse it.
        takes_widened: a few tokens of a 16-bit model may come in fp32, cast once for the router and
            these experts, which multiply in fp32 anyway.
    """

    mixes_tokens = False
    takes_gaussian = False
    takes_widened = False

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__()
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.ranks = spec.ranks
        self.shared_ranks = spec.shared_ranks
        self.scaling = spec.scaling
        self.active: int | None = None
        self.overwrites = False
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout > 0 else nn.Identity()

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        """Initialise; called once, when the adapter is created.

        Args:
            init: True leaves the base model's output unchanged, False doesn't.
            base_weight: returns the site's weight (d_out, d_in), dequantised if need be, for
                parametrisations that start from it.
        """
        raise NotImplementedError

    def reorder(self, order: Sequence[int]) -> None:
        """Put the routed experts in another order, of experts of equal ranks.

        Args:
            order: the new e-th expert is the one that was number order[e].

        Raises:
            NotImplementedError: an expert has no parameters that are its own.
        """
        raise NotImplementedError(
            f"{type(self).__name__} can't be put in another order: their parameters don't belong "
            "to one expert each."
        )

    def after_step(self, progress: float | None) -> None:
        """Called after each optimizer step: the only place where experts may change themselves.

        Args:
            progress: share of the training that is done, in [0, 1]; None if unknown.
        """

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        """Add the experts' part to the base layer's output.

        Args:
            hidden: (..., d_in) the site's input.
            weights: (T, E) routing weights, T the flattened batch, or (T, E + S) where the gate
                weighs the S shared experts too; None without routed experts.
            result: (..., d_out) the base layer's output.

        Returns:
            (..., d_out) in the dtype of `result`.
        """
        raise NotImplementedError

    def add_token(
        self, hidden: Tensor, weights: list[tuple[int, float]], result: Tensor
    ) -> Tensor | None:
        """`forward` for one token at inference and the experts that it uses.

        Args:
            hidden: (d_in,) fp32 or fp64 on the CPU.
            weights: those experts by number, and the weight of each.
            result: (..., d_out) the base layer's output, which stays as it is.

        Returns:
            (..., d_out) in the dtype of `result`; None where `forward` has to be asked.
        """
        return None

    def mix_tokens(self, hidden: Tensor, routing: Routing, result: Tensor) -> Tensor:
        """`forward` with the whole decision, for experts that mix tokens.

        Args:
            hidden: (..., m, d_in) the site's input, m the tokens of a sequence.
            routing: the decision about all of them, flattened.
            result: (..., m, d_out) the base layer's output.
        """
        raise NotImplementedError

    def outputs(self, hidden: Tensor) -> Tensor:
        """(T, E, d_out) what each routed expert makes of the tokens `hidden` (T, d_in), unweighted.

        For losses that compare experts, on few tokens; without dropout.

        Raises:
            ValueError: an expert has no output that is its own.
        """
        raise ValueError(
            f"{type(self).__name__} doesn't give its experts' single outputs, which are read here."
        )

    def down_factor(self) -> Tensor:
        """A of the routed experts, for routers that let the experts choose by themselves.

        Returns:
            (sum of the routed ranks, d_in), expert by expert.

        Raises:
            ValueError: the experts don't differ in what they make of the input.
        """
        raise ValueError(
            f"{type(self).__name__} has no down factor of its own for each expert to route by; use "
            "experts='lora', or another router."
        )

    def shared_down_factor(self) -> Tensor:
        """(r, d_in) the one down factor of all routed experts, for routers that read A x.

        Raises:
            ValueError: each expert has its own.
        """
        raise ValueError(
            f"{type(self).__name__} share no down factor for a router to read; use "
            "experts='shared_a' or 'up_bank', or another router."
        )

    def lora_factors(self) -> LoraFactors:
        """The experts as plain LoRA experts; what merging, calibrating and exporting go by.

        Raises:
            ValueError: the experts aren't linear in the input.
        """
        raise ValueError(
            f"{type(self).__name__} can't be written as LoRA factors, so it can't be merged, "
            "calibrated or exported; keep the adapter as it is (save_pretrained)."
        )

    def mixed(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """A (q, d_in) and B (d_out, q) whose product is `delta_weight`, fp32 (fp64 in fp64 models);
        weights and errors as there.
        """
        return self.lora_factors().mixed(weights)

    def delta_weight(self, weights: Tensor | None) -> Tensor:
        """(d_out, d_in) that routing weights of shape (E,), held fixed, add to the base weight; of
        shape (E + S,) where the gate weighs the S shared experts too, None where nothing is routed.
        """
        A, B = self.mixed(weights)
        return B @ A

    def extra_repr(self) -> str:
        shared = f", shared_ranks={self.shared_ranks}" if self.shared_ranks else ""
        return f"ranks={self.ranks}{shared}"
