"""DenseMixer: sparse forward, a router that hears of every expert."""

from .base import Method, register_method

DENSEMIXER = register_method(
    Method(
        name="densemixer",
        title="DenseMixer: Improving MoE Post-Training with Precise Router Gradient",
        summary="top-2 of 8 experts with the router gradient of all 8",
        arxiv=None,
        equations="""p = softmax(W_r x)                      one router per module, no bias
s = sum of the 2 largest p
forward:   w_e = p_e / s                for those 2 experts, 0 elsewhere
backward:  dL/dp_e = dL/dw_e / s        for every expert, s held fixed
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "dense_gradient",
            "losses": {"load_balancing": 1e-3},
        },
        sources="The authors' repository (yaof20/DenseMixer), which trains the router and "
        "experts of existing mixtures, also through LoRA. There is no preprint that this was "
        "checked against. Numbers of experts, r, alpha and the loss coefficient are this "
        "library's choice.",
        deviations="None in the formula: experts learn from the tokens that use them only, as "
        "there. The published method runs all experts densely in training (1.46 times the FLOPs"
        " on full experts); here dL/dw_e is the product of two rank-r vectors that the operator"
        " has anyway.",
        citation="""@misc{yao2025densemixer,
  title={{DenseMixer}: Improving {MoE} Post-Training with Precise Router Gradient},
  author={Feng Yao and others},
  year={2025},
  note={https://github.com/yaof20/DenseMixer},
}""",
    )
)
