"""The sparse architecture that a dense one becomes, and its configuration."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

# What a configuration says of itself, not of the model.
ABOUT_ITSELF = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"}


def _off(value: object) -> bool:
    return not value


def _any(value: object) -> bool:
    return True


def _all_full(value: list[str] | None) -> bool:
    return set(value or ()) <= {"full_attention"}


@dataclass(frozen=True)
class Family:
    """A mixture-of-experts architecture of transformers, as checkpoints name its parts.

    Attributes:
        model_type: its name.
        architecture: its causal language model.
        router: key of the router's weight in layer {layer}.
        expert: key of one expert's linear module {linear}.
        linears: linear modules of the dense network -> their names in an expert.
        renormalizes: it divides a token's weights by their sum; None where a field says it.
        zeros: tensors that it has beside, and which are 0 -> their shapes, None for the width.
        lacks: fields of the dense configuration that this one doesn't have -> whether it computes
            the same with that value of theirs.
    """

    model_type: str
    architecture: str
    router: str
    expert: str
    linears: Mapping[str, str]
    lacks: Mapping[str, Callable[[Any], bool]]
    renormalizes: bool | None = None
    zeros: Mapping[str, tuple[int | None, ...]] = dataclasses.field(default_factory=dict)

    def own_fields(
        self, base: PretrainedConfig, experts: int, top_k: int, renormalize: bool | None
    ) -> dict[str, Any]:
        """The fields that a dense configuration doesn't have."""
        if self.renormalizes is not None:
            return {"num_experts_per_tok": top_k, "num_local_experts": experts}
        fields = {
            "num_experts_per_tok": top_k,
            "num_experts": experts,
            "moe_intermediate_size": base.intermediate_size,
            "norm_topk_prob": renormalize is not False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return fields | ({"shared_expert_intermediate_size": 1} if self.zeros else {})


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{linear}.weight",
    linears={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    lacks={"attention_bias": _off, "mlp_bias": _off, "pretraining_tp": _any},
    renormalizes=True,
)
SHARED_EXPERT = "model.layers.{layer}.mlp.shared_expert"
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    router="model.layers.{layer}.mlp.gate.weight",
    expert="model.layers.{layer}.mlp.experts.{expert}.{linear}.weight",
    linears={name: name for name in ("gate_proj", "up_proj", "down_proj")},
    lacks={},
    zeros={
        f"{SHARED_EXPERT}.gate_proj.weight": (1, None),
        f"{SHARED_EXPERT}.up_proj.weight": (1, None),
        f"{SHARED_EXPERT}.down_proj.weight": (None, 1),
        f"{SHARED_EXPERT}_gate.weight": (1, None),
    },
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    router="model.layers.{layer}.mlp.gate.weight",
    expert="model.layers.{layer}.mlp.experts.{expert}.{linear}.weight",
    linears={name: name for name in ("gate_proj", "up_proj", "down_proj")},
    lacks={"max_window_layers": _any, "layer_types": _all_full},
)
# The class of the dense model -> what it becomes.
FAMILIES = {
    "LlamaForCausalLM": MIXTRAL,
    "MistralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3_MOE,
}


def sparse_config(
    base: PretrainedConfig, family: Family, experts: int, top_k: int, renormalize: bool | None
) -> PretrainedConfig:
    """The base model's configuration in the family's, with every field that it has.

    Args:
        base: of the dense model.
        family: the architecture that it becomes.
        experts: E.
        top_k: K.
        renormalize: whether the weights of a token's K experts are divided by their sum; None where
            they sum to 1.

    Raises:
        ValueError: a field has a value that the architecture can't express.
    """
    if getattr(base, "quantization_config", None) is not None:
        raise ValueError(
            "the base model is quantised, and experts are merged into its weights: load it "
            "unquantised, with the same adapter, and export that."
        )
    if family.renormalizes and renormalize is False:
        raise ValueError(
            f"{family.architecture} divides the weights of a token's experts by their sum, and the "
            "adapter's gate doesn't; train with gate='top_k', or on a Qwen2 or Qwen3 model."
        )
    fields = {key: value for key, value in base.to_dict().items() if key not in ABOUT_ITSELF}
    understood = type(base)().to_dict()
    known = AutoConfig.for_model(family.model_type).to_dict().keys() | {"head_dim"}
    carried = {}
    for field, value in fields.items():
        if field in known or field not in understood:
            carried[field] = (
                value  # a field that the dense architecture ignores, the other does too
            )
        elif field not in family.lacks or not family.lacks[field](value):
            raise ValueError(
                f"{family.architecture} has no {field!r}, and the base model's is {value!r}: the "
                "exported model would compute something else. Keep the adapter as it is "
                "(save_pretrained)."
            )
    sparse = AutoConfig.for_model(
        family.model_type, **{**carried, **family.own_fields(base, experts, top_k, renormalize)}
    )
    sparse.architectures = [family.architecture]
    sparse.dtype = base.dtype
    written = sparse.to_dict()
    if not carried.get("sliding_window"):  # Qwen2-MoE writes 0 for none
        written["sliding_window"] = written.get("sliding_window") or carried.get("sliding_window")
    changed = [field for field, value in carried.items() if written.get(field) != value]
    if changed:
        raise ValueError(
            f"{family.architecture} changes {', '.join(changed)} of the base model's "
            "configuration; keep the adapter as it is (save_pretrained)."
        )
    return sparse
