"""DynMoLE: all experts for tokens whose router is unsure, few for the others."""

from .base import Method, register_method
from .mixlora import BLOCK

DYNMOLE = register_method(
    Method(
        name="dynmole",
        title="DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing "
        "Mechanism",
        summary="all of 8 networks where the entropy is high, else as many as reach 0.75",
        arxiv="2504.00661",
        equations="""p = softmax(W_r x)                 one router per feed-forward network, no bias
H = (1 - sum over e of p_e^q) / (q - 1)                                       q = 1.1
w_e = p_e                               for all e, if H > 0.9, else
w_e = p_e / sum over S of p             for e in S, 0 elsewhere, with S the shortest prefix of the
                                        experts, by falling p, of at least 2 that reach 0.75
FFN_e(x) = D_e (act(G_e x) * U_e x)     with G_e = G + (alpha / r) B_e A_e, and so U_e and D_e
y = sum over e of w_e FFN_e(x)
L = task loss + a load balancing + c mean over the tokens of H / max H""",
        defaults={
            **BLOCK,
            "gate": "entropy_hybrid",
            "gate_options": {"q": 1.1, "threshold": 0.9, "p": 0.75, "min_experts": 2},
            "router_options": {"init_std": 0.02},
            "losses": {
                "load_balancing": 1e-3,
                "tsallis_entropy": {"coefficient": 1e-2, "q": 1.1},
            },
        },
        sources="Unverified: the rule and its constants (q 1.1, threshold 0.9, top-p 0.75, at "
        "least 2) are from a third party's implementation that names them the paper's; only the "
        "abstract of the paper was read. The authors' repository (TUDB-Labs/MoE-PEFT, v2.1.0) has "
        "the entropy loss alone, with top-2: 1e-2, and 1e-3 for the balance. The rest is from "
        "MixLoRA, on which it builds.",
        deviations="The entropy loss has the routing's q; the authors' code has 1.4, and averages "
        "padding too. The balance loss is 1 at balance, by site and averaged; the authors' is the "
        "mean number of active experts at balance, and pools the layers. See MixLoRA for the rest.",
        citation="""@article{li2025dynmole,
  title={{DynMoLE}: Boosting Mixture of {LoRA} Experts Fine-Tuning with a Hybrid Routing Mechanism},
  author={Li, Dengchun and Wang, Naizheng and Zhang, Zihao and Yin, Haoyang and Duan, Lei and
          Xiao, Meng and Tang, Mingjie},
  journal={arXiv preprint arXiv:2504.00661},
  year={2025},
}""",
    )
)
