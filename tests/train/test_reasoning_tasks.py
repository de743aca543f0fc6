import pytest

from reasoning_tasks import make_examples

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_examples_differ_and_are_reproducible():
    rows = make_examples("chain_sum", SUMS, 40, seed=3)
    assert len({row["prompt"] for row in rows}) == 40
    assert {row["task"] for row in rows} == {"chain_sum"}
    assert rows == make_examples("chain_sum", SUMS, 40, seed=3)
    assert rows != make_examples("chain_sum", SUMS, 40, seed=4)


def test_answers_are_right():
    for row in make_examples("chain_sum", SUMS, 20, seed=0):
        problem = row["prompt"].rpartition(":")[2].rstrip("= ")
        assert eval(problem) == int(row["completion"])


def test_excluded_prompts_do_not_occur():
    first = {row["prompt"] for row in make_examples("chain_sum", SUMS, 60, seed=1)}
    second = {row["prompt"] for row in make_examples("chain_sum", SUMS, 60, seed=1, exclude=first)}
    assert len(second) == 60
    assert first.isdisjoint(second)


def test_wrong_tasks():
    with pytest.raises(ValueError, match="task 'no_such_task' of reasoning_gym"):
        make_examples("no_such_task", {}, 1, seed=0)
    with pytest.raises(ValueError, match="task 'chain_sum' of reasoning_gym: .*colour"):
        make_examples("chain_sum", {"colour": 1}, 1, seed=0)
    with pytest.raises(ValueError, match="gave .* different examples of 20000, 1000 are wanted"):
        make_examples("chain_sum", SUMS, 1000, seed=0)
