"""HydraLoRA: one down factor that all experts share, and an up factor for each."""

from .base import Method, register_method

HYDRALORA = register_method(
    Method(
        name="hydralora",
        title="HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
        summary="one shared A, an up factor B for each of 4 experts, mixed by a dense softmax",
        arxiv="2404.19245",
        equations="""w = softmax(W_r x)                      one router per module, no bias
y = W x + (alpha / r) sum over e of w_e B_e A x""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 4,
            "r": 4,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "experts": "shared_a",
            "gate": "dense",
            "router": "linear",
        },
        sources="The authors' repository (Clin0212/HydraLoRA), fine-tuning.sh: 4 experts, r 4, "
        "alpha 32, dropout 0.05, the feed-forward layers (confirmed by the authors in its issues); "
        "learning rate 2e-4, cosine.",
        deviations="A x is computed once, with one dropout mask; the code draws a mask per expert. "
        "Logits are computed in fp32. The k-means that the paper chooses the number of experts "
        "with isn't in the code either: num_experts is yours to set. All B start equal, at zero; "
        "the random router is what tells the experts apart. The repository's multimodal variant "
        "(hard top-1 with a balance loss) is another method: experts='shared_a' with the gate "
        "and loss of llava-mole.",
        citation="""@inproceedings{tian2024hydralora,
  title={{HydraLoRA}: An Asymmetric {LoRA} Architecture for Efficient Fine-Tuning},
  author={Tian, Chunlin and Shi, Zhan and Guo, Zhijiang and Li, Li and Xu, Chengzhong},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024},
}""",
    )
)
