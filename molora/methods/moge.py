"""MoGE: the same number of experts from each group."""

from .base import Method, register_method

MOGE = register_method(
    Method(
        name="moge",
        title="Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity",
        summary="top-1 in each of 4 groups of 4 experts, raw probabilities, a shared expert",
        arxiv="2505.21411",
        equations="""p = softmax(W_r x) over all E experts   one router per module, no bias
S = the K / M likeliest experts of each of the M equal groups
w_e = p_e                               for e in S, 0 elsewhere, not renormalised
y = W x + (alpha / r) (sum over e of w_e B_e A_e x + B_s A_s x)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 16,
            "top_k": 4,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "grouped_top_k",
            "gate_options": {"groups": 4},
            "num_shared_experts": 1,
            "losses": {"load_balancing": 1e-2},
        },
        sources="Unverified: from the abstract and secondary sources (64 routed experts of "
        "which 8 are active, in 8 groups, and 4 shared ones, pre-trained on whole feed-forward "
        "layers). Numbers of experts, r, alpha and the loss coefficient are this library's "
        "choice.",
        deviations="The point of the groups is an equal load of devices; LoRA experts of one "
        "layer live on one device, so here they are a constraint on what is combined. The "
        "balance loss counts over all experts, not by group.",
        citation="""@article{tang2025pangu,
  title={Pangu Pro {MoE}: Mixture of Grouped Experts for Efficient Sparsity},
  author={Yehui Tang and others},
  journal={arXiv preprint arXiv:2505.21411},
  year={2025},
}""",
    )
)
