"""An adapter is attached whole or not at all: a refusal leaves the model as it was."""

from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from molora import MoloraConfig
from molora.layer import MoloraLayer

# Each is refused in the second of two layers at the earliest.
REFUSED: dict[str, dict[str, Any]] = {
    "scaling_vectors": {"experts": "scaling_vectors", "r": [1, 2]},
    "rank_pairs": {"experts": "rank_pairs", "r": [1, 2]},
    "down_vectors": {
        "experts": "rank_pairs",
        "r": 1,
        "expert_options": {"down_vectors": 2},
        "num_experts": [4, 3],
    },
    "factor_mixing": {"experts": "factor_mixing", "num_shared_experts": [0, 1]},
    "splits": {
        "experts": "factor_mixing",
        "expert_options": {"splits": 4},
        "num_experts": [4, 6],
    },
    "residual_tree": {"experts": "residual_tree", "num_experts": [4, 5]},
    "up_bank": {"experts": "up_bank", "num_shared_experts": [0, 1]},
    "ranks of up_bank": {"experts": "up_bank", "r": [[2, 2, 2, 2], [2, 2, 2, 1]]},
    "svd_segments": {"experts": "svd_segments", "r": [2, 7]},
    "modality_groups": {
        "router": "modality_groups",
        "router_options": {"common": False},
        "num_experts": [4, 3],
    },
    "fixed": {
        "gate": "fixed",
        "gate_options": {"weights": [1.0, 0.5, 2.0, 1.5]},
        "router": "random",
        "num_experts": [4, 5],
    },
}
# Parts that each work with others, but not with one another, and what says so.
UNLIKE: dict[str, dict[str, Any]] = {
    "LoraExperts share no down factor": {"router": "inner"},
    "FeedForwardExperts share no down factor": {
        "router": "inner",
        "experts": "shared_a",
        "mixing": "feed_forward",
        "target_modules": ["up_proj"],
    },
    "SharedAExperts has no down factor of its own": {
        "router": "activation",
        "experts": "shared_a",
    },
    "score='signed' needs experts of rank 1": {
        "router": "activation",
        "router_options": {"score": "signed"},
    },
    "'activation' gives 4 logits, one for each expert, but the gate reads 8": {
        "router": "activation",
        "gate": "noisy_top_k",
    },
    "gives a new expert its row of the router's weight": {
        "router": "output",
        "gate": "expert_thresholds",
        "target_modules": ["up_proj"],
    },
    "are cut into 2 splits": {
        "experts": "factor_mixing",
        "expert_options": {"splits": 2},
        "gate": "grouped_sigmoid",
    },
    "FactorMixingExperts doesn't give its experts' single outputs": {
        "experts": "factor_mixing",
        "losses": {"contrastive": 0.1},
    },
    "RankPairExperts doesn't give its experts' single outputs": {
        "experts": "rank_pairs",
        "r": 1,
        "losses": {"orthogonality": 0.1},
    },
    "UpBankExperts has no down factor of its own": {
        "experts": "up_bank",
        "losses": {"orthogonality": {"coefficient": 0.1, "of": "down_factor"}},
    },
    "'expert_router_coupling' reads the router's row": {
        "router": "mlp",
        "losses": {"expert_router_coupling": 0.1},
    },
    "'simplicity_diversity' reads the router's row": {
        "gate": "null_experts",
        "losses": {"simplicity_diversity": 0.1},
    },
    "'modality_balancing' needs router='modality_groups'": {
        "router": "token_mask",
        "losses": {"modality_balancing": 0.1},
    },
}
every_refusal = pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)


def config(**fields: Any) -> MoloraConfig:
    given = {"r": 2, "num_experts": 4, "target_modules": ["q_proj", "v_proj"], **fields}
    return MoloraConfig(task_type="CAUSAL_LM", **given)


def state_of(model: nn.Module) -> tuple[list, dict]:
    """Every module, hooks included, and every parameter and buffer, by what they are."""
    modules = [
        (name, id(module), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, {name: (id(t), t.requires_grad, t.clone()) for name, t in tensors}


def assert_as_it_was(model: nn.Module, before: tuple[list, dict]) -> None:
    modules, tensors = state_of(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (was, trained, values) in before[1].items():
        assert tensors[name][:2] == (was, trained), name
        assert torch.equal(tensors[name][2], values), name


@every_refusal
def test_a_model_stays_as_it_was(fields, tiny_model):
    model, refused = tiny_model("llama"), config(**fields)
    before = state_of(model)
    for attach in (
        lambda: get_peft_model(model, refused),
        lambda: inject_adapter_in_model(refused, model),
        lambda: model.add_adapter(refused),
    ):
        with pytest.raises(ValueError):
            attach()
        assert_as_it_was(model, before)
        assert not hasattr(model, "peft_config")


@every_refusal
def test_a_second_adapter_leaves_the_first_alone(fields, tiny_model):
    model = get_peft_model(tiny_model("llama"), config(target_modules=["q_proj", "k_proj"]))
    before, refused = state_of(model), config(**fields)
    with pytest.raises(ValueError):
        model.add_adapter("second", refused)
    assert_as_it_was(model, before)
    assert list(model.peft_config) == ["default"]
    layers = [module for module in model.modules() if isinstance(module, MoloraLayer)]
    assert all(list(layer.molora_allocation) == ["default"] for layer in layers)


@pytest.mark.parametrize(("said", "fields"), UNLIKE.items(), ids=UNLIKE)
def test_parts_that_do_not_go_together_are_refused(said, fields, tiny_model):
    model, refused = tiny_model("llama"), config(**fields)
    before = state_of(model)
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, refused)
    assert_as_it_was(model, before)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_name_of_a_refused_adapter_is_free_again(tiny_model):
    model = tiny_model("llama")
    model.add_adapter(config(), "first")
    before = state_of(model)
    with pytest.raises(ValueError, match="singular values"):
        model.add_adapter(config(**REFUSED["svd_segments"]), "second")
    assert_as_it_was(model, before)
    model.add_adapter(config(), "second")
    assert list(model.peft_config) == ["first", "second"]


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained")
@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_a_name_that_no_module_can_have_is_refused(name, tiny_model):
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match=f"adapter_name={name!r} must be a string, not empty"):
        get_peft_model(model, config(), adapter_name=name)
    assert_as_it_was(model, before)
