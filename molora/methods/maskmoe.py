"""MaskMoE: an id of the vocabulary sees some experts only, a rare one a single expert."""

from .base import Method, register_method

MASKMOE = register_method(
    Method(
        name="maskmoe",
        title="MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
        summary="top-2 among experts drawn once for each id of the vocabulary; rare ids see one",
        arxiv="2407.09816",
        equations="""V_t of the E experts are drawn once for the id of token t, at each router
p = softmax(W_r x) over those           one router per module, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere; 1 where V_t = 1
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "top_k": 2,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k",
            "router": "token_mask",
            "router_options": {"frequent": 4, "rare": 1, "frequent_ids": 10_000},
            "losses": {"load_balancing": 1e-2},
        },
        sources="Unverified: the paper's abstract and a second-hand summary. From them are the "
        "fixed random masks for each layer, and one visible expert for rare ids, more for "
        "frequent ones. All numbers are this library's choice.",
        deviations="Ids below frequent_ids count as frequent, because a byte-pair vocabulary is "
        "numbered by frequency, roughly; published, they are counted in the corpus. The masks are "
        "a hash of the id instead of a table over the vocabulary. The routers are those of LoRA "
        "experts. The benefit has been shown in pre-training.",
        citation="""@article{su2024maskmoe,
  title={{MaskMoE}: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts},
  author={Su, Zhenpeng and others},
  journal={arXiv preprint arXiv:2407.09816},
  year={2024},
}""",
    )
)
