"""AdaMoE-VLA: one head selects the expert, another one weighs it."""

from .base import Method, register_method

ADAMOE_VLA = register_method(
    Method(
        name="adamoe-vla",
        title="Expertise need not monopolize: Action-Specialized Mixture of Experts for "
        "Vision-Language-Action Learning",
        summary="top-1 of 4 experts and a shared one; selection and weight by different heads",
        arxiv="2510.14300",
        equations="""p = softmax(W_r x)                      one router per module, no bias
w_e = p_e + (W_s x)_e                   for the largest p, 0 elsewhere
y = W x + (alpha / r) (B_0 A_0 x + sum over e of w_e B_e A_e x)     0 the shared expert
L = task loss + c mean over the tokens of (log sum over e of exp z_e)^2""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 4,
            "num_shared_experts": 1,
            "top_k": 1,
            "r": 8,
            "lora_alpha": 16,
            "gate": "decoupled",
            "router": "linear",
            "losses": {"z_loss": 1e-4},
        },
        sources="The authors' repository (swjTheDad/AdaMoE-VLA): 1 of 4 experts, a shared one, "
        "z-loss 1e-4. Its experts are whole feed-forward layers of an action model: r and alpha "
        "are this library's choice.",
        deviations="W_s starts at zero, so that the gate starts as plain top-1. The code trains "
        "the routers with twice the learning rate; give the optimizer parameter groups for that. "
        "The variant w = softmax(W_s [x; p]) is not part of it.",
        citation="""@article{shen2025expertise,
  title={Expertise need not monopolize: Action-Specialized Mixture of Experts for
         Vision-Language-Action Learning},
  author={Weijie Shen and Yitian Liu and Yuhao Wu and Zhixuan Liang and Sijia Gu and Dehui Wang and
          Tian Nian and Lei Xu and Yusen Qin and Jiangmiao Pang and Xinping Guan and
          Xiaokang Yang and Yao Mu},
  journal={arXiv preprint arXiv:2510.14300},
  year={2025},
}""",
    )
)
