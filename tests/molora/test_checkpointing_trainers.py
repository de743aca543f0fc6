"""Under gradient checkpointing a layer runs twice, and its losses still count once."""

from pathlib import Path

import pytest

from .routed_twin import Twin, check_added_gradient, routed_llama
from .trainer_runs import BOTH, dpo_trainer, probed, sft_trainer, trainer

# TRL still switches checkpointing off and on by its old name around the reference model's pass.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able:FutureWarning")


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("build", [trainer, sft_trainer, dpo_trainer])
def test_the_losses_reach_the_gradient_once(build, tmp_path: Path, steps: int, reentrant: bool):
    run = probed(
        build,
        tmp_path,
        gradient_accumulation_steps=steps,
        max_steps=1,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    check_added_gradient(run, Twin(routed_llama()), BOTH, windows=1)
