"""Student's intervals."""

import math

import numpy as np
import pytest

from server.intervals import interval, rounded_with_interval, with_interval


def test_interval_is_students():
    """Three values 1, 2, 3: standard deviation 1, t(2 degrees) 4.303, so 2 +- 4.303 / sqrt(3)."""
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0])[1])


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(4000, 5))
    covered = [abs(mean) <= half for mean, half in map(interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def test_single_value_has_no_interval():
    assert with_interval([1.25], 2) == "1.25"
    assert with_interval([1.0, 2.0, 3.0], 1, sign="+") == "+2.0 ± 2.5"


def test_rounding_is_to_significant_digits():
    assert rounded_with_interval([0.012345]) == "0.0123"
    assert rounded_with_interval([100.0, 200.0, 300.0], 2) == "2e+02 ± 2.5e+02"
