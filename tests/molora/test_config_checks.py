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
