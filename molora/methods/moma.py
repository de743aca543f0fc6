"""MoMa: text and images have experts of their own, and nothing in common."""

from .base import Method, register_method

MOMA = register_method(
    Method(
        name="moma",
        title="MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
        summary="top-1 among the 4 experts of the token's modality; no expert is common",
        arxiv="2407.21770",
        equations="""E / 2 experts for text, E / 2 for images
p = softmax(W_m x) over the experts of m,  m the token's modality, a router for each
w_e = p_e                               for the largest p, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 1,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k_unnormalized",
            "router": "modality_groups",
            "router_options": {"num_modalities": 2, "common": False},
            "losses": {"modality_balancing": 1e-2},
        },
        sources="Unverified: the paper's abstract (4 experts for text and 4 for images, routing "
        "within a group); the rest is from memory. r, alpha and the loss are this library's "
        "choice.",
        deviations="In the paper the experts of a group choose their tokens, which needs later "
        "tokens, and second routers that imitate the choice make it causal at inference. Here "
        "each token chooses, so that training and generation are alike, and a balance loss for "
        "each modality does what equal loads did there; for the paper's own training use "
        "gate='expert_choice' with top_k=None, which refuses to generate. The experts are LoRA "
        "experts beside a frozen network. The batch must bring modality_ids, or the model "
        "mm_token_type_ids.",
        citation="""@article{lin2024moma,
  title={{MoMa}: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts},
  author={Lin, Xi Victoria and Shrivastava, Akshat and Luo, Liang and Iyer, Srinivasan and
          Lewis, Mike and Ghosh, Gargi and Zettlemoyer, Luke and Aghajanyan, Armen},
  journal={arXiv preprint arXiv:2407.21770},
  year={2024},
}""",
    )
)
