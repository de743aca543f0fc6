"""Soft-MoA: bottleneck adapters on soft mixtures of tokens."""

from .base import Method, register_method

SOFT_MOA = register_method(
    Method(
        name="soft-moa",
        title="Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of "
        "Adapters",
        summary="7 bottleneck adapters on soft mixtures of an encoder's tokens, beside attention",
        arxiv="2402.00828",
        equations="""L = X Phi                            (m, E p), of one sequence of m tokens
D = softmax of L over the tokens,  C = softmax of L over the slots
Z_e = B_e gelu(A_e (D^T X)_e + a_e) + b_e    of each expert's p slots
y = W x + (C Z) of that token""",
        defaults={
            "target_modules": r".*(attention\.output\.dense|o_proj|out_proj)",
            "num_experts": 7,
            "r": 6,
            "lora_alpha": 1,
            "scaling_rule": "constant",
            "experts": "slot_adapters",
            "gate": "soft_slots",
            "gate_options": {"slots": 1},
            "router": "linear",
        },
        sources="The authors' repository (umbertocappellazzo/PETL_AST, MoA.py): 7 adapters in the "
        "example, 2 to 15 in the study, one slot each, reduction 128 (768 / 128 = 6 features), "
        "GELU, beside the self-attention by default; learning rate 5e-3, weight decay 0.1.",
        deviations="The adapters stand beside the attention's output projection and read its "
        "input, because a site is a linear module; the authors' stand beside the whole attention "
        "and read its normalised input. There both layers of an adapter start at zero, and then "
        "nothing but the last bias ever learns: here A starts kaiming-uniform. Phi starts "
        "kaiming-uniform instead of Xavier-normal. Normalising X and Phi, off by default there, "
        "and the variant with a dense softmax for each token aren't there. Norms and classifier "
        "don't train unless modules_to_save names them. Padding is read by no slot. Experts see "
        "later tokens, so causal models and decoders are refused, unless "
        "gate_options={'allow_non_causal': True}; KV caches and packed rows are refused in any "
        "case.",
        citation="""@inproceedings{cappellazzo2024efficient,
  title={Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of Adapters},
  author={Cappellazzo, Umberto and Falavigna, Daniele and Brutti, Alessio},
  booktitle={Interspeech},
  year={2024},
}""",
    )
)
