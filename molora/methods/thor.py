"""THOR: no router, an expert by chance."""

from .base import Method, register_method

THOR = register_method(
    Method(
        name="thor",
        title="Taming Sparsely Activated Transformer with Stochastic Experts",
        summary="a random one of 8 experts in each pass of training, their mean at inference",
        arxiv="2110.04260",
        equations="""training:   y = W x + (alpha / r) B_e A_e x, e uniform, one per module and pass
inference:  y = W x + (1 / E) sum over e of (alpha / r) B_e A_e x
L = CE(p_1) + CE(p_2) + c (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2   p_1, p_2 of two passes""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "router": "random",
            "gate": "stochastic",
        },
        sources="The authors' repository (microsoft/Stochastic-Mixture-of-Experts): one draw per "
        "layer and batch, two passes. Its experts are whole feed-forward layers: number of "
        "experts, r and alpha are this library's choice. Unverified: the half in the agreement "
        "term; its coefficient is the training loop's.",
        deviations="The second pass and the agreement term are the training loop's: "
        "molora.consistency_loss(logits_1, logits_2, mask). Without them this trains each expert "
        "on a random share of the passes. Of the two published ways of inference it has the mean "
        "of all experts, not one expert by chance; the mean of linear experts is one LoRA of their "
        "summed rank.",
        citation="""@inproceedings{zuo2022thor,
  title={Taming Sparsely Activated Transformer with Stochastic Experts},
  author={Simiao Zuo and others},
  booktitle={International Conference on Learning Representations},
  year={2022},
}""",
    )
)
