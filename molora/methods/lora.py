"""Plain LoRA: the baseline that every comparison needs, as one expert that is always on."""

from .base import Method, register_method

LORA = register_method(
    Method(
        name="lora",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        summary="plain LoRA, the baseline: one expert that is always on, no router",
        arxiv="2106.09685",
        equations="y = W x + (alpha / r) B A x",
        defaults={
            "num_experts": 0,
            "num_shared_experts": 1,
            "r": 8,
            "lora_alpha": 16,
            "target_modules": "all-linear",
        },
        sources="r and alpha are common choices, not the paper's, which sweeps them.",
        deviations="All linear layers instead of the paper's q and v. Equals PEFT's LoRA with the "
        "same weights, number for number.",
        citation="""@inproceedings{hu2022lora,
  title={{LoRA}: Low-Rank Adaptation of Large Language Models},
  author={Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and
          Shean Wang and Lu Wang and Weizhu Chen},
  booktitle={International Conference on Learning Representations},
  year={2022},
}""",
    )
)
