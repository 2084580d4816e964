"""`gradjax.difference` on planted differences and on pairs of programs that agree."""

import pytest
from pathologies.difference_cases import EQUAL, PLANTED
from pathologies.differences import compare, misses

# The others run with `python tests/pathologies/nonfinite.py`.
CHOSEN = (*PLANTED[::3], *EQUAL[::2])
FAST = CHOSEN[::12]


def test_the_suite_is_as_large_as_it_must_be():
    assert len(PLANTED) >= 40 and len(EQUAL) >= 20
    assert len({pair.name for pair in (*PLANTED, *EQUAL)}) == len(PLANTED) + len(EQUAL)
    assert {pair.kind for pair in PLANTED} == {"value", "cotangent", "gradient", "dtype", "loss"}


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=pair.name, marks=() if pair in FAST else pytest.mark.slow)
        for pair in CHOSEN
    ],
)
def test_the_first_difference_and_its_lines(pair):
    found = compare(pair)
    assert not misses(pair, found), f"{misses(pair, found)}\n{found}"
