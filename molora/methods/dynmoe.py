"""DynMoE: thresholds per expert, and a number of experts that is learned."""

import math

from .base import Method, register_method

DYNMOE = register_method(
    Method(
        name="dynmoe",
        title="Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer "
        "Models",
        summary="each expert has a threshold of its own; a pool of 8, of which 4 are active first",
        arxiv="2405.14297",
        equations="""s_e = sigmoid(tau cos(x, w_e)), 0 for experts that are off;  tau = exp(1)
g_e = 1 if s_e > sigmoid(tau G_e), else 0     one threshold G_e per expert
w = g / max(sum of g, 1)
backward: dL/dg_e goes to s_e - sigmoid(tau G_e) where g_e = 1
inference: w = 1 for the largest s_e where no g_e is 1
every 300 steps: experts without a token are switched off; if tokens had no expert, one is
switched on with w_e = their sum scaled to length 1 and G_e = 0
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + c_1 (|V V^T - I|_F + mean |w_e|) + c_2 (E sum over e of m_e c_e + mean g)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "router": "cosine",
            "router_options": {"temperature": math.exp(-1)},
            "gate": "expert_thresholds",
            "gate_options": {"scale": math.e, "initial_experts": 4, "period": 300},
            "losses": {"simplicity_diversity": 1e-2, "efficiency": 1e-2},
        },
        sources="The authors' repository (LINs-lab/DynMoE): orthogonal rows, G = 0, tau with "
        "logarithm 1 that isn't trained, changes every 300 passes. Its experts are whole "
        "feed-forward layers: the pool, its 4 active experts, r, alpha and both coefficients are "
        "this library's choice. Unverified: whether the number of experts in w is differentiated "
        "too (here it is held fixed), whether idle rows count in the simplicity term (here they "
        "don't), which expert serves a token without one at inference, and the efficiency term, "
        "read as the mean of the gates with their straight-through gradient.",
        deviations="It counts optimizer steps and real tokens, where the code counts forward "
        "passes, so accumulation, recomputation and padding change nothing. Counts and changes "
        "alternate there; here every period is counted and ends in a change. At least one expert "
        "stays on. Experts that are off keep their A and B, which a switched-on one starts from, "
        "and its router row keeps the optimizer's moments.",
        citation="""@inproceedings{guo2025dynmoe,
  title={Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer Models},
  author={Yongxin Guo and others},
  booktitle={International Conference on Learning Representations},
  year={2025},
}""",
    )
)
