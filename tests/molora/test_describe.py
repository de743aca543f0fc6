"""The table of what each site got."""

import re
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from molora import MoloraConfig, describe
from molora.describe import SiteRow, join_layers, site_rows


@pytest.fixture
def described(tiny_model):
    """`described("llama", gate=...)`: the model with such an adapter."""

    def build(name: str, **fields: Any) -> PeftModel:
        fields = {"target_modules": "all-linear", **fields}
        return get_peft_model(tiny_model(name), MoloraConfig(**fields))

    return build


def cells(table: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[1:-1]]


def test_the_table_of_a_llama(described):
    model = described("llama", num_experts=4, r=2, target_modules=["q_proj", "down_proj"])
    table = describe(model)
    assert table.splitlines()[0].split()[:5] == ["site", "experts", "ranks", "K", "shared"]
    # q_proj: A 8 x 32, B 32 x 8, router 4 x 32; down_proj: A 8 x 48, B 32 x 8, router 4 x 48
    assert cells(table) == [
        ["model.layers.{0-1}.self_attn.q_proj", "4", "4x2", "2", "-", "8", "own", "1,280"],
        ["model.layers.{0-1}.mlp.down_proj", "4", "4x2", "2", "-", "8", "own", "1,664"],
    ]
    assert table.splitlines()[-1] == "4 sites, 2,944 trainable parameters in adapters"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bert", "vit", "mlp"])
def test_the_sum_is_what_trains(described, name):
    model = described(name, num_shared_experts=1, router_scope="block")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe(model).splitlines()[-1].split(" sites, ")[1].startswith(f"{trainable:,} ")
    assert sum(row.parameters for row in site_rows(model)) == trainable
    assert sum(row.parameters for row in join_layers(site_rows(model))) == trainable


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"experts": "frozen_lora"}, 4 * 32),  # the router of a site alone
        ({"experts": "frozen_lora", "expert_options": {"frozen": 2}}, 4 * 32 + 6 * (32 + 32)),
        ({"experts": "frozen_lora", "router": "arrow"}, 0),
    ],
    ids=str,
)
def test_what_is_frozen_does_not_count(described, fields, numbers):
    model = described("llama", num_experts=4, r=2, target_modules=["q_proj"], **fields)
    (row,) = join_layers(site_rows(model))
    assert row.parameters == 2 * numbers
    assert row.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_site_has_its_line_on_request(described):
    model = described("llama")
    names = [row[0] for row in cells(describe(model, every_site=True))]
    assert names == [row.name for row in site_rows(model)] and len(names) == 14
    assert "{" not in "".join(names)


def test_layers_that_differ_keep_their_lines(described):
    model = described("llama", target_modules=["o_proj"], num_experts=[2, 4])
    assert [row[:2] for row in cells(describe(model))] == [
        ["model.layers.0.self_attn.o_proj", "2"],
        ["model.layers.1.self_attn.o_proj", "4"],
    ]


@pytest.mark.parametrize(
    ("fields", "column", "shown"),
    [
        ({"gate": "top_p"}, 3, "varies"),
        ({"gate": "dense"}, 3, "8"),
        ({"gate": "switch"}, 3, "1"),
        ({"num_experts": 0, "num_shared_experts": 2}, 3, "-"),
        ({"num_experts": 0, "num_shared_experts": 2}, 1, "0"),
        ({"num_experts": 0, "num_shared_experts": 2}, 2, "-"),
        ({"num_experts": 0, "num_shared_experts": 2}, 4, "2x8"),
        ({"num_experts": 0, "num_shared_experts": 2}, 6, "none"),
        ({"num_experts": 1}, 6, "none"),
        ({"num_experts": 3, "r": {".*": [2, 4, 8]}}, 2, "2,4,8"),
        ({"num_experts": 3, "r": {".*": [2, 4, 8]}}, 5, "14"),
        ({"num_experts": 2, "rank_wise": True}, 2, "16x1"),
        ({"num_shared_experts": 1, "shared_expert_rank": 3}, 4, "1x3"),
    ],
    ids=str,
)
def test_what_stands_in_a_column(described, fields, column, shown):
    (row,) = cells(describe(described("llama", target_modules=["o_proj"], **fields)))
    assert row[column] == shown


def test_a_shared_router_is_named(described):
    model = described("llama", target_modules=["q_proj", "v_proj"], router_scope="block")
    assert [row[6] for row in cells(describe(model))] == ["own", "q_proj"]


def test_adapters_are_told_apart(described):
    model = described("llama", target_modules=["o_proj"], num_experts=2)
    model.add_adapter("second", MoloraConfig(target_modules=["q_proj"], num_experts=3))
    assert cells(describe(model))[0][:2] == ["model.layers.{0-1}.self_attn.o_proj", "2"]
    assert cells(describe(model, "second"))[0][:2] == ["model.layers.{0-1}.self_attn.q_proj", "3"]
    with pytest.raises(ValueError, match="no MoLoRA adapter named 'third'"):
        describe(model, "third")


def row_of(name: str, experts: int = 2) -> SiteRow:
    return SiteRow(name, experts, "2x8", "2", "-", 16, "own", 100)


def test_joining_spans_and_sums():
    names = [f"h.{i}.attn.c_proj" for i in (0, 1, 2, 5, 7, 8)]
    joined = join_layers([row_of(name) for name in names])
    assert [(row.name, row.parameters) for row in joined] == [("h.{0-2,5,7-8}.attn.c_proj", 600)]


def test_only_the_layers_number_is_joined():
    names = [f"decoder.block.{i}.layer.{j}.x.q" for i in (0, 1) for j in (0, 1)]
    joined = [row.name for row in join_layers([row_of(name) for name in names])]
    assert joined == ["decoder.block.{0-1}.layer.0.x.q", "decoder.block.{0-1}.layer.1.x.q"]
    assert [r.name for r in join_layers([row_of("up"), row_of("0"), row_of("2")])] == [
        "up", "0", "2",
    ]  # fmt: skip
