"""What later trainings are predicted to reach, from what those before them did."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emutune.fleet.adaptation import Judged, factors

positive = st.floats(0.1, 1e3)


def test_the_first_training_is_the_curves() -> None:
    assert factors([]) == {}


def test_a_device_goes_on_from_where_it_is() -> None:
    assert factors([Judged("a", None, 100.0, 120.0, 90.0, True)]) == {("a", None): pytest.approx(0.9)}
    # Refused: the adapter before stays, which was none.
    assert factors([Judged("a", None, 100.0, 120.0, 130.0, False)]) == {("a", None): pytest.approx(1.2)}


def test_how_much_is_gained_is_learnt_from_all_devices() -> None:
    judged = [
        Judged("a", None, 100.0, 120.0, 90.0, True),
        Judged("b", None, 50.0, 60.0, 40.0, True),
        Judged("a", None, 100.0, 90.0, 81.0, True),
    ]
    assert factors(judged) == {("a", None): pytest.approx(0.81 * 0.9), ("b", None): pytest.approx(0.8 * 0.9)}


@given(
    st.floats(0.8, 1.0), st.floats(0.5, 1.0), st.lists(positive, min_size=3, max_size=8), st.integers(2, 6)
)
def test_what_always_gains_the_same_is_predicted_exactly(
    gain: float, first: float, curves: list[float], steps: int
) -> None:
    """Whatever levels are trained, as long as they are as good to each other as the curve says."""
    reached, judged = {}, []
    for step in range(steps):
        for device, curve in enumerate(curves):
            name, scaled = f"ue{device}", curve * (1 + step % 2)
            share = reached.get(name, first / gain) * gain
            judged.append(Judged(name, "m", scaled, reached.get(name, 1.0) * scaled, share * scaled, True))
            reached[name] = share
    for (name, _), factor in factors(judged).items():
        assert factor == pytest.approx(reached[name] * gain)
