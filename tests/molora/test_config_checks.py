"""Checks of single fields: how modules are named."""

from typing import Any

import pytest

from molora import MoloraConfig


def refusal(**fields: Any) -> str:
    with pytest.raises(ValueError) as caught:
        MoloraConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", [5, ["q_proj", 5], {"q_proj": 8}, [["q_proj"]]], ids=str)
def test_modules_are_named_by_strings(field, value):
    assert f"{field}={value!r} must be a list of module names" in refusal(**{field: value})


@pytest.mark.parametrize("value", ["lm_head", 5, ["lm_head", 5]], ids=str)
def test_modules_to_save_are_a_list(value):
    message = refusal(modules_to_save=value)
    assert f"modules_to_save={value!r} must be a list of module names." in message


def test_modules_to_save_in_other_containers_become_the_list_that_peft_adds_to():
    assert MoloraConfig(modules_to_save=("b", "a")).modules_to_save == ["b", "a"]
    assert MoloraConfig(modules_to_save={"b", "a"}).modules_to_save == ["a", "b"]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_name_with_wildcards_is_no_regex(field):
    message = refusal(**{field: "*.q_proj"})
    assert f"{field}: '*.q_proj' is not a regex: nothing to repeat" in message


@pytest.mark.parametrize("value", [5, ["layers", 3]], ids=str)
def test_lists_of_layers_are_named_by_strings(value):
    message = refusal(layers_to_transform=[0], layers_pattern=value)
    assert f"layers_pattern={value!r} must be a list of module names." in message


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("layers_to_transform", [], []),
        ("trainable_token_indices", [], []),
        ("trainable_token_indices", 0, 0),
        ("trainable_token_indices", {"wte": 1}, 1),
    ],
)
def test_numbers_are_a_list_with_one_at_least(field, value, shown):
    assert f"{field}={shown!r} must be a list of numbers, one at least" in refusal(**{field: value})


def test_one_layer_needs_no_list():
    assert MoloraConfig(layers_to_transform=3).layers_to_transform == 3


@pytest.mark.parametrize("field", ["rank_wise", "use_rslora", "inference_mode"])
@pytest.mark.parametrize("value", ["no", 0, None], ids=str)
def test_a_switch_is_on_or_off(field, value):
    assert f"unknown {field} {value!r}; known: False, True" in refusal(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [{"method": "mixlora"}, {"method": "mixlora", "method_version": "1"}, {"method": 3}],
    ids=str,
)
def test_a_methods_name_alone_brings_none_of_its_settings(fields):
    message = refusal(**fields)
    assert "set none of its fields; MoloraConfig.from_method builds it" in message


def test_a_loss_that_counts_nothing_trains_no_router():
    for losses in ({}, {"z_loss": 0.0}):
        message = refusal(gate="indicator", losses=losses)
        assert "gives the router no gradient from the task" in message
    MoloraConfig(gate="indicator", losses={"z_loss": 0.1})


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ("null_balancing", "null_experts"),
        ("efficiency", "expert_thresholds"),
        ("load_cv", "noisy_top_k"),
        ("selector_entropy", "binary_selectors"),
        ({"load_balancing": {"coefficient": 1.0, "above_threshold": True}}, "learned_threshold"),
    ],
)
@pytest.mark.parametrize("gate", ["top_k", "noisy_top_k", "learned_threshold"])
def test_a_loss_of_what_the_gate_does_not_leave_is_refused(loss, wanted, gate):
    fields = {"gate": gate, "losses": loss if isinstance(loss, dict) else {loss: 1.0}}
    if gate == wanted:
        MoloraConfig(**fields)
    else:
        assert f"doesn't leave there; use gate={wanted!r}, or drop the loss" in refusal(**fields)
