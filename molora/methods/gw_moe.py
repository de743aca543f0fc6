"""GW-MoE: tokens whose router is undecided learn in every expert."""

from .base import Method, register_method

GW_MOE = register_method(
    Method(
        name="gw-moe",
        title="GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory",
        summary="top-2 of 8 experts; in training an undecided token goes to all of them",
        arxiv="2406.12375",
        equations="""p = softmax(W_r x)                      one router per module, no bias
H = - sum over e of p_e log p_e
w = p                                   in training, for tokens with H >= h
w_e = p_e / sum of the 2 largest p      else, for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "global_workspace",
            "gate_options": {"entropy": 0.77},
            "losses": {"load_balancing": 1e-2},
        },
        sources="The authors' repository (WaitHZ/GW-MoE): h = 1.6 for 8 experts, which is 0.77 "
        "log 8. Its experts are whole feed-forward layers: r, alpha and the loss coefficient "
        "are this library's choice.",
        deviations="The threshold is relative to log E. No cap on the number of such tokens in "
        "a sequence: the published one bounds the compute of full experts, and which tokens it "
        "keeps depends on the rest of the sequence. The released code assigns where the formula"
        " adds up, and never runs the experts for those tokens; this follows the formula.",
        citation="""@article{wu2024gwmoe,
  title={{GW-MoE}: Resolving Uncertainty in {MoE} Router with Global Workspace Theory},
  author={Haoze Wu and others},
  journal={arXiv preprint arXiv:2406.12375},
  year={2024},
}""",
    )
)
