"""GOAT: experts from segments of the base weight's singular values, with the scale of theory."""

from .base import Method, register_method

GOAT = register_method(
    Method(
        name="goat",
        title="Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and "
        "Mixture-of-Experts Optimization Alignment",
        summary="top-2 of 8 experts that start from 8 segments of the base weight's SVD",
        arxiv="2502.16894",
        equations="""W = U S V^T in E segments; expert e starts from the first r of segment e:
B_e = U sqrt(S / (s rho)), A_e = sqrt(S / (s rho)) V^T;  B0, A0 keep these values
p = softmax(W_r x)                      one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + s sum over e of (w_e B_e A_e - B0_e A0_e / E) x,  s = sqrt(3 eta d_in / r)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "top_k": 2,
            "r": 1,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "experts": "svd_segments",
            "expert_options": {"eta": 1.0, "rho": 10.0},
            "gate": "top_k",
            "router": "linear",
            "losses": {"load_balancing": 1e-3},
        },
        sources="The authors' repository (Facico/GOAT-PEFT), math.sh: 8 experts, K 2, total rank 8 "
        "(1 each), alpha 16, eta 1, dropout 0.05, balance loss 1e-3; rho 10; learning rate 2e-5, "
        "batch 32, 5 epochs.",
        deviations="The base weight is not edited: what the code subtracts from it is a frozen "
        "correction of low rank beside the experts, saved with the adapter, so disabling the "
        "adapter restores the model and quantised bases work. As there, the output starts equal "
        "to the base model's only where every weight is 1/E. Published versions of the code "
        "differ in s: the theory's sqrt(3 eta d_in / r), the default here, or alpha / r: "
        "expert_options={'eta': None}. segment_end='last' is the code's goat_mini. The code's "
        "balance loss is K times load_balancing and summed over the modules: multiply 1e-3 by K "
        "times their number for its weight at balance. One dropout mask per site instead of one "
        "per expert. The SVD of every target runs on creation; loading into low_cpu_mem_usage=True "
        "skips it. With num_experts=1 this is plain LoRA.",
        citation="""@article{fan2025make,
  title={Make {LoRA} Great Again: Boosting {LoRA} with Adaptive Singular Values and
         Mixture-of-Experts Optimization Alignment},
  author={Fan, Chenghao and Lu, Zhenyi and Liu, Sichen and Gu, Chengfeng and Qu, Xiaoye and
          Wei, Wei and Cheng, Yu},
  journal={arXiv preprint arXiv:2502.16894},
  year={2025},
}""",
    )
)
