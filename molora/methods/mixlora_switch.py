"""MixLoRA with one expert per token, of limited capacity."""

from .base import Method, register_method
from .mixlora import BLOCK, CITATION, DEVIATIONS, SOURCES, TITLE

MIXLORA_SWITCH = register_method(
    Method(
        name="mixlora-switch",
        title=TITLE,
        summary="MixLoRA with the likeliest of 8 networks, 32 tokens of a sequence for each",
        arxiv="2404.15159",
        equations="""p = softmax(W_r x)                 one router per feed-forward network, no bias
w_e = p_e                               for the likeliest expert, 0 elsewhere
FFN_e(x) = D_e (act(G_e x) * U_e x)     with G_e = G + (alpha / r) B_e A_e, and so U_e and D_e
y = w_e FFN_e(x)
y = FFN_0(x)                           in training, past the first 32 tokens of a sequence for e""",
        defaults={
            **BLOCK,
            "gate": "switch",
            "gate_options": {"capacity": 32},
            "router_options": {"init_std": 1.0, "jitter": 0.01},
            "losses": {"load_balancing": 1e-3, "z_loss": 1e-3},
        },
        sources=SOURCES + "The repository's strategy of that name: capacity 32, jitter 0.01, "
        "router from N(0, 1), balance loss and z-loss 1e-3. It is in the code only; unverified: "
        "whether the paper has it.",
        deviations=DEVIATIONS + "The weight is p_max, as in the repository: a new adapter scales "
        "each network's output by it, which is near 1 for a router that starts from N(0, 1) on "
        "wide inputs. A token that finds its expert full gets the base network's output; there the "
        "network's input is passed on, p_max times, which skips the frozen network. Tokens count "
        "in the order of their sequence, so none depends on a later one or on another sequence; "
        "padding, counted there, takes no place. Outside training there is no limit: the cache of "
        "a generation doesn't tell how full an expert is, and there the whole block is skipped "
        "then. The balance loss is by site, over real tokens.",
        citation=CITATION,
    )
)
