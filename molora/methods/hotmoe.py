"""HotMoE: experts ask one another in the lower layers, tokens ask them in the upper ones."""

from .base import Method, register_method

HOTMOE = register_method(
    Method(
        name="hotmoe",
        title="Hybrid Routing for a Mixture of LoRA Experts",
        summary="top-2 of 5; attention among experts, by tokens in the upper half of the layers",
        arxiv=None,
        equations="""v = W_v x + b_v,  K = LN(c) W_k^T          c_e a vector for each expert
Q = LN(c) W_q^T                         in the lower half of the layers
Q = LN(U relu(D x + b_D) + b_U) W_q^T   in the upper half
p = softmax(softmax(Q K^T / sqrt(a)) v)
w = softmax(p / 0.1) over the 2 largest p, 0 elsewhere
y = W x + sum over e of w_e (alpha / sqrt(r)) B_e A_e x
L = task loss + 0.01 (max(0, log E - I) / log E
                      + mean over pairs of sequences of ((1 - S) C + 1.5 S (1 - C)))
I = H(mean w) - mean H(w);  C, S cosines of the sequences' mean inputs and mean weights""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 5,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "use_rslora": True,
            "gate": "sharpened_top_k",
            "gate_options": {"sharpness": 0.1},
            "router": "expert_attention",
            "router_options": {"vector_dim": 256, "attention_dim": 256},
            "losses": {"similarity_guided": {"coefficient": 0.01, "alike": 1.0, "unlike": 1.5}},
        },
        sources="The authors' repository (Starlight039/HotMoE), hotmoe/model.py and train.sh: "
        "equations, E, r, alpha, dropout, dimensions, the losses' factors. Its number of active "
        "experts is not in train.sh; 2 is this library's choice.",
        deviations="The losses are averaged over the routers, where the code adds them up. They "
        "are formed of one micro-batch, and of real tokens alone: the code's mean inputs include "
        "padding, and its micro-batches add up until the optimizer's step. The queries' map has no "
        "dropout. The code keeps a layer's attention between experts for inference if an equality "
        "of tensors holds; here it is formed in every pass.",
        citation="""@inproceedings{huang2026hybrid,
  title={Hybrid Routing for a Mixture of {LoRA} Experts},
  author={Huang, Yitong and Yang, Ziqi and Wang, Zihui and Qi, Jianzhong and Yu, Rongshan and
          Fan, Xiaoliang and Wang, Cheng},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2026},
}""",
    )
)
