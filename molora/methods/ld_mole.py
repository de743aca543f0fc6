"""LD-MoLE: a differentiable sparse gate whose sparsity is learned per token."""

from .base import Method, register_method

LD_MOLE = register_method(
    Method(
        name="ld-mole",
        title="LD-MoLE: Learnable Dynamic Routing for Mixture of LoRA Experts",
        summary="sparsegen instead of top-k: how many experts a token uses is learned",
        arxiv="2509.25684",
        equations="""z = W_r x                               one router per module, no bias
lambda = log sigmoid(v relu(V x + c) + c_0) + 0.99
w_e = max(z_e - tau, 0) / (1 - lambda)  with the tau for which w sums to 1
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "gate": "sparsegen",
            "gate_options": {"hidden_size": 256, "eps": 1e-2},
            "router": "linear",
            "losses": {"load_balancing": 1.0},
        },
        sources="The authors' repository (eshentw/LD-MoLE): 8 experts, r 8, alpha 16, dropout 0.1, "
        "256 hidden units, eps 1e-2, c_0 from -2.5, seven target modules; run.sh sets the "
        "balance loss to 1.0. Its other losses are off there: 'z_loss', 'sparsity_budget' (the "
        "analytical sparsity control, K 2) and 'sparsity_slack'.",
        deviations="The paper's MLP for lambda is shared by all modules of equal d_in; here each "
        "decision has its own, so that a router and its gate stay one unit that can be saved, "
        "shared within a block and moved between devices: more parameters, 256 (d_in + 2) + 1 "
        "each; router_scope='block' shares it among modules of equal input, or lower hidden_size. "
        "c starts at 0; from -2.5 as in the code, hardly any relu unit fires on normalised "
        "inputs, and V and c get no gradient. Router and MLP read the input without dropout. "
        "load_balancing is the authors' formula to the letter, for the probabilities are the "
        "weights: f is a share of all selections there and here. The other three losses leave "
        "padding out, which theirs count.",
        citation="""@inproceedings{zhuang2026ldmole,
  title={{LD-MoLE}: Learnable Dynamic Routing for Mixture of {LoRA} Experts},
  author={Zhuang, Yuan and Shen, Yi and Bian, Yuexin and Su, Qing and Ji, Shihao and
          Shi, Yuanyuan and Miao, Fei},
  booktitle={International Conference on Learning Representations},
  year={2026},
}""",
    )
)
