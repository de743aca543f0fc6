"""DSelect-k: selectors that point at experts by a smooth binary code."""

from .base import Method, register_method

DSELECT_K = register_method(
    Method(
        name="dselect-k",
        title="DSelect-k: Differentiable Selection in the Mixture of Experts with Applications "
        "to Multi-Task Learning",
        summary="2 selectors with a smooth 3-bit code over 8 experts: starts dense, ends sparse",
        arxiv="2106.03760",
        equations="""S(t) = 0 below -g/2, 1 above g/2, else 1/2 + 3 t / (2 g) - 2 (t / g)^3
b_i = S(W_i x)                          m = log2 E bits of selector i, i = 1..K
r_i(e) = product over j of (b_ij if bit j of e is set, else 1 - b_ij)
w = sum over i of softmax(W_a x)_i r_i
y = W x + sum over e of w_e (alpha / r) B_e A_e x
L = task loss + c mean over the tokens of sum over i of H(r_i)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "binary_selectors",
            "gate_options": {"gamma": 1.0},
            "router_options": {"init_std": 1e-2},
            "losses": {"selector_entropy": 1e-3},
        },
        sources="The authors' repository (google-research/dselect_k_moe): gamma 1, per-example "
        "gates, bits that start near 1/2. Unverified: the entropy coefficient, which the paper "
        "raises from about 1e-6; 1e-3 is this library's constant. Its experts are whole "
        "networks: numbers of experts, r and alpha are this library's choice.",
        deviations="The per-example form, by token; the static form, one gate per task, is a "
        "task table. The bit weights start normal with deviation 0.01 instead of uniform in "
        "+-gamma/100.",
        citation="""@inproceedings{hazimeh2021dselectk,
  title={{DSelect-k}: Differentiable Selection in the Mixture of Experts with Applications to
         Multi-Task Learning},
  author={Hussein Hazimeh and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021},
}""",
    )
)
