"""Top-p routing: harder tokens get more experts."""

import math

from .base import Method, register_method

TOP_P = register_method(
    Method(
        name="top-p",
        title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
        summary="the fewest of 8 experts whose probabilities reach 0.4, with an entropy loss",
        arxiv="2403.07652",
        equations="""p = softmax(W_r x)                      one router per module, no bias
S = the shortest prefix of the experts, by falling p, with a sum of at least 0.4
w_e = p_e                               for e in S, 0 elsewhere, not renormalised
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + a load balancing + c mean over the tokens of - sum over e of p_e log p_e""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_p",
            "gate_options": {"p": 0.4},
            "router": "linear",
            "losses": {
                "load_balancing": 1e-2,
                "tsallis_entropy": {"coefficient": 1e-4 * math.log(8), "q": 1},
            },
        },
        sources="The authors' repository (ZhenweiAn/Dynamic_MoE): threshold 0.4, raw "
        "probabilities. Unverified: the coefficients 1e-2 and 1e-4 are from memory of the paper. "
        "Its experts are whole feed-forward layers, pre-trained: numbers of experts, r and alpha "
        "are this library's choice.",
        deviations="The entropy loss is relative to log E: the published coefficient times log 8. "
        "The balance loss is divided by the mean number of active experts.",
        citation="""@article{huang2024harder,
  title={Harder Tasks Need More Experts: Dynamic Routing in {MoE} Models},
  author={Quzhe Huang and others},
  journal={arXiv preprint arXiv:2403.07652},
  year={2024},
}""",
    )
)
