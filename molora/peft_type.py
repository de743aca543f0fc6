"""The key under which PEFT knows this tuner."""

import enum


class MoloraPeftType(str, enum.Enum):  # noqa: UP042  # see the docstring
    """A member that PEFT and transformers accept beside those of `peft.PeftType`.

    A plain string isn't enough: transformers asks for `.value`. Being a `str`, it equals the
    "MOLORA" that a saved config carries. It is no `StrEnum`, because PEFT's model status reads what
    follows the dot in `str(member)`.
    """

    MOLORA = "MOLORA"


MOLORA = MoloraPeftType.MOLORA
