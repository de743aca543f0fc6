"""ReMoE: a ReLU in place of the softmax and its top-k."""

from .base import Method, register_method

REMOE = register_method(
    Method(
        name="remoe",
        title="ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
        summary="weights max(z, 0); a penalty that follows the load leaves 2 of 8 on average",
        arxiv="2412.14711",
        equations="""w = max(W_r x, 0)                       one router per module, no bias
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + lambda (E / K) sum over e of f_e mean over the tokens of w_e
f_e the share of the tokens that use e
lambda <- 1.2 lambda after a step in which tokens used more than K experts, lambda / 1.2 else""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "relu",
            "gate_options": {"start": 1e-8, "growth": 1.2},
            "router": "linear",
            "losses": {"relu_sparsity": 1.0},
        },
        sources="The authors' repository (thu-ml/ReMoE): the gate, the penalty with the load as "
        "its weight, lambda's start and growth. Its experts are whole feed-forward layers: E, K, r "
        "and alpha are this library's choice.",
        deviations="lambda belongs to a module and follows the module's own load, where the code "
        "has one for the mean over all layers: each module ends with K experts per token on "
        "average, so tokens may differ in their number, and modules don't. It changes after the "
        "optimizer's step and not in forward. A token whose logits are all negative gets the base "
        "layer's output.",
        citation="""@article{wang2024remoe,
  title={{ReMoE}: Fully Differentiable Mixture-of-Experts with {ReLU} Routing},
  author={Wang, Ziteng and Zhu, Jun and Chen, Jianfei},
  journal={arXiv preprint arXiv:2412.14711},
  year={2024},
}""",
    )
)
