"""From a configuration and sites to what each site gets."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora import MoloraConfig
from molora.allocation import SiteAllocation, allocate
from molora.sites import Site

LAYERS = 4
# name in a layer: (d_in, d_out)
MODULES = {
    "attn.q_proj": (8, 8),
    "attn.k_proj": (8, 4),
    "attn.v_proj": (8, 4),
    "attn.o_proj": (8, 8),
    "mlp.gate_proj": (8, 12),
    "mlp.up_proj": (8, 12),
    "mlp.down_proj": (12, 8),
}


def sites(layers: int = LAYERS, modules: Any = MODULES) -> list[Site]:
    return [
        Site(f"layers.{layer}.{name}", layer, *modules[name])
        for layer in range(layers)
        for name in modules
    ]


def plan(layers: int = LAYERS, modules: Any = MODULES, **fields: Any) -> dict[str, SiteAllocation]:
    return allocate(MoloraConfig(**fields), sites(layers, modules), layers)


def refusal(**fields: Any) -> str:
    config = MoloraConfig(**fields)  # what fails here fails for the model, not for itself
    with pytest.raises(ValueError) as caught:
        allocate(config, sites(), LAYERS)
    return str(caught.value)


def of_layer(allocations: dict[str, SiteAllocation], read: Any) -> list[Any]:
    """One value per layer, which all its sites share."""
    values: list[set[Any]] = [set() for _ in range(LAYERS)]
    for allocation in allocations.values():
        values[allocation.site.layer].add(read(allocation))
    assert all(len(value) == 1 for value in values)
    return [value.pop() for value in values]


def num_experts(allocation: SiteAllocation) -> int:
    return len(allocation.ranks)


def test_numbers_are_the_same_everywhere_and_the_order_is_the_models():
    allocations = plan(r=3, num_experts=5, top_k=2, num_shared_experts=2, lora_alpha=6)
    assert list(allocations) == [site.name for site in sites()]
    for name, allocation in allocations.items():
        assert allocation.site.name == name
        assert allocation.ranks == (3,) * 5 and allocation.shared_ranks == (3, 3)
        assert allocation.scaling == (2.0,) * 7
        assert (allocation.top_k, allocation.total_rank) == (2, 21)
        assert allocation.owns_router and allocation.is_routed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([2, 4, 6, 8], [2, 4, 6, 8]),
        ("inverted_triangle:2-8/4", [2, 4, 6, 8]),
        ("triangle:2-8", [8, 6, 4, 2]),
        ("hourglass:2-8/2", [8, 8, 8, 8]),
        ({r"layers\.[01]\..*": 3, ".*": 5}, [3, 3, 5, 5]),
    ],
    ids=str,
)
def test_the_forms_of_num_experts_and_r_and_k(value, expected):
    assert of_layer(plan(num_experts=value), num_experts) == expected
    assert of_layer(plan(r=value, num_experts=1), lambda a: a.total_rank) == expected
    assert of_layer(plan(top_k=value, num_experts=9), lambda a: a.top_k) == expected
    shared = plan(num_shared_experts=value, num_experts=0)
    assert of_layer(shared, lambda a: len(a.shared_ranks)) == expected


def test_ranks_of_single_experts():
    allocations = plan(num_experts=2, r=[[1, 2], [3, 4], 5, [6, 7]])
    assert of_layer(allocations, lambda a: a.ranks) == [(1, 2), (3, 4), (5, 5), (6, 7)]
    allocations = plan(num_experts=2, r={"q_proj": [1, 2], ".*": 3})
    assert allocations["layers.0.attn.q_proj"].ranks == (1, 2)
    assert allocations["layers.0.attn.k_proj"].ranks == (3, 3)


def test_patterns_override_rank_and_alpha_and_the_first_match_counts():
    allocations = plan(
        num_experts=2, r=4, lora_alpha=8,
        rank_pattern={r"layers\.0\.attn\.q_proj": [1, 2], "q_proj": 16},
        alpha_pattern={"k_proj": 32, ".*_proj": 4},
    )  # fmt: skip
    assert allocations["layers.0.attn.q_proj"].ranks == (1, 2)
    assert allocations["layers.1.attn.q_proj"].ranks == (16, 16)
    assert allocations["layers.1.attn.q_proj"].scaling == (4 / 16,) * 2
    assert allocations["layers.1.attn.k_proj"].ranks == (4, 4)
    assert allocations["layers.1.attn.k_proj"].scaling == (8.0, 8.0)


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ("alpha/r", lambda alpha, r: alpha / r),
        ("alpha/sqrt(r)", lambda alpha, r: alpha / math.sqrt(r)),
        ("constant", lambda alpha, r: alpha),
    ],
)
def test_scaling_rules_use_each_experts_own_rank(rule, factor):
    fields = {"num_experts": 3, "r": {".*": [1, 4, 9]}, "lora_alpha": 12, "scaling_rule": rule}
    allocation = plan(**fields, num_shared_experts=1, shared_expert_rank=16)["layers.0.mlp.up_proj"]
    assert allocation.scaling == tuple(factor(12.0, r) for r in (1, 4, 9, 16))


def test_shared_experts_take_their_own_rank_or_the_first_experts():
    fields = {"num_experts": 2, "r": {".*": [3, 5]}, "num_shared_experts": 2}
    assert plan(**fields)["layers.0.mlp.up_proj"].shared_ranks == (3, 3)
    assert plan(**fields, shared_expert_rank=7)["layers.0.mlp.up_proj"].shared_ranks == (7, 7)


@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), shared=st.integers(0, 2))
def test_rank_wise_makes_every_rank_an_expert_with_the_scaling_of_its_expert(ranks, shared):
    fields = {"num_experts": len(ranks), "r": {".*": ranks}, "num_shared_experts": shared}
    fields |= {"gate": "top_k_unnormalized", "top_k": 1, "lora_alpha": 60}
    whole, split = plan(**fields), plan(**fields, rank_wise=True)
    for name, allocation in split.items():
        assert allocation.total_rank == whole[name].total_rank
        whole_shared = whole[name].shared_ranks
        for always_on in (allocation.shared_ranks, whole_shared):
            assert always_on[len(always_on) - shared :] == (ranks[0],) * shared
        expected = tuple(60 / r for r in ranks for _ in range(r))
        assert allocation.scaling[: sum(ranks)] == expected
        if sum(ranks) > 1:
            assert allocation.ranks == (1,) * sum(ranks)


@pytest.mark.parametrize("gate", ["top_k", "dense", "switch", "sigmoid", "top_p", "threshold"])
def test_one_expert_needs_no_router(gate):
    allocation = plan(num_experts=1, gate=gate, r=3, num_shared_experts=1)["layers.0.mlp.up_proj"]
    assert not allocation.is_routed and allocation.router_site is None and allocation.top_k is None
    assert (allocation.ranks, allocation.shared_ranks) == ((), (3, 3))


def test_only_shared_experts_need_no_router():
    allocation = plan(num_experts=0, num_shared_experts=2, r=3)["layers.0.mlp.up_proj"]
    assert not allocation.is_routed and not allocation.owns_router
    assert (allocation.ranks, allocation.shared_ranks, allocation.num_decisions) == ((), (3, 3), 0)


@pytest.mark.parametrize(
    ("fields", "k"),
    [
        ({"gate": "top_k"}, 2),
        ({"gate": "sigmoid"}, 2),
        ({"gate": "switch"}, 1),
        ({"gate": "dense"}, 6),
        ({"gate": "top_p"}, None),
        ({"gate": "threshold"}, None),
        ({"gate": "top_k", "top_k": 6}, 6),
        ({"gate": "top_k", "top_k": {"q_proj": 3, ".*": 2}}, 2),
    ],
    ids=str,
)
def test_k_is_the_configs_or_the_gates(fields, k):
    assert plan(num_experts=6, **fields)["layers.0.mlp.up_proj"].top_k == k


def test_rank_wise_counts_k_in_ranks():
    assert plan(num_experts=2, r=4, rank_wise=True, top_k=7)["layers.0.mlp.up_proj"].top_k == 7
    message = refusal(num_experts=2, r=4, rank_wise=True, top_k=9)
    assert "top_k=9 is more than the 8 experts at the site 'layers.0.attn.q_proj'" in message


def followed(allocations: dict[str, SiteAllocation], layer: int = 1) -> dict[str, str | None]:
    prefix = f"layers.{layer}."
    return {
        name.removeprefix(prefix): (a.router_site or "").removeprefix(prefix) or None
        for name, a in allocations.items()
        if name.startswith(prefix)
    }


def test_scope_site():
    allocations = plan()
    assert followed(allocations) == {name: name for name in MODULES}
    assert {a.num_decisions for a in allocations.values()} == {LAYERS * 7}


def test_scope_block():
    allocations = plan(router_scope="block")
    assert followed(allocations) == {
        "attn.q_proj": "attn.q_proj", "attn.k_proj": "attn.q_proj", "attn.v_proj": "attn.q_proj",
        "attn.o_proj": "attn.o_proj", "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj", "mlp.down_proj": "mlp.down_proj",
    }  # fmt: skip
    assert {a.num_decisions for a in allocations.values()} == {LAYERS * 4}


def test_scope_layer():
    allocations = plan(router_scope="layer")
    assert set(followed(allocations).values()) == {"attn.q_proj"}
    assert {a.num_decisions for a in allocations.values()} == {LAYERS}


def test_scope_layer_keeps_the_encoders_tokens_apart():
    # they are other tokens, and only by chance as many
    names = ["SelfAttention.q", "EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "wo"]
    allocations = plan(modules=dict.fromkeys(names, (8, 8)), router_scope="layer")
    assert followed(allocations) == {
        "SelfAttention.q": "SelfAttention.q", "EncDecAttention.q": "SelfAttention.q",
        "EncDecAttention.k": "EncDecAttention.k", "EncDecAttention.v": "EncDecAttention.k",
        "wo": "SelfAttention.q",
    }  # fmt: skip


def test_the_first_routed_site_decides_for_its_block():
    experts = {"q_proj": 1, ".*": 4}
    assert followed(plan(router_scope="block", num_experts=experts))["attn.v_proj"] == "attn.k_proj"


def test_one_model_may_mix_routed_and_plain_sites():
    allocations = plan(num_experts={"attn.*": 0, ".*": 4}, num_shared_experts=1)
    assert [n for n, e in followed(allocations).items() if e is None] == [
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj",
    ]  # fmt: skip
    assert {a.num_decisions for a in allocations.values()} == {LAYERS * 3}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": [2, 4, 6]}, "num_experts lists 3 values, but the model has 4 layers"),
        ({"r": [2] * 5}, "r lists 5 values, but the model has 4 layers"),
        ({"num_experts": "uniform:4/5"}, "num_experts='uniform:4/5' has 5 groups for 4 layers"),
        ({"num_experts": {"q_proj": 4}}, "num_experts has no entry for the site 'layers.0.attn.k_"),
        (
            {"num_experts": [2, 4, 4, 4], "top_k": 3},
            "top_k=3 is more than the 2 experts at the site 'layers.0.attn.q_proj'",
        ),
        (
            {"num_experts": 4, "top_k": [2, 1, 2, 2]},
            "top_k=1 with gate='top_k' makes every routing weight 1, so the router would get no "
            "gradient from the task at the site 'layers.1.attn.q_proj'",
        ),
        (
            {"num_experts": 4, "gate": "switch", "top_k": [1, 1, 2, 1]},
            "top_k=2 doesn't go with gate='switch', which uses 1 at the site 'layers.2.attn.q_",
        ),
        (
            {"num_experts": 3, "r": {".*": [4, 8]}},
            "r=[4, 8] gives 2 ranks for the 3 experts of the site 'layers.0.attn.q_proj'",
        ),
        (
            {"num_experts": [0, 2, 2, 2]},
            "the site 'layers.0.attn.q_proj' would get no expert at all; exclude it",
        ),
        (
            {"router_scope": "block", "num_experts": {"k_proj": 3, ".*": 4}},
            "router_scope='block' makes 'layers.0.attn.k_proj' follow the decision of "
            "'layers.0.attn.q_proj', but they have 3 and 4 experts",
        ),
        (
            {"router_scope": "layer", "num_experts": 4, "top_k": {"up_proj": 3, ".*": 2}},
            "with top_k 3 and 2; give them equal numbers",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_names_field_site_and_numbers(fields, said):
    assert said in refusal(**fields)


def test_a_block_whose_inputs_differ_in_size_is_refused():
    modules = {"attn.q_proj": (8, 8), "attn.k_proj": (6, 8)}
    with pytest.raises(ValueError) as caught:
        plan(modules=modules, router_scope="block")
    message = str(caught.value)
    assert "'layers.0.attn.k_proj' and 'layers.0.attn.q_proj'" in message
    assert "6 and 8 features" in message and "router_scope='site'" in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_experts": "triangle:2-4"}, "num_experts='triangle:2-4' goes by layer, but the site"),
        ({"router_scope": "layer"}, "router_scope='layer', but the site 'lm_head' is in no"),
    ],
    ids=str,
)
def test_a_site_outside_the_layers(fields, said):
    outside = [*sites(), Site("lm_head", None, 8, 20)]
    with pytest.raises(ValueError) as caught:
        allocate(MoloraConfig(**fields), outside, LAYERS)
    assert said in str(caught.value) and "exclude_modules" in str(caught.value)
    assert allocate(MoloraConfig(), outside, LAYERS)["lm_head"].owns_router


def test_allocating_changes_neither_config_nor_sites():
    config = MoloraConfig(num_experts=[2, 4, 6, 8], r={".*": 4})
    before = config.to_dict()
    assert allocate(config, iter(sites()), LAYERS) == allocate(config, sites(), LAYERS)
    assert config.to_dict() == before
