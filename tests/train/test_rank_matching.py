import pytest

from molora import MoloraConfig
from rank_matching import match_rank, sized

TARGETS = ["q_proj", "v_proj"]


def test_the_size_of_plain_lora_is_that_of_its_factors(model_folder):
    config = MoloraConfig(num_experts=0, num_shared_experts=1, r=3, target_modules=["q_proj"])
    found = sized(config, str(model_folder))
    # two layers of 32 features each
    assert found.parameters == 2 * 3 * (32 + 32)
    assert found.config is config


@pytest.mark.parametrize("r", [1, 2, 5, 16])
def test_the_rank_comes_nearest_to_the_size(model_folder, r):
    config = MoloraConfig(num_experts=4, top_k=2, r=r, target_modules=TARGETS)
    sizes = {
        rank: sized(
            MoloraConfig(num_experts=4, top_k=2, r=rank, target_modules=TARGETS), str(model_folder)
        ).parameters
        for rank in range(1, 9)
    }
    between = (sizes[4] + sizes[5]) // 2
    for wanted, rank in ((1, 1), (sizes[6], 6), (between - 1, 4), (between + 1, 5)):
        found = match_rank(config, wanted, str(model_folder), "own")
        assert (found.config.r, found.parameters) == (rank, sizes[rank])


@pytest.mark.parametrize(
    ("rule", "alpha"), [("alpha/r", 12.0), ("alpha/sqrt(r)", 4 * 3**0.5), ("constant", 4.0)]
)
def test_the_scaling_stays(model_folder, rule, alpha):
    config = MoloraConfig(
        num_experts=4, top_k=2, r=2, lora_alpha=4, scaling_rule=rule, target_modules=TARGETS
    )
    wanted = MoloraConfig(num_experts=4, top_k=2, r=6, target_modules=TARGETS)
    size = sized(wanted, str(model_folder)).parameters
    found = match_rank(config, size, str(model_folder), "own").config
    assert found.r == 6
    assert found.lora_alpha == pytest.approx(alpha)


def test_what_no_rank_can_size_is_refused(model_folder):
    config = MoloraConfig(r=[2, 4], num_experts=4, top_k=2, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"'own' has ranks of its own, r=\[2, 4\]"):
        match_rank(config, 1000, str(model_folder), "own")
    config = MoloraConfig(
        rank_pattern={".*proj": 4}, num_experts=4, top_k=2, target_modules=TARGETS
    )
    with pytest.raises(
        ValueError, match="has .* trainable parameters whatever its rank; set equal"
    ):
        match_rank(config, 1000, str(model_folder), "own")
    config = MoloraConfig.from_method("mov", num_experts=4, target_modules=TARGETS)
    with pytest.raises(ValueError, match="'mov' doesn't take r=2, .* 1,000 .* of no rank"):
        match_rank(config, 1000, str(model_folder), "mov")
    config = MoloraConfig.from_method("smora", r=16, target_modules=TARGETS)
    with pytest.raises(ValueError, match="'smora' doesn't take r=4, .* top_k=8 is more than"):
        match_rank(
            config, sized(config, str(model_folder)).parameters // 4, str(model_folder), "smora"
        )
