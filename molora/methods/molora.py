"""MoLoRA: a dense softmax mixture of small LoRA experts on every linear layer."""

from .base import Method, register_method

MOLORA = register_method(
    Method(
        name="molora",
        title="Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for "
        "Instruction Tuning",
        summary="dense softmax over 10 experts of rank 4 on every linear layer",
        arxiv="2309.05444",
        equations="""w = softmax(W_r x)                      one router per module, no bias
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 10,
            "r": 4,
            "lora_alpha": 16,
            "gate": "dense",
            "router": "linear",
            "router_options": {"init_std": 0.02},
            "expert_options": {"init_std": 0.02},
        },
        sources="The authors' repository (for-ai/parameter-efficient-moe), molora.gin: 10 experts, "
        "r 4, alpha 16 fixed in the class, A and W_r normal with deviation 0.02, B zero, no router "
        "bias, no dropout; learning rate 3e-4, Adafactor, constant, batch 32. Targets there are q, "
        "k, v, o, wi and wo of T5.",
        deviations="Top-k without renormalisation, which the code offers, is "
        "gate='top_k_unnormalized' with top_k=K. The code's balance and z-losses are never applied "
        "and are not part of it.",
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
