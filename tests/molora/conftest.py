"""Hypothesis, for every module of these tests."""

from hypothesis import settings

# No deadline: a loaded machine is no failure. Derandomised: a run that passed passes again.
settings.register_profile("molora", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("molora")
