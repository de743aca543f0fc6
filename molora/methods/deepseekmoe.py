"""DeepSeekMoE: many small experts, a shared one, and balance without a loss."""

from .base import Method, register_method

DEEPSEEKMOE = register_method(
    Method(
        name="deepseekmoe",
        title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language "
        "Models",
        summary="4 of 16 small experts and a shared one, sigmoid scores, balanced by a bias",
        arxiv="2401.06066",
        equations="""s = sigmoid(W_r x)                      one router per module, no bias
S = the K largest s + b                 b selects only
w_e = s_e / sum over S of s             for e in S, 0 elsewhere
y = W x + (alpha / r) (B_0 A_0 x + sum over e of w_e B_e A_e x)     0 the shared expert
b_e += u sign(mean count - count_e)     after each optimizer step""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 16,
            "num_shared_experts": 1,
            "top_k": 4,
            "r": 4,
            "lora_alpha": 8,
            "gate": "sigmoid",
            "gate_options": {"update_rate": 1e-3},
            "router": "linear",
        },
        sources="The structure, fine-grained experts beside a shared one, is that of the paper; "
        "sigmoid scores and the bias are those of DeepSeek-V3 (arXiv 2412.19437, bias from arXiv "
        "2408.15664) as read in Megatron-LM. Unverified: u 1e-3 is from memory. Pre-training "
        "methods both: numbers of experts, r and alpha are this library's choice, with the "
        "parameters of 8 experts of rank 8.",
        deviations="V3 multiplies the weights by 2.5: gate_options={'scale': 2.5}; here the "
        "scaling is alpha's. No groups of devices, no sequence-wise balance loss. The first "
        "paper's softmax and balance loss are gate='top_k_unnormalized' with "
        "gate_options={} and losses={'load_balancing': c}. With few experts b may swing; a smaller "
        "update_rate calms it.",
        citation="""@article{dai2024deepseekmoe,
  title={{DeepSeekMoE}: Towards Ultimate Expert Specialization in Mixture-of-Experts Language
         Models},
  author={Damai Dai and Chengqi Deng and Chenggang Zhao and R. X. Xu and Huazuo Gao and others},
  journal={arXiv preprint arXiv:2401.06066},
  year={2024},
}""",
    )
)
