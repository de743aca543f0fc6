"""Omni-SMoLA: low-rank experts on soft mixtures of tokens."""

from .base import Method, register_method

OMNI_SMOLA = register_method(
    Method(
        name="omni-smola",
        title="Omni-SMoLA: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank "
        "Experts",
        summary="16 LoRA experts of rank 4 on soft mixtures of an encoder's tokens",
        arxiv="2312.00968",
        equations="""L = X Phi                            (m, E p), of one sequence of m tokens
D = softmax of L over the tokens,  C = softmax of L over the slots
Z_e = (alpha / r) B_e A_e (D^T X)_e  of each expert's p slots
y = W x + (C Z) of that token""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 16,
            "r": 4,
            "lora_alpha": 4,
            "experts": "slot_lora",
            "gate": "soft_slots",
            "gate_options": {"slots": 1},
            "router": "linear",
        },
        sources="Unverified: of the paper only the abstract was at hand. It says that experts of "
        "low rank are mixed softly, after Soft MoE (arXiv 2308.00951), beside a frozen model; "
        "dispatch and combine are read as in Soft MoE. Rank 4 and tens of experts in the linear "
        "modules of a multimodal encoder are from memory; 16 experts, one slot and alpha are ours.",
        deviations="One set of experts reads all tokens; the sets for text and for images alone "
        "aren't there. Padding is read by no slot. Experts see later tokens, so causal models and "
        "decoders are refused, unless gate_options={'allow_non_causal': True}; KV caches and "
        "packed rows are refused in any case.",
        citation="""@inproceedings{wu2024omni,
  title={Omni-{SMoLA}: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank Experts},
  author={Wu, Jialin and Hu, Xia and Wang, Yaqing and Pang, Bo and Soricut, Radu},
  booktitle={Conference on Computer Vision and Pattern Recognition},
  year={2024},
}""",
    )
)
