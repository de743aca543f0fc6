"""Rank-stabilised LoRA: the baseline with a scaling that doesn't shrink with the rank."""

from .base import Method, register_method

RSLORA = register_method(
    Method(
        name="rslora",
        title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        summary="plain LoRA of rank 64 with the scaling alpha / sqrt(r), a baseline",
        arxiv="2312.03732",
        equations="y = W x + (alpha / sqrt(r)) B A x",
        defaults={
            "num_experts": 0,
            "num_shared_experts": 1,
            "r": 64,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": "all-linear",
        },
        sources="The scaling is the paper's. r is that of 8 experts of rank 8 together, alpha a "
        "common choice.",
        deviations="None. Equals PEFT's LoRA with use_rslora=True and the same weights.",
        citation="""@article{kalajdzievski2023rank,
  title={A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}},
  author={Damjan Kalajdzievski},
  journal={arXiv preprint arXiv:2312.03732},
  year={2023},
}""",
    )
)
