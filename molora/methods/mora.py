"""MoRA, later named MoRAM: rank-1 atoms that activate themselves, for continual learning."""

from .base import Method, register_method

MORA = register_method(
    Method(
        name="mora",
        title="Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank "
        "Adaptive Learning",
        summary="rank-1 atoms chosen by their own normalised activation, within a budget",
        arxiv="2506.21035",
        equations="""v = A x,  n = v / |v|                   over all R atoms
w = softmax(n / tau) over the K largest n, 0 elsewhere; at evaluation 0 where n_i < delta too
y = W x + (alpha / r) sum over i of w_i v_i b_i""",
        defaults={
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "num_experts": 1,
            "r": 8,
            "rank_wise": True,
            "top_k": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "gate": "pruned_top_k",
            "gate_options": {"temperature": 0.03, "threshold": 0.2},
            "router": "activation",
            "router_options": {"score": "signed", "normalize": "token"},
        },
        sources="The authors' repository (Artificer-AI-Lab/MoRAM), its language model part: 8 "
        "atoms per task, activation budget K 8, tau 0.03, threshold delta 0.2, alpha 2r, dropout "
        "0.1, attention projections; learning rate 5e-4, cosine. Its CLIP part: r 16, K 16, tau "
        "0.01, scale 1. Unverified: the paper was known from its abstract and reviews.",
        deviations="The weights multiply the activation v itself, as in the code. The scale "
        "alpha / r multiplies every atom, also those of earlier tasks, which the code's language "
        "model part loses when it freezes them. The code's K is at least 2, as here. n is formed "
        "from the input without dropout. For the next task, molora.grow freezes the atoms and "
        "appends num_experts times r new ones; where the code appends the next task's before it "
        "saves, so that atoms of random keys and zero values take part at inference, here they "
        "are there only once you grow the adapter.",
        citation="""@article{lu2025little,
  title={Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive
         Learning},
  author={Lu, Haodong and Zhao, Chongyang and Xue, Jason and Yao, Lina and Moore, Kristen and
          Gong, Dong},
  journal={arXiv preprint arXiv:2506.21035},
  year={2025},
}""",
    )
)
