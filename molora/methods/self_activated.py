"""Autonomy of Experts on LoRA: the experts with the largest |A_e x| take the token."""

from .base import Method, register_method

SELF_ACTIVATED = register_method(
    Method(
        name="self-activated",
        title="Autonomy-of-Experts Models",
        summary="no router: the top-2 experts by the norm of their own activation A_e x",
        arxiv="2501.13074",
        equations="""z_e = |A_e x|
w_e = softmax of z over the 2 largest   for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "activation",
            "router_options": {"score": "norm"},
            "losses": {"load_balancing": 1e-2},
        },
        sources="Unverified: the paper pretrains full feed-forward experts, whose first factor is "
        "split into two of low rank so that the score is cheap; experts of LoRA form are this "
        "library's reading, with A_e for the first of the two factors, and E, K, r, alpha and the "
        "coefficient of the balance loss are common choices, not the paper's.",
        deviations="Experts start with activations of about equal norm, so early routing is nearly "
        "arbitrary, and an expert whose A grows wins more tokens: hence the balance loss, and "
        "router_options={'normalize': 'factor'}, which divides by the norm of A_e. A "
        "temperature below 1 sharpens the weights.",
        citation="""@article{lv2025autonomy,
  title={Autonomy-of-Experts Models},
  author={Lv, Ang and Xie, Ruobing and Qian, Yining and Wu, Songhao and Sun, Xingwu and
          Kang, Zhanhui and Wang, Di and Yan, Rui},
  journal={arXiv preprint arXiv:2501.13074},
  year={2025},
}""",
    )
)
