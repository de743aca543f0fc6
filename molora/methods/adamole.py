"""AdaMoLE: as many experts as exceed a threshold that the token sets itself."""

from .base import Method, register_method

ADAMOLE = register_method(
    Method(
        name="adamole",
        title="AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank "
        "Adaptation Experts",
        summary="every expert whose probability exceeds a learned threshold, on the attention",
        arxiv="2405.00361",
        equations="""p = softmax(W_r x)                      one router per module, no bias
tau = sigmoid(w_tau x + b_tau) / E
w_e = max(p_e - tau, 0) / sum over e of max(p_e - tau, 0)
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + c E sum over e of (share of tokens that use e) (mean of p_e - tau)""",
        defaults={
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "num_experts": 8,
            "r": 4,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "gate": "learned_threshold",
            "router": "linear",
            "losses": {"load_balancing": {"coefficient": 0.128, "above_threshold": True}},
        },
        sources="The paper and the authors' repository (zefang-liu/AdaMoLE): 8 experts, total rank "
        "32 (4 each), alpha 16, dropout 0.05, tau at most 1/E; learning rate 1e-4, constant with "
        "200 steps of warm-up, batch 16. Its baseline LoRA has alpha 16 at rank 32, an 8 times "
        "smaller scaling.",
        deviations="The loss is averaged over sites and divided by the mean number of active "
        "experts; there it is summed with 1e-3, here 0.128 = 1e-3 times the 128 sites of "
        "Llama-2-7B. Padding doesn't count. Logits and threshold are computed in fp32. One dropout "
        "mask per site instead of one per expert. The MoLE baselines of the same repository are "
        "gate='top_k' and gate='threshold'.",
        citation="""@article{liu2024adamole,
  title={{AdaMoLE}: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation
         Experts},
  author={Zefang Liu and Jiahua Luo},
  journal={arXiv preprint arXiv:2405.00361},
  year={2024},
}""",
    )
)
