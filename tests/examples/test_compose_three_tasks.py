"""Three adapters that PEFT has trained for a moment, as one mixture."""

import pytest

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


@pytest.mark.slow
def test_the_routing_weight_goes_to_the_tasks_own_adapter(example, tmp_path):
    script = example("compose_three_tasks")
    routers = ["--routers", "static", "dume", "ttmm"]
    results = script.run(script.parse(["--quick", "--output", str(tmp_path), *routers]))
    assert list(results) == ["base model", "its own adapter", "static", "dume", "ttmm"]
    for task in script.TASKS:
        assert results["its own adapter"][task][1] is None
        assert results["static"][task][1] == pytest.approx(1 / 3, abs=1e-3)
        assert results["dume"][task][1] > 0.7
        assert results["ttmm"][task][1] > 0.85
