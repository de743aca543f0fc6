"""Arrow (arXiv 2405.11157): by the directions that the adapters amplify most."""

from torch import Tensor

from ..routers import top_right_singular_vector
from .base import register_composer
from .prototypes import PrototypeComposer


@register_composer("arrow")
class Arrow(PrototypeComposer):
    """See `ArrowRouter`. 3 experts and temperature 1 are PEFT's."""

    def __init__(self, *, top_k: int = 3, temperature: float = 1.0) -> None:
        super().__init__(top_k, temperature)

    def prototype(self, index: int, site: str, A: Tensor, B: Tensor) -> Tensor:
        return top_right_singular_vector(A, B)
