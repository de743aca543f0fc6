"""Ranking adapters: losses against PEFT's own models, likeness against dense products."""

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import molora
from molora.composition.ranking import cosines
from molora.composition.sources import read_lora

from .dense_mixture import deltas


@pytest.fixture(scope="module")
def examples(tiny_batch) -> list[dict[str, Tensor]]:
    """Two batches of unlike numbers of labels."""
    batch = tiny_batch("llama")
    return [
        {key: value[:1] for key, value in batch.items()},
        {key: value.roll(1, 1) for key, value in batch.items()},
    ]


def loss_of(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean negative log probability of a label, label by label."""
    found = []
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
        for row, labels in zip(logits.log_softmax(-1), batch["labels"], strict=True):
            found += [-row[t, label] for t, label in enumerate(labels[1:]) if label != -100]
    return float(torch.stack(found).mean())


def dense_cosines(folders: list[str]) -> Tensor:
    """The same from matrices of the modules' size."""
    experts = [deltas(folder) for folder in folders]
    sites = sorted({site for expert in experts for site in expert})
    rows = []
    for expert in experts:
        parts = []
        for site in sites:
            like = next(other[site] for other in experts if site in other)
            parts.append(expert.get(site, torch.zeros_like(like)).flatten())
        rows.append(torch.cat(parts).double())
    stacked = torch.stack(rows)
    return F.cosine_similarity(stacked[None], stacked[:, None], -1)


def test_losses_are_those_of_pefts_models(base, folders, examples):
    ranking = molora.rank_adapters(base(), folders, examples)
    for folder, loss in zip(folders, ranking.losses, strict=True):
        theirs = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False).eval()
        # transformers forms the loss in fp32, whatever the model's dtype
        assert loss == pytest.approx(loss_of(theirs, examples), rel=1e-6)
    assert ranking.base_loss == pytest.approx(loss_of(base(), examples), rel=1e-6)
    assert len(set(ranking.losses)) == 3
    assert ranking.perplexities[1] == pytest.approx(2.718281828459045 ** ranking.losses[1])


def test_likeness_is_that_of_the_dense_products(folders):
    found = cosines([read_lora(folder) for folder in folders])
    torch.testing.assert_close(found, dense_cosines(folders), rtol=1e-6, atol=1e-8)
    assert found.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert found.fill_diagonal_(0).abs().max() > 1e-3


@pytest.fixture(scope="module")
def shelf(base, folders, tmp_path_factory) -> list[str]:
    """The three, a copy of the second that is a little smaller, and one that changes nothing."""
    root = tmp_path_factory.mktemp("shelf")
    copy = PeftModel.from_pretrained(base(), folders[1], autocast_adapter_dtype=False)
    for name, parameter in copy.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.99
    copy.save_pretrained(root / "copy")
    idle = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base(), idle).save_pretrained(root / "idle")
    return [*folders, str(root / "copy"), str(root / "idle")]


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
def test_the_choice_is_the_best_of_all_sequences(base, shelf, examples, diversity):
    ranking = molora.rank_adapters(base(), shelf, examples, 3, diversity=diversity)
    cosine, losses = dense_cosines(shelf).nan_to_num(0.0), ranking.losses
    low, high = min(losses), max(losses)
    quality = [(high - loss) / (high - low) for loss in losses]

    def gains(sequence: tuple[int, ...]) -> list[float]:
        first, *rest = sequence
        found = [quality[first]]
        for place, e in enumerate(rest, 1):
            nearest = max(float(cosine[e, k]) for k in sequence[:place])
            found.append((1 - diversity) * quality[e] - diversity * nearest)
        return [round(gain, 9) for gain in found]

    # Greedy: the sequence whose gains are the largest, the first one counting most.
    best = max(permutations(range(len(shelf)), 3), key=gains)
    assert gains(tuple(ranking.kept)) == gains(best)
    assert ranking.chosen == [shelf[e] for e in ranking.kept]
    both = {1, 3} <= set(ranking.kept)
    assert not both if diversity >= 0.7 else True
    if diversity == 0.0:
        assert ranking.kept == sorted(range(len(shelf)), key=lambda e: losses[e])[:3]


def test_a_given_score_comes_first_and_the_loss_decides_between_equals(base, folders, examples):
    seen = []

    def score(model: Any) -> float:
        seen.append(loss_of(model, examples))  # the adapter is at work in it
        return [0.5, 0.5, 1.0][len(seen) - 1]

    model = base()
    ranking = molora.rank_adapters(model, folders, examples, 2, diversity=0.0, score=score)
    assert seen == pytest.approx(ranking.losses) and ranking.scores == [0.5, 0.5, 1.0]
    assert ranking.kept == [2, min((0, 1), key=lambda e: ranking.losses[e])]
    assert loss_of(model, examples) == pytest.approx(loss_of(base(), examples))


def test_the_model_is_left_as_it_was(base, folders, examples):
    model = base().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    molora.rank_adapters(model, folders, examples)
    assert model.training and not model.model.layers[0].self_attn.q_proj._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_table_shows_the_kept_first(base, shelf, examples):
    ranking = molora.rank_adapters(base(), shelf, examples, 2)
    head, *rows, last = str(ranking).splitlines()
    assert head.split()[:4] == ["adapter", "kept", "loss", "perplexity"]
    assert [row.split()[1] for row in rows] == ["1", "2", "-", "-", "-"]
    assert rows[0].startswith(ranking.chosen[0])
    assert last.startswith("no adapter") and f"{ranking.base_loss:.4f}" in last
    assert all(f"{loss:.4f}" in str(ranking) for loss in ranking.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "adapters is empty"),
        ({"keep": 4}, "keep=4 must be from 1 to 3"),
        ({"keep": 0}, "keep=0"),
        ({"keep": "2"}, "keep='2' must be from 1 to 3"),
        ({"diversity": "1"}, "diversity='1' must be from 0 to 1"),
        ({"diversity": 1.5}, r"diversity=1\.5"),
        ({"batches": []}, "no batch has a label"),
    ],
)
def test_wrong_options_are_named(options, message, base, folders, examples):
    chosen = {"adapters": folders, "batches": examples, **options}
    with pytest.raises(ValueError, match=message):
        molora.rank_adapters(base(), **chosen)


def test_batches_without_labels_are_refused(base, folders, examples):
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in examples]
    with pytest.raises(ValueError, match="have labels"):
        molora.rank_adapters(base(), folders, bare)
    hidden = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in examples]
    with pytest.raises(ValueError, match=r"no batch has a label"):
        molora.rank_adapters(base(), folders, hidden)
