"""MiLoRA: the modules of a layer are its experts, chosen once for each prompt."""

from .base import Method, register_method

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MILORA = register_method(
    Method(
        name="milora",
        title="MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models "
        "Fine-tuning",
        summary="each of a layer's 7 modules is an expert; 3 of them are chosen once for a prompt",
        arxiv="2410.18035",
        equations="""a = softmax over the prompt's tokens of v . x_t     once for a prompt and layer
h = sum over these tokens of a_t x_t
p = softmax(W_r f(h))                   f a learned rational function that starts as GELU
R_m = p_m for the 3 largest, 0 elsewhere
y = W_m x + R_m B_m A_m x               for each of the 7 modules m of the layer
L = task loss + 1e-2 * 7 sum over m of f_m mean(p_m),  f_m the share whose largest p is m""",
        defaults={
            "target_modules": MODULES,
            "num_experts": len(MODULES),
            "top_k": 3,
            "r": 32,
            "lora_alpha": 32,
            "experts": "module_adapters",
            "expert_options": {"modules": MODULES},
            "gate": "top_k_unnormalized",
            "router": "prompt_attention",
            "router_scope": "layer",
            "losses": {"load_balancing": {"coefficient": 1e-2, "first_choice": True}},
        },
        sources="The paper: 3 of 7 modules, r 32, loss coefficient 1e-2, degrees 6 and 5; learning "
        "rate 1e-4. Its text gives no alpha, so s = 1, and does not write whether R_m or 1 "
        "multiplies a chosen module; with 1 the task would not train the router. Unverified: the "
        "absolute value in f's denominator and the starts of v and W_r.",
        deviations="The router reads what the layer's first module reads, the normalised hidden "
        "state, instead of the hidden state before the norm. f's coefficients train with all other "
        "parameters; published, in steps of their own on held-out batches with learning rate 1e-6. "
        "The loss counts a prompt once for each real token of its sequence. A module that is not "
        "chosen is multiplied by 0 instead of being skipped.",
        citation="""@inproceedings{zhang2024milora,
  title={{MiLoRA}: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning},
  author={Zhang, Jingfan and Zhao, Yi and Chen, Dan and Tian, Xing and Zheng, Huanran and Zhu, Wei},
  booktitle={Findings of the Association for Computational Linguistics: EMNLP 2024},
  year={2024},
}""",
    )
)
