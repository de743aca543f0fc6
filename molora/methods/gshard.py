"""GShard: two experts per token, the second one drawn in training."""

from .base import Method, register_method

GSHARD = register_method(
    Method(
        name="gshard",
        title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
        summary="top-2 of 8 experts; in training the second is used as often as it weighs",
        arxiv="2006.16668",
        equations="""p = softmax(W_r x)                      one router per module, no bias
g_1, g_2 = the 2 largest p, divided by their sum
w = g_1 for the first expert; g_2 for the second, in training with probability min(1, 2 g_2)
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + c E sum over e of (share of tokens whose first expert is e) (mean p_e)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "gate": "gshard",
            "router": "linear",
            "losses": {"load_balancing": {"coefficient": 1e-2, "first_choice": True}},
        },
        sources="Unverified: the method is from memory of the paper. Its experts are whole "
        "feed-forward layers, pre-trained: numbers of experts, r, alpha and the coefficient are "
        "this library's choice.",
        deviations="No capacity: a token loses its second expert by the draw only. The loss is 1 "
        "at balance, E^2 times the published one.",
        citation="""@article{lepikhin2020gshard,
  title={{GShard}: Scaling Giant Models with Conditional Computation and Automatic Sharding},
  author={Dmitry Lepikhin and HyoukJoong Lee and Yuanzhong Xu and Dehao Chen and Orhan Firat and
          Yanping Huang and Maxim Krikun and Noam Shazeer and Zhifeng Chen},
  journal={arXiv preprint arXiv:2006.16668},
  year={2020},
}""",
    )
)
