"""A random router: the baseline for what learning to route is worth."""

from .base import Method, register_method

RANDOM = register_method(
    Method(
        name="random",
        title="Random routing, a baseline",
        summary="top-2 of 8 experts chosen by a random router that never learns, a baseline",
        arxiv=None,
        equations="""p = softmax(W_0 x)                      W_0 random, fixed
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "random",
        },
        sources="No paper. Settings as in the other top-2 methods, so that the router is all that "
        "differs; any method becomes its own random baseline with router='random'.",
        deviations="Equal inputs always get equal experts, in training and afterwards; random "
        "experts drawn anew in every pass are another method, thor.",
        citation="""@misc{molora_random,
  title={Random routing, a baseline},
  author={{the {MoLoRA} library}},
  year={2026},
}""",
    )
)
