"""What one forward pass tells the layers: which rows are real, and whether logits are finite."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molora.context import RoutingContext
from molora.stats import RoutingStatistics


class Model(nn.Module):
    """Takes what transformers' models take; `during` runs in place of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.context = RoutingContext()
        self.handles = self.context.install(self)
        self.during: Any = lambda: None
        self.received: dict[str, Any] = {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        self.received = kwargs
        return self.during()


MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])
IDS = torch.zeros(2, 3, dtype=torch.long)


def read(hidden_shape: tuple[int, ...], name: str = "attention_mask", *args, **kwargs) -> Any:
    """The mask that a layer with that input gets during a pass with these arguments."""
    model = Model()
    hidden = torch.zeros(*hidden_shape, 8)
    model.during = lambda: model.context.token_mask(name, hidden)
    mask = model(*args, **kwargs)
    return mask if mask is None else mask.tolist()


FLAT = [False, True, True, True, True, True]


def test_the_mask_is_that_of_the_flattened_tokens():
    assert read((2, 3), input_ids=IDS, attention_mask=MASK) == FLAT
    assert read((2, 3), "attention_mask", IDS, MASK) == FLAT  # by position
    assert read((2, 3), inputs_embeds=torch.zeros(2, 3, 8), attention_mask=MASK) == FLAT
    assert read((6,), input_ids=IDS, attention_mask=MASK.bool()) == FLAT  # already flattened


def test_without_a_mask_every_row_counts():
    assert read((2, 3), input_ids=IDS) is None
    # a (batch, 1, query, key) mask says nothing about single tokens
    assert read((2, 3), input_ids=IDS, attention_mask=torch.ones(2, 1, 3, 3)) is None


def test_while_decoding_the_mask_also_covers_the_cache():
    new = IDS[:, :1]
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert read((2, 1), input_ids=new, attention_mask=mask) == [False, True]
    decoder = {"decoder_input_ids": new, "decoder_attention_mask": mask}
    assert read((2, 1), "decoder_attention_mask", **decoder) == [False, True]
    # an encoder's mask stays whole while its decoder decodes
    assert read((2, 5), attention_mask=mask, **decoder) == mask.bool().flatten().tolist()


def test_one_row_per_sequence_counts_whole():
    # a pooled output, which padding is no part of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read((2,), input_ids=IDS, attention_mask=MASK) is None


@pytest.mark.parametrize("rows", [(2, 2), (2, 4), (3, 3), (2, 1), (7,)], ids=str)
def test_an_input_that_the_mask_does_not_describe_is_warned_about(rows):
    # (2, 2): the image tokens beside a longer text, in a model of two towers
    with pytest.warns(UserWarning) as caught:
        assert read(rows, input_ids=IDS, attention_mask=MASK) is None
    message = str(caught[0].message)
    assert str((*rows, 8)) in message and "attention_mask of shape (2, 3)" in message


def test_it_is_warned_once():
    model = Model()
    model.during = lambda: model.context.token_mask("attention_mask", torch.zeros(2, 9, 8))
    with pytest.warns(UserWarning):
        model(input_ids=IDS, attention_mask=MASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, attention_mask=MASK)


def test_the_decoders_mask_comes_from_the_labels_if_it_is_not_given():
    labels = torch.tensor([[5, -100], [0, 7]])
    name = "decoder_attention_mask"
    assert read((2, 2), name, labels=labels) == [True, False, True, True]
    given = torch.tensor([[1, 1], [0, 1]])
    seen = read((2, 2), name, labels=labels, decoder_attention_mask=given)
    assert seen == [True, True, False, True]
    assert read((2, 2), name, labels=torch.tensor([1, 2])) is None  # classes


def test_a_pass_without_gradients_does_not_change_what_a_recomputation_reads():
    model = Model()
    context, hidden = model.context, torch.zeros(2, 3, 8)
    model(input_ids=IDS, attention_mask=MASK)
    with torch.no_grad():
        model.during = lambda: context.token_mask("attention_mask", hidden).tolist()
        assert model(input_ids=IDS, attention_mask=torch.ones(2, 3)) == [True] * 6
    seen = []

    def recompute(grad: Tensor) -> None:
        with torch.enable_grad():
            seen.append(context.token_mask("attention_mask", hidden).tolist())

    output = torch.zeros(1, requires_grad=True) * 1
    output.register_hook(recompute)
    output.backward()
    assert seen == [FLAT]


@pytest.mark.parametrize("gradients", [False, True])
def test_what_runs_outside_a_pass_is_not_described_by_the_one_before(gradients):
    model = Model()
    with torch.set_grad_enabled(gradients):
        model(input_ids=IDS, attention_mask=MASK, task_ids=torch.tensor([0, 1]))
        assert model.context.token_mask("attention_mask", torch.zeros(2, 3, 8)) is None
        assert dict(model.context.given().labels) == {}


class Whole(Model):
    """A model around one that runs by itself too, as `generate` runs an encoder."""

    def __init__(self) -> None:
        self.base_model = None
        super().__init__()
        for handle in self.handles:
            handle.remove()
        self.base_model = Model()
        for handle in self.base_model.handles:
            handle.remove()
        self.context.install(self)


def test_a_part_that_runs_by_itself_is_a_pass_and_within_one_it_is_not():
    model = Whole()
    part, ids = model.base_model, torch.tensor([3, 4])
    hidden = torch.zeros(2, 3, 8)
    part.during = lambda: (
        model.context.token_mask("attention_mask", hidden),
        dict(model.context.given().labels),
    )
    mask, labels = part(input_ids=IDS, attention_mask=MASK, task_ids=ids)
    assert mask.tolist() == FLAT and labels == {"task_ids": ids}
    assert model.context.token_mask("attention_mask", hidden) is None  # it has ended

    model.during = lambda: (part(input_ids=IDS), part(input_ids=IDS))
    for mask, labels in model(input_ids=IDS, attention_mask=MASK, task_ids=ids):
        assert mask.tolist() == FLAT and labels == {"task_ids": ids}


def test_a_pass_without_a_mask_forgets_the_previous_one():
    model = Model()
    model(input_ids=IDS, attention_mask=MASK)
    model(input_ids=IDS)
    assert model.context.token_mask("attention_mask", torch.zeros(2, 3, 8)) is None


def test_labels_for_routing_do_not_reach_the_model_and_nothing_else_is_kept_from_it():
    model = Model()
    ids = torch.tensor([3, 4])
    model.during = lambda: dict(model.context.given().labels)
    assert model(input_ids=IDS, task_ids=ids, use_cache=False) == {"task_ids": ids}
    assert model.received == {"use_cache": False}
    assert model(input_ids=IDS) == {}
    # PEFT's model classes take an argument called task_ids for themselves
    assert model(input_ids=IDS, routing_task_ids=ids) == {"task_ids": ids}
    assert model.received == {}


def test_labels_reach_a_model_that_takes_them_itself():
    class TakesTasks(Model):
        def forward(self, task_ids: Tensor) -> Tensor:  # type: ignore[override]
            return task_ids

    ids = torch.tensor([3, 4])
    assert TakesTasks()(task_ids=ids) is ids


def test_only_passes_that_train_are_counted():
    model = Model()
    context = model.context
    model.during = context.counting
    assert model(input_ids=IDS) is None  # nobody wants to know
    context.statistics = RoutingStatistics()
    assert model(input_ids=IDS) is context.statistics
    with torch.no_grad():
        assert model(input_ids=IDS) is None

    def reentrant() -> RoutingStatistics | None:
        with torch.no_grad():
            return context.counting()

    model.during = reentrant  # the first pass of a layer under reentrant checkpointing
    assert model(input_ids=IDS) is context.statistics


def test_after_removal_nothing_is_captured():
    model = Model()
    for handle in model.handles:
        handle.remove()
    model(input_ids=IDS, attention_mask=MASK)
    assert model.context.token_mask("attention_mask", torch.zeros(2, 3, 8)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_stop_with_the_name_of_the_site(bad):
    context = RoutingContext()
    context.check_finite("layers.0.q_proj", torch.zeros(2, 3))
    with pytest.raises(FloatingPointError) as caught:
        context.check_finite("layers.1.q_proj", torch.tensor([[0.0, bad]]))
    message = str(caught.value)
    assert "'layers.1.q_proj'" in message and "Lower the learning rate" in message
    context.check_finite("layers.1.q_proj", torch.zeros(2, 3))  # caught once, a new start


def test_on_an_accelerator_nothing_waits_and_the_finding_is_raised_later():
    context = RoutingContext()
    # the meta device stands for one: reading a value there fails
    context.check_finite("site", torch.zeros(2, 3, device="meta"))
    context._not_finite = {name: torch.tensor(name != "b") for name in "abc"}
    with pytest.raises(FloatingPointError, match=r"site 'a' are not finite \(and of 1 more\)"):
        context.raise_if_not_finite()
    context.raise_if_not_finite()
