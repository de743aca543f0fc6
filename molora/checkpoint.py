"""What is checked when an adapter is read, and how its config is written."""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes, _is_key_under_prefixes
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .peft_type import MOLORA

WEIGHTS_NAME = "adapter_model.safetensors"


def check_state_dict(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Compare a checkpoint with the adapter it is about to be loaded into.

    Args:
        model: the model with the adapter injected.
        config: the adapter's configuration.
        adapter_name: its name.
        state_dict: the checkpoint, with the model's own key names.

    Raises:
        ValueError: tensors have other shapes than this base model needs, are missing, or belong to
            modules that it doesn't have.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    expected = {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if _is_key_under_prefixes(key, prefixes)
    }
    base = config.base_model_name_or_path
    trained_on = f" It was trained on {base!r}." if base else ""
    for key, shape in expected.items():
        if key in state_dict and state_dict[key].shape != shape:
            raise ValueError(
                f"the adapter does not fit this base model: {key} is "
                f"{tuple(state_dict[key].shape)} in the file, and the model needs "
                f"{tuple(shape)}.{trained_on}"
            )
    missing = [key for key in expected if key not in state_dict]
    if missing:
        raise ValueError(
            f"the adapter's file lacks {len(missing)} of the {len(expected)} tensors that this "
            f"model and configuration need, {missing[0]} among them.{trained_on}"
        )
    own = f".{MOLORA.lower()}_"
    left = [key for key in state_dict if own in key and key not in expected]
    if left:
        raise ValueError(
            f"the adapter does not fit this base model, which has no place for {len(left)} of its "
            f"tensors, {left[0]} among them.{trained_on}"
        )


def check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for NaN or infinity among the weights that were read from a source."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{source!r} holds NaN or infinity in {name}, as a diverged run leaves them; take "
                "an earlier checkpoint."
            )


def check_weights_file(folder: str | Path) -> None:
    """Read the header of an adapter's weights, where they lie in a local folder.

    Raises:
        ValueError: the file is empty, truncated or not in the safetensors format.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is corrupted or incomplete ({error}); copy or "
            "download it again, or load an earlier checkpoint."
        ) from error
