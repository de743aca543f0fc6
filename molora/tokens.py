"""What is known of a pass's tokens: their sequence, their place in it, what belongs to a prompt.

Everything is worked out when a router asks, once for all layers of the pass.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sites import reads_decoder

if TYPE_CHECKING:
    from .passes import Pass

HOW_TO_GIVE_A_PROMPT = (
    "train on prompts and completions (TRL then sets the labels of a prompt to -100), pass "
    "prompt_mask (batch, sequence), 1 for the prompt's tokens, to the model's forward or in a "
    "dataset's column with molora.RoutingLabelCollator, or, for generation, leave use_cache=True. "
    "TRL's trainers for ORPO, CPO, TPO, GKD, distillation and online DPO give the model neither: "
    "override compute_loss, and call theirs inside of molora.routing_labels(model, "
    "prompt_mask=...). A model that doesn't generate, such as a classifier or a reward model, has "
    "router_options={'pool': 'sequence'}"
)
WHOLE_PROMPT = (
    "Give a prompt as a whole to an empty cache (no prefill_chunk_size, no prefix that was cached "
    "before, a new cache for each turn of a conversation)"
)
LEAVE_OUT = "leave such modules out with exclude_modules"


class Tokens:
    """The T = batch * columns tokens that a site reads in one pass.

    A sequence is a row of the batch or, in packed and padding-free batches, where `position_ids`
    start again at 0 within a row, a part of one. N is their number.

    Args:
        given: what the pass was given.
        batch: rows.
        columns: tokens of a row in this pass.
        mask: (T,) bool, False for padding; None when every token is real.
        device: where the site computes.
        site: the name of a site that reads them, for errors.
        rows: the rows of the pass that these are, where a batch mixes adapters; None for all.
    """

    def __init__(
        self,
        given: "Pass",
        batch: int,
        columns: int,
        mask: Tensor | None,
        device: torch.device,
        site: str = "",
        rows: Tensor | None = None,
    ) -> None:
        self.given = given
        self.batch = batch
        self.columns = columns
        self.mask = mask
        self.device = device
        self.site = site
        self.rows = rows

    @property
    def real(self) -> Tensor:
        """(T,) bool, False for padding.

        Raises:
            RuntimeError: the pass has a mask that doesn't say it.
        """
        if self.given.unread_mask:
            raise RuntimeError(
                "the attention mask of this pass is not (batch, sequence), so it doesn't say which "
                "tokens are padding; a decision for a whole sequence needs it. Generate with a "
                "dynamic cache (the default), or give the prompt's tokens by "
                "molora.routing_labels(model, prompt_mask=...)."
            )
        if self.mask is None:
            return torch.ones(self.batch * self.columns, dtype=torch.bool, device=self.device)
        return self.mask

    def by_token(self, name: str) -> Tensor | None:
        """(T,) a label with a value for each token, such as "modality_ids"; None if not given.

        Raises:
            ValueError: it doesn't have a value for each token of the pass.
        """
        label = self.given.by_column(name, self.columns)
        if label is None:
            return None
        if label.dim() != 2 or label.shape[1] != self.columns:
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)}, but the site {self.site!r} reads "
                f"{self.columns} tokens of each sequence; give one value for each of them, or "
                f"{LEAVE_OUT}."
            )
        return self._rows_of(name, label).reshape(-1).to(self.device)

    def by_sequence(self, name: str) -> Tensor | None:
        """(N, ...) a label with a value for each sequence, such as "task_ids"; None if not given.

        Raises:
            ValueError: it has another number of values.
        """
        label = self.given.label(name)
        if label is None:
            return None
        if len(label) == self.num_sequences != self.batch:
            return label.to(self.device)  # one for each sequence of a packed row
        if self.packed:
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)}, but the batch packs "
                f"{self.num_sequences} sequences into {self.batch} rows; give one value for each."
            )
        return self._rows_of(name, label).to(self.device)

    def vectors(self, name: str, width: int) -> Tensor:
        """(N, width) a label with a vector for each sequence, which `Router.needs` names.

        Raises:
            ValueError: it has another shape.
        """
        label = self.by_sequence(name)
        assert label is not None, "checked"
        if label.dim() != 2 or label.shape[1] != width:
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)}; here each sequence needs {width} "
                "numbers."
            )
        return label

    def _refuse_others(self, what: str) -> None:
        """Refuse to say of other tokens what is known of those of the model's input alone.

        Raises:
            ValueError: the site reads others.
        """
        given, rows = self.given, self.batch if self.rows is None else 0
        other = given.columns not in (0, self.columns) or (rows and given.batch not in (0, rows))
        if other or (given.encoder_decoder and reads_decoder(self.site)):
            raise ValueError(
                f"the site {self.site!r} reads other tokens than the model's input has, such as a "
                "decoder's or what a pooler makes of a sequence, and nothing says what is their "
                f"{what}; {LEAVE_OUT}."
            )

    def _rows_of(self, name: str, label: Tensor) -> Tensor:
        """Its rows for the rows of this pass; a prompt's row for each of its beams or samples."""
        total = self.given.batch or self.batch
        standing = name not in self.given.labels
        if len(label) != total and not (standing and len(label) and total % len(label) == 0):
            raise ValueError(
                f"{name} has the shape {tuple(label.shape)}, but the batch holds {total} rows; "
                "give one value for each of them."
            )
        if len(label) != total:
            label = label.repeat_interleave(total // len(label), 0)
        return label if self.rows is None else label[self.rows.to(label.device)]

    @cached_property
    def input_ids(self) -> Tensor | None:
        """(T,) the tokens' ids in the vocabulary; None if the pass was given embeddings.

        Raises:
            ValueError: the site reads other tokens.
        """
        ids = self.given.input_ids
        if ids is None:
            return None
        self._refuse_others("id")
        return self._own(ids).reshape(-1).to(self.device)

    @cached_property
    def embeddings(self) -> Tensor | None:
        """(T, d) the embeddings of the tokens, before the first layer, without a graph.

        Raises:
            ValueError: the site reads other tokens.
        """
        self._refuse_others("embedding")
        found = self.given.embeddings()
        return None if found is None else self._own(found).flatten(0, 1).detach().to(self.device)

    def _own(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows.to(values.device)]

    @cached_property
    def packed(self) -> bool:
        """Whether a row holds several sequences, by its `position_ids`."""
        return self.num_sequences != self.batch

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(T,) int64 the number of each token's sequence, from 0, in the order of the batch."""
        rows = torch.arange(self.batch, device=self.device)[:, None]
        rows = rows.expand(self.batch, self.columns)
        places = self._position_ids()
        if places is None or self.given.cached:
            return rows.reshape(-1)
        real = self.real.view(self.batch, self.columns)
        later = real.cumsum(-1) - real.long() > 0  # padding on the left is no sequence
        starts = (places == 0) & real & later
        starts[:, 0] = True
        return starts.reshape(-1).cumsum(0) - 1

    @cached_property
    def num_sequences(self) -> int:
        """N."""
        if self._position_ids() is None or self.given.cached:
            return self.batch
        # Waits for the device, once a pass, and only where positions were given.
        return int(self.sequence_ids[-1]) + 1

    def _position_ids(self) -> Tensor | None:
        """(batch, columns), if they were given in a form that speaks of single tokens."""
        places = self.given.position_ids
        total = self.given.batch or self.batch
        if places is None or places.dim() != 2 or places.shape[1] != self.columns:
            return None
        if len(places) == 1:
            places = places.expand(total, -1)
        return self._own(places).to(self.device) if len(places) == total else None

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64 each token's place in its sequence, from 0, padding not counted.

        Raises:
            ValueError: the site reads other tokens.
        """
        self._refuse_others("place")
        places = self._position_ids()
        if places is None:
            real = self.real.view(self.batch, self.columns).long()
            places = real.cumsum(-1) - 1 + self._earlier()[:, None]
        return places.clamp(min=0).reshape(-1)

    def _earlier(self) -> Tensor:
        """(batch,) real tokens of each row that are in the cache already."""
        whole = self.given.whole_mask
        if whole is None:
            return torch.full((self.batch,), self.given.first, device=self.device)
        return self._own(whole)[:, : -self.columns].sum(-1).to(self.device)

    @cached_property
    def prompt(self) -> Tensor:
        """(T,) bool: the tokens that what is decided once for a sequence may depend on.

        The first of these that is there says it:

        1. `prompt_mask` (batch, sequence), given to the forward or by `molora.routing_labels`.
        2. `completion_mask` (batch, sequence): what stands before a sequence's first completion
           token.
        3. `labels` (batch, sequence): what stands before a sequence's first label that isn't -100.
        4. The pass writes an empty KV cache, because the caller asked for one: all of its tokens
           but the drafts of assisted generation, which are those beyond the first whose logits
           are asked for by `logits_to_keep`.

        By 2 and 3 the first token of a sequence belongs to the prompt whatever its label: nothing
        predicts it. Padding never does.

        Raises:
            ValueError: none of them is there, or the site reads other tokens.
            RuntimeError: the prompt goes on in a later pass.
        """
        if not self.given.encoder_decoder:
            self._refuse_others("prompt")
        given = self.by_token("prompt_mask")
        if given is not None:
            self._refuse_parts()
            # It leaves padding out by itself where the attention mask doesn't say.
            return given.bool() if self.given.unread_mask else given.bool() & self.real
        if self.given.encoder_decoder:
            raise ValueError(
                "decisions for a whole prompt are for models without an encoder of their own; "
                "give prompt_mask, or use another router."
            )
        real = self.real
        completion = self.by_token("completion_mask")
        if completion is not None:
            return self._before_first(completion.bool() & real) & real
        targets = self.given.targets
        if targets is not None and targets.dim() == 2 and targets.shape[1] == self.columns:
            answers = (self._own(targets) != -100).reshape(-1).to(self.device)
            return self._before_first(answers & real) & real
        if not self.given.cached:
            raise ValueError(f"nothing says which tokens are a prompt: {HOW_TO_GIVE_A_PROMPT}.")
        drafts = max(self.given.logits_to_keep - 1, 0)
        column = torch.arange(self.columns, device=self.device)
        return real & (column < self.columns - drafts).repeat(self.batch)

    def _refuse_parts(self) -> None:
        beyond = self.given.beyond("prompt_mask", self.columns)
        if self.given.cached and beyond is not None and bool(beyond.any()):
            raise RuntimeError(
                "the prompt of this sequence goes on after the pass, and a decision for the whole "
                f"prompt can't wait for it. {WHOLE_PROMPT}."
            )

    def _before_first(self, found: Tensor) -> Tensor:
        """(T,) bool: before the first True of the token's sequence, or that sequence's start."""
        ids, total = self.sequence_ids, self.batch * self.columns
        place = torch.arange(total, device=self.device)
        none = place.new_full((self.num_sequences,), total)
        starts = none.scatter_reduce(0, ids, torch.where(self.real, place, total), "amin")
        first = none.scatter_reduce(0, ids, torch.where(found, place, total), "amin")
        return (place < first[ids]) | (place == starts[ids])

    def kept(self, site: str, adapter: str) -> Tensor | None:
        """(N, E) the logits that an earlier pass decided by for these sequences; None in a pass
        that decides.

        Raises:
            RuntimeError: the pass continues a cache that carries no decision of this site, or one
                for other sequences, or it may hold more of the prompt.
        """
        given = self.given
        if not given.first:
            return None
        where = f"the site {site!r} decides once for each prompt, and this pass continues a cache"
        logits = None if given.kept is None else given.kept.logits.get((site, adapter))
        if logits is None:
            raise RuntimeError(
                f"{where} that carries no decision: it was filled without this adapter, or made "
                f"from a copy of the states alone. {WHOLE_PROMPT}, and copy caches by "
                "copy.deepcopy."
            )
        if len(logits) != self.batch:
            raise RuntimeError(
                f"{where} that was filled by {len(logits)} sequences with {self.batch}. Expand the "
                "prompts before they are read, as generate does for beams."
            )
        self._refuse_more_prompt(where)
        return logits.to(self.device)

    def _refuse_more_prompt(self, where: str) -> None:
        if self.columns == 1 or self.columns == self.given.logits_to_keep:
            return
        prompt = self.by_token("prompt_mask")
        if prompt is None or bool(prompt.any()):
            raise RuntimeError(
                f"{where} by {self.columns} tokens that may belong to the prompt. {WHOLE_PROMPT}; "
                "for drafts to be verified, pass logits_to_keep with their number, or a "
                "prompt_mask of zeros."
            )

    def keep(self, site: str, adapter: str, logits: Tensor) -> None:
        """Keep (N, E) logits beside the cache that this pass writes, if it writes one."""
        if self.given.kept is not None and not self.given.first:
            self.given.kept.logits[site, adapter] = logits.detach()

    def attention(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """(T,) weights of the chosen tokens of each sequence for `mean`, which makes the softmax of
        their scores (T,) of them.
        """
        scores = scores.masked_fill(~chosen, -torch.inf)
        none = scores.new_full((self.num_sequences,), -torch.inf)
        largest = none.scatter_reduce(0, self.sequence_ids, scores.detach(), "amax")
        # Of a sequence without a chosen token both are -inf, and their difference isn't a number.
        return (scores - self.spread(largest)).masked_fill(~chosen, -torch.inf).exp()

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Mean over the tokens of each sequence: (T, d) -> (N, d), in fp32 (fp64 of fp64); 0 for a
        sequence of which none is chosen.

        Args:
            values: (T, d).
            weights: (T,) bool, the chosen tokens, or weights whose largest in a sequence is 1.
        """
        dtype = torch.promote_types(values.dtype, torch.float32)
        counts = weights.to(dtype)
        if not self.packed:
            counts = counts.view(self.batch, 1, self.columns)
            total = (counts @ values.to(dtype).view(self.batch, self.columns, -1)).squeeze(1)
            return total / counts.sum(-1).clamp(min=1)
        # A product, because sums by index have no fixed order on a GPU.
        numbers = torch.arange(self.num_sequences, device=self.device)[:, None]
        member = (self.sequence_ids == numbers) * counts  # (N, T)
        return member @ values.to(dtype) / member.sum(-1, keepdim=True).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """(N, ...) -> (T, ...): to each token what its sequence has."""
        if not self.packed:
            shape = (self.batch, self.columns, *values.shape[1:])
            return values[:, None].expand(shape).flatten(0, 1)
        return values[self.sequence_ids]
