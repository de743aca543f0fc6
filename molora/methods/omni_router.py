"""Omni-router: the layers share one router."""

from .base import Method, register_method

OMNI_ROUTER = register_method(
    Method(
        name="omni-router",
        title="Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech "
        "Recognition",
        summary="top-1 by probability, with one router weight for all layers",
        arxiv="2507.05724",
        equations="""p = softmax(W_r x)   one W_r for all layers, each has its own x, no bias
w_e = p_e            for the likeliest expert, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 4,
            "r": 8,
            "lora_alpha": 16,
            "router": "shared_linear",
            "router_scope": "block",
            "gate": "switch",
            "losses": {"load_balancing": 1e-2},
        },
        sources="The abstract and secondary sources: one router matrix for all layers, top-1 of a "
        "softmax, 2, 4 and 8 experts, in speech models trained from scratch. Unverified: the loss "
        "coefficient, which is Switch Transformer's. r and alpha are this library's choice.",
        deviations="The paper routes whole feed-forward networks of one width. Here gate_proj and "
        "up_proj share one decision, and down_proj, whose input is wider, has a router of its own: "
        "two matrices for the model.",
        citation="""@article{gu2025omni,
  title={Omni-Router: Sharing Routing Decisions in Sparse Mixture-of-Experts for Speech
         Recognition},
  author={Zijin Gu and Tatiana Likhomanenko and Navdeep Jaitly},
  journal={arXiv preprint arXiv:2507.05724},
  year={2025},
}""",
    )
)
