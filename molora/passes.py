"""What one forward pass of the base model was given, as far as routing reads it."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .carry import LayerCarry
from .sites import reads_decoder
from .tokens import Tokens

if TYPE_CHECKING:
    from .prompt_merging import PromptMerges

# What a batch may carry for routers and losses, beside what the base model reads: the argument's
# name -> the label's. PEFT's model classes swallow task_ids, so there it needs its other name.
LABELS = {
    "task_ids": "task_ids",
    "routing_task_ids": "task_ids",
    "instance_scores": "instance_scores",
    "expert_prior": "expert_prior",
    "request_embeddings": "request_embeddings",
    "modality_ids": "modality_ids",
    "prompt_mask": "prompt_mask",
    "completion_mask": "completion_mask",
}
# What some base models read, and routers under another name where that isn't given.
ALSO = {"mm_token_type_ids": "modality_ids"}
CACHES = ("past_key_values", "cache_params")
# The attribute of a cache under which the decisions of its sequences are kept: what copies the
# cache copies them too, and two generations never mix.
KEPT = "molora_decisions"


class KeptDecisions:
    """What is kept beside a cache: logits (N, E) decided once for its N sequences, by site and
    adapter, the cache of the first pass, where there is one (`read_ahead`), and what stands in for
    the experts while its sequences go on (`PromptMerges`)."""

    def __init__(self) -> None:
        self.logits: dict[tuple[str, str], Tensor] = {}
        self.ahead: Any = None
        self.merges: PromptMerges | None = None
        self.sequences = 0

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Keep what belongs to other sequences, made of those that there were, row by row.

        Where a batch mixes adapters, each has logits for its own rows alone, which every pass names
        again; these stay.
        """
        for key, logits in self.logits.items():
            if len(logits) == self.sequences:
                self.logits[key] = rows(logits)
        self.merges = None if self.merges is None else self.merges.selected(rows)
        self.sequences = len(rows(torch.arange(self.sequences)))


class _Followed:
    """A cache that does to what is kept beside it what is done to it."""

    def _both(self, name: str, *args: Any) -> KeptDecisions:
        getattr(super(), name)(*args)
        kept: KeptDecisions = getattr(self, KEPT)
        if kept.ahead is not None:
            getattr(kept.ahead, name)(*args)
        return kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        kept = self._both("reorder_cache", beam_idx)
        kept.select(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def crop(self, tokens: int) -> None:
        self._both("crop", tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        kept = self._both("batch_repeat_interleave", repeats)
        kept.select(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = self._both("batch_select_indices", indices)
        kept.select(lambda rows: rows[indices.to(rows.device)])

    def reset(self) -> None:
        self._both("reset")


@dataclass
class Pass:
    """What one forward pass was given.

    Attributes:
        masks: (batch, columns) bool, by the argument's name; None where it is missing or says
            nothing about single tokens.
        unread_mask: there is an attention mask that says nothing about single tokens.
        whole_mask: (batch, sequence) the mask with the columns of the cache, if it was given.
        labels: what the forward was given for routing, by name.
        standing: what `molora.routing_labels` gives for passes that weren't given it, by name.
        cached: the pass was asked to write or read a cache, as `generate` does; a base model whose
            own configuration makes one that nobody asked for isn't generating.
        first: columns of the sequences that are in the cache already.
        kept: the decisions that belong to the cache; None where there is none to keep any.
        batch: rows of the base model's input; 0 if it isn't known.
        columns: its tokens of each row, those of the encoder where there is one; 0 if it isn't
            known.
        input_ids, inputs_embeds, position_ids: as given.
        targets: the argument `labels`.
        logits_to_keep: the last positions whose logits are wanted; 0 for all.
        encoder_decoder: the base model has an encoder and a decoder.
        module: the base model, for its embeddings; None outside of its passes.
        decisions: what was decided for all sites of the pass at once (`ModelDecision`).
        carries: what routers hand from layer to layer, by chain.
        ahead: (batch, columns, d) the last hidden state of a first pass without the adapter.
        merges: what stands in for experts that a prompt has decided about, or is collected to.
    """

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    unread_mask: bool = False
    whole_mask: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    standing: Mapping[str, Tensor] = field(default_factory=dict)
    cached: bool = False
    first: int = 0
    kept: KeptDecisions | None = None
    batch: int = 0
    columns: int = 0
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    position_ids: Tensor | None = None
    targets: Tensor | None = None
    logits_to_keep: int = 0
    encoder_decoder: bool = False
    module: nn.Module | None = None
    flat_masks: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    decisions: dict[Hashable, Any] = field(default_factory=dict)
    carries: dict[Hashable, LayerCarry] = field(default_factory=dict)
    ahead: Tensor | None = None
    merges: "PromptMerges | None" = None
    _tokens: dict[Hashable, Tokens] = field(default_factory=dict)

    def flat_mask(self, name: str, device: torch.device) -> Tensor:
        """(T,) that mask on a layer's device; put there once for all layers of the pass."""
        mask = self.flat_masks.get((name, device))
        if mask is None:
            given = self.masks[name]
            assert given is not None
            mask = given.reshape(-1).to(device, non_blocking=True)
            self.flat_masks[name, device] = mask
        return mask

    def tokens(
        self, shape: tuple[int, ...], mask: Tensor | None, device: torch.device, site: str
    ) -> Tokens:
        """What is known of the tokens that a site reads, once for all sites that read them.

        Args:
            shape: the leading dimensions of the site's input.
            mask: (T,) bool, False for padding, from `flat_mask`; None when every token is real.
            device: where the site computes.
            site: its name; errors give that of the first of the sites.
        """
        decoder = self.encoder_decoder and reads_decoder(site)
        key = (shape, None if mask is None else id(mask), device, decoder)
        if key not in self._tokens:
            total = math.prod(shape)
            batch = shape[0]
            if len(shape) == 1 and self.batch and total % self.batch == 0:
                batch = self.batch  # flattened already
            columns = total // max(batch, 1)
            self._tokens[key] = Tokens(self, batch, columns, mask, device, site)
        return self._tokens[key]

    def tokens_of_rows(
        self,
        shape: tuple[int, ...],
        mask: Tensor | None,
        device: torch.device,
        site: str,
        rows: Tensor,
    ) -> Tokens:
        """The same of some rows of a batch that mixes adapters; shape and mask are theirs."""
        return Tokens(self, shape[0], math.prod(shape[1:]), mask, device, site, rows)

    def label(self, name: str) -> Tensor | None:
        """As it was given: to the forward or, else, by `molora.routing_labels`."""
        found = self.labels.get(name)
        return self.standing.get(name) if found is None else found

    @property
    def has_embeddings(self) -> bool:
        """Whether `embeddings` gives any."""
        if self.inputs_embeds is not None:
            return True
        return self.input_ids is not None and hasattr(self.module, "get_input_embeddings")

    def by_column(self, name: str, columns: int) -> Tensor | None:
        """(batch, columns) of a label with a value for each token: those of a site's tokens, which
        are this pass's, or its last ones where only their logits are wanted. To a site that reads
        others, such as the one vector that a pooler makes of a sequence, it comes as it is.

        What `molora.routing_labels` gives speaks of the sequence from its start; the tokens after
        its end, those that are generated, have 0. Of a model with an encoder and a decoder a label
        comes as it is: it speaks of one of the two, and says nothing about the other's tokens.
        """
        label = self.label(name)
        total = self.columns or columns
        others = self.encoder_decoder or columns not in (total, self.logits_to_keep)
        if others or label is None or label.dim() != 2:
            return label
        if name not in self.labels:
            end = self.first + total
            label = torch.nn.functional.pad(label[:, :end], (0, max(end - label.shape[1], 0)))
        # As of the attention mask, the last columns are this pass's.
        return label[:, -columns:]

    def beyond(self, name: str, columns: int) -> Tensor | None:
        """What `molora.routing_labels` says of tokens that come after this pass's."""
        label = self.standing.get(name) if name not in self.labels else None
        return None if label is None else label[:, self.first + columns :]

    def embeddings(self) -> Tensor | None:
        """(batch, columns, d) what the first layer starts from, without a graph."""
        if self.inputs_embeds is not None or self.input_ids is None or self.module is None:
            return self.inputs_embeds
        # A table that trains would keep tensors for backward in the first checkpointed layer that
        # asks, and none when that layer is run again: by then they are known.
        with torch.no_grad():
            found: Tensor = self.module.get_input_embeddings()(self.input_ids)  # type: ignore[operator]
        return found


def read_pass(
    module: nn.Module,
    accepted: tuple[str, ...],
    args: tuple,
    kwargs: dict[str, Any],
    standing: Mapping[str, Tensor],
    follows_cache: bool,
) -> tuple[Pass, dict[str, Any]]:
    """What the forward of `module` was called with, and the arguments that are for the model.

    Args:
        module: the base model.
        accepted: the names of its forward's parameters.
        args: positional arguments.
        kwargs: named arguments; the labels that only routing needs are taken out of them.
        standing: labels of `molora.routing_labels`.
        follows_cache: some router decides once for several passes, or asks for positions. Only
            then the cache is asked for its length, for which some caches wait for the device.
    """
    names = {**ALSO, **LABELS}  # a label's own name comes last and counts more
    labels = {names[name]: kwargs[name] for name in names if kwargs.get(name) is not None}
    kwargs = {k: v for k, v in kwargs.items() if k not in LABELS or k in accepted}
    values = dict(kwargs)
    values.update(zip(accepted, args, strict=False))
    mask = values.get("attention_mask")
    whole = _token_mask(mask)
    masks = {
        "attention_mask": _without_cache(whole, values, ("input_ids", "inputs_embeds")),
        "decoder_attention_mask": _decoder_mask(values),
    }
    cache = cache_of(values)
    embeds = _tensor(values, "inputs_embeds")
    source = _tensor(values, "input_ids") if embeds is None else embeds
    first = _length(cache, whole, source) if follows_cache or standing else 0
    given = Pass(
        masks=masks,
        unread_mask=mask is not None and whole is None,
        whole_mask=whole,
        labels=labels,
        standing=standing,
        cached=bool(values.get("use_cache")) or cache is not None,
        first=first,
        kept=getattr(cache, KEPT, None) if first else KeptDecisions(),
        input_ids=_tensor(values, "input_ids"),
        inputs_embeds=None if embeds is None else embeds.detach(),
        position_ids=_tensor(values, "position_ids"),
        targets=_tensor(values, "labels"),
        encoder_decoder="decoder_input_ids" in accepted,
        module=module,
    )
    if source is not None:
        given.batch = len(source)
        given.columns = source.shape[1] if source.dim() > 1 else 0
    keep = values.get("logits_to_keep")
    given.logits_to_keep = keep if isinstance(keep, int) else 0
    return given, kwargs


def keep_decisions(given: Pass, kwargs: Mapping[str, Any], output: Any) -> None:
    """Put what the pass decided beside the cache that it wrote, wherever that was made."""
    kept = given.kept
    if given.merges is not None and given.merges.collecting:
        kept = kept or KeptDecisions()
        kept.merges = given.merges.collected()
    elif given.first or kept is None:
        return
    found = _written_cache(kwargs, output)
    # What a cache that was emptied carries is of sequences that are gone.
    anything = kept.logits or kept.ahead is not None or kept.merges is not None
    if found is None or not (anything or hasattr(found, KEPT)):
        return
    kept.sequences = given.batch
    setattr(found, KEPT, kept)
    if not isinstance(found, _Followed):
        # A class and not wrapped methods: those of a deep copy would act upon the original.
        cls = type(found)
        found.__class__ = type(cls.__name__, (_Followed, cls), {})


def _written_cache(kwargs: Mapping[str, Any], output: Any) -> Any:
    """The cache that was given to the pass, or that it made."""
    found = cache_of(kwargs)
    if found is None:
        named = {name: getattr(output, name, None) for name in CACHES}
        found = cache_of(named)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return found


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments or outputs, or None."""
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def _length(cache: Any, mask: Tensor | None, source: Tensor | None) -> int:
    """Columns of the sequences that are in the cache."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of linear attention alone doesn't count them; the mask does
        if not cache.has_previous_state():
            return 0
    if mask is None or source is None:
        return 1
    return max(mask.shape[1] - source.shape[1], 1)


def _tensor(values: Mapping[str, Any], name: str) -> Tensor | None:
    value = values.get(name)
    return value if isinstance(value, Tensor) else None


def _token_mask(mask: object) -> Tensor | None:
    """A (batch, sequence) mask as bool; other forms say nothing about single tokens."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.detach().bool()
    return None


def _without_cache(
    mask: Tensor | None, values: Mapping[str, Any], inputs: tuple[str, ...]
) -> Tensor | None:
    """The columns of the mask that stand for this pass's tokens; while decoding it covers the cache
    too.

    Which pass it is, the model's input says. A layer's can't: in a model of two towers the images'
    tokens may be fewer than the text's.
    """
    given = next((values[name] for name in inputs if isinstance(values.get(name), Tensor)), None)
    if mask is None or given is None or given.dim() < 2 or given.shape[1] >= mask.shape[1]:
        return mask
    return mask[:, mask.shape[1] - given.shape[1] :]


def _decoder_mask(values: Mapping[str, Any]) -> Tensor | None:
    """The decoder's mask of an encoder-decoder model, from the labels if it isn't given."""
    mask = _without_cache(
        _token_mask(values.get("decoder_attention_mask")),
        values,
        ("decoder_input_ids", "decoder_inputs_embeds"),
    )
    labels = values.get("labels")
    if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
        mask = labels.detach() != -100  # position i of the decoder predicts label i
    return mask
