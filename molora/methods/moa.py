"""MoA: adapters of several kinds, each weighed by itself, by one router for a layer."""

from .base import Method, register_method

TITLE = (
    "MoA: Heterogeneous Mixture of Adapters for Parameter-Efficient Fine-Tuning of Large "
    "Language Models"
)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
DEFAULTS = {
    "target_modules": MODULES,
    "num_experts": len(MODULES) + 1,
    "r": 8,
    "lora_alpha": 8,
    "experts": "module_adapters",
    "expert_options": {"modules": MODULES, "adapter": "down_proj", "adapter_size": 16},
    "router": "swiglu",
    "router_options": {"expansion": 4},
    "router_scope": "layer",
    "gate": "independent",
}
EQUATIONS = """z = W_2 (silu(W_1 x + b_1) * (W_3 x + b_3)) + b_2     once for a layer, x that of q
w = sigmoid(z){threshold}
y = W x + w_j (alpha / r) B A x                     at the j-th module
y = ... + w_a (U silu(D x + d) + u)                 at the down projection, the adapter"""
SOURCES = (
    "The authors' repository (DCDmllm/MoA): LoRA of rank 8 and alpha 8 on q, k, v, o and the "
    "feed-forward part's down projection, an adapter of 16 features beside that part, a router of "
    "4 hidden units per expert; weight decay 0.02, 2 epochs, learning rate 7.5e-4 at 32 examples."
)
DEVIATIONS = (
    "The adapter stands beside the down projection and reads its input, because a site is a linear "
    "module; the authors' stands beside the whole feed-forward part and reads that part's input. "
    "The prompt expert, 10 learned keys and values of the attention, isn't there: it needs the "
    "attention's inside. The adapter's U starts at zero instead of Xavier with gain 1e-4, so that "
    "a new adapter changes nothing. The router reads the normalised input of the block, as the "
    "authors' transformers version does; their other version reads it before the norm. Several "
    "experts inside one kind aren't there."
)
CITATION = """@article{cao2025moa,
  title={MoA: Heterogeneous Mixture of Adapters for Parameter-Efficient Fine-Tuning of Large
         Language Models},
  author={Cao, Jie and Lin, Tianwei and Yuan, Bo and Yan, Rolan and He, Hongyang and
          Zhang, Wenqiao and Li, Juncheng and Zhang, Dongping and Tang, Siliang and
          Zhuang, Yueting},
  journal={arXiv preprint arXiv:2506.05928},
  year={2025},
}"""

MOA = register_method(
    Method(
        name="moa",
        title=TITLE,
        summary="a LoRA for each module and an adapter, weighed by one router's sigmoids",
        arxiv="2506.05928",
        equations=EQUATIONS.format(threshold=""),
        defaults=DEFAULTS,
        sources=SOURCES,
        deviations=DEVIATIONS,
        citation=CITATION,
    )
)
