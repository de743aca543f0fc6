"""What runs beside a trainer: the scale of the auxiliary losses, and a report on routing."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .context import RoutingContext
from .observe import after_step, routing_contexts
from .stats import RoutingStatistics, SiteStatistics


class TrainerHook(TrainerCallback):
    """Present in every `transformers.Trainer` once molora is imported; does nothing without it.

    It tells the auxiliary losses the trainer's gradient accumulation and gradient scaler, lets
    gates and routers take their own step after the optimizer's, stops the run after a step in which
    router logits weren't finite, and has a `RoutingCallback` log before experiment trackers do.
    """

    def __init__(self) -> None:
        self._contexts: list[RoutingContext] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._contexts = routing_contexts(model) if model is not None else []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        for context in self._contexts:
            batches = batches_in_window(args.gradient_accumulation_steps, train_dataloader)
            context.loss_scale.start_window(batches, optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for context in self._contexts:
            context.loss_scale.end_window()  # of all, before one raises
        for context in self._contexts:
            context.raise_if_not_finite()
        if self._contexts and model is not None:
            after_step(model, state.global_step / state.max_steps if state.max_steps else None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # Trackers come between this hook and the callbacks that the user gives.
        for callback in dict.fromkeys(context.callback for context in self._contexts):
            if callback is not None:
                callback.on_log(args, state, control, logs=logs, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._contexts = []


class RoutingCallback(TrainerCallback):
    """Logs how the experts are used, and prints a table of it when training ends.

    Each log entry of the trainer gains, over the tokens since the last one: `routing/entropy` (mean
    over sites, 1 is uniform), `routing/largest_share` (of the worst site), `routing/dead_experts`
    (over all sites), `routing/active_experts` (of a token, mean over sites), and `routing/<loss>`
    for each auxiliary loss. The forward pass only adds up tensors; the host reads them when the
    trainer logs. Of several processes, each counts its own tokens, and what the main one logs is
    its share of the batch.

    Args:
        per_site: also log entropy, largest share and dead experts of each site by name.
        report: print the table at the end.

    Attributes:
        summary: statistics by site of the last logging window.
    """

    def __init__(self, per_site: bool = True, report: bool = True) -> None:
        self.per_site = per_site
        self.report = report
        self.summary: dict[str, SiteStatistics] = {}
        self._statistics: list[RoutingStatistics] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        contexts = routing_contexts(model) if model is not None else []
        if not contexts:
            raise ValueError(
                "RoutingCallback found no MoLoRA layer in the model that is being trained; pass "
                "peft_config=MoloraConfig(...) to the trainer, or call peft.get_peft_model first."
            )
        for context in contexts:
            context.callback = self
            context.statistics = RoutingStatistics()
        self._statistics = [context.statistics for context in contexts if context.statistics]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # evaluation and the closing summary
            return
        if not self._summarize():  # nothing happened, or `TrainerHook` has called already
            return
        metrics = routing_metrics(self.summary, self.per_site)
        logs.update(metrics)
        if state.log_history:  # the trainer has already stored a copy of this entry
            state.log_history[-1].update(metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._summarize()  # what came after the last log entry
        for context in routing_contexts(model) if model is not None else []:
            context.callback = context.statistics = None
        if self.report and self.summary and state.is_world_process_zero:
            print(routing_report(self.summary))

    def _summarize(self) -> bool:
        """Take the window's statistics into `summary`; False if no token was routed since."""
        summary: dict[str, SiteStatistics] = {}
        for statistics in self._statistics:
            summary.update(statistics.summarize())
            statistics.reset()
        self.summary = summary or self.summary
        return bool(summary)


def batches_in_window(accumulation_steps: int, train_dataloader: Any) -> int:
    """Micro-batches of the optimizer step that a Trainer begins: fewer at the end of an epoch.

    The Trainer has fetched them all by then, so at the end its loader has given its last one.
    """
    from accelerate.state import GradientState

    if not (GradientState().end_of_dataloader and has_length(train_dataloader)):
        return accumulation_steps
    return len(train_dataloader) % accumulation_steps or accumulation_steps


def routing_metrics(summary: dict[str, SiteStatistics], per_site: bool) -> dict[str, float]:
    """Flat names and numbers, as trainers log them."""
    sites = summary.values()
    metrics = {
        "routing/entropy": sum(s.entropy for s in sites) / len(summary),
        "routing/largest_share": max(s.largest_share for s in sites),
        "routing/dead_experts": float(sum(len(s.dead_experts) for s in sites)),
        "routing/active_experts": sum(s.mean_active for s in sites) / len(summary),
    }
    for name in {name for s in sites for name in s.losses}:
        metrics[f"routing/{name}"] = sum(s.losses.get(name, 0.0) for s in sites) / len(summary)
    if per_site:
        for site, s in summary.items():
            metrics[f"routing/entropy/{site}"] = s.entropy
            metrics[f"routing/largest_share/{site}"] = s.largest_share
            metrics[f"routing/dead_experts/{site}"] = float(len(s.dead_experts))
    return metrics


def routing_report(summary: dict[str, SiteStatistics]) -> str:
    """A table with a line per routing decision."""
    width = max(len("site"), *(len(site) for site in summary))
    lines = [f"{'site':<{width}}  entropy  largest  active  dead"]
    for site, s in summary.items():
        dead = ",".join(map(str, s.dead_experts)) or "-"
        numbers = f"{s.entropy:7.3f}  {s.largest_share:7.3f}  {s.mean_active:6.2f}"
        lines.append(f"{site:<{width}}  {numbers}  {dead}")
    return "\n".join(lines)
