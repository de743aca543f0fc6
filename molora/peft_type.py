"""The key under which PEFT knows this tuner."""

import enum


class MoloraPeftType(enum.StrEnum):
    """A member that PEFT and transformers accept beside those of `peft.PeftType`.

    A plain string isn't enough: transformers asks for `.value`. Being a `str`, it equals the
    "MOLORA" that a saved config carries.
    """

    MOLORA = "MOLORA"


MOLORA = MoloraPeftType.MOLORA
