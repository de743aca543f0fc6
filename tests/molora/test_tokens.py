"""What a pass knows of its tokens: sequences, places, prompts, and labels of every shape."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import molora
from molora import MoloraConfig
from molora.context import RoutingContext
from molora.passes import KEPT
from molora.tokens import Tokens


class Model(nn.Module):
    """Takes what transformers' models take; the layer's view of its tokens is what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.context = RoutingContext()
        self.context.follows_cache = True
        self.handles = self.context.install(self)
        self.table = nn.Embedding(64, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        mm_token_type_ids: Tensor | None = None,
    ) -> Tokens:
        source = input_ids if inputs_embeds is None else inputs_embeds
        assert source is not None
        hidden = torch.zeros(*source.shape[:2], 3)
        mask = self.context.token_mask("attention_mask", hidden)
        return self.context.given().tokens(hidden.shape[:-1], mask, hidden.device, "site")


def tokens(*shape: int, **given: Any) -> Tokens:
    """Of a pass over ids of that shape."""
    return Model()(torch.arange(shape[0] * shape[1]).view(*shape) % 64, **given)


def cache(length: int) -> Any:
    return SimpleNamespace(get_seq_length=lambda: length)


def linear_cache(filled: bool) -> Any:
    """Of linear attention alone, which has no length to tell."""

    def get_seq_length() -> int:
        raise ValueError("only attention layers count")

    return SimpleNamespace(get_seq_length=get_seq_length, has_previous_state=lambda: filled)


def flags(*rows: str) -> Tensor:
    """A mask written as digits."""
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def written(mask: Tensor) -> str:
    return "".join(str(int(value)) for value in mask)


IGNORED = -100


def test_a_row_is_a_sequence():
    seen = tokens(2, 3, attention_mask=flags("011", "111"))
    assert seen.sequence_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert (seen.num_sequences, seen.packed) == (2, False)
    assert seen.positions.tolist() == [0, 0, 1, 0, 1, 2]
    assert written(seen.real) == "011111"


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        ("00111", [0, 0, 0, 1, 2]),  # of a contract test
        ("00111", [1, 1, 0, 1, 2]),  # of generate
        ("11100", [0, 1, 2, 0, 0]),  # of TRL
        ("11100", [0, 1, 2, 2, 2]),
    ],
)
def test_padding_makes_no_sequence(mask: str, places: list[int]):
    seen = tokens(1, 5, attention_mask=flags(mask), position_ids=torch.tensor([places]))
    assert (seen.num_sequences, seen.packed) == (1, False)
    assert seen.sequence_ids.tolist() == [0] * 5


def test_positions_that_start_again_begin_a_sequence():
    places = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    seen = tokens(2, 5, position_ids=places)
    assert seen.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert (seen.num_sequences, seen.packed) == (4, True)
    assert seen.positions.tolist() == places.flatten().tolist()
    values = torch.arange(4.0)[:, None]
    assert seen.spread(values).flatten().tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    chosen = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 1]).bool()
    mean = seen.mean(torch.arange(10.0)[:, None], chosen)
    assert mean.flatten().tolist() == [0.5, 3, 0, 7.5]  # the third has no token to count


def test_positions_of_one_row_are_those_of_all():
    seen = tokens(2, 3, position_ids=torch.tensor([[0, 1, 0]]))
    assert seen.sequence_ids.tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("places", [torch.zeros(3, 2, 4).long(), torch.zeros(2, 3).long()])
def test_positions_that_say_nothing_of_single_tokens(places: Tensor):
    # three axes of an image's tokens, or of other tokens
    seen = tokens(2, 4, position_ids=places)
    assert (seen.num_sequences, seen.positions.tolist()) == (2, [0, 1, 2, 3] * 2)


def test_decoded_tokens_go_on_with_their_sequence():
    seen = tokens(2, 2, past_key_values=cache(3), attention_mask=flags("00111", "11111"))
    assert seen.positions.tolist() == [1, 2, 3, 4]
    seen = tokens(1, 1, past_key_values=cache(3), position_ids=torch.tensor([[0]]))
    assert (seen.num_sequences, seen.positions.tolist()) == (1, [0])


def test_a_cache_without_a_length():
    assert tokens(1, 1, past_key_values=linear_cache(False)).given.first == 0
    assert tokens(1, 1, past_key_values=linear_cache(True)).given.first == 1
    mask = flags("0111")
    seen = tokens(1, 1, past_key_values=linear_cache(True), attention_mask=mask)
    assert (seen.given.first, seen.positions.tolist()) == (3, [2])


def prompt(*shape: int, **given: Any) -> str:
    return written(tokens(*shape, **given).prompt)


def test_the_prompt_is_what_a_mask_says():
    mask = flags("0110", "1100")
    assert prompt(2, 4, prompt_mask=mask) == "01101100"
    assert prompt(2, 4, prompt_mask=mask, attention_mask=flags("0011", "1111")) == "00101100"


def test_the_prompt_ends_at_the_first_token_of_a_completion():
    mask = flags("0011", "0101")
    assert prompt(2, 4, completion_mask=mask) == "11001000"
    # the first token is never predicted, so it is always there to decide by
    assert prompt(1, 4, completion_mask=flags("1111")) == "1000"
    assert prompt(1, 4, completion_mask=flags("0000")) == "1111"
    left = flags("0011")
    assert prompt(1, 4, completion_mask=left, attention_mask=flags("0111")) == "0100"


def test_the_prompt_ends_at_the_first_label():
    x = IGNORED
    labels = torch.tensor([[x, x, 5, x], [x, 5, 6, 7]])  # a later turn is no part of it
    assert prompt(2, 4, labels=labels) == "11001000"
    mask = flags("1110", "0111")
    assert prompt(2, 4, labels=labels, attention_mask=mask) == "11000100"
    # in each sequence of a packed row; TRL ignores the first label of each
    labels = torch.tensor([[x, x, 5, 6, x, 5, x, x]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1]])
    assert prompt(1, 8, labels=labels, position_ids=places) == "11001011"


def test_what_fills_an_empty_cache_is_a_prompt():
    assert prompt(1, 4, use_cache=True) == "1111"
    assert prompt(1, 4, past_key_values=cache(0)) == "1111"
    assert prompt(2, 3, use_cache=True, attention_mask=flags("011", "111")) == "011111"
    # generate asks for the logits of the last token; assisted, of the drafts behind it too
    assert prompt(1, 4, use_cache=True, logits_to_keep=1) == "1111"
    assert prompt(1, 4, use_cache=True, logits_to_keep=3) == "1100"


def test_who_says_what_the_prompt_is():
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6]])
    given = {"labels": labels, "use_cache": True}
    assert prompt(1, 4, **given) == "1100"
    given["completion_mask"] = flags("0001")
    assert prompt(1, 4, **given) == "1110"
    assert prompt(1, 4, **given, prompt_mask=flags("1000")) == "1000"


@pytest.mark.parametrize(
    "given", [{}, {"labels": torch.tensor([1])}, {"labels": torch.tensor([[1, 2]])}]
)
def test_without_any_of_it_the_prompt_is_not_guessed(given: dict[str, Tensor]):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        prompt(1, 4, **given)
    for way in ("-100", "prompt_mask", "molora.RoutingLabelCollator", "use_cache=True"):
        assert way in str(caught.value)


def test_a_mask_of_another_form_does_not_say_what_is_real():
    seen = tokens(1, 3, attention_mask=torch.ones(1, 1, 3, 3), use_cache=True)
    with pytest.raises(RuntimeError, match="which tokens are padding"):
        _ = seen.prompt
    seen = tokens(1, 3, attention_mask=torch.ones(1, 1, 3, 3), prompt_mask=flags("110"))
    assert written(seen.prompt) == "110"


def test_ids_and_embeddings():
    model = Model()
    ids = torch.tensor([[3, 4]])
    assert model(ids).input_ids.tolist() == [3, 4]
    assert torch.equal(model(ids).embeddings, model.table.weight[3:5])
    assert not model(ids).embeddings.requires_grad
    given = torch.randn(1, 2, 2, requires_grad=True)
    seen = model(inputs_embeds=given)
    assert seen.input_ids is None
    assert torch.equal(seen.embeddings, given[0].detach()) and not seen.embeddings.requires_grad


def test_labels_of_tokens():
    modality = torch.tensor([[0, 1], [1, 1]])
    assert tokens(2, 2, modality_ids=modality).by_token("modality_ids").tolist() == [0, 1, 1, 1]
    assert tokens(2, 2).by_token("modality_ids") is None
    # what a processor of transformers gives, and a label of one's own before it
    seen = tokens(2, 2, mm_token_type_ids=modality)
    assert seen.by_token("modality_ids").tolist() == [0, 1, 1, 1]
    seen = tokens(2, 2, mm_token_type_ids=modality, modality_ids=1 - modality)
    assert seen.by_token("modality_ids").tolist() == [1, 0, 0, 0]
    # with a cache the last columns are the pass's, as of the attention mask
    seen = tokens(2, 1, modality_ids=modality, past_key_values=cache(1))
    assert seen.by_token("modality_ids").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"modality_ids has the shape \(2, 2\), but the site"):
        tokens(2, 3, modality_ids=modality).by_token("modality_ids")
    with pytest.raises(ValueError, match=r"modality_ids has the shape \(2, 2\), but .* 3 rows"):
        tokens(3, 2, modality_ids=modality).by_token("modality_ids")


def test_labels_of_the_last_tokens_alone():
    # an adapted head reads only those whose logits are wanted
    model = Model()
    seen = model(torch.zeros(1, 4).long(), modality_ids=flags("0012"), logits_to_keep=2).given
    last = seen.tokens((1, 2), None, torch.device("cpu"), "lm_head")
    assert last.by_token("modality_ids").tolist() == [1, 2]
    model.context.standing_labels = {"modality_ids": flags("00123")}
    seen = model(torch.zeros(1, 3).long(), past_key_values=cache(1), logits_to_keep=2).given
    last = seen.tokens((1, 2), None, torch.device("cpu"), "lm_head")
    assert last.by_token("modality_ids").tolist() == [1, 2]
    with pytest.raises(ValueError, match="'lm_head' reads other tokens .* their prompt"):
        _ = last.prompt
    seen = seen.tokens((1, 1), None, torch.device("cpu"), "pooler")
    with pytest.raises(ValueError, match="the site 'pooler' reads 1 tokens"):
        seen.by_token("modality_ids")
    with pytest.raises(ValueError, match="nothing says what is their place"):
        _ = seen.positions


def test_labels_of_sequences():
    tasks = torch.tensor([4, 5])
    assert tokens(2, 3, task_ids=tasks).by_sequence("task_ids").tolist() == [4, 5]
    assert tokens(2, 3).by_sequence("task_ids") is None
    places = torch.tensor([[0, 1, 0, 1]])
    seen = tokens(1, 4, task_ids=tasks, position_ids=places)  # padding-free
    assert seen.by_sequence("task_ids").tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"shape \(2,\), but the batch holds 3 rows"):
        tokens(3, 2, task_ids=tasks).by_sequence("task_ids")
    with pytest.raises(ValueError, match="packs 2 sequences into 1 rows"):
        tokens(1, 4, task_ids=tasks[:1], position_ids=places).by_sequence("task_ids")


def test_standing_labels_speak_of_the_sequence_from_its_start():
    model = Model()
    model.context.standing_labels = {
        "task_ids": torch.tensor([4, 5]),
        "modality_ids": torch.tensor([[0, 1, 1], [1, 0, 1]]),
    }

    def seen(*shape: int, **given: Any) -> tuple[list[int], list[int]]:
        found = model(torch.zeros(shape).long(), **given)
        return found.by_sequence("task_ids").tolist(), found.by_token("modality_ids").tolist()

    assert seen(2, 3) == ([4, 5], [0, 1, 1, 1, 0, 1])
    assert seen(2, 2, past_key_values=cache(2)) == ([4, 5], [1, 0, 1, 0])
    assert seen(2, 1, past_key_values=cache(3)) == ([4, 5], [0, 0])
    # two beams of each prompt
    assert seen(4, 1, past_key_values=cache(0)) == ([4, 4, 5, 5], [0, 0, 1, 1])
    own = torch.tensor([7, 7])
    assert model(torch.zeros(2, 3).long(), task_ids=own).by_sequence("task_ids").tolist() == [7, 7]
    with pytest.raises(ValueError, match="the batch holds 3 rows"):
        seen(3, 3)


def test_nothing_is_put_beside_a_cache_that_nothing_was_decided_for(tiny_model):
    config = MoloraConfig(num_experts=2, target_modules=["q_proj"])
    model = get_peft_model(tiny_model("llama"), config)
    output = model(torch.tensor([[3, 4]]), use_cache=True)
    assert not hasattr(output.past_key_values, KEPT)


PACKED = ("octavius", "smear", "meo", "moelora-task")


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packing_changes_no_token(name: str, tiny_model, randomize):
    """Sequences one after the other in a row are routed as each of them alone."""
    config = MoloraConfig.from_method(name, r=2)
    model = randomize(get_peft_model(tiny_model("llama"), config).eval())
    rows = [[5, 9, 33, 12, 60], [44, 3, 17], [8, 8, 50, 31]]
    tasks = torch.tensor([1, 0, 2])
    length = sum(map(len, rows))
    labels = [[IGNORED, IGNORED, *row[2:]] for row in rows]

    def run(parts: list[int], **given: Any) -> Tensor:
        batch = {
            "input_ids": torch.tensor([[i for part in parts for i in rows[part]]]),
            "labels": torch.tensor([[i for part in parts for i in labels[part]]]),
            "routing_task_ids": tasks[parts],
            "use_cache": False,  # or the attention of transformers doesn't see the boundaries
            **given,
        }
        return model(**batch).logits[0]

    places = torch.tensor([[i for row in rows for i in range(len(row))]])
    with molora.observe(model) as records:
        packed = run([0, 1, 2], position_ids=places)
    alone = torch.cat([run([part]) for part in range(3)])
    assert all(len(routing.weights) == length for routing in records.values())
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
