"""Awaker2.5-VL: one expert weighed against one that is always on."""

from .base import Method, register_method

AWAKER = register_method(
    Method(
        name="awaker",
        title="Awaker2.5-VL: Stably Scaling MLLMs with Parameter-Efficient Mixture of Experts",
        summary="top-1 of 4 experts and a global one, weighed against each other",
        arxiv="2411.10669",
        equations="""p = softmax(W_r x + 0.1 noise)          noise in training only
w = max p, e* = argmax p
y = W x + (alpha / r) (w B_e* A_e* x + (1 - w) B_g A_g x)           g the global expert
L = task loss + c var(I) / mean(I)^2    I_e = sum over the tokens of their weight for e""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 4,
            "num_shared_experts": 1,
            "r": 16,
            "lora_alpha": 32,
            "gate": "convex",
            "router": "linear",
            "router_options": {"noise": 0.1},
            "losses": {"importance_cv": 1e-3},
        },
        sources="The authors' repository (MetabrainAGI/Awaker): 1 of 4 experts and a global one, "
        "noise 0.1, loss 1e-3. Unverified: r, alpha and targets are this library's choice.",
        deviations="Each router reads its module's own input; the code's all read one input, the "
        "normalised token embeddings (or their mean over the prompt). The code's second loss, on "
        "the load that the noise would give, is not part of it. The later stage that freezes the "
        "routers is the training script's business. The softmax is fp32 instead of fp16.",
        citation="""@article{long2024awaker,
  title={{Awaker2.5-VL}: Stably Scaling {MLLM}s with Parameter-Efficient Mixture of Experts},
  author={Jinqiang Long and others},
  journal={arXiv preprint arXiv:2411.10669},
  year={2024},
}""",
    )
)
