"""Expert Choice: experts pick their tokens, so that every expert has the same load."""

from .base import Method, register_method

EXPERT_CHOICE = register_method(
    Method(
        name="expert-choice",
        title="Mixture-of-Experts with Expert Choice Routing",
        summary="each of 8 experts picks its tokens, 2 experts per token on average; no generation",
        arxiv="2202.09368",
        equations="""p = softmax(W_r x)                      one router per module, no bias
C = floor(n c / E)                      n real tokens in the batch, c experts each on average
w_te = p_te                             if t is among the C tokens with the largest p_te
w_te = 0                                else
y = W x + sum over e of w_e (alpha / r) B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "router": "linear",
            "gate": "expert_choice",
            "gate_options": {"capacity": 2.0},
        },
        sources="Unverified: the formula and c = 2 are from memory of the paper, of which only the "
        "abstract was at hand. Its experts are whole feed-forward layers: number of experts, r "
        "and alpha are this library's choice.",
        deviations="Padding takes no part in the choice, so a padded batch gives what its real "
        "tokens alone would. n is that of one micro-batch on one process. A token that no expert "
        "picks gets the base layer's output. Generation with a KV cache is refused, because "
        "tokens that come later take part in the choice; there is no second router that imitates "
        "it causally. A causal language model trained like this has a loss that saw the future: "
        "meant for encoders and for comparisons.",
        citation="""@article{zhou2022expertchoice,
  title={Mixture-of-Experts with Expert Choice Routing},
  author={Yanqi Zhou and others},
  journal={arXiv preprint arXiv:2202.09368},
  year={2022},
}""",
    )
)
