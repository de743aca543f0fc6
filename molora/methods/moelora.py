"""MoELoRA: top-k experts that a contrastive loss keeps apart."""

from .base import Method, register_method

MOELORA = register_method(
    Method(
        name="moelora",
        title="MoELoRA: Contrastive Learning Guided Mixture of Experts on Parameter-Efficient "
        "Fine-Tuning for Large Language Models",
        summary="top-2 of 8 experts on q and v; a contrastive loss keeps experts apart",
        arxiv="2402.12851",
        equations="""p = softmax(W_r x)                      one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x
h_i = B_e A_e x_t / |B_e A_e x_t|       for each pair i of a token t and an expert e that it uses
L = task loss + a load balancing + c mean over i of -log(
    sum over the other pairs j with e of exp(h_i h_j / T) / sum over all other pairs j of it)""",
        defaults={
            "target_modules": ["q_proj", "v_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "linear",
            "losses": {"load_balancing": 1e-2, "contrastive": 1e-2},
        },
        sources="Unverified: the paper's abstract and one review of it. From them are the top-k "
        "gate, the balance loss and what the contrastive loss compares. The formulas, all numbers "
        "and v_proj (the review says 'q_proj and p_proj') are this library's choice.",
        deviations="The contrastive loss compares at most 64 real tokens per site, drawn anew in "
        "each pass, and leaves out outputs of length (nearly) zero: all of them at the start, when "
        "B is 0.",
        citation="""@article{luo2024moelora,
  title={{MoELoRA}: Contrastive Learning Guided Mixture of Experts on Parameter-Efficient
         Fine-Tuning for Large Language Models},
  author={Tongxu Luo and others},
  journal={arXiv preprint arXiv:2402.12851},
  year={2024},
}""",
    )
)
