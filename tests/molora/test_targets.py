"""What is said when target_modules names nothing, or something that isn't there."""

import warnings
from typing import Any

import pytest
from peft import NoMatchingPeftModuleError, get_peft_model
from torch import nn

from molora import MoloraConfig
from molora.targets import warn_unmatched


def a_model() -> nn.Module:
    layer = nn.ModuleDict(
        {"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    )
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def refusal(**fields: Any) -> str:
    model = a_model()
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        get_peft_model(model, MoloraConfig(**fields))
    assert [type(m) for m in model.modules()] == [type(m) for m in a_model().modules()]
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "shown"),
    [(["qproj"], "['qproj']"), (["zzz", "qproj"], "['qproj', 'zzz']"), ("q_prj", "'q_prj'")],
    ids=str,
)
def test_what_was_asked_for_what_is_near_and_what_exists(target, shown):
    message = refusal(target_modules=target)
    assert f"target_modules={shown} matches no module" in message
    assert "Did you mean 'q_proj'?" in message
    assert "Linear modules here: q_proj, v_proj." in message


def test_nothing_near():
    message = refusal(target_modules=["conv1d"])
    assert "Did you mean" not in message and "Linear modules here: q_proj, v_proj." in message


def test_no_targets_for_an_unknown_model():
    message = refusal()
    assert "target_modules is not set" in message and "target_modules='all-linear'" in message
    assert "Linear modules here: q_proj, v_proj." in message


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"exclude_modules": ["q_proj"]}, "exclude_modules={'q_proj'}"),
        ({"layers_to_transform": [7], "layers_pattern": "layers"}, "layers_to_transform=[7]"),
    ],
    ids=str,
)
def test_what_restricted_the_targets_is_named(fields, shown):
    message = refusal(target_modules=["q_proj"], **fields)
    assert f"target_modules=['q_proj'] with {shown}" in message


def test_a_model_without_linear_modules():
    with pytest.raises(NoMatchingPeftModuleError, match=r"Linear modules here: none\."):
        get_peft_model(
            nn.ModuleDict({"norm": nn.LayerNorm(4)}), MoloraConfig(target_modules=["q_proj"])
        )


def test_a_target_that_matches_nothing_beside_one_that_does_is_warned_about():
    with pytest.warns(UserWarning) as caught:
        model = get_peft_model(a_model(), MoloraConfig(target_modules=["v_proj", "q_porj"]))
    (message,) = [str(w.message) for w in caught if "molora" in str(w.message)]
    assert "target_modules 'q_porj' match no module and get no adapter" in message
    assert "Did you mean 'q_proj'?" in message
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "molora_experts")}
    assert names == {"v_proj"}


def test_a_target_that_is_excluded_was_asked_for():
    config = MoloraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(a_model(), config)


@pytest.mark.parametrize(
    "targets", [["q_proj", "layers.0.v_proj"], "q_.*", "all-linear", None], ids=str
)
def test_nothing_is_said_where_everything_matches(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unmatched(MoloraConfig(target_modules=targets), dict(a_model().named_modules()))


def said(**fields) -> list[str]:
    """What is said about that configuration."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(
            a_model(), MoloraConfig(**{"target_modules": ["q_proj", "v_proj"], **fields})
        )
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("field", ["num_experts", "num_shared_experts", "top_k", "r"])
@pytest.mark.parametrize(
    ("patterns", "idle"),
    [
        (["q_porj", ".*"], "'q_porj' decide"),
        (["[qv]_proj", "q_proj"], "'q_proj' decide"),
        (["x", "y", "q_proj", ".*"], "'x', 'y' decide"),
    ],
    ids=["misspelt", "too late", "two"],
)
def test_a_regex_that_decides_nowhere_is_warned_about(field: str, patterns: list[str], idle: str):
    (message,) = said(**{field: dict.fromkeys(patterns, 2)})
    assert (
        message.startswith(f"molora: {field} {idle} for no site") and "layers.0.q_proj" in message
    )


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_peft_that_matches_nothing_is_warned_about(field: str):
    (message,) = said(**{field: {"q_porj": 2}})
    assert field in message and "q_porj" in message


def test_a_closing_regex_for_all_others_may_be_idle():
    assert said(num_experts={"q_proj": 2, "v_proj": 3, ".*": 4}) == []


def test_losses_where_nothing_is_routed_are_warned_about():
    losses = {"load_balancing": 0.01}
    (message,) = said(num_experts=1, losses=losses)
    assert "no site has experts to choose from" in message and "load_balancing" in message
    assert said(num_experts={"q_proj": 1, ".*": 2}, losses=losses) == []


def test_a_module_to_save_that_the_model_lacks_is_warned_about():
    (message,) = said(target_modules=["q_proj"], modules_to_save=["norm", "v_prj"])
    assert "modules_to_save 'v_prj' match no module" in message
    assert "Did you mean 'v_proj'?" in message
    assert said(target_modules=["q_proj"], modules_to_save=["norm", "v_proj"]) == []


def test_heads_that_peft_adds_for_a_task_are_no_mistake(tiny_model):
    config = MoloraConfig(target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(tiny_model("bert"), config)  # a warning is an error in these tests
    assert config.modules_to_save == ["classifier", "score"]  # of which BERT has one


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_a_layer_that_the_model_lacks_is_warned_about(tiny_model, pattern):
    config = MoloraConfig(
        target_modules=["q_proj"], layers_to_transform=[1, 2, 5], layers_pattern=pattern
    )
    with pytest.warns(UserWarning, match="layers_to_transform 2, 5 hold no target module"):
        get_peft_model(tiny_model("llama"), config)
    assert config.layers_to_transform == [1, 2, 5]
