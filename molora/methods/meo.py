"""MEO: the experts that a sequence selects are merged into one."""

from .base import Method, register_method

MEO = register_method(
    Method(
        name="meo",
        title="Merging Experts into One: Improving Computational Efficiency of Mixture of Experts",
        summary="12 of 16 experts merged for each sequence, by noisy top-k of the mean of its "
        "prompt",
        arxiv="2310.09832",
        equations="""v = mean of x over the prompt's tokens                    once for a sequence
h = W_g v + n (softplus(W_n v) + 0.01), n ~ N(0, 1) in training; h = W_g v otherwise
w = softmax over the 12 largest h, 0 elsewhere
y = (W + s sum over e of w_e B_e A_e) x = W x + sum over e of w_e s B_e A_e x
L = task loss + 1e-2 (CV(sum of w)^2 + CV(load)^2),  load: the noise's chance to choose it""",
        defaults={
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "num_experts": 16,
            "top_k": 12,
            "r": 8,
            "lora_alpha": 16,
            "gate": "noisy_top_k",
            "gate_options": {"per_sequence": True},
            "router": "prompt_mean",
            "router_options": {"zero_init": True},
            "losses": {"importance_cv": 1e-2, "load_cv": 1e-2},
        },
        sources="The authors' repository (Shwai-He/MEO): 16 experts, 12 active, W_g and W_n start "
        "at 0, both losses with 1e-2; feed-forward modules of BERT, GPT-2, T5 and BART. Of the "
        "paper the abstract was read. r and alpha are this library's choice.",
        deviations="The experts are LoRA experts instead of whole matrices: merging what they add "
        "to the weight is the same as mixing their outputs, which is how it is computed. The mean "
        "is over the prompt, padding left out; published, over all tokens, padding included "
        "(router_options={'pool': 'sequence'} for models that read a whole sequence at once). The "
        "losses count a sequence once for each of its real tokens. The bottleneck that the "
        "token-level variant puts before the experts is left out.",
        citation="""@article{he2023merging,
  title={Merging Experts into One: Improving Computational Efficiency of Mixture of Experts},
  author={He, Shwai and Fan, Run-Ze and Ding, Liang and Shen, Li and Zhou, Tianyi and Tao, Dacheng},
  journal={arXiv preprint arXiv:2310.09832},
  year={2023},
}""",
    )
)
