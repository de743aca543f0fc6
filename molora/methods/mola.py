"""MoLA: top-k experts on every linear layer, with a number of experts that depends on the depth."""

from .base import Method, register_method

MOLA = register_method(
    Method(
        name="mola",
        title="Higher Layers Need More LoRA Experts",
        summary="top-2 of softmax on every linear layer, 2-4-6-8 experts from bottom to top",
        arxiv="2402.08562",
        equations="""p = softmax(W_r x)                      one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": "inverted_triangle:2-8/4",
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "gate": "top_k",
            "router": "linear",
        },
        sources="The authors' repository (GCYZSL/MoLA): 2, 4, 6 and 8 experts for 8 layers each of "
        "a 32-layer Llama, r 8, alpha 16, dropout 0.05, top-2; learning rate 3e-4, batch 128. The "
        "paper's other shapes are num_experts='triangle:2-8/4', 'hourglass:2-8/4' and "
        "'uniform:5'.",
        deviations="The four groups are cut proportionally for models that don't have 32 layers. "
        "Logits are computed in fp32 instead of the ambient dtype. One dropout mask per site "
        "instead of one per expert. The balance loss is off, as in the repository's default; "
        "switched on there, it pools the modules of a layer before the product and sums over "
        "layers with 1e-3, while losses={'load_balancing': c} is per site and averaged: c "
        "= 1e-3 times the number of layers has the same weight at balance. moe-peft 2.0.2's MoLA "
        "has the same formula, and its logits and gradients equal these to rounding; it differs in "
        "one number of experts for all layers, a dropout that stays on in evaluation, and a "
        "balance loss of one product over all sites that is K, not 1, at balance "
        "(examples/compare_with_peers).",
        citation="""@article{gao2024higher,
  title={Higher Layers Need More {LoRA} Experts},
  author={Gao, Chongyang and Chen, Kezhen and Rao, Jinmeng and Sun, Baochen and Liu, Ruibo and
          Peng, Daiyi and Zhang, Yawen and Guo, Xiaoyuan and Yang, Jie and Subrahmanian, VS},
  journal={arXiv preprint arXiv:2402.08562},
  year={2024},
}""",
    )
)
