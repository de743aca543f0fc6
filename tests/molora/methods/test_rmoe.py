"""RMoE from its formula, and the gradient of its state across checkpointed layers."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer
from molora.observe import routing_contexts

from ..test_contract import gradients


def formula(site):
    if site.name.endswith("gate_proj"):
        p, memory = site.p, site.memory
        gru = memory.setdefault("gru", {k: v for k, v in p.items() if ".gru." in k})
        Wi, Wh, bi, bh = (gru[f"router.gru.{n}"] for n in
                          ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
        x = site.x @ p["router.down"].T
        h = memory.get("h", torch.zeros_like(x))
        size = x.shape[1]
        i, g = x @ Wi.T + bi, h @ Wh.T + bh
        r = torch.sigmoid(i[:, :size] + g[:, :size])
        z = torch.sigmoid(i[:, size : 2 * size] + g[:, size : 2 * size])
        n = torch.tanh(i[:, 2 * size :] + r * g[:, 2 * size :])
        memory["h"] = (1 - z) * n + z * h
        logits = memory["h"] @ p["router.up"].T
        probs = logits.softmax(-1)
        best = probs.topk(2).indices
        chosen = torch.zeros_like(probs).scatter(1, best, 1.0)
        memory["weights"] = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
        used, mean = site.token_mean(chosen), site.token_mean(probs)
        return site.mix(memory["weights"]), {
            "load_balancing": probs.shape[1] / 2 * (used * mean).sum()
        }
    return site.mix(site.memory["weights"])


def config(**overrides):
    fields = {"num_experts": 4, "r": 2, "router_options": {"hidden_size": 5}, **overrides}
    return MoloraConfig.from_method("rmoe", **fields)


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    case.check(formula, train=False)


def three_layers(tiny_model, **overrides):
    base = tiny_model("llama", num_hidden_layers=3)
    torch.manual_seed(0)
    model = get_peft_model(
        base, config(init_lora_weights=False, task_type="CAUSAL_LM", **overrides)
    )
    for name, parameter in model.named_parameters():
        if "molora_router" in name:  # so that the state, and its gradient, aren't small
            parameter.data = 2 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize("scope", ["layer", "site"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_the_gradient_crosses_checkpointed_layers(tiny_model, tiny_batch, scope, reentrant):
    model, batch = three_layers(tiny_model, router_scope=scope), tiny_batch("llama")
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        actual = gradients(model, batch)
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_each_of_two_passes_is_run_again_with_its_own_states(tiny_model, tiny_batch, reentrant):
    model, one = three_layers(tiny_model), tiny_batch("llama")
    two = {name: values[:, :4] for name, values in one.items()}
    first, second = gradients(model, one), gradients(model, two)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    (model(**one).loss + model(**two).loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = first[name] + second[name]
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_a_second_backward_that_ends_in_a_lower_layer(tiny_model, tiny_batch, reentrant):
    """It runs that layer again, and not the one above, whose gradient it has had already."""
    model, batch = three_layers(tiny_model), tiny_batch("llama")

    def both() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(**batch, output_hidden_states=True, use_cache=False)
        out.loss.backward(retain_graph=True)
        out.hidden_states[1].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = both()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    actual = both()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("checkpointed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_some_layers_checkpointed(tiny_model, tiny_batch, checkpointed, reentrant):
    model, batch = three_layers(tiny_model), {**tiny_batch("llama"), "use_cache": False}
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    for i in checkpointed:
        layer = model.get_base_model().model.layers[i]

        def run(hidden, forward=layer.forward, **kwargs):
            return checkpoint(lambda h: forward(h, **kwargs), hidden, use_reentrant=reentrant)

        layer.forward = run
    actual = gradients(model, batch)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_without_the_carrys_gradient_they_would_differ(tiny_model, tiny_batch, monkeypatch):
    model, batch = three_layers(tiny_model), tiny_batch("llama")
    expected = gradients(model, batch)
    take = molora.carry.LayerCarry.take

    def detached(self, site, again):
        state = take(self, site, again)
        return None if state is None else state.detach()

    monkeypatch.setattr(molora.carry.LayerCarry, "take", detached)
    actual = gradients(model, batch)
    name = next(n for n in expected if "layers.0" in n and n.endswith("weight_hh"))
    largest = expected[name].abs().max()
    assert (actual[name] - expected[name]).abs().max() > 1e-2 * largest


def test_one_gru_for_all_layers_and_a_chain_for_each_module(tiny_model, tiny_batch, logits_of):
    model = three_layers(tiny_model, router_scope="site").eval()
    grus = [name for name, _ in model.named_parameters() if name.endswith("gru.weight_hh")]
    assert len(grus) == 3 and all("layers.0" in name for name in grus)
    batch = tiny_batch("llama")
    before = logits_of(model, batch)
    for layer in model.modules():
        if isinstance(layer, MoloraLayer):
            layer.molora_router["default"].gru.weight_hh.data.zero_()
    assert not torch.equal(logits_of(model, batch), before)


def test_no_graph_outlives_the_forward(tiny_model, tiny_batch):
    model = three_layers(tiny_model)
    model(**tiny_batch("llama")).loss.backward()
    given = routing_contexts(model)[0]._with_gradients
    (carry,) = given.carries.values()
    states = [slot.state for slot in carry._slots.values()]
    assert len(states) == 3 and not any(state.requires_grad for state in states)


def test_what_it_cannot_do_is_refused(tiny_model, tiny_batch):
    router = molora.routers.ROUTERS.build("recurrent", {}, in_features=2, num_experts=2)
    with pytest.raises(RuntimeError, match="needs the base model's forward"):
        router(molora.SiteInput(torch.zeros(1, 2), site="layers.0.up"))
    carry = molora.carry.LayerCarry()
    carry.take("a", again=False)
    with pytest.raises(RuntimeError, match="'a' runs twice"):
        carry.take("a", again=False)
    with pytest.raises(RuntimeError, match="'b' is run again for a pass in which it didn't run"):
        carry.take("b", again=True)
    with pytest.raises(ValueError, match="hidden_size=0"):
        config(router_options={"hidden_size": 0})
