"""All experts with equal weight: the baseline for what routing is worth."""

from .base import Method, register_method

UNIFORM = register_method(
    Method(
        name="uniform",
        title="Uniform mixture, a baseline",
        summary="all 8 experts with weight 1/8 for every token, a baseline",
        arxiv=None,
        equations="y = W x + (1 / E) sum over e of (alpha / r) B_e A_e x",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "gate": "uniform",
            "router": "random",
        },
        sources="No paper. Settings as in the other methods with 8 experts.",
        deviations="It is one LoRA of rank 64 that is initialised in 8 parts.",
        citation="""@misc{molora_uniform,
  title={Uniform mixture, a baseline},
  author={{the {MoLoRA} library}},
  year={2026},
}""",
    )
)
