"""What the tests of every method share."""

from typing import Any

import pytest

from molora import MoloraConfig

from .fidelity import Case


@pytest.fixture(scope="session")
def fidelity():
    """`fidelity(config, seed=0)`: a `Case`, to be compared with a formula by `case.check`."""

    def make(config: MoloraConfig, **options: Any) -> Case:
        return Case(config, **options)

    return make
