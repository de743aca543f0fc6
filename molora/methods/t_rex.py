"""T-REX: every pair of a down and an up vector is a rank-1 expert."""

from .base import Method, register_method

T_REX = register_method(
    Method(
        name="t-rex",
        title="T-REX: Mixture-of-Rank-One-Experts with Semantic-aware Intuition for Multi-task "
        "Large Language Model Finetuning",
        summary="the 32 pairs of 4 down and 8 up vectors are experts under a dense softmax",
        arxiv="2404.08985",
        equations="""p = softmax(W_r x)                      one router per module, no bias
m = sigmoid(100 theta), v = sigmoid(100 omega)      learned scalars per module, from 0
w = m p                                 by default
w = m (v p + (1 - v) s / 8)             with the scores s of the instance
G = w as a 4 x 8 matrix
y = W x + 32 B G^T A x                  A (4, d_in), B (d_out, 8)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 32,
            "r": 1,
            "lora_alpha": 32,
            "scaling_rule": "constant",
            "experts": "rank_pairs",
            "expert_options": {"down_vectors": 4},
            "gate": "intuition",
            "router": "linear",
        },
        sources="The authors' repository (RoyZry98/T-REX-Pytorch), trex_train.sh: 4 down and 8 up "
        "vectors, token gates scaled by 32 and instance gates by 4 (hence s / 8), no alpha / r, "
        "every linear layer; learning rate 5e-5, cosine, 3 epochs. Unverified: the paper was known "
        "from its abstract.",
        deviations="The instance part is off by default and turned on as for mor1e: "
        "gate_options={'instance': True}, and instance_scores (batch, 32) passed to the model's "
        "forward. The router starts random, not at zero: from zero, and without the instance part, "
        "the columns of B would get equal gradients and stay equal for ever. alpha is the number "
        "of experts in the released configuration, which makes the mean gate m: change it with "
        "num_experts.",
        citation="""@article{zhang2025trex,
  title={{T-REX}: Mixture-of-Rank-One-Experts with Semantic-aware Intuition for Multi-task Large
         Language Model Finetuning},
  author={Zhang, Rongyu and Liu, Yijiang and Yang, Huanrui and Zheng, Shenli and Tan, Chongkang and
          Wang, Dan and Du, Yuan and Du, Li and Zhang, Shanghang},
  journal={arXiv preprint arXiv:2404.08985},
  year={2025},
}""",
    )
)
