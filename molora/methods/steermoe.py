"""Steer-MoE: a mixture of steering vectors, added to what each layer gives on."""

from .base import Method, register_method

STEERMOE = register_method(
    Method(
        name="steermoe",
        title="Steer-MoE: Efficient Audio-Language Alignment with a Mixture-of-Experts Steering "
        "Module",
        summary="8 steering vectors at the end of each layer, weighted by a dense softmax",
        arxiv="2510.13558",
        equations="""u = W x + b                                 W the last linear module of a layer
p = softmax(W_r u + b_r)                      over E experts
y = u + g sum over e of p_e v_e               g one learned number for each layer, from 0.1""",
        defaults={
            "target_modules": r".*\.(fc2|down_proj)",
            "num_experts": 8,
            "r": 1,
            "lora_alpha": 1,
            "experts": "steering_vectors",
            "expert_options": {"scale": 0.1},
            "gate": "dense",
            "router": "output",
            "router_options": {"bias": True},
        },
        sources="The authors' repository (forfrt/SteerMoE, efficient_layer_wise_whisper.py): 8 "
        "experts, a learned scale that starts at 0.1, softmax, no auxiliary loss. It steers the "
        "layers of a Whisper encoder; for a whole Whisper add exclude_modules='.*decoder.*'.",
        deviations="The vectors start at zero instead of N(0, 0.01^2), so that a new adapter "
        "leaves the output as it is; the router starts random, and breaks the symmetry. The "
        "repository's router is one linear map with E outputs for each layer, of which a layer "
        "reads its own: the same as a router for each layer. It reads the layer's output, the "
        "residual stream; here it reads what the layer's last module adds to that stream, because "
        "a site knows no more. The projection between audio encoder and language model isn't part "
        "of the tuner. Unverified: settings of the paper's text where they differ from the "
        "repository's.",
        citation="""@article{feng2025steermoe,
  title={Steer-{MoE}: Efficient Audio-Language Alignment with a Mixture-of-Experts Steering Module},
  author={Feng, Ruitao and Zhang, Bixi and Liang, Sheng and Yuan, Zheng},
  journal={arXiv preprint arXiv:2510.13558},
  year={2025},
}""",
    )
)
