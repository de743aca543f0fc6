"""FlyLoRA from its formula; its frozen projection, saved or drawn again from a seed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from molora import MoloraConfig

RATE, K = 0.05, 3


def formula(site, absolute: bool):
    values = site.x @ site.buffers["experts.A"].T
    ranked = (values.abs() if absolute else values) + RATE * site.buffers["gate.bias.steps"]
    chosen = torch.zeros_like(values).scatter(1, ranked.topk(K).indices, 1.0)
    return site.base() + 64 / values.shape[1] * (chosen * values) @ site.p["experts.B"].T


@pytest.mark.parametrize("absolute", [False, True], ids=["signed", "absolute"])
def test_formula(fidelity, absolute: bool):
    config = MoloraConfig.from_method(
        "flylora",
        r=[8, 5],
        top_k=K,
        expert_options={"density": 0.5},
        router_options={"score": "norm" if absolute else "signed"},
        gate_options={"update_rate": RATE},
    )
    case = fidelity(config)
    for layer in case.layers().values():
        steps = layer.molora_gate["default"].bias.steps
        steps.copy_(torch.arange(len(steps)) % 4 - 2)
    case.check(lambda site: formula(site, absolute))


def test_the_projection_is_sparse_and_frozen(tiny_model):
    config = MoloraConfig.from_method("flylora", r=64, target_modules=["up_proj"])
    model = get_peft_model(tiny_model("llama"), config)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(name.endswith(".molora_experts.default.B") for name in trainable)
    projections = [b for name, b in model.named_buffers() if name.endswith("default.A")]
    assert len(projections) == 2 and not torch.equal(*projections)
    for A in projections:
        assert A.shape == (64, 32)
        assert ((A != 0).sum(-1) == 8).all()
        assert A[A != 0].std().item() == pytest.approx(1 / 64, rel=0.15)


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("save", [True, False], ids=["projection", "seed"])
def test_save_and_load(tiny_model, tiny_batch, logits_of, randomize, tmp_path, save, low_cpu):
    config = MoloraConfig.from_method(
        "flylora", expert_options={"density": 0.25, "save_projection": save}
    )
    model = randomize(get_peft_model(tiny_model("llama"), config).eval())
    saved = get_peft_model_state_dict(model)
    assert {n.rpartition(".")[2] for n in saved} == {"B", "steps", "A" if save else "seed"}
    expected = logits_of(model, tiny_batch("llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama"), tmp_path, low_cpu_mem_usage=low_cpu
    ).eval()
    assert torch.equal(logits_of(loaded, tiny_batch("llama")), expected)
