"""MING-MOE: top-2 of four experts in the feed-forward layers, with router biases."""

from .base import Method, register_method

MING_MOE = register_method(
    Method(
        name="ming-moe",
        title="MING-MOE: Enhancing Medical Multi-Task Learning in Large Language Models with "
        "Sparse Mixture of Low-Rank Adapter Experts",
        summary="top-2 of 4 experts on the feed-forward layers, router with bias",
        arxiv="2404.09027",
        equations="""p = softmax(W_r x + b)                  one router per module
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 4,
            "top_k": 2,
            "r": 16,
            "lora_alpha": 32,
            "gate": "top_k",
            "router": "linear",
            "router_options": {"bias": True},
        },
        sources="The authors' repository (MediaBrain-SJTU/MING): 2 of 4 experts on the linears of "
        "the feed-forward part, router bias. Unverified: r and alpha are this library's choice.",
        deviations="The optional shared expert, which joins the softmax with a logit of 1, and the "
        "sampled selection are not part of it: the code's training path uses the first and its "
        "evaluation path doesn't, and the second is a hook for reinforcement learning. Router "
        "biases start at 0.",
        citation="""@article{liao2024ming,
  title={{MING-MOE}: Enhancing Medical Multi-Task Learning in Large Language Models with Sparse
         Mixture of Low-Rank Adapter Experts},
  author={Yusheng Liao and Shuyang Jiang and Yu Wang and Yanfeng Wang},
  journal={arXiv preprint arXiv:2404.09027},
  year={2024},
}""",
    )
)
