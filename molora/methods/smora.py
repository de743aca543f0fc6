"""SMoRA: every rank of one LoRA is an expert."""

from .base import Method, register_method

SMORA = register_method(
    Method(
        name="smora",
        title="Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task "
        "Learning",
        summary="the 64 ranks of one LoRA are experts, 8 of them active, balanced by a bias",
        arxiv="2501.15103",
        equations="""s = sigmoid(W_r x) + b                  R scores, one router per module
w_i = s_i / sum of the K largest s      for those K ranks, 0 elsewhere
y = W x + alpha sum over i of w_i b_i (a_i x)
b_i += u sign(mean count - count_i)     after each optimizer step""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 1,
            "r": 64,
            "rank_wise": True,
            "top_k": 8,
            "lora_alpha": 16,
            "scaling_rule": "constant",
            "gate": "biased_sigmoid",
            "gate_options": {"update_rate": 1e-5},
            "router": "linear",
        },
        sources="The authors' repository (StyxXuan/smora): 64 ranks, 8 active, alpha 16, u 1e-5, "
        "no dropout, all linear layers; learning rate 1e-4, cosine, batch 128 to 256, 3 epochs. "
        "Unverified: the paper was known from its abstract.",
        deviations="The code's gates sum to K and its scale is alpha / K; here the weights sum to "
        "1 and the scale is alpha, the same product. b moves once after each optimizer step, by "
        "the counts of all its micro-batches and processes and without padding, and not in every "
        "forward: there gradient checkpointing counts twice and selects by another b the second "
        "time. Router logits come from the input without dropout. `rank_partition`, gates of "
        "several ranks each, is num_experts with r above 1 and rank_wise=False.",
        citation="""@article{zhao2025each,
  title={Each Rank Could be an Expert: Single-Ranked Mixture of Experts {LoRA} for Multi-Task
         Learning},
  author={Zhao, Ziyu and Zhou, Yixiao and Zhang, Zhi and Zhu, Didi and Shen, Tao and Li, Zexi and
          Yang, Jinluan and Wang, Xuwu and Su, Jing and Kuang, Kun and others},
  journal={arXiv preprint arXiv:2501.15103},
  year={2025},
}""",
    )
)
