"""Makes the tuner known to PEFT, and its trainer hook to transformers."""

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers import trainer

from .callback import TrainerHook
from .config import MoloraConfig
from .model import MoloraModel
from .peft_type import MOLORA


def register() -> None:
    """Enter MOLORA into PEFT's mappings; doing it twice changes nothing."""
    mappings: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoloraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MoloraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MoloraModel.prefix),
    ]
    for mapping, entry in mappings:
        mapping[MOLORA] = entry
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if TrainerHook not in callbacks:
        callbacks.append(TrainerHook)
