"""X-LoRA: a first pass of the base model decides the mixture of the second."""

from .base import Method, register_method

XLORA = register_method(
    Method(
        name="xlora",
        title="X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large "
        "Language Models with Applications in Protein Mechanics and Molecular Design",
        summary="a first pass without adapters weighs all experts of the second, token by token",
        arxiv="2402.07148",
        equations="""H = last hidden state of the base model, without adapters, no gradient
w = softmax((W_r H + b) / temperature)      one router for the whole model, for each token
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 4,
            "r": 8,
            "lora_alpha": 16,
            "router": "first_pass",
            "router_scope": "model",
            "gate": "dense",
        },
        sources="EricLBuehler/xlora and PEFT 0.21.2 (tuners/xlora): a classifier of depth 1 with "
        "bias, temperature 1, dense softmax, the same scalings for all layers. Number of experts, "
        "r and alpha are this library's choice: there they are those of the adapters loaded.",
        deviations="The experts train together with the router, from new ones; there they are "
        "trained adapters, frozen unless use_trainable_adapters is set. PEFT multiplies the "
        "experts' input by w, which for linear experts is the same as their output. Its layer-wise "
        "scalings, E for each module from one linear map, are router_scope='site', where every "
        "target must be as wide as the model. Its top-k, which cuts after the softmax, is "
        "gate='top_k_unnormalized'. A deeper classifier is router_options={'hidden_size': 2048}, "
        "with one hidden layer and without its dropout of 0.2. PEFT has no KV cache: it runs the "
        "whole prompt twice for every token. Here the first pass has a cache of its own, kept "
        "beside the other and reordered and cut with it, so that generating gives what one pass "
        "over the sequence gives; it costs a second cache and twice the base model's work.",
        citation="""@article{buehler2024xlora,
  title={{X-LoRA}: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language
         Models with Applications in Protein Mechanics and Molecular Design},
  author={Eric L. Buehler and Markus J. Buehler},
  journal={arXiv preprint arXiv:2402.07148},
  year={2024},
}""",
    )
)
