"""SMAR: a loss keeps the routing of two modalities apart, but not too far."""

from .base import Method, register_method

SMAR = register_method(
    Method(
        name="smar",
        title="SMAR: Soft Modality-Aware Routing Strategy for MoE-based Multimodal Large Language "
        "Models Preserving Language Capabilities",
        summary="top-2 with a bias for each modality; the modalities' divergence is kept in a band",
        arxiv="2506.06406",
        equations="""p = softmax(W_r x + b_m)                m the token's modality
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x
K = KL(P || Q) + KL(Q || P),  P and Q the mean p of text and of image tokens
L = task loss + c (max(0, 1.5 - K) + max(0, K - 2))""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "modality_bias",
            "losses": {"load_balancing": 1e-2, "modality_kl": 1e-2},
        },
        sources="Unverified: the paper's abstract and its reviews. From them are the bias, the "
        "symmetric divergence and the band [1.5, 2]. The coefficient c, the balance loss and all "
        "other numbers are this library's choice; symmetric means the sum of both directions "
        "here.",
        deviations="The experts are LoRA experts beside a frozen network. A batch of one modality "
        "adds nothing to the loss. The batch must bring modality_ids, or the model "
        "mm_token_type_ids; all modalities but text count as one.",
        citation="""@article{xia2025smar,
  title={{SMAR}: Soft Modality-Aware Routing Strategy for {MoE}-based Multimodal Large Language
         Models Preserving Language Capabilities},
  author={Xia, Guoyang and Ding, Yifeng and Li, Fengfa and Ren, Lei and Wei, Chen and
          Feng, Fangxiang and Wang, Xiaojie},
  journal={arXiv preprint arXiv:2506.06406},
  year={2025},
}""",
    )
)
