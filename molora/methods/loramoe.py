"""LoRAMoE: a dense softmax mixture in the feed-forward layers, with experts in two groups."""

from .base import Method, register_method

LORAMOE = register_method(
    Method(
        name="loramoe",
        title="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via "
        "MoE-Style Plugin",
        summary="dense softmax over 8 experts on the feed-forward layers; groups by task if asked",
        arxiv="2312.09979",
        equations="""w = softmax(W_r x)                      one router per module, no bias
y = W x + sum over e of w_e (alpha / r) B_e A_e x
Z_{b,e} = (1 +- delta) mean over the tokens of sample b of w_e      + if e's group is b's task
L = task loss + beta var(Z) / mean(Z)^2                             localized balancing""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 8,
            "r": 4,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "gate": "dense",
            "router": "linear",
        },
        sources="The authors' repository (Ablustrund/LoRAMoE), run_loramoe.sh: 8 experts, r 4, "
        "alpha 32, dropout 0.05; learning rate 2e-4. Unverified: delta 0.1, the loss's default "
        "here, is from memory of the paper; beta was not found.",
        deviations="Localized balancing is off by default, because the released script sets delta "
        "and beta to 0 and because it needs the task of every sample. Switch it on with "
        "losses={'localized_balancing': beta} and give the ids with molora.TaskIdCollator; it is "
        "averaged over sites, where the code sums: beta there is beta times the number of sites "
        "here. It leaves padding out and takes means over a sample's tokens, where the code sums "
        "over the padded length. Logits are computed in fp32. One dropout mask per site instead of "
        "one per expert. For models that name their feed-forward layers differently, set "
        "target_modules. moe-peft 2.0.2's LoRAMoE has the same formula without any loss, and its "
        "logits and gradients equal these to rounding; its dropout stays on in evaluation "
        "(examples/compare_with_peers).",
        citation="""@article{dou2023loramoe,
  title={{LoRAMoE}: Alleviate World Knowledge Forgetting in Large Language Models via
         {MoE}-Style Plugin},
  author={Dou, Shihan and Zhou, Enyu and Liu, Yan and Gao, Songyang and Zhao, Jun and Shen, Wei and
          Zhou, Yuhao and Xi, Zhiheng and Wang, Xiao and Fan, Xiaoran and others},
  journal={arXiv preprint arXiv:2312.09979},
  year={2023},
}""",
    )
)
