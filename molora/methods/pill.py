"""PILL: an adapter for each modality, chosen by what the token is."""

from .base import Method, register_method

PILL = register_method(
    Method(
        name="pill",
        title="PILL: Plug Into LLM with Adapter Expert and Attention Gate",
        summary="one LoRA for text and one for images; the token's modality decides, no router",
        arxiv="2311.02126",
        equations="""w_m = 1                         for the token's modality m, 0 for the other
y = W x + (alpha / r) B_m A_m x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 2,
            "top_k": 1,
            "r": 8,
            "lora_alpha": 16,
            "gate": "top_k_unnormalized",
            "router": "own_modality",
        },
        sources="The authors' repository (DsaltYfish/PILL): an adapter for images and one for "
        "text before each feed-forward network, chosen by the token's modality. Target modules, r "
        "and alpha are this library's choice.",
        deviations="This is the rule of the mixture on LoRA experts: PILL's adapters are gated "
        "bottlenecks in front of the network, which no LoRA is, and its second part, a gate on the "
        "attention's values at image tokens, isn't there, nor is its shared adapter in front of "
        "the attention. More modalities are more experts. The batch must bring modality_ids, or "
        "the model mm_token_type_ids; generated tokens are text.",
        citation="""@article{zhang2023pill,
  title={{PILL}: Plug Into {LLM} with Adapter Expert and Attention Gate},
  author={Zhang, Fangyuan and Liang, Tingting and Wu, Zhengyuan and Yin, Yuyu},
  journal={arXiv preprint arXiv:2311.02126},
  year={2023},
}""",
    )
)
