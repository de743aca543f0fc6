"""DS-MoE: dense in training, sparse at inference."""

from .base import Method, register_method

DS_MOE = register_method(
    Method(
        name="ds-moe",
        title="Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts "
        "Language Models",
        summary="all 8 experts in training, top-2 at inference, mutual information as the loss",
        arxiv="2404.05567",
        equations="""p = softmax(W_r x)
w_e = p_e                              for all experts in training
w_e = p_e                              for the K likeliest at inference, 0 elsewhere
L = mean over tokens of H(p) - H(mean over tokens of p)
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "router_scope": "block",
            "gate": "dense_training",
            "losses": {"mutual_information": 1e-2},
        },
        sources="The abstract: dense training of all experts, sparse inference, 30 to 40 per cent "
        "of the parameters active. Unverified: the loss, its coefficient of 1e-2 (here for I / log "
        "E), and whether the weights that are left are renormalised; here they aren't. Numbers of "
        "experts, r and alpha are this library's choice.",
        deviations="The paper trains whole models, attention heads included, and may also choose "
        "experts by a threshold on p. To see what the cut costs, evaluate the same adapter "
        "with gate='dense', top_k=None too.",
        citation="""@article{pan2024dense,
  title={Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts Language
         Models},
  author={Bowen Pan and Yikang Shen and Haokun Liu and Mayank Mishra and Gaoyuan Zhang and Aude
          Oliva and Colin Raffel and Rameswar Panda},
  journal={arXiv preprint arXiv:2404.05567},
  year={2024},
}""",
    )
)
