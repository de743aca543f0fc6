"""Sparse MoA: the adapters of MoA that reach a threshold."""

from .base import Method, register_method
from .moa import CITATION, DEFAULTS, DEVIATIONS, EQUATIONS, SOURCES, TITLE

MOA_SPARSE = register_method(
    Method(
        name="moa-sparse",
        title=TITLE,
        summary="MoA whose adapters act where their weight reaches 0.25",
        arxiv="2506.05928",
        equations=EQUATIONS.format(threshold=" where that is at least 0.25, else 0"),
        defaults={
            **DEFAULTS,
            "gate": "independent_threshold",
            "gate_options": {"threshold": 0.25},
        },
        sources=SOURCES + " The weight stays w, not w minus the threshold.",
        deviations=DEVIATIONS
        + " The threshold there is 0.5 sigmoid(v x + c), used in a comparison alone, so v and c "
        "never get a gradient: it stays random, near 0.25. Here it is that constant.",
        citation=CITATION,
    )
)
