"""Polytropon and MHR from their formula, PEFT's own layer beside it, and one LoRA for each task."""

import pytest
import torch
from peft import PolyConfig, get_peft_model

import molora
from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec
from molora.gates import GATES
from molora.layer import MoloraLayer
from molora.routers import ROUTERS

TARGETS = ["gate_proj", "down_proj"]


def mixes(site, q):
    """(B, q, S): the skills of each sequence, drawn as torch's own distribution draws them."""
    table = site.p["router.table"].T[site.labels["task_ids"]]  # (B, E)
    if site.training:
        uniform = torch.rand(table.shape, dtype=table.dtype)
        table = table + uniform.log() - (1 - uniform).log()
    skills = (1 / (1 + torch.exp(-table))).reshape(len(table), q, -1)
    return skills / skills.sum(-1, keepdim=True)


def formula(site, q):
    batch, r = site.shape[0], site.ranks[0]
    w = mixes(site, q)
    A, B = site.experts()
    skills = w.shape[-1]
    outputs = []
    for b, x in enumerate(site.x.unflatten(0, site.shape)):
        down = [sum(w[b, i, j] * A[i * skills + j] for j in range(skills)) for i in range(q)]
        up = [sum(w[b, i, j] * B[i * skills + j] for j in range(skills)) for i in range(q)]
        outputs.append(x @ torch.cat(down, 1).T @ torch.cat(up, 0).T)
    assert len(outputs) == batch
    return site.base() + torch.cat(outputs) / r


CASES = {
    "poly": (1, {"num_experts": [3, 4]}),
    "mhr": (2, {"num_experts": 6, "expert_options": {"splits": 2}, "gate_options": {"groups": 2}}),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(fidelity, name: str):
    q, options = CASES[name]
    tasks = {"router_options": {"num_tasks": 3}, "target_modules": TARGETS, "r": 2}
    case = fidelity(MoloraConfig.from_method(name, **tasks, **options))
    case.check(lambda site: formula(site, q))
    case.check(lambda site: formula(site, q), train=False)


@pytest.mark.parametrize("splits", [1, 4])
def test_it_is_pefts_poly(tiny_model, tiny_batch, logits_of, splits: int):
    skills = 3
    config = PolyConfig(
        r=2,
        n_tasks=5,
        n_skills=skills,
        n_splits=splits,
        target_modules=["q_proj", "v_proj"],
        init_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(tiny_model("llama"), config).eval()
    ours = get_peft_model(
        tiny_model("llama"),
        MoloraConfig.from_method(
            "mhr",
            r=2,
            num_experts=skills * splits,
            expert_options={"splits": splits},
            gate_options={"groups": splits},
            router_options={"num_tasks": 5},
        ),
    ).eval()
    for site, layer in ours.named_modules():
        if isinstance(layer, MoloraLayer):
            twin, experts = theirs.get_submodule(site), layer.molora_experts["default"]
            twin.poly_router["default"].module_logits.data.normal_()
            table = twin.poly_router["default"].module_logits.data
            layer.molora_router["default"].table.data.copy_(table.T)
            A, B = twin.poly_lora_A["default"].data, twin.poly_lora_B["default"].data
            experts.A.data.copy_(A.transpose(2, 3).flatten(0, 2))
            experts.B.data.copy_(B.permute(3, 0, 1, 2).flatten(1))
    batch, tasks = tiny_batch("llama"), torch.tensor([4, 1])
    expected = logits_of(theirs, {**batch, "task_ids": tasks})
    actual = logits_of(ours, {**batch, "routing_task_ids": tasks})
    assert (actual - logits_of(tiny_model("llama"), batch)).abs().max() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_draws_are_those_of_the_relaxed_bernoulli():
    router = ROUTERS.build("task_table", {"temperature": 0.5}, in_features=2, num_experts=2)
    router.table.data[:, 3] = torch.tensor([1.5, -0.5])
    pass_ = molora.passes.Pass(
        batch=4000, labels={"task_ids": torch.full((4000,), 3)}, module=router
    )
    inputs = molora.SiteInput(torch.zeros(4000, 2), shape=(4000, 1), given=pass_)
    torch.manual_seed(0)
    drawn = router.train()(inputs).sigmoid()
    reference = torch.distributions.RelaxedBernoulli(
        torch.tensor(0.5), logits=torch.tensor([1.5, -0.5])
    ).sample((4000,))
    for moment in (1, 2):  # a mean of 4000 values in [0, 1]: deviation below 0.008
        difference = (drawn**moment).mean(0) - (reference**moment).mean(0)
        assert difference.abs().max() < 0.03
    calm = router.eval()(inputs)
    assert torch.equal(calm, torch.tensor([3.0, -1.0]).expand(4000, 2))


def test_one_draw_for_a_sequence(tiny_model, tiny_batch):
    config = MoloraConfig.from_method("poly", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config).train()
    batch = {**tiny_batch("llama"), "routing_task_ids": torch.tensor([3, 3])}
    with molora.observe(model) as records:
        model(**batch)
    for routing in records.values():
        weights = routing.weights.unflatten(0, batch["input_ids"].shape)
        assert torch.equal(weights, weights[:, :1].expand_as(weights))
        assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", CASES)
def test_a_task_is_one_lora(tiny_model, tiny_batch, logits_of, name: str):
    config = MoloraConfig.from_method(name, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config).eval()
    for key, parameter in model.named_parameters():
        if "table" in key:
            parameter.data.normal_()
    batch = tiny_batch("llama")
    expected = logits_of(model, {**batch, "routing_task_ids": torch.tensor([2, 2])})
    molora.fix_routing(model, task=2)
    for layer in model.modules():
        if isinstance(layer, MoloraLayer):
            experts = layer.molora_experts["default"]
            weights = layer.molora_router["default"].static_weights(layer.molora_gate["default"], 2)
            A, B = experts.mixed(weights)
            assert (A.shape[0], B.shape[1]) == (8, 8)
            torch.testing.assert_close(B @ A, experts.delta_weight(weights))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-5, rtol=1e-5)


def bank(ranks=(2,) * 4, shared=(), features=(4, 6), **options):
    scaling = (0.5,) * (len(ranks) + len(shared))
    spec = SiteSpec(*features, ranks, shared, scaling=scaling)
    built = EXPERTS.build("factor_mixing", options, spec=spec).double()
    torch.manual_seed(0)
    built.reset_parameters(False, lambda: torch.zeros(6, 4))
    return built


def test_it_is_the_mixture_of_outputs_for_one_hot_weights_alone():
    experts, x = bank(), torch.randn(3, 4, dtype=torch.float64)
    A, B = experts.A.split(2), experts.B.split(2, 1)
    outputs = torch.stack([0.5 * x @ a.T @ b.T for a, b in zip(A, B, strict=True)], 1)
    for weights, equal in (([0, 0, 1.0, 0], True), ([0, 0.5, 0.5, 0], False)):
        weights = torch.tensor(weights, dtype=torch.float64).expand(3, 4)
        mixed = experts(x, weights, torch.zeros(3, 6, dtype=torch.float64))
        of_outputs = (weights[..., None] * outputs).sum(1)
        assert torch.allclose(mixed, of_outputs, atol=1e-12) == equal


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"splits": 3}, "splits=3 must divide the number of experts, 4"),
        ({"splits": 4}, "splits=4 must divide the output features, 6"),
        ({"splits": 0}, "splits=0"),
        ({"shared": (2,)}, "no shared experts"),
        ({"ranks": (2, 3, 2, 2)}, "one rank for all"),
    ):
        with pytest.raises(ValueError, match=message):
            bank(**options)
    with pytest.raises(ValueError, match="groups=3 must divide the number of experts, 4"):
        GATES.build("grouped_sigmoid", {"groups": 3}, num_experts=4, top_k=None, in_features=1)
    gate = GATES.build("grouped_sigmoid", {"groups": 2}, num_experts=4, top_k=None, in_features=1)
    router = ROUTERS.build("linear", {}, in_features=4, num_experts=4)
    with pytest.raises(ValueError, match=r"gate_options=\{'groups': 1\}"):
        gate.check_fit(router, bank(splits=1))


def test_sigmoids_that_underflow_still_sum_to_one():
    gate = GATES.build("grouped_sigmoid", {"groups": 2}, num_experts=4, top_k=None, in_features=1)
    logits = torch.tensor([[-200.0, -201.0, 3.0, -900.0]])
    weights = gate(logits, molora.SiteInput(torch.zeros(1, 1))).weights.unflatten(1, (2, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2))
    share = 1 / (1 + torch.e)
    torch.testing.assert_close(weights[0, 0], torch.tensor([1 - share, share]))
