"""FlyLoRA: a frozen sparse random A that is the router too."""

from .base import Method, register_method

FLYLORA = register_method(
    Method(
        name="flylora",
        title="FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise "
        "Mixture-of-Experts",
        summary="frozen sparse random A; the 8 of 32 ranks with the largest A x are active",
        arxiv="2510.08396",
        equations="""v = A x                     A frozen, a share K / R of each row not zero
S = the K largest v_i + d_i
y = W x + (alpha / R) sum over i in S of b_i v_i
d_i += u sign(mean count - count_i)     after each optimizer step""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 1,
            "r": 32,
            "rank_wise": True,
            "top_k": 8,
            "lora_alpha": 64,
            "experts": "sparse_projection",
            "expert_options": {"density": 0.25},
            "gate": "indicator",
            "gate_options": {"update_rate": 1e-3},
            "router": "activation",
            "router_options": {"score": "signed"},
        },
        sources="The authors' repository (gfyddha/FlyLoRA), its MMLU script: R 32, K 8, alpha 64, "
        "u 1e-3 (the class's default is 1e-2), no dropout, all linear layers; learning rate 3e-4, "
        "batch 128, 1 epoch. A's entries have deviation 1 / R, as in the paper.",
        deviations="The paper ranks the signed v + d in one equation (10) and |v + d| in another "
        "(8), its code likewise: signed is the default; router_options={'score': 'norm'} ranks "
        "|v| + d, which differs from |v + d| only by the bias. d moves once after each optimizer "
        "step, without padding and over all processes, and not in every forward, evaluation "
        "included. x gets its gradient through A, which the code's fp16 path drops. A is saved "
        "with the adapter; expert_options={'density': 0.25, 'save_projection': False} saves its "
        "seed instead. Set density to K / R when you change either.",
        citation="""@inproceedings{zou2025flylora,
  title={{FlyLoRA}: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
         Mixture-of-Experts},
  author={Zou, Heming and Zang, Yunliang and Xu, Wutong and Zhu, Yao and Ji, Xiangyang},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
}""",
    )
)
