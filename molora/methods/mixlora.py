"""MixLoRA: each feed-forward network becomes a mixture of itself with E adapters; attention gets
plain LoRA."""

from typing import Any

from .base import Method, register_method

# Linear modules of feed-forward networks, by the names they have in Llama, T5, GPT-2, ViT and kin.
FEED_FORWARD = r"(mlp|DenseReluDense)\.\w+|gate_proj|up_proj|gate_up_proj|down_proj"
# Every linear module is adapted: experts on the feed-forward ones, one LoRA each on the others.
BLOCK: dict[str, Any] = {
    "mixing": "feed_forward",
    "target_modules": "all-linear",
    "num_experts": {FEED_FORWARD: 8, ".*": 0},
    "num_shared_experts": {FEED_FORWARD: 0, ".*": 1},
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "router": "linear",
}
TITLE = "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts"
SOURCES = (
    "The authors' repositories (TUDB-Labs/MixLoRA, TUDB-Labs/MoE-PEFT): 8 experts, r 16, alpha 32, "
    "dropout 0.05, all seven modules of a Llama layer, learning rate 2e-4, batch 16, 2 epochs. "
)
DEVIATIONS = (
    "A token's experts are computed in slots next to one another instead of expert by expert. "
    "LoRA is computed in the parameters' dtype, not always in fp32. Linear modules outside of the "
    "feed-forward networks and the attention, such as a classifier, get plain LoRA too. "
)
CITATION = """@article{li2024mixlora,
  title={{MixLoRA}: Enhancing Large Language Models Fine-Tuning with {LoRA}-based Mixture of
         Experts},
  author={Li, Dengchun and Ma, Yingzi and Wang, Naizheng and Ye, Zhengmao and Cheng, Zhiyuan and
          Tang, Yinghao and Zhang, Yan and Duan, Lei and Zuo, Jie and Yang, Cal and Tang, Mingjie},
  journal={arXiv preprint arXiv:2404.15159},
  year={2024},
}"""

MIXLORA = register_method(
    Method(
        name="mixlora",
        title=TITLE,
        summary="top-2 of 8 whole feed-forward networks, plain LoRA on attention",
        arxiv="2404.15159",
        equations="""p = softmax(W_r x)                 one router per feed-forward network, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
FFN_e(x) = D_e (act(G_e x) * U_e x)     with G_e = G + (alpha / r) B_e A_e, and so U_e and D_e
y = sum over e of w_e FFN_e(x)""",
        defaults={
            **BLOCK,
            "top_k": 2,
            "gate": "top_k",
            "router_options": {"init_std": 0.02},
            "losses": {"load_balancing": 2e-3},
        },
        sources=SOURCES + "Router from N(0, 0.02); the balance loss counts 1e-3.",
        deviations=DEVIATIONS + "The published balance loss pools the tokens of all layers before "
        "the product and is k at balance; here it is 1 at balance, by site and averaged, so its "
        "coefficient is 2 times 1e-3. Pooled, one layer could use the first expert alone and "
        "another one the second.",
        citation=CITATION,
    )
)
