"""S'MoRE: a token's experts are sub-trees of low-rank residuals."""

from .base import Method, register_method

SMORE = register_method(
    Method(
        name="smore",
        title="S'MoRE: Structural Mixture of Residual Experts for Parameter-Efficient LLM "
        "Fine-tuning",
        summary="a tree of 4 + 4 residuals, 2 branches followed at each node, tanh between layers",
        arxiv="2504.06426",
        equations="""q = MLP_l([D x + d, keys of the nodes above]), p = softmax(keys_l q)
w = p of the f likeliest branches, divided by their sum, from the root down
x_{l+1}^i = sum over n of w_{i,n} tanh(B_l^n (A_l^n x + a) + b + W_l x_l^n + c)    upwards
y = W x + P x_L + b_P    no W_l at the leaves""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 16,
            "top_k": 4,
            "r": 8,
            "lora_alpha": 1,
            "scaling_rule": "constant",
            "experts": "residual_tree",
            "expert_options": {"depth": 2, "activation": "tanh"},
            "gate": "tree_top_k",
            "gate_options": {"depth": 2},
            "router": "tree",
            "router_options": {"depth": 2, "hidden_size": 32, "key_size": 32},
            "losses": {"load_balancing": 1e-2},
        },
        sources="The authors' repository (ZimpleX/SMoRE-LLM, hier_moe/layer.py, moe_gates.py and "
        "the example): two layers of 4 residuals, fan-out 2, keys and down-projection of 32, "
        "switch gate, tanh, scale 1, P zero at the start (w_final_zero), one router for each of "
        "gate, up and down; learning rate 1e-4, cosine, warmup 0.1, 2 epochs, gradient norm 1. "
        "The rank was searched between 8 and 64.",
        deviations="The balance loss is one over the 16 paths of a site and the mean over sites, "
        "where the repository adds one for each layer of the tree, with 1e-2 too. All layers have "
        "the same number of residuals, rank and fan-out. Following one branch at each node, "
        "weighted by the raw probability, is refused: give the tree more branches or use top_k=4. "
        "Of the gates, noisy top-k by cosine isn't there; top_k=16 is the dense one. The variants "
        "that share one pool of residuals between layers, or apply tanh to the child alone, "
        "aren't there. Biases start at zero.",
        citation="""@inproceedings{zeng2025smore,
  title={S'MoRE: Structural Mixture of Residual Experts for Parameter-Efficient {LLM} Fine-tuning},
  author={Zeng, Hanqing and Xia, Yinglong and Zhao, Zhuokai and Jiang, Chuan and Zhang, Qiang and
          Liu, Jiayi and Zhang, Qunshu and Zhang, Lizhu and Fan, Xiangjun and Zhang, Benyu},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
}""",
    )
)
