"""MoV: a mixture of vectors that scale keys, values and the feed-forward part, after IA3."""

from .base import Method, register_method

MOV = register_method(
    Method(
        name="mov",
        title="Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for "
        "Instruction Tuning",
        summary="30 vectors that scale the output of k, v and up, weighted by a dense softmax",
        arxiv="2309.05444",
        equations="""u = W x + b
p = softmax(W_r u)                            over E experts; it reads the output
y = u * (1 + sum over e of p_e v_e)           l_e = 1 + v_e is the published vector, from 1""",
        defaults={
            "target_modules": ["k_proj", "v_proj", "up_proj"],
            "num_experts": 30,
            "r": 1,
            "lora_alpha": 1,
            "experts": "scaling_vectors",
            "gate": "dense",
            "router": "output",
            "router_options": {"init_std": 0.02},
        },
        sources="The authors' repository (for-ai/parameter-efficient-moe, configs/mov.gin): 30 "
        "experts on T5's keys, values and feed-forward intermediate, no bias, router weights "
        "normal with deviation 0.02, no auxiliary loss; learning rate 3e-4, constant, Adafactor. "
        "T5's modules are k, v and wi_1.",
        deviations="The repository decides for keys and values head by head, with one router "
        "kernel for all heads; here one decision is made for the whole output. It scales the "
        "product of gate and up projection; scaling the up projection gives the same value, but "
        "the router reads up alone. In a feed-forward part without a gate the vectors act before "
        "the activation instead of after it. The vectors are stored as their difference from 1: "
        "the weights sum to 1, so the output is the same, weight decay pulls towards the base "
        "model, and gates whose weights don't sum to 1 start from it too. Unverified: what the "
        "paper's text says the router reads; router='linear' reads x.",
        citation="""@article{zadouri2023pushing,
  title={Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient {MoE} for
         Instruction Tuning},
  author={Ted Zadouri and Ahmet {\\"U}st{\\"u}n and Arash Ahmadian and Beyza Ermi{\\c{s}} and
          Acyr Locatelli and Sara Hooker},
  journal={arXiv preprint arXiv:2309.05444},
  year={2023},
}""",
    )
)
