"""Octavius: one decision for all sites of the model, from the instruction's embeddings."""

from .base import Method, register_method

OCTAVIUS = register_method(
    Method(
        name="octavius",
        title="Octavius: Mitigating Task Interference in MLLMs via LoRA-MoE",
        summary="one top-2 decision for a sample and all sites, from the instruction's embeddings",
        arxiv="2311.02684",
        equations="""m = mean of the embeddings of the prompt's tokens        once for a sample
p = softmax(W_g m)                      one router for the whole model, no bias
w_e = p_e / sum of the 2 largest p      for those 2 experts, 0 elsewhere, at every token and site
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "num_experts": 4,
            "top_k": 2,
            "r": 32,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "gate": "top_k",
            "router": "instruction",
            "router_scope": "model",
        },
        sources="The authors' repository (OpenGVLab/LAMM, src/model/Octavius): 4 experts for "
        "images (3 for point clouds, 6 for both), r 32, alpha 32, dropout 0.1, W_g drawn from "
        "N(0, 1), q, k, v and o; learning rate 5e-4, 2 epochs. Of the paper the abstract was "
        "read.",
        deviations="The mean is over the prompt's real tokens; the repository's is over the "
        "padded length, and over the question alone in training but all text after the image in "
        "generation. The repository never applies alpha / r, which is 1 with its own numbers. A_e "
        "starts as kaiming-uniform of its own 2-D shape; the repository initialises all of them "
        "as one 3-D tensor, sqrt(r) smaller. The rule by which it means to drop a second expert "
        "at random has no effect there and is left out. Dividing by the sum has no 1e-9 beside "
        "it.",
        citation="""@article{chen2023octavius,
  title={Octavius: Mitigating Task Interference in {MLLMs} via {LoRA-MoE}},
  author={Chen, Zeren and Wang, Ziqin and Wang, Zhen and Liu, Huayang and Yin, Zhenfei and
          Liu, Si and Sheng, Lu and Ouyang, Wanli and Qiao, Yu and Shao, Jing},
  journal={arXiv preprint arXiv:2311.02684},
  year={2023},
}""",
    )
)
