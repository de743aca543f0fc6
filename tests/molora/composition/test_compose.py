"""Saved LoRA adapters as experts: compared with PEFT's own layers and the routers' formulas."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model

import molora
from molora.composition import plan_composition
from molora.layer import MoloraLayer
from molora.routers import top_right_singular_vector

from .dense_mixture import deltas, random_gates


def test_one_adapter_is_pefts_own(base, folders, batch, logits_of):
    for folder in folders:
        theirs = logits_of(PeftModel.from_pretrained(base(), folder), batch)
        assert (theirs - logits_of(base(), batch)).abs().max() > 0.1
        for router in ("static", "arrow"):
            ours = logits_of(molora.compose(base(), [folder], router), batch)
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def arrow(base, folders) -> Any:
    return molora.compose(base(), folders, top_k=2)


def test_an_adapter_is_never_chosen_where_it_is_not(arrow, batch, folders):
    with molora.observe(arrow) as records:
        arrow(**batch)
    assert len(records) == 6
    for site, routing in records.items():
        for e, folder in enumerate(folders):
            if site not in deltas(folder):
                assert (routing.weights[:, e] == 0).all(), site
    first = records["model.layers.0.mlp.up_proj"]  # one adapter alone adapts it
    assert (first.weights[:, 0] == 1).all() and first.logits.isfinite().all()


def test_it_saves_loads_and_stays_frozen(arrow, base, batch, logits_of, tmp_path):
    arrow.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits_of(loaded, batch), logits_of(arrow, batch))
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert not any(parameter.requires_grad for parameter in trainable.parameters())


@torch.no_grad()
def test_padding_and_a_cache_change_nothing(arrow, batch):
    whole = arrow(**batch).logits
    ids = batch["input_ids"][1:, :5]
    torch.testing.assert_close(arrow(ids).logits, whole[1:, :5], atol=1e-10, rtol=1e-10)
    start = arrow(ids[:, :3], use_cache=True)
    rest = arrow(ids[:, 3:], past_key_values=start.past_key_values)
    torch.testing.assert_close(rest.logits, whole[1:, 3:5], atol=1e-10, rtol=1e-10)


def test_the_config_names_what_it_can_in_short(base, folders):
    plan = plan_composition(base(), folders)
    assert plan.config.target_modules == {"q_proj", "up_proj", "v_proj"}
    assert plan.config.r["v_proj"] == [2, 4, 1]
    assert plan.ranks["model.layers.1.mlp.up_proj"] == [2, 1, 1]
    same = plan_composition(base(), [folders[0]] * 2)
    assert same.config.r == {".*": [2, 2]} and same.config.top_k == 2
    assert "expert 2: " in plan.describe() and "2 of 6 sites, ranks 1, 3" in plan.describe()
    assert not any(isinstance(m, MoloraLayer) for m in base().modules())


def test_some_modules_of_a_name_are_named_in_full(base, folders):
    plan = plan_composition(base(), [folders[2]])
    layer = "model.layers.1"
    assert plan.config.target_modules == {f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"}


@pytest.mark.parametrize("shape", [(3, 10, 7), (12, 10, 7), (1, 1, 4), (2, 5, 5)])
def test_the_singular_vector_is_that_of_the_product(shape):
    rank, d_in, d_out = shape
    A, B = torch.randn(rank, d_in).double(), torch.randn(d_out, rank).double()
    v, expected = top_right_singular_vector(A, B), torch.linalg.svd(B @ A).Vh[0]
    torch.testing.assert_close((v @ expected).abs(), torch.ones(()).double())
    torch.testing.assert_close(v.norm(), torch.ones(()).double())
    assert (top_right_singular_vector(A, 0 * B) == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changed its base"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A"),
    ],
)
def test_adapters_that_are_more_than_factors(tiny_model, tmp_path: Path, fields, message):
    config = LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        molora.compose(tiny_model("llama"), [str(tmp_path)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_has_diverged(tiny_model, tmp_path: Path, value):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    broken = "base_model.model.model.layers.1.self_attn.q_proj.lora_B"
    model.get_parameter(f"{broken}.default.weight").data[3, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"holds NaN or infinity in {re.escape(broken)}.weight"):
        molora.compose(tiny_model("llama"), [str(tmp_path)] * 2)


def test_an_adapter_of_another_kind(tiny_model, tmp_path: Path):
    config = VeraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type VERA; only LoRA adapters"):
        molora.compose(tiny_model("llama"), [str(tmp_path)])


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"num_hidden_layers": 1}, "has no such module"),
        ({"intermediate_size": 40}, "has 32 and 40"),
    ],
)
def test_another_base_model(tiny_model, folders, fields, has):
    model = tiny_model("llama", **fields)
    with pytest.raises(ValueError, match=f"trained on another base model: .* this model {has}"):
        molora.compose(model, folders)
    assert not any(isinstance(module, MoloraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router": "arow"},
            "unknown router to compose by 'arow'; known: arrow, dume, glider, linear, lora-mixer, ",
        ),
        (
            {"router": "static", "top_k": 2},
            "router to compose by 'static' has no option 'top_k'; it takes: weights.",
        ),
        ({"weights": [1, 2, 3]}, "'arrow' has no option 'weights'; it takes: temperature, top_k."),
        ({"router": "static", "weights": [1.0]}, "weights has 1 entries for 3 adapters"),
        ({"router": "static", "weights": 0.5}, "weights=0.5 must be a list of finite numbers"),
        ({"router": "static", "weights": "abc"}, "weights='abc' must be a list of finite"),
        ({"router": "phatgoose"}, "router='phatgoose' needs gates"),
        ({"gates": [{}, {}, {}]}, "'arrow' has no option 'gates'"),
        ({"router": "phatgoose", "gates": [{}, {}, {}]}, "gates[0] has no vector for"),
        ({"router": "phatgoose", "gates": [None] * 3}, "gates[0] has no vector for"),
        ({"router": "phatgoose", "gates": {}}, "gates is a dict; it must be a list"),
        (
            {"router": "phatgoose", "gates": [{"model.layers.0.self_attn.q_proj": [1.0]}] * 3},
            "gates[0] has no vector for",
        ),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"top_k": "2"}, "'arrow': option top_k='2' must be a whole number"),
        ({"router": "lora-mixer", "top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        (
            {"router": "lora-mixer", "train_experts": "False"},
            "train_experts='False' must be",
        ),
        ({"router": "x-lora", "train_experts": 1}, "train_experts=1 must be True or False"),
        ({"top_k": 1}, "top_k=2 with a small temperature"),
        ({"router": "static", "weights": [0, 0, 0]}, "are all 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_do_not_go_together(base, folders, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        molora.compose(base(), folders, **options)


def test_gates_of_another_length(base, folders):
    """DUME's have one number more."""
    gates = random_gates(folders)
    longer = [{site: torch.cat([v, v[:1]]) for site, v in own.items()} for own in gates]
    for router, given, needed in (("phatgoose", longer, 32), ("dume", gates, 33)):
        with pytest.raises(ValueError, match=rf"gates.*shape .* \({needed},\) is needed"):
            molora.compose(base(), folders, router, gates=given)


def test_gates_that_have_diverged(base, folders):
    gates = random_gates(folders)
    next(iter(gates[1].values()))[0] = torch.nan
    with pytest.raises(ValueError, match=r"'gates\[1\]' holds NaN or infinity in model.layers"):
        molora.compose(base(), folders, "phatgoose", gates=gates)


def test_nothing_to_compose(base):
    with pytest.raises(ValueError, match="adapters is empty"):
        molora.compose(base(), [])


def test_one_folder_is_no_list(base, folders):
    with pytest.raises(ValueError, match="must be a list of folders or Hub names"):
        molora.compose(base(), folders[0])
    with pytest.raises(ValueError, match="must be a list of folders or Hub names"):
        molora.fit_weights(base(), Path(folders[0]), [])


def test_a_base_model_that_holds_an_adapter(base, folders):
    model = base()
    mixture = molora.compose(model, folders)
    for adapted in (model, mixture, PeftModel.from_pretrained(base(), folders[0])):
        with pytest.raises(ValueError, match="holds an adapter already; load it anew"):
            molora.compose(adapted, folders)
    molora.compose(mixture.unload(), folders)
