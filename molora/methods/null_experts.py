"""AdaMoE: experts that do nothing, for tokens that need fewer."""

from .base import Method, register_method

NULL_EXPERTS = register_method(
    Method(
        name="null-experts",
        title="AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language "
        "Models",
        summary="top-4 among 4 experts and 4 null experts, which do nothing",
        arxiv="2406.13233",
        equations="""p = softmax(W_r x)                      over E experts and N null experts
S = the K largest p
w_e = p_e / sum over the real experts in S of p      for those, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + c ((E + N) / K) sum over all E + N of f_i P_i
    f_i the share of tokens that use i, for a null expert the mean of all null experts""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 4,
            "top_k": 4,
            "r": 8,
            "lora_alpha": 16,
            "gate": "null_experts",
            "gate_options": {"num_null": 4},
            "router": "linear",
            "losses": {"null_balancing": 1e-3},
        },
        sources="The authors' repository (CengZihao/AdaMoE), exp_1, which is MoLA's code: 4 real "
        "experts, coefficient 1e-3. Unverified: K and N are this library's choice, for 2 real "
        "experts on average when all are used equally; r and alpha are MoLA's.",
        deviations="Padding doesn't count; the loss is averaged over sites. K can be at most the "
        "number of real experts.",
        citation="""@article{zeng2024adamoe,
  title={{AdaMoE}: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models},
  author={Zihao Zeng and others},
  journal={arXiv preprint arXiv:2406.13233},
  year={2024},
}""",
    )
)
