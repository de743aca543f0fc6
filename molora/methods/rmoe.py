"""RMoE: routers that are linked across layers by a recurrent unit."""

from .base import Method, register_method

RMOE = register_method(
    Method(
        name="rmoe",
        title="Layerwise Recurrent Router for Mixture-of-Experts",
        summary="top-2 by a GRU that runs over the layers, one decision per layer",
        arxiv="2408.06793",
        equations="""h_l = GRU(W_1l x, h_(l-1))    one GRU for all layers, h_0 = 0, for each token
p = softmax(W_2l h_l)
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "recurrent",
            "router_options": {"hidden_size": 256},
            "router_scope": "layer",
            "gate": "top_k",
            "losses": {"load_balancing": 1e-3},
        },
        sources="The authors' repository (qiuzh20/RMoE): a state of 256, the standard GRU, top-k "
        "softmax renormalised, balance coefficient 1e-3. Numbers of experts, r and alpha are this "
        "library's choice; the paper trains whole feed-forward networks.",
        deviations="The decision of a layer is made from the input of its first targeted module, "
        "here gate_proj's, which is the network's, and its other modules follow it. GRU and logits "
        "are computed in fp32. The gradient through h is exact, under both kinds of checkpointing "
        "too. Unverified: whether W_1 and W_2 have biases; here they have none.",
        citation="""@article{qiu2024layerwise,
  title={Layerwise Recurrent Router for Mixture-of-Experts},
  author={Zihan Qiu and Zeyu Huang and Shuang Cheng and Yizhi Zhou and Zili Wang and Ivan Titov and
          Jie Fu},
  journal={arXiv preprint arXiv:2408.06793},
  year={2024},
}""",
    )
)
