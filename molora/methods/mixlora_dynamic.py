"""MixLoRA with as many experts as reach a share of the probability."""

from .base import Method, register_method
from .mixlora import BLOCK, CITATION, DEVIATIONS, SOURCES, TITLE

MIXLORA_DYNAMIC = register_method(
    Method(
        name="mixlora-dynamic",
        title=TITLE,
        summary="MixLoRA with the fewest of 8 networks whose probabilities reach 0.8",
        arxiv="2404.15159",
        equations="""p = softmax(W_r x)                 one router per feed-forward network, no bias
S = the shortest prefix of the experts, by falling p, with a sum of at least 0.8
w_e = p_e                               for e in S, 0 elsewhere, not renormalised
FFN_e(x) = D_e (act(G_e x) * U_e x)     with G_e = G + (alpha / r) B_e A_e, and so U_e and D_e
y = sum over e of w_e FFN_e(x)""",
        defaults={
            **BLOCK,
            "gate": "top_p",
            "gate_options": {"p": 0.8},
            "router_options": {"init_std": 0.02},
            "losses": {"load_balancing": 1e-3},
        },
        sources=SOURCES + "The repository's strategy of that name: top_p 0.8, router from "
        "N(0, 0.02), balance loss 1e-3. It is in the code only; unverified: whether the paper has "
        "it.",
        deviations=DEVIATIONS + "The weights sum to between 0.8 and 1, as in the repository, so a "
        "new adapter scales the output of each network down by as much; "
        "gate_options={'p': 0.8, 'renormalize': True} doesn't. The balance loss is 1 at balance, "
        "by site, over real tokens; the published one pools the layers, counts padding, and is the "
        "mean number of active experts at balance. The repository's temperature divides the "
        "probabilities and is off; router_options={'temperature': t} divides the logits.",
        citation=CITATION,
    )
)
