"""HMoE: experts of unequal size, and a loss that makes the large ones dear."""

from .base import Method, register_method

HMOE = register_method(
    Method(
        name="hmoe",
        title="HMoE: Heterogeneous Mixture of Experts for Language Modeling",
        summary="top-2 of 8 experts with ranks from 9 to 23, and a penalty on using large ones",
        arxiv="2408.10681",
        equations="""p = softmax(W_r x)                      one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r_e) B_e A_e x
L = task loss + c (E / K) sum over e of (share of tokens that use e) (mean p_e) r_e / mean r""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": {".*": [9, 11, 13, 15, 17, 19, 21, 23]},
            "lora_alpha": 32,
            "gate": "top_k",
            "router": "linear",
            "losses": {"parameter_penalty": 0.1},
        },
        sources="The paper: 8 experts whose sizes are in the proportion 9 : 11 : ... : 23, top-2, "
        "coefficient 0.1. Its experts are whole feed-forward layers, pre-trained; here the "
        "proportions are ranks of LoRA experts. Alpha is this library's choice.",
        deviations="The penalty is relative to the mean rank and divided by K, so that it is 1 at "
        "balance; the printed one is K times the mean size times this. The top-p variant is "
        "gate='top_p' with top_k=None, gate_options={'p': 0.6, 'renormalize': True} and an entropy "
        "loss of 3e-2: losses={'tsallis_entropy': {'coefficient': 3e-2 * log(8), 'q': 1}}. The "
        "paper prints the opposite sign, which would raise the entropy; its text wants it lowered.",
        citation="""@article{wang2024hmoe,
  title={{HMoE}: Heterogeneous Mixture of Experts for Language Modeling},
  author={An Wang and others},
  journal={arXiv preprint arXiv:2408.10681},
  year={2024},
}""",
    )
)
