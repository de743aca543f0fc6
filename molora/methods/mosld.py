"""MoSLD: experts that share one factor, which is dropped entry by entry in training."""

from .base import Method, register_method

MOSLD = register_method(
    Method(
        name="mosld",
        title="MoSLD: An Extremely Parameter-Efficient Mixture-of-Shared LoRAs for Multi-Task "
        "Learning",
        summary="top-2 of experts that share one factor, with DropConnect on it",
        arxiv="2412.08946",
        equations="""p = softmax(W_r x)                      one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
A~ = A * mask / (1 - 0.1)               mask 0 with probability 0.1 per entry, in training
y = W x + (alpha / r) sum over e of w_e B_e A~ x          experts="shared_a"
y = W x + (alpha / r) B~ sum over e of w_e A_e x          experts="shared_b" """,
        defaults={
            "target_modules": ["q_proj", "v_proj"],
            "num_experts": "triangle:2-8/4",
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "init_lora_weights": "gaussian",
            "experts": "shared_a",
            "expert_options": {"drop_connect": 0.1},
            "gate": "top_k",
            "router": "linear",
            "losses": {"load_balancing": 1e-2},
        },
        sources="The paper: q and v of Llama-2-7B, 8, 6, 4 and 2 experts for 8 layers each from "
        "the bottom, K 2, r 8, alpha 16, dropout 0.1 on the shared factor; learning rate 3e-4, "
        "batch 128, 10 epochs. Unverified: no code is released; one router per module; the "
        "deviation of the Gaussian (here PEFT's 1/r); the paper gives no coefficient for its "
        "balance loss, 1e-2 is Switch Transformer's.",
        deviations="The paper names the shared factor A, Gaussian, and the experts' own B, zero, "
        "which is the naming of LoRA: the down factor is shared (experts='shared_a', the "
        "default). Its shapes, and 'the upper projection', say the opposite: the up factor is "
        "shared, Gaussian, and the experts' down factors start at zero: "
        "experts='shared_b'. Its balance loss, the sum over experts of counts times summed "
        "probabilities, is K T^2 / E times load_balancing, which is 1 at balance. The four groups "
        "are cut proportionally for models that don't have 32 layers.",
        citation="""@inproceedings{zhao2025mosld,
  title={{MoSLD}: An Extremely Parameter-Efficient Mixture-of-Shared {LoRAs} for Multi-Task
         Learning},
  author={Zhao, Lulu and Zeng, Weihao and Shi, Xiaofeng and Zhou, Hua},
  booktitle={Proceedings of the 31st International Conference on Computational Linguistics},
  year={2025},
}""",
    )
)
