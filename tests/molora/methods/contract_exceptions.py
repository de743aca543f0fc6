"""Where a published method differs on purpose from the contract of all methods, and why.

`test_all_methods.py` reads these tables; a method that is in none of them keeps the whole contract.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

# Settings for two layers of 32 features, where the published ones don't fit.
FIT: dict[str, dict[str, Any]] = {
    "hotmoe": {"router_options": {"vector_dim": 8, "attention_dim": 6}},
    "mhr": {"target_modules": "all-linear", "lora_alpha": 16},  # see poly
    "mola": {"num_experts": [2, 4]},  # published: four groups of layers
    # half of the vocabulary, so that both kinds of ids occur
    "maskmoe": {"router_options": {"frequent": 4, "rare": 1, "frequent_ids": 32}},
    "mos": {"r": 3},  # the pools of two layers hold no more
    "mosld": {"num_experts": [4, 2]},  # published: four groups of layers
    "poly": {"target_modules": "all-linear", "lora_alpha": 16},  # 1/8 of q and v teaches too little
    "omni-smola": {"gate_options": {"allow_non_causal": True}},
    "soft-moa": {"gate_options": {"allow_non_causal": True}},
    "steermoe": {"target_modules": "all-linear"},  # two shifts teach a random model too little
    "thor": {"num_experts": 2},  # a step trains one expert of a site: 12 steps don't train 8
}
# A new adapter leaves the base model's output as it is, or else near it.
STARTS_NEAR: dict[str, float] = {
    "goat": 0.02,  # the experts' start is subtracted again, but equals it in the mean only
    "dynmole": 1e-6,  # equal outputs, weighted: to rounding
    "mixlora": 1e-6,  # likewise
    "mixlora-dynamic": 0.01,  # weights that sum to 0.8 or more scale each network's output
    "mixlora-switch": 0.05,  # p_max scales each network's output
}
# Routing weights of a token sum to 1 in evaluation, except:
SUMS: dict[str, str] = {
    "ds-moe": "at most 1",  # raw probabilities
    "moa": "free",  # every expert by itself
    "moa-sparse": "free",
    "adamoe-vla": "free",  # a head of its own weighs
    "awaker": "at most 1",  # p_max; the shared expert gets the rest
    "dselect-k": "at most 1",  # some codes may stand for no expert
    "expert-choice": "at most 1",  # raw probabilities of the experts that want the token
    "flylora": "count",  # weight 1 for each
    "mhr": "free",  # 1 in each block of features
    "mixlora-dynamic": "at most 1",  # raw probabilities
    "mixlora-switch": "at most 1",  # p_max
    "milora": "at most 1",  # raw probabilities
    "moma": "at most 1",  # raw probabilities
    "mor1e": "at most 1",  # times a learned scalar
    "moge": "at most 1",  # raw probabilities
    "mora": "at most 1",  # weak experts are dropped, the others keep their weight
    "null-experts": "at most 1",  # 0 where only null experts were chosen
    "omni-router": "at most 1",  # p_max
    "remoe": "free",  # positive logits
    "sparsemixer": "free",  # two masked softmaxes, one weight from each
    "stablemoe": "at most 1",  # a sigmoid
    "switch": "at most 1",  # p_max
    "t-rex": "at most 1",  # times a learned scalar
    "top-p": "at most 1",  # raw probabilities
}
SUM_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1": lambda total, used: (total - 1).abs() < 1e-4,
    "at most 1": lambda total, used: (total >= 0) & (total < 1 + 1e-4),
    "count": lambda total, used: total == used,
    "free": lambda total, used: total.isfinite(),
}
# Tokens use exactly top_k experts (or all, with a dense gate), except:
COUNTS: dict[str, str] = {
    "moa-sparse": "free",  # those that reach the threshold
    "adamole": "at least 1",
    "dselect-k": "at least 1",  # dense until the codes have saturated
    "dynmoe": "at least 1",
    "dynmole": "at least 1",
    "expert-choice": "free",  # as many as want the token
    "ld-mole": "at least 1",
    "maskmoe": "at most top_k",  # 1 for rare ids
    "mixlora-dynamic": "at least 1",
    "mora": "at most top_k",
    "null-experts": "at most top_k",
    "remoe": "free",  # top_k is what the penalty leaves on average
    "top-p": "at least 1",
}
COUNT_RULES: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "top_k": lambda used, top_k: used == top_k,
    "at most top_k": lambda used, top_k: used <= top_k,
    "at least 1": lambda used, top_k: used >= 1,
    "free": lambda used, top_k: used >= 0,
}
# Renaming the experts together with their router rows changes nothing, except:
ORDERED: dict[str, str] = {
    "dselect-k": "the router gives bits of the experts' numbers",
    "maskmoe": "which experts an id may use goes by their numbers",
    "mhr": "an expert belongs to a block of features",
    "lily": "its up factors belong to all layers",
    "moa": "an expert belongs to a kind of module",
    "moa-sparse": "an expert belongs to a kind of module",
    "moge": "experts compete within their group",
    "milora": "each expert belongs to a module",
    "moiie": "which experts a modality may use goes by their numbers",
    "moma": "which experts a modality may use goes by their numbers",
    "pill": "an expert belongs to the modality of its number",
    "smore": "an expert is a path, and each residual is in several",
    "t-rex": "an expert is a pair of vectors, and each vector is in several experts",
}
# The router learns from the task, except where its gate says `task_trains_router = False`, and:
UNTAUGHT: dict[str, str] = {
    "sparsemixer": "only tokens whose best logits nearly tie teach it",
    "stablemoe": "its second router has a loss of its own",
}
# Parameters that training may leave alone, by a part of their name:
AT_REST: dict[str, tuple[str, ...]] = {
    "milora": ("molora_experts",),  # a module that neither prompt has chosen
    "sparsemixer": ("router",),  # see above
}
# With one expert the method is plain LoRA, wherever no router is made then, except:
NOT_LORA: dict[str, str] = {
    "mhr": "one expert can't be cut in blocks",
    "milora": "its experts are the layer's modules",
    "moge": "one expert can't be cut in groups",
    "moma": "one expert isn't one for each modality",
    "pill": "one expert isn't one for each modality",
    "mov": "its experts scale the output",
    "lily": "its up factors belong to all layers",
    "mos": "its factors are put together from shards",
    "smore": "its experts aren't linear",
    "steermoe": "its experts shift the output",
}
# A token's output depends on itself and the tokens before it alone, except:
NOT_CAUSAL: dict[str, str] = {
    "expert-choice": "experts choose among all tokens of the batch",
    "omni-smola": "experts read mixtures of all tokens of a sequence",
    "soft-moa": "experts read mixtures of all tokens of a sequence",
}
# The learning rate that a dozen steps need, 1e-2 except:
RATES: dict[str, float] = {
    "mov": 0.5,  # it changes what is there by a few per cent
    "steermoe": 0.02,  # vectors times 0.1
}
# What a batch must bring beside task ids.
BATCH: dict[str, dict[str, Tensor]] = {}
