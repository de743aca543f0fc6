"""StableMoE: a router that learns, then one distilled from it that stays."""

from .base import Method, register_method

STABLEMOE = register_method(
    Method(
        name="stablemoe",
        title="StableMoE: Stable Routing Strategy for Mixture of Experts",
        summary="1 of 8 experts; its choice is frozen after a tenth of the training",
        arxiv="2204.08396",
        equations="""z = W_r x                               one router per module, no bias
z' = D P x                              P (50, d_in), D (E, 50); no gradient to x
first 10% of the training:  a = argmax z
    L = task loss + 0.3 sum over e of (E f_e - 1) mean w_e + 0.3 mean of -log softmax(z')_a
after that:  a = argmax z' with P and D fixed, L = task loss
inference:   a = argmax z'
w_a = sigmoid(z_a), 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "distilled",
            "gate_options": {"distilled_dim": 50, "freeze_after": 0.1},
            "losses": {"assignment_balancing": 0.3, "distillation": 0.3},
        },
        sources="The authors' repository (Hunter-DDM/stablemoe): 6000 of 60000 updates, both "
        "coefficients 0.3, inner width 50. Its experts are whole feed-forward layers: number of "
        "experts, r and alpha are this library's choice.",
        deviations="The distilled router of the paper embeds the token's id, so that a token "
        "always has the same expert; a layer of this tuner doesn't see ids, so z' is linear in "
        "the module's input. Its map is frozen, but what it reads still moves as the layers below "
        "learn: assignments are steadier, not constant. Token means where the code has sums over "
        "the tokens: the balance between the two losses and the task's is not the published one.",
        citation="""@inproceedings{dai2022stablemoe,
  title={{StableMoE}: Stable Routing Strategy for Mixture of Experts},
  author={Damai Dai and others},
  booktitle={Annual Meeting of the Association for Computational Linguistics},
  year={2022},
}""",
    )
)
