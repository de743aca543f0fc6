"""MoR1E: rank-1 experts weighted by a token router and, optionally, by the instance's cluster."""

from .base import Method, register_method

MOR1E = register_method(
    Method(
        name="mor1e",
        title="Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning",
        summary="32 experts of rank 1 under a dense softmax, with a learned gate on the sum",
        arxiv="2404.08985",
        equations="""p = softmax(W_r x)                      one router per module, no bias
m = sigmoid(100 theta), v = sigmoid(100 omega)      learned scalars per module, from 0
w = m p                                 by default
w = m (v p + (1 - v) s / 8)             with the scores s of the instance
y = W x + 32 sum over i of w_i b_i (a_i x)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 1,
            "r": 32,
            "rank_wise": True,
            "lora_alpha": 32,
            "scaling_rule": "constant",
            "gate": "intuition",
            "router": "linear",
        },
        sources="The authors' repository (RoyZry98/T-REX-Pytorch), its mode rank1: rank 32, token "
        "gates scaled by 32 and instance gates by 4 (hence s / 8), no alpha / r; learning rate "
        "5e-5, cosine, 3 epochs. Unverified: the paper was known from its abstract.",
        deviations="The instance part is off by default, because its scores (cosines of the "
        "prompt's embedding with 32 cluster centroids) come from an embedding model outside this "
        "library. gate_options={'instance': True} turns it on: pass them to the model's forward as "
        "instance_scores (batch, 32); generate() doesn't take them. The router starts random and "
        "not at zero. alpha is the number of experts in the released configuration, which makes "
        "the mean gate m: change it with r.",
        citation="""@article{liu2024intuition,
  title={Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning},
  author={Liu, Yijiang and Zhang, Rongyu and Yang, Huanrui and Keutzer, Kurt and Du, Yuan and
          Du, Li and Zhang, Shanghang},
  journal={arXiv preprint arXiv:2404.08985},
  year={2024},
}""",
    )
)
