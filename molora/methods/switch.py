"""Switch: one expert per token, weighted by its probability."""

from .base import Method, register_method

SWITCH = register_method(
    Method(
        name="switch",
        title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient "
        "Sparsity",
        summary="top-1 of 8 experts weighted by its probability, jittered router input",
        arxiv="2101.03961",
        equations="""p = softmax(W_r (x * u))                u ~ U(0.99, 1.01) in training, else 1
e* = argmax p
y = W x + p_e* (alpha / r) B_e* A_e* x
L = task loss + c E sum over e of (share of tokens that use e) (mean p_e)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 8,
            "lora_alpha": 16,
            "gate": "switch",
            "router": "linear",
            "router_options": {"jitter": 0.01},
            "losses": {"load_balancing": 1e-2},
        },
        sources="The router as read in Megatron-LM and in MoE-PEFT's switch preset (jitter 0.01). "
        "Unverified: the coefficient 1e-2 is from memory of the paper. Its experts are whole "
        "feed-forward layers, pre-trained: numbers of experts, r and alpha are this library's "
        "choice.",
        deviations="No capacity: every token gets its expert. The weight is about 1 / E at the "
        "start and scales the update down by as much; raise lora_alpha, or take top-2.",
        citation="""@article{fedus2022switch,
  title={Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient
         Sparsity},
  author={William Fedus and Barret Zoph and Noam Shazeer},
  journal={Journal of Machine Learning Research},
  year={2022},
}""",
    )
)
