"""SparseMixer-v2 (GRIN): two sampled experts with a gradient estimator."""

from .base import Method, register_method

SPARSEMIXER = register_method(
    Method(
        name="sparsemixer",
        title="GRIN: GRadient-INformed MoE",
        summary="2 of 8 experts, sampled near the best in training, each by its own masked softmax",
        arxiv="2409.12136",
        equations="""near(z) = {e: max z - z_e <= 2 eps max(|z_e|, max z)},  z = W_r x, eps = 0.01
pi = softmax of z over near(z)
round 1:   e1 = argmax pi; in training e1 is drawn from pi
           w_e1 = pi_e1; in training, if e1 is not the argmax, a third of it with probability 3/4
           (the gradient is that of pi_e1 in either case)
round 2:   the same with z_e1 = -infinity
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "sparse_mixer",
            "gate_options": {"jitter": 0.01},
        },
        sources="The code of Phi-3.5-MoE: two rounds, jitter 0.01. Its experts are whole "
        "feed-forward layers, pre-trained: numbers of experts, r and alpha are this library's "
        "choice. Unverified: what it brings to the small routers of LoRA experts.",
        deviations="Only tokens whose best logits lie within 2 eps of each other give the router a "
        "gradient, here as there. Sampling uses torch's generator, so the recomputation of a "
        "checkpointed layer draws the same experts.",
        citation="""@article{liu2024grin,
  title={{GRIN}: {GR}adient-{IN}formed {MoE}},
  author={Liyuan Liu and others},
  journal={arXiv preprint arXiv:2409.12136},
  year={2024},
}""",
    )
)
