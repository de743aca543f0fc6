from evaluation import exact_match


def test_each_task_counts_once_in_the_mean():
    scores = exact_match(
        predictions=["4", "5", "4", "yes"],
        references=["4", "4", "4", "no"],
        tasks=["sum", "sum", "sum", "logic"],
    )
    assert scores == {"mean": (2 / 3 + 0) / 2, "logic": 0.0, "sum": 2 / 3}


def test_only_white_space_is_forgiven():
    def score(prediction: str, reference: str) -> float:
        return exact_match([prediction], [reference], ["t"])["mean"]

    assert score(" a  b\n", "a b") == 1.0
    assert score("", "") == 1.0
    assert score("A b", "a b") == 0.0
    assert score("a b.", "a b") == 0.0
    assert score("ab", "a b") == 0.0
