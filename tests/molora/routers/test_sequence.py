"""Routers that decide once for a sequence: what they read, in models of every kind."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

import molora
from molora import MoloraConfig, SiteInput
from molora.gates import GATES
from molora.routers import ROUTERS

SEQUENCE = ("instruction", "layer_norm", "prompt_mean")


def adapted(tiny_model, randomize, kind: str, modules: list[str], **fields: Any) -> Any:
    config = MoloraConfig(
        r=2, num_experts=3, gate="dense", target_modules=modules,
        **{"router": "prompt_mean", **fields},
    )  # fmt: skip
    return randomize(get_peft_model(tiny_model(kind), config).eval())


@pytest.mark.parametrize(("kind", "module"), [("bert", "query"), ("vit", "q_proj")])
def test_a_model_that_reads_all_at_once(kind: str, module: str, tiny_model, tiny_batch, randomize):
    names = {name.split(".")[-1] for name, _ in tiny_model(kind).named_modules()}
    module = module if module in names else "query"
    batch = tiny_batch(kind)
    by_prompt = adapted(tiny_model, randomize, kind, [module])
    with pytest.raises(ValueError, match="nothing says which tokens are a prompt"):
        by_prompt(**batch)
    model = adapted(tiny_model, randomize, kind, [module], router_options={"pool": "sequence"})
    with torch.no_grad(), molora.observe(model) as records:
        model(**batch)
        (record, *_) = records.values()
        rows = record.weights.view(2, -1, 3)
        assert (rows == rows[:, :1]).all() and (rows[0] != rows[1]).any()
        if kind == "bert":  # what stands under the padding changes nothing
            other = {**batch, "input_ids": batch["input_ids"].clone()}
            other["input_ids"][1, 5:] = 9
            expected, actual = (model(**b).logits for b in (batch, other))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router", ["instruction", "centroid"])
@pytest.mark.parametrize("trains", [{"trainable_token_indices": [3, 5]},
                                    {"modules_to_save": ["embed_tokens"]}])  # fmt: skip
def test_embeddings_that_train_leave_checkpointing_exact(
    router: str, trains: dict[str, list], tiny_model, tiny_batch, randomize
):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = adapted(tiny_model, randomize, "llama", ["q_proj"], router=router, **trains).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**tiny_batch("llama")).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert any("embed_tokens" in name for name in expected)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


def test_a_plain_module_has_a_sequence_for_each_row(tiny_model, tiny_batch, randomize):
    options = {"router_options": {"pool": "sequence"}}
    pooled = adapted(tiny_model, randomize, "mlp", ["middle"], **options)
    single = adapted(tiny_model, randomize, "mlp", ["middle"], router="linear")
    x = tiny_batch("mlp")["x"]
    torch.testing.assert_close(pooled(x), single(x))


def test_an_encoder_with_a_decoder(tiny_model, tiny_batch, randomize):
    model = adapted(tiny_model, randomize, "t5", ["q"])
    with pytest.raises(ValueError, match="without an encoder of their own"):
        model(**tiny_batch("t5"))
    model = adapted(tiny_model, randomize, "t5", ["q"], router_options={"pool": "sequence"})
    with torch.no_grad():
        assert model(**tiny_batch("t5")).logits.isfinite().all()
    ids = tiny_batch("t5")["input_ids"]
    with pytest.raises(ValueError, match="without an encoder of their own"):
        model.generate(input_ids=ids, max_new_tokens=2)
    model = adapted(
        tiny_model, randomize, "t5", r"encoder\..*\.q", router_options={"pool": "sequence"}
    )
    with torch.no_grad():
        last = model.generate(input_ids=ids, max_new_tokens=1)[:, -1]  # by the encoder alone
        start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
        whole = model(input_ids=ids, decoder_input_ids=start).logits[:, -1]
    assert torch.equal(last, whole.argmax(-1))


def test_sequence_means_the_prompt_where_a_cache_is_written(tiny_model, randomize):
    ids = torch.tensor([[5, 9, 33, 12]])
    options = {"router_options": {"pool": "sequence"}}
    model = adapted(tiny_model, randomize, "llama", ["q_proj"], **options)
    with torch.no_grad():
        first = model(ids[:, :3], use_cache=True)
        expected = model(ids, prompt_mask=torch.tensor([[1, 1, 1, 0]])).logits
        with molora.observe(model) as records:
            model(ids)
        assert all((r.weights == r.weights[:1]).all() for r in records.values())
    by_prompt = adapted(tiny_model, randomize, "llama", ["q_proj"])
    with torch.no_grad():
        twin = by_prompt(ids, prompt_mask=torch.tensor([[1, 1, 1, 0]])).logits
    torch.testing.assert_close(first.logits, twin[:, :3], atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected, twin)  # in a pass without a cache it is the whole row


def test_noise_is_drawn_once_for_a_sequence(tiny_model, randomize):
    options = {"router_options": {"noise": 1.0}}
    model = adapted(tiny_model, randomize, "llama", ["q_proj"], **options)
    batch = {"input_ids": torch.tensor([[5, 9, 33], [5, 9, 33]]), "prompt_mask": torch.ones(2, 3)}
    with torch.no_grad(), molora.observe(model.train()) as records:
        model(**batch)
    for record in records.values():
        rows = record.logits.view(2, 3, 3)
        assert (rows == rows[:, :1]).all() and (rows[0] != rows[1]).any()


@pytest.mark.parametrize("name", SEQUENCE)
def test_wrong_options(name: str):
    with pytest.raises(ValueError, match=r"unknown router option pool 'mean'; known: prompt, sequ"):
        ROUTERS.build(name, {"pool": "mean"}, in_features=4, num_experts=2)
    single = {"instruction": "init_std", "layer_norm": "scale"}.get(name)
    if single:
        with pytest.raises(ValueError, match=f"router option {single}=0 must be above 0"):
            ROUTERS.build(name, {single: 0}, in_features=4, num_experts=2)


@pytest.mark.parametrize(
    ("gate", "options", "said"),
    [
        ("expert_dropout", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ("expert_dropout", {"unit": "row"}, "unknown gate option unit 'row'; known: sequence, tok"),
        ("noisy_top_k", {"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
    ],
)
def test_wrong_options_of_the_gates(gate: str, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        GATES.build(gate, options, num_experts=3, top_k=2, in_features=4)


def test_a_dropped_expert_is_dropped_for_single_tokens_too():
    torch.manual_seed(0)
    gate = GATES.build("expert_dropout", {"dropout": 0.5}, num_experts=4, top_k=None, in_features=2)
    routing = gate(torch.zeros(2000, 4), SiteInput(hidden=torch.zeros(2000, 2)))
    assert abs((routing.weights == 0).float().mean() - 0.5) < 0.05
    total = routing.weights.sum(-1)
    assert ((total - 1).abs() < 1e-6).logical_or(total == 0).all()  # all four may be dropped
    assert (gate.eval()(torch.zeros(1, 4), SiteInput(torch.zeros(1, 2))).weights == 0.25).all()


def test_noise_that_all_experts_survive(tiny_model):
    """With K = E everything is chosen, whatever is drawn."""
    config = MoloraConfig(
        num_experts=3, top_k=3, gate="noisy_top_k", target_modules=["q_proj"],
        losses={"load_cv": 1.0},
    )  # fmt: skip
    model = get_peft_model(tiny_model("llama"), config).train()
    ids = torch.tensor([[5, 9, 33]])
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.isfinite().all() for grad in grads)
