"""The configuration: what it refuses and how it says so, and its way through JSON and back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from molora import MoloraConfig
from molora import config as config_module
from molora.config import SCHEMA_VERSION

EVERYTHING = {
    "r": {"q_proj": [2, 4], "a_proj": [8, 8], ".*": [1, 3]},
    "lora_alpha": 12.5,
    "lora_dropout": 0.1,
    "num_experts": 2,
    "top_k": {"q_proj": 2, "a_proj": 2, ".*": 2},
    "num_shared_experts": [1, 0, 2],
    "shared_expert_rank": 5,
    "scaling_rule": "alpha/sqrt(r)",
    "router": "mlp",
    "router_options": {"hidden_size": 7, "temperature": 0.5},
    "router_scope": "block",
    "gate": "sigmoid",
    "losses": {"z_loss": 1e-3, "load_balancing": {"coefficient": 0.01}},
    "target_modules": ["v_proj", "q_proj", "a_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"v_proj": [3, 3], r"layers\.0\..*": [2, 2]},
    "alpha_pattern": {"v_proj": 3.0, r"layers\.0\..*": 4.0},
    "bias": "molora_only",
    "modules_to_save": ["score"],
    "trainable_token_indices": [1, 2],
    "init_lora_weights": "gaussian",
}


def refusal(**fields: Any) -> str:
    with pytest.raises(ValueError) as caught:
        MoloraConfig(**fields)
    return str(caught.value)


def test_the_fields_of_this_test_are_all_there_are():
    ours = set(MoloraConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    elsewhere = {"experts", "expert_options", "gate_options", "method", "method_version"}
    elsewhere |= {"mixing", "rank_wise", "schema_version", "use_rslora"}
    assert ours == set(EVERYTHING) | elsewhere


@pytest.mark.parametrize("reader", [MoloraConfig, PeftConfig])
def test_a_config_survives_its_file(tmp_path: Path, reader: type[PeftConfig]):
    config = MoloraConfig(**EVERYTHING)
    config.save_pretrained(str(tmp_path))
    loaded = reader.from_pretrained(str(tmp_path))
    assert isinstance(loaded, MoloraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.target_modules == {"v_proj", "q_proj", "a_proj"}
    assert loaded.exclude_modules == {"lm_head"}


@pytest.mark.parametrize(
    "field", ["r", "top_k", "rank_pattern", "alpha_pattern"], ids=lambda field: field
)
def test_regexes_keep_their_order_in_the_file(tmp_path: Path, field: str):
    # the first that matches counts, and PEFT writes sorted keys
    config = MoloraConfig(**EVERYTHING)
    config.save_pretrained(str(tmp_path))
    loaded = MoloraConfig.from_pretrained(str(tmp_path))
    assert list(getattr(loaded, field)) == list(EVERYTHING[field])


def test_equal_configs_give_equal_files(tmp_path: Path):
    names = ["v_proj", "q_proj", "a_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
    texts = set()
    for order in (names, names[::-1], names[3:] + names[:3]):
        MoloraConfig(target_modules=order).save_pretrained(str(tmp_path))
        texts.add((tmp_path / "adapter_config.json").read_text())
    assert len(texts) == 1
    assert json.loads(texts.pop())["target_modules"] == sorted(names)


def test_the_auto_mapping_reaches_the_file(tmp_path: Path):
    MoloraConfig().save_pretrained(str(tmp_path), auto_mapping_dict={"base_model_class": "X"})
    assert MoloraConfig.from_pretrained(str(tmp_path)).auto_mapping == {"base_model_class": "X"}


def test_a_method_survives_the_file_with_its_overrides(tmp_path: Path):
    config = MoloraConfig.from_method("mola", r=4, num_experts="triangle:2-8/4")
    config.save_pretrained(str(tmp_path))
    loaded = MoloraConfig.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.method, loaded.method_version, loaded.r) == ("mola", 1, 4)


@pytest.mark.parametrize("moment", ["while PEFT writes", "before it is moved"])
def test_an_interrupted_save_leaves_the_previous_file(tmp_path, monkeypatch, moment):
    MoloraConfig(r=3).save_pretrained(str(tmp_path))
    before = (tmp_path / "adapter_config.json").read_bytes()

    def interrupted(*args: object, **kwargs: object) -> None:
        if moment == "while PEFT writes":  # half a file, wherever PEFT was told to write
            Path(str(args[1]), "adapter_config.json").write_text('{"r": 5, "tar')
        raise KeyboardInterrupt

    target = (PeftConfig, "save_pretrained")
    if moment == "before it is moved":
        target = (config_module.os, "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            MoloraConfig(r=5).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_bytes() == before


def test_saving_onto_a_file_is_refused_and_keeps_it(tmp_path: Path):
    path = tmp_path / "taken"
    path.write_text("precious")
    with pytest.raises((ValueError, AssertionError), match="should be a directory"):
        MoloraConfig().save_pretrained(str(path))
    assert path.read_text() == "precious"


def test_a_newer_schema_is_refused(tmp_path: Path):
    MoloraConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["schema_version"] == SCHEMA_VERSION
    path.write_text(json.dumps({**saved, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ValueError) as caught:
        MoloraConfig.from_pretrained(str(tmp_path))
    message = str(caught.value)
    assert f"schema_version {SCHEMA_VERSION + 1}" in message and "upgrade molora" in message


def test_a_newer_schema_with_fields_of_its_own_is_refused_too(tmp_path: Path):
    saved = {"peft_type": "MOLORA", "schema_version": SCHEMA_VERSION + 1, "not_yet_invented": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="not_yet_invented"), pytest.raises(ValueError) as caught:
        MoloraConfig.from_pretrained(str(tmp_path))
    assert "upgrade molora" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 9])
def test_broken_weights_beside_the_config_are_found(tmp_path: Path, content: bytes):
    MoloraConfig().save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        MoloraConfig.from_pretrained(str(tmp_path))
    message = str(caught.value)
    assert "adapter_model.safetensors" in message
    assert f"({len(content)} bytes) is corrupted or incomplete" in message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("gate", "topk", ["unknown gate 'topk'", "top_k_unnormalized", "Did you mean 'top_k'?"]),
        ("router", "linaer", ["unknown router 'linaer'", "mlp", "Did you mean 'linear'?"]),
        ("experts", "lroa", ["unknown experts 'lroa'", "Did you mean 'lora'?"]),
        ("losses", {"zloss": 1.0}, ["unknown loss 'zloss'", "load_balancing", "'z_loss'?"]),
        ("router_scope", "head", ["unknown router_scope 'head'", "block, layer, model, site"]),
        ("scaling_rule", "alpha/R", ["unknown scaling_rule 'alpha/R'", "alpha/sqrt(r)"]),
        ("bias", "lora_only", ["unknown bias 'lora_only'", "molora_only"]),
        ("init_lora_weights", "pissa", ["unknown init_lora_weights 'pissa'", "False", "gaussian"]),
        ("init_lora_weights", 1, ["unknown init_lora_weights 1"]),
        ("num_experts", "pyramid:2-8", ["num_experts: unknown pattern 'pyramid'", "hourglass"]),
        ("gate", ["top_k"], ["unknown gate ['top_k']", "sigmoid"]),
    ],
    ids=str,
)
def test_an_unknown_name_lists_the_known_ones(field, value, said):
    message = refusal(**{field: value})
    assert all(part in message for part in said), message


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError) as caught:
        MoloraConfig.from_method("molla")
    message = str(caught.value)
    assert "unknown method 'molla'" in message
    assert "loramoe" in message and "Did you mean 'mola'?" in message


def test_an_unknown_field_of_a_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown field 'num_expert'; known: .*'num_experts'\?"):
        MoloraConfig.from_method("mola", num_expert=4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"r": -4}, "r=-4 must be"),
        ({"r": 2.0}, "r=2.0 must be a whole number"),
        ({"r": True}, "r=True must be a whole number"),
        ({"r": None}, "r=None must be a whole number"),
        ({"r": [4, 0]}, "r[1]=0 must be"),
        ({"r": [[4, 0], 2]}, "r[0]=0 must be"),
        ({"r": [[]]}, "r[0]=[] must be"),
        ({"r": {"q_proj": 0}}, "r['q_proj']=0 must be"),
        ({"r": "triangle:0-8"}, "r=0 must be"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 must be"),
        ({"rank_pattern": {"q_proj": [4, 0]}}, "rank_pattern['q_proj']=0 must be"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is not a regex"),
        ({"alpha_pattern": {"(": 4.0}}, "alpha_pattern: '(' is not a regex"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj']=0 must be a number above 0"),
        ({"alpha_pattern": {"": 0}}, "alpha_pattern['']=0 must be a number above 0"),
        ({"shared_expert_rank": 0}, "shared_expert_rank=0 must be"),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform=-1 must be a whole number of at"),
        ({"trainable_token_indices": [3, -1]}, "trainable_token_indices=-1 must be a whole number"),
        ({"trainable_token_indices": {"wte": ["a"]}}, "trainable_token_indices='a' must be"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0' must be a whole number of at"),
        ({"schema_version": "1"}, "schema_version='1' must be a whole number of at least 1"),
        ({"schema_version": 0}, "schema_version=0 must be a whole number of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a number above 0"),
        ({"lora_alpha": math.inf}, "lora_alpha=inf must be a number above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan must be"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be in [0, 1)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1 must be"),
        ({"num_experts": -1}, "num_experts=-1 must be a whole number of at least 0"),
        ({"num_experts": [2, "four"]}, "num_experts[1]='four' must be"),
        ({"num_shared_experts": 1.5}, "num_shared_experts=1.5 must be"),
        ({"num_experts": 0}, "num_experts=0 and num_shared_experts=0 leave no expert at all"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"num_experts": 4, "top_k": 5}, "top_k=5 is more than the 4 experts"),
    ],
    ids=str,
)
def test_a_size_out_of_range_is_named(fields, said):
    assert said in refusal(**fields)


@pytest.mark.parametrize(
    "field",
    ["expert_options", "router_options", "gate_options", "losses", "rank_pattern", "alpha_pattern"],
)
@pytest.mark.parametrize("value", [None, 0.01, ["z_loss"]], ids=str)
def test_a_mapping_must_be_one(field, value):
    assert f"{field}={value!r} must be a mapping" in refusal(**{field: value})


@pytest.mark.parametrize("gate", ["top_k", "sigmoid"])
def test_one_active_expert_with_weight_one_is_refused_with_the_ways_out(gate):
    message = refusal(gate=gate, top_k=1)
    for part in (f"top_k=1 with gate={gate!r}", "no gradient", "'switch'", "top_k_unnormalized"):
        assert part in message


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "top_k_unnormalized", "top_k": 1},
        {"gate": "switch", "top_k": 1},
        {"gate": "switch"},
        {"gate": "top_k", "top_k": 1, "num_experts": 1},
        {"gate": "top_k", "top_k": 4, "num_experts": 2, "rank_wise": True},
    ],
    ids=str,
)
def test_a_k_that_works_is_accepted(fields):
    config = MoloraConfig(**fields)
    assert config.top_k == fields.get("top_k")


@pytest.mark.parametrize("gate", ["dense", "top_p", "threshold"])
def test_k_is_refused_where_it_has_no_effect(gate):
    assert f"top_k=2 has no effect with gate={gate!r}" in refusal(gate=gate, top_k=2)


def test_switch_has_one_k():
    assert "top_k=2 doesn't go with gate='switch', which uses 1" in refusal(gate="switch", top_k=2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"gate": "top_p", "gate_options": {"q": 0.5}},
            "gate 'top_p' has no option 'q'; it takes: p, renormalize.",
        ),
        ({"gate_options": {"p": 0.5}}, "gate 'top_k' has no option 'p'; it takes: no options."),
        (
            {"router_options": {"hidden_size": 4}},
            "router 'linear' has no option 'hidden_size'; it takes: bias, init_std, ",
        ),
        ({"losses": {"z_loss": {"coefficient": 1.0, "power": 2}}}, "loss 'z_loss' has no option"),
        ({"gate": "top_p", "gate_options": {"p": 0}}, "gate option p=0 must be in (0, 1]"),
        (
            {"gate": "top_p", "gate_options": {"p": "0.9"}},
            "gate 'top_p': option p='0.9' must be a finite number",
        ),
        ({"gate": "threshold", "gate_options": {"threshold": 1.5}}, "threshold=1.5 must be in"),
        ({"router_options": {"temperature": 0}}, "router option temperature=0 must be above 0"),
        (
            {"router_options": {"temperature": "hot"}},
            "router 'linear': option temperature='hot' must be a finite number",
        ),
        ({"router_options": {"noise": -1}}, "router option noise=-1 must not be negative"),
        ({"router_options": {"init_std": 0}}, "router option init_std=0 must be above 0"),
        (
            {"router": "mlp", "router_options": {"hidden_size": 0}},
            "router option hidden_size=0 must be at least 1",
        ),
        (
            {"router": "mlp", "router_options": {"hidden_size": 2.5}},
            "router 'mlp': option hidden_size=2.5 must be a whole number",
        ),
    ],
    ids=str,
)
def test_options_are_checked_by_the_class_that_takes_them(fields, said):
    assert said in refusal(**fields)


@pytest.mark.parametrize("value", ["0.01", None, True, {}, {"weight": 1.0}, math.nan, math.inf])
def test_a_loss_needs_a_finite_number(value):
    message = refusal(losses={"z_loss": value})
    assert f"losses['z_loss']={value!r} needs a number as its coefficient" in message


def test_load_balancing_of_a_gate_that_uses_every_expert_is_refused():
    message = refusal(gate="dense", losses={"load_balancing": 0.01})
    assert "'load_balancing' is constant with gate='dense'" in message
    MoloraConfig(gate="dense", losses={"z_loss": 0.01})


def test_losses_are_built_with_their_coefficient():
    config = MoloraConfig(losses={"z_loss": 1, "load_balancing": {"coefficient": 0.5}})
    built = config.build_losses()
    assert {name: coefficient for name, (coefficient, _) in built.items()} == {
        "z_loss": 1.0,
        "load_balancing": 0.5,
    }
    assert config.losses["load_balancing"] == {"coefficient": 0.5}  # building took nothing away


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            "layers_to_transform can't be used with target_modules='all-linear'",
        ),
        (
            {"target_modules": ".*q", "layers_to_transform": [0], "layers_pattern": "h"},
            "layers_to_transform can't be used with target_modules='.*q'",
        ),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            "layers_pattern has no effect without layers_to_transform",
        ),
        ({"shared_expert_rank": 4}, "shared_expert_rank=4 has no effect with num_shared_experts=0"),
        ({"shared_expert_rank": 4, "num_shared_experts": [0, 0]}, "with num_shared_experts=[0, 0]"),
        ({"shared_expert_rank": 4, "num_shared_experts": {".*": 0}}, "experts={'.*': 0}"),
        ({"shared_expert_rank": 4, "num_shared_experts": "uniform:0"}, "experts='uniform:0'"),
        ({"use_rslora": True, "scaling_rule": "constant"}, "use_rslora=True means scaling_rule="),
        ({"task_type": "CAUSAL"}, "Invalid task type: 'CAUSAL'"),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(fields, said):
    assert said in refusal(**fields)


def test_use_rslora_is_pefts_name_for_a_scaling_rule(tmp_path: Path):
    config = MoloraConfig(use_rslora=True)
    assert config.scaling_rule == "alpha/sqrt(r)"
    config.save_pretrained(str(tmp_path))
    assert MoloraConfig.from_pretrained(str(tmp_path)).scaling_rule == "alpha/sqrt(r)"


def test_shared_field_names_are_pefts():
    shared = {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "r",
        "rank_pattern", "target_modules", "trainable_token_indices", "use_rslora",
    }  # fmt: skip
    assert shared <= set(LoraConfig.__dataclass_fields__) & set(MoloraConfig.__dataclass_fields__)


def test_a_methods_defaults_do_not_change_with_the_configs_made_from_it(monkeypatch):
    from dataclasses import replace

    from molora.methods import METHODS

    mola = METHODS.get("mola")
    method = replace(mola, defaults={**mola.defaults, "losses": {"load_balancing": 0.01}})
    monkeypatch.setitem(METHODS._entries, "mola", method)
    MoloraConfig.from_method("mola").losses["z_loss"] = 1.0
    assert method.defaults["losses"] == {"load_balancing": 0.01}
