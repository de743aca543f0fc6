"""LLaVA-MoLE: one expert per token in the feed-forward part, plain LoRA on the attention."""

from .base import Method, register_method

LLAVA_MOLE = register_method(
    Method(
        name="llava-mole",
        title="LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in "
        "Instruction Finetuning MLLMs",
        summary="hard top-1 of 3 experts, one decision per feed-forward part; LoRA on attention",
        arxiv="2401.16160",
        equations="""z = W_r x + b                           x the input of the feed-forward part
e* = argmax z                           for gate, up and down alike
y = W x + (alpha / r) B_e* A_e* x       with weight 1, whatever the probability
q, k, v, o: y = W x + (alpha / r) B A x
L = task loss + c sum over e of (share of tokens that use e) (mean of softmax(z)_e)""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": {"(q|k|v|o)_proj": 0, ".*": 3},
            "num_shared_experts": {"(q|k|v|o)_proj": 1, ".*": 0},
            "top_k": 1,
            "r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "gate": "indicator",
            "router": "linear",
            "router_options": {"bias": True},
            "router_scope": "layer",
            "losses": {"load_balancing": 0.05 / 3},
        },
        sources="The first author's repository (forwchen/LLaVA-MoLE, inference only): 3 experts, r "
        "32, alpha 64, dropout 0.05, router bias. A checkpoint's name says r 16, alpha 32. "
        "Unverified: the loss's weight, 0.05 in HydraLoRA's port of it; the published loss is 1/E "
        "of this library's, hence 0.05 / 3.",
        deviations="The balance loss takes each layer's tokens by itself; the code pools all "
        "layers and does so for each sample. The router is trained by the balance loss alone: a "
        "weight of 1 passes no gradient from the task, in the code neither. Router biases start at "
        "0, logits are computed in fp32. The code's dense mode is gate='dense' with "
        "top_k=None and losses={}.",
        citation="""@article{chen2024llavamole,
  title={{LLaVA-MoLE}: Sparse Mixture of {LoRA} Experts for Mitigating Data Conflicts in
         Instruction Finetuning {MLLM}s},
  author={Shaoxiang Chen and Zequn Jie and Lin Ma},
  journal={arXiv preprint arXiv:2401.16160},
  year={2024},
}""",
    )
)
