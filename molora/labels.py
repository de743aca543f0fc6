"""Labels for routing that can't be handed to a forward, because somebody else calls it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .observe import contexts_with
from .passes import LABELS
from .registry import unknown_name_message


@contextmanager
def routing_labels(model: nn.Module, **labels: Tensor) -> Iterator[None]:
    """Give every pass of the model inside the block labels that it isn't given itself.

        with molora.routing_labels(model, task_ids=torch.tensor([0, 2])):
            model.generate(**prompts)

    For `generate` where it refuses them, which it does unless `get_peft_model` has made the model
    from a config with a `task_type`, and for trainers that give a model tokens alone. A row of a
    label is used for all beams or samples of its prompt. Labels with a value for each token speak
    of the sequences from their start, padding included; the tokens that are generated after their
    end have 0.

    Args:
        model: a model with a MoLoRA adapter.
        labels: `task_ids` (batch,), `modality_ids` (batch, sequence), `prompt_mask` (batch,
            sequence), `expert_prior` (batch, E), ...

    Raises:
        ValueError: there is no such label, it is no tensor, or the model has no MoLoRA layer.
    """
    names = sorted(set(LABELS.values()))
    for name, value in labels.items():
        if name not in names:
            raise ValueError(unknown_name_message("label", name, names))
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}={value!r} must be a tensor.")
    with contexts_with(model, "standing_labels", lambda outer: {**outer, **labels}):
        yield
