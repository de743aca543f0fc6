"""Lily: up factors shared by all layers, chosen in the rank space of each layer's down factor."""

from .base import Method, register_method

LILY = register_method(
    Method(
        name="lily",
        title="Low-Rank Interconnected Adaptation across Layers",
        summary="one down factor for each site, 2 up factors for all layers, softmax of W_r A x",
        arxiv="2407.09946",
        equations="""h = A_i x                             A_i of one layer, or of `stride` layers
p = softmax(W_i h)                    over the E up factors of this kind of module
y = W x + s sum over e of p_e B_e h   B_e shared by all layers, for each kind of module""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 2,
            "r": 32,
            "lora_alpha": 1,
            "scaling_rule": "constant",
            "experts": "up_bank",
            "expert_options": {"stride": 1},
            "router": "inner",
            "gate": "dense",
        },
        sources="PEFT's implementation (peft.tuners.lily): rank 32, two up factors, one down "
        "factor per layer, scaling 1 without alpha / r, A and router kaiming-uniform, B zero, no "
        "dropout. It recommends a number of up factors of the order of layers / stride.",
        deviations="PEFT's takes the mean of p over all tokens of the batch, padding included, "
        "and uses it for all of them: a token's output then depends on its batch mates and on "
        "later tokens, and a prompt read at once on how it is cut. Here every token has its own "
        "weights. Unverified: how the paper's text forms the weights.",
        citation="""@inproceedings{zhong2025low,
  title={Low-Rank Interconnected Adaptation across Layers},
  author={Zhong, Yibo and Zhao, Jinman and Zhou, Yao},
  booktitle={Findings of the Association for Computational Linguistics: ACL 2025},
  year={2025},
}""",
    )
)
