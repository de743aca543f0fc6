"""A gate for each layer that reads the mean of its input over the prompt."""

import re

import pytest
import torch

import molora

from .dense_mixture import by_formula, router_of

PROMPT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def rows() -> dict[str, torch.Tensor]:
    """Two sequences, the second shorter, with their prompts."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    return {
        "input_ids": torch.randint(3, 64, (2, 5), generator=generator),
        "attention_mask": mask,
    }


def randomized(model):
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("scope", ["layer", "site"])
def test_it_is_its_formula(base, folders, rows, scope):
    model = randomized(molora.compose(base(), folders, "mole", router_scope=scope))
    decided = {}

    def formula(x, site, dense, present):
        key = site if scope == "site" else re.search(r"layers\.\d+", site)[0]
        if key not in decided:
            router = router_of(model, site)
            pairs = zip(x.view(2, 5, -1), PROMPT.bool(), strict=True)
            mean = torch.stack([row[chosen].mean(0) for row, chosen in pairs])
            logits = mean @ router.weight.double().mT / router.log_temperature.double().exp()
            decided[key] = logits.softmax(-1).repeat_interleave(5, 0)
        return decided[key]

    expected = by_formula(base(), folders, formula, rows)
    with torch.no_grad():
        actual = model(**rows, prompt_mask=PROMPT).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert len(decided) == (2 if scope == "layer" else 6)


def test_the_temperature_starts_where_it_is_told_and_trains(base, folders, rows):
    model = molora.compose(base(), folders, "mole", temperature=0.3)
    router = router_of(model, "model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(router.log_temperature.exp(), torch.tensor([0.3]).double())
    labels = rows["input_ids"].masked_fill(PROMPT.bool(), -100)
    model.train()(**rows, labels=labels).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4  # weight and temperature of two layers
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


def test_the_loss_is_the_papers_less_its_least(base, folders, rows):
    """-alpha log prod q at one gate is the library's loss times E alpha, plus alpha E log E."""
    model = molora.compose(base(), folders, "mole", balance=0.5)
    config = model.peft_config["default"]
    assert config.losses == {"gate_balance": 1.5} and config.experts == "frozen_lora"
    loss = config.build_losses()["gate_balance"][1]
    with molora.observe(randomized(model)) as records:
        model(**rows, prompt_mask=PROMPT)
    for routing in records.values():
        q = routing.weights[rows["attention_mask"].bool().flatten()].mean(0)
        published = -0.5 * q.prod().log() - 0.5 * 3 * torch.tensor(3.0).double().log()
        torch.testing.assert_close(1.5 * loss(routing, None), published)


@torch.no_grad()
def test_the_prompts_decision_is_kept_while_decoding(base, folders, rows):
    model = randomized(molora.compose(base(), folders, "mole"))
    ids = rows["input_ids"][:1]
    whole = model(ids, prompt_mask=PROMPT[:1]).logits
    start = model(ids[:, :3], use_cache=True)
    rest = model(ids[:, 3:4], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 3:4], atol=1e-10, rtol=1e-10)


def test_what_is_refused(base, folders):
    with pytest.raises(ValueError, match="balance=-1 must be a number, and not negative"):
        molora.compose(base(), folders, "mole", balance=-1)
    with pytest.raises(ValueError, match="router_scope"):
        molora.compose(base(), folders, "mole", router_scope="token")
