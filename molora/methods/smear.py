"""SMEAR: experts are merged for each sequence, by weights from the mean of its prompt."""

from .base import Method, register_method

SMEAR = register_method(
    Method(
        name="smear",
        title="Soft Merging of Experts with Adaptive Routing",
        summary="all experts merged for each sequence, weighted by the normalised mean of its "
        "prompt",
        arxiv="2306.03745",
        equations="""v = mean of x over the prompt's tokens                    once for a sequence
p = softmax(LN(v) LN'(W_r)^T + b)       LN' starts with a scale of 0.01
in training each p_e is 0 with probability 0.1, and w = p / (sum of p + 1e-10); else w = p
y = (W + s sum over e of w_e B_e A_e) x = W x + sum over e of w_e s B_e A_e x""",
        defaults={
            "target_modules": "all-linear",
            "num_experts": 8,
            "r": 24,
            "lora_alpha": 24,
            "gate": "expert_dropout",
            "gate_options": {"dropout": 0.1, "unit": "sequence"},
            "router": "layer_norm",
        },
        sources="The authors' repository (r-three/smear): 8 experts of width 24, expert dropout "
        "0.1, the router's normalisations and starts (W_r N(0, 0.01), scale 0.01, no division by "
        "sqrt(d)); learning rate 3e-4. Of the paper the abstract was read. Unverified: that the "
        "two layer norms have a scale and no shift of their own.",
        deviations="The experts are LoRA experts: merging what they add to the weight, B_e A_e, "
        "is the same as mixing their outputs, which is how it is computed. The published experts "
        "are bottleneck adapters whose two matrices are merged one by one, with a swish between "
        "them; merging A and B one by one would add terms of two experts each. alpha = r, s = 1. "
        "The mean is over the prompt of the module's own input, padding left out; published, over "
        "the encoder's whole input of the adapter, padding included (router_options={'pool': "
        "'sequence'} for models that read a whole sequence at once).",
        citation="""@article{muqeeth2023soft,
  title={Soft Merging of Experts with Adaptive Routing},
  author={Muqeeth, Mohammed and Liu, Haokun and Raffel, Colin},
  journal={arXiv preprint arXiv:2306.03745},
  year={2023},
}""",
    )
)
