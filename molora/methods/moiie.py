"""MoIIE: experts of one modality each, beside experts that all of them share."""

from .base import Method, register_method

MOIIE = register_method(
    Method(
        name="moiie",
        title="MoIIE: Mixture of Intra- and Inter-Modality Experts for Large Vision Language "
        "Models",
        summary="top-2 among the experts of the token's modality and common ones",
        arxiv="2508.09779",
        equations="""E / 4 experts for text, E / 4 for images, E / 2 for both
p = softmax(W_m x) over those that m may use,  m the token's modality, a router for each
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "modality_groups",
            "router_options": {"num_modalities": 2},
            "losses": {"modality_balancing": 1e-2},
        },
        sources="The authors' repository (AlenjandroWang/MoIIE): a quarter of the experts for "
        "each modality, half for both, a router and a balance loss of its own for each modality, "
        "renormalised top-k, generated tokens are text. All numbers are this library's choice.",
        deviations="The experts are LoRA experts beside a frozen network instead of copies of it. "
        "The two balance losses have one coefficient and are averaged. The repository's masks "
        "count the last token of an image as text; here modality_ids say what it is. The batch "
        "must bring modality_ids, or the model mm_token_type_ids.",
        citation="""@article{wang2025moiie,
  title={{MoIIE}: Mixture of Intra- and Inter-Modality Experts for Large Vision Language Models},
  author={Wang, Dianyi and Wang, Siyuan and Li, Zejun and Wang, Yikun and Li, Yitong and
          Tang, Duyu and Shen, Xiaoyu and Huang, Xuanjing and Wei, Zhongyu},
  journal={arXiv preprint arXiv:2508.09779},
  year={2025},
}""",
    )
)
