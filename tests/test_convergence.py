"""Smoothing, CQI and epoch markers against worked examples and a second, slow implementation."""

import math
from itertools import pairwise

import numpy as np
import pytest
from fmce_ops.convergence import ConvergenceMonitor, cqi, epoch_markers, maturity, smooth
from fmce_ops.errors import MarkerError
from hypothesis import assume, example, given
from hypothesis import strategies as st

METHODS = ("paper", "ema")


# The formulas of arXiv 2405.04041 once more, point by point, in plain Python and 1-based.


def slow_smooth(losses, alpha, method):
    smoothed = {1: losses[0]}
    for m in range(2, len(losses) + 1):
        past = losses[m - 2] if method == "paper" else smoothed[m - 1]
        smoothed[m] = alpha * past + (1 - alpha) * losses[m - 1]
    return smoothed


def slow_cqi(losses, alpha, window, method):
    smoothed = slow_smooth(losses, alpha, method)
    indicator = {1: math.nan}
    for m in range(2, len(losses) + 1):
        steps = [abs(smoothed[j] - smoothed[j - 1]) for j in range(m - window + 1, m + 1) if j > 1]
        indicator[m] = sum(steps) / len(steps)
    return indicator


def slow_end(losses, threshold, alpha, window, method):
    indicator = slow_cqi(losses, alpha, window, method)
    below = [m for m, value in indicator.items() if value <= threshold]
    return (below[0], True) if below else (len(losses), False)


def slow_markers(losses, phases, threshold, alpha, window, method):
    """Points (not yet checked for coincidence), E_0, whether it converged, and the closest call."""
    log = {m: math.log(s) for m, s in slow_smooth(losses, alpha, method).items()}
    start = losses.index(max(losses)) + 1
    end, converged = slow_end(losses, threshold, alpha, window, method)
    fall = {m: log[start] - log[m] for m in range(start, end + 1)}
    levels = [k * fall[end] / phases for k in range(1, phases)] if fall else []
    points = [next(m for m in fall if fall[m] >= level) for level in levels] + [end]
    if fall and fall[end] < 0:
        points = [start] * phases  # nothing falls
    closest = min((abs(f - level) for f in fall.values() for level in levels), default=math.inf)
    return points, start, converged, closest


# Worked examples.


def test_the_paper_smooths_with_the_raw_previous_loss():
    # S_2 = .85 * 4 + .15 * 2, S_3 = .85 * 2 + .15 * 1
    np.testing.assert_allclose(smooth([4, 2, 1]), [4, 3.7, 1.85], rtol=1e-15)


def test_ema_smooths_with_the_smoothed_previous_loss():
    # S_2 = .85 * 4 + .15 * 2 = 3.7, S_3 = .85 * 3.7 + .15 * 1
    np.testing.assert_allclose(smooth([4, 2, 1], method="ema"), [4, 3.7, 3.295], rtol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_without_weight_of_the_past_the_smoothed_loss_is_the_loss(method):
    assert smooth([4, 2, 1], alpha=0, method=method).tolist() == [4, 2, 1]


def test_cqi_is_the_mean_of_the_last_steps_and_of_fewer_where_there_are_fewer():
    # Steps 4, 3, 2, 1; a window of 3 is full from the fourth point on.
    indicator = cqi([20, 16, 13, 11, 10], alpha=0, window=3)
    assert math.isnan(indicator[0])
    np.testing.assert_allclose(indicator[1:], [4, 3.5, 3, 2], rtol=1e-15)


def test_cqi_counts_a_rise_like_a_fall():
    np.testing.assert_allclose(cqi([1, 3, 1, 3], alpha=0, window=10)[1:], [2, 2, 2], rtol=1e-15)


def test_cqi_of_a_single_point_is_not_a_number():
    assert np.isnan(cqi([1.0])).tolist() == [True]


def geometric(points, rate):
    """Losses e^(-rate m), m = 0, 1, ...: the log loss falls by ``rate`` at every point."""
    return np.exp(-rate * np.arange(points))


def test_markers_of_a_geometric_curve_are_evenly_spaced():
    # Not smoothed, 21 points fall by 20 rates; a quarter is reached 5 points after the first.
    # The slightly steeper first part keeps every crossing clear of rounding.
    losses = geometric(21, 0.1) * np.r_[1, np.full(19, 1 - 1e-9), 1]
    found = epoch_markers(losses, phases=4, mu=1e-9, alpha=0)
    assert found.points == (6, 11, 16, 21)
    assert (found.start, found.converged, found.mu) == (1, False, 1e-9)


def test_a_crossing_between_two_points_belongs_to_the_later_one():
    # Falls 0, 3, 6, 9: thirds of the whole are 3 and 6; fourths are 2.25, 4.5, 6.75.
    losses = np.exp([9, 6, 3, 0.0])
    with pytest.raises(MarkerError, match="phases 3 and 4 fall"):
        epoch_markers(losses, phases=4, mu=1e-9, alpha=0)
    # Falls 0, 3, 6, 9, 10 of 4 phases: 2.5 at the second point, 5 at the third, 7.5 at the fourth.
    assert epoch_markers(np.exp([10, 7, 4, 1, 0.0]), 4, 1e-9, alpha=0).points == (2, 3, 4, 5)


def test_markers_of_the_smoothed_curve_by_hand():
    # S = 8, 6, 3, 1.5, .75 (alpha .5): falls of log2 from 8 are 0, .415, 1.415, 2.415, 3.415.
    # Halves: 1.7075, reached at the fourth point.
    found = epoch_markers([8, 4, 2, 1, 0.5], phases=2, mu=1e-9, alpha=0.5)
    assert found.points == (4, 5)


def test_phases_are_counted_from_the_largest_loss_wherever_it_is():
    # A rise from e^3 to e^9 first: the falls start at the third point.
    logs = [3, 5, 9, 7, 5, 3, 0.0]
    found = epoch_markers(np.exp(logs), phases=2, mu=1e-9, alpha=0)
    # Half of 9 is 4.5: e^5 is 4 below, e^3 is 6 below.
    assert (found.start, found.points) == (3, (6, 7))


def test_a_rise_of_the_smoothed_loss_behind_its_start_is_no_fall():
    # Smoothed with .85: 1, 2.35, 9.985, 9.165, 4.55, 1.85, .94, .585, .485.
    losses = [1, 10, 9.9, 5, 2, 1, 0.6, 0.5, 0.4]
    found = epoch_markers(losses, phases=2, mu=1e-9)
    # From 2.35 to .485 the logarithm falls by 1.578: the third point is 1.447 away, but above.
    assert (found.start, found.points) == (2, (7, 9))
    with pytest.raises(MarkerError, match=r"rises from its start \(point 2\) .* \(point 5\)"):
        epoch_markers(losses[:5], phases=2, mu=1e-9)


def test_the_largest_loss_is_the_raw_one():
    # Raw: the second point. Smoothed with .5: 4, 4.5, 3, 1: also the second, so weigh the past
    # by .9: 4, 4.1, 4.6, .95+..., whose largest is the third.
    losses = [4, 5, 1, 0.5, 0.2]
    assert int(np.argmax(smooth(losses, 0.9))) == 2
    assert epoch_markers(losses, phases=2, mu=1e-9, alpha=0.9).start == 2


def test_a_converged_run_ends_at_the_first_point_that_reaches_mu():
    # Steps 4, 2.01, .99, .5, .25 with a window of 2: CQI -, 4, 3.005, 1.5, .745, .375
    losses = [8, 4, 1.99, 1, 0.5, 0.25]
    found = epoch_markers(losses, phases=2, mu=0.75, alpha=0, window=2)
    assert found.converged
    # E_K is the fifth point, 16 times below the first; the third is a little over 4 times below.
    assert found.points == (3, 5)


def test_a_threshold_that_is_just_reached_is_reached():
    assert epoch_markers([4, 2, 1], phases=2, mu=1, alpha=0, window=1).converged


def test_relative_mu_is_times_the_largest_smoothed_loss():
    losses = [8, 4, 1.99, 1, 0.5, 0.25]
    found = epoch_markers(losses, phases=2, mu=0.75 / 8, alpha=0, window=2, relative=True)
    assert (found.mu, found.points, found.converged) == (0.75, (3, 5), True)


def test_where_nothing_converges_the_last_point_ends_the_run():
    found = epoch_markers([8, 4, 2], phases=2, mu=1e-9, alpha=0)
    assert (found.points[-1], found.converged) == (3, False)


def test_or_it_is_an_error_that_tells_the_least_cqi():
    # Steps 4 and 2: CQI 4, then their mean 3.
    message = r"no convergence in 3 points: the least CQI is 3 and mu is 0.5; .*unconverged.*'last'"
    with pytest.raises(MarkerError, match=message):
        epoch_markers([8, 4, 2], phases=2, mu=0.5, alpha=0, unconverged="error")


def test_phases_that_meet_are_named_with_three_ways_out():
    # All of the fall happens in one step: thirds are reached at once, at the second point.
    with pytest.raises(MarkerError) as error:
        epoch_markers(np.exp([6, 1, 0.0]), phases=3, mu=1e-9, alpha=0)
    message = str(error.value)
    assert "phases 1 and 2 fall on the same point" in message
    for way_out in ("more points per epoch", "lower the learning rate", "fewer phases"):
        assert way_out in message


def test_every_meeting_is_named():
    with pytest.raises(MarkerError, match="phases 1 and 2, 2 and 3 fall"):
        # Falls 0, 31, 45, 49, 50: fifths of 50 are 10, 20, 30, all at the second point, and 40.
        epoch_markers(np.exp([0, -31, -45, -49, -50.0]), phases=5, mu=1e-30, alpha=0)


@pytest.mark.parametrize("phases", [0, -1, 4, 2.5])
def test_phases_must_fit_the_points(phases):
    with pytest.raises(MarkerError, match=f"{phases} phases were asked of 3 recorded points"):
        epoch_markers([3, 2, 1], phases=phases)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_by_its_point(bad):
    for function in (smooth, cqi, epoch_markers):
        with pytest.raises(MarkerError, match=f"loss at point 3 is {bad}"):
            function([3, 2, bad, 1, math.nan])


@pytest.mark.parametrize("losses", [[], [[1, 2], [3, 4]], 1.0])
def test_what_is_no_curve_is_refused(losses):
    with pytest.raises(MarkerError, match="give one number per point"):
        smooth(losses)


@pytest.mark.parametrize("last", [0, -1])
def test_a_loss_without_logarithm_is_refused(last):
    with pytest.raises(MarkerError, match=r"at point 4 .* stays above zero"):
        epoch_markers([3, 2, 1, last], phases=2, alpha=0)


def test_a_flat_loss_has_no_phases():
    # It converges at once, at the second point, without having fallen at all.
    with pytest.raises(MarkerError, match="fall on the same point"):
        epoch_markers([1.0] * 20, phases=3)


def test_a_largest_loss_behind_the_convergence_is_an_error():
    # Steps 0, 0, 4: converged at the second point, largest at the fourth.
    with pytest.raises(MarkerError, match=r"largest loss \(point 4\) does not come before .* 2\)"):
        epoch_markers([1, 1, 1, 5], phases=2, mu=0.1, alpha=0, window=1)


@pytest.mark.parametrize("alpha", [-0.1, 1, 2, math.nan])
def test_the_weight_of_the_past_is_from_zero_to_less_than_one(alpha):
    with pytest.raises(MarkerError, match="alpha"):
        smooth([1, 2], alpha=alpha)


def test_settings_out_of_range_are_refused():
    with pytest.raises(MarkerError, match="window is 0"):
        cqi([1, 2], window=0)
    with pytest.raises(MarkerError, match=r"'median'.*'paper' or 'ema'"):
        smooth([1, 2], method="median")
    with pytest.raises(MarkerError, match="window is 0"):
        ConvergenceMonitor(window=0)
    for mu in (-0.1, math.nan):
        with pytest.raises(MarkerError, match=f"mu is {mu}"):
            epoch_markers([2, 1], 1, mu)
    with pytest.raises(MarkerError, match=r"'first': choose 'last' or 'error'"):
        epoch_markers([2, 1], 1, unconverged="first")


# Any curve.

curves = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)
falling = st.lists(st.floats(0.5, 1.05), min_size=3, max_size=60).map(
    lambda factors: np.cumprod([3.0, *factors]).tolist()
)
settings_of_cqi = {
    "alpha": st.floats(0, 0.99),
    "window": st.integers(1, 15),
    "method": st.sampled_from(METHODS),
}


@given(losses=curves, **settings_of_cqi)
def test_cqi_is_what_the_formula_says(losses, alpha, window, method):
    slow = list(slow_cqi(losses, alpha, window, method).values())
    np.testing.assert_allclose(cqi(losses, alpha, window, method), slow, rtol=1e-9, atol=1e-12)


@given(
    losses=st.one_of(curves, falling),
    phases=st.integers(1, 8),
    mu=st.floats(1e-6, 0.5),
    relative=st.booleans(),
    **settings_of_cqi,
)
@example(
    losses=(0.9 ** np.arange(60)).tolist(),
    phases=8, mu=1e-3, relative=True, alpha=0.85, window=10, method="paper",
)  # fmt: skip
def test_markers_are_what_the_definition_says(losses, phases, mu, relative, alpha, window, method):
    threshold = mu * max(slow_smooth(losses, alpha, method).values()) if relative else mu
    indicator = slow_cqi(losses, alpha, window, method).values()
    # Ties and the last bit of a sum are nobody's definition.
    assume(not any(math.isclose(c, threshold, rel_tol=1e-9) for c in indicator))
    points, start, converged, closest = slow_markers(
        losses, phases, threshold, alpha, window, method
    )
    assume(closest > 1e-9)
    options = {"alpha": alpha, "window": window, "method": method, "relative": relative}
    if phases > len(losses) or any(a >= b for a, b in pairwise([start, *points])):
        with pytest.raises(MarkerError):
            epoch_markers(losses, phases, mu, **options)
        return
    found = epoch_markers(losses, phases, mu, **options)
    assert (list(found.points), found.start, found.converged) == (points, start, converged)
    assert found.mu == pytest.approx(threshold, rel=1e-12)


def markers_or_none(losses, phases, mu, **options):
    try:
        return epoch_markers(losses, phases, mu, **options)
    except MarkerError:
        return None


@given(losses=falling, phases=st.integers(1, 8), mu=st.floats(1e-6, 0.5), **settings_of_cqi)
def test_markers_rise_strictly_from_the_largest_loss_to_the_end(
    losses, phases, mu, alpha, window, method
):
    found = markers_or_none(losses, phases, mu, alpha=alpha, window=window, method=method)
    assume(found is not None)
    assert len(found.points) == phases
    assert all(a < b for a, b in pairwise([found.start, *found.points]))
    assert max(losses) == losses[found.start - 1]
    indicator = cqi(losses, alpha, window, method)
    if found.converged:
        assert indicator[found.points[-1] - 1] <= mu
        assert not (indicator[: found.points[-1] - 1] <= mu).any()
    else:
        assert found.points[-1] == len(losses)
        assert not (indicator <= mu).any()


@given(losses=st.one_of(curves, falling), power=st.integers(-20, 20), **settings_of_cqi)
def test_cqi_has_the_unit_of_the_loss(losses, power, alpha, window, method):
    # A power of two scales every float without rounding.
    scaled = cqi([loss * 2.0**power for loss in losses], alpha, window, method)
    np.testing.assert_array_equal(scaled, cqi(losses, alpha, window, method) * 2.0**power)


@given(losses=falling, phases=st.integers(1, 6), mu=st.floats(1e-5, 0.3), power=st.integers(-9, 9))
def test_the_unit_of_the_loss_does_not_move_relative_markers(losses, phases, mu, power):
    threshold = mu * smooth(losses).max()
    assume(slow_markers(losses, phases, threshold, 0.85, 10, "paper")[3] > 1e-9)
    plain = markers_or_none(losses, phases, mu, relative=True)
    scaled = markers_or_none([x * 2.0**power for x in losses], phases, mu, relative=True)
    assert (plain is None) == (scaled is None)
    if plain is not None:
        assert scaled.points == plain.points
        assert (scaled.start, scaled.converged) == (plain.start, plain.converged)
        assert scaled.mu == plain.mu * 2.0**power


@given(losses=curves, constant=st.floats(0, 10))
def test_cqi_does_not_see_a_constant_on_top(losses, constant):
    raised = cqi([loss + constant for loss in losses])
    np.testing.assert_allclose(raised, cqi(losses), atol=1e-9)


# The monitor of a running loop.


@given(losses=st.one_of(curves, falling), mu=st.floats(1e-6, 10), **settings_of_cqi)
def test_the_monitor_gives_the_same_bits(losses, mu, alpha, window, method):
    monitor = ConvergenceMonitor(mu, alpha=alpha, window=window, method=method)
    expected = cqi(losses, alpha, window, method)
    for m, loss in enumerate(losses):
        returned = monitor.update(loss)
        np.testing.assert_array_equal([returned, monitor.cqi], [expected[m]] * 2)
        assert monitor.converged == bool((expected[: m + 1] <= mu).any())


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_the_monitor_counts_in_double_whatever_the_type_of_the_loss(kind):
    losses = np.float32([0.9, 0.7, 0.4, 0.3, 0.25])
    monitor = ConvergenceMonitor()
    assert [monitor.update(kind(loss)) for loss in losses][1:] == cqi(losses)[1:].tolist()


def test_the_monitor_stays_converged():
    monitor = ConvergenceMonitor(0.1, alpha=0, window=1)
    seen = []
    for loss in [2, 1, 1, 5, 1]:
        monitor.update(loss)
        seen.append(monitor.converged)
    assert seen == [False, False, True, True, True]


def test_a_relative_monitor_takes_the_largest_loss_so_far():
    # Steps 1, 9, 9.5 with a window of 1 and mu .96: limits 1.92, then 9.6 from the third point.
    monitor = ConvergenceMonitor(0.96, alpha=0, window=1, relative=True)
    monitor.update(2)
    assert not monitor.converged
    monitor.update(1)
    assert monitor.converged  # 1 <= .96 * 2
    strict = ConvergenceMonitor(0.4, alpha=0, window=1, relative=True)
    for loss in [2, 1, 10, 0.5]:  # steps 1, 9, 9.5 against .8, 4, 4
        strict.update(loss)
    assert not strict.converged
    strict.update(4)  # a step of 3.5 against 4; against 1.6, had the limit not moved
    assert strict.converged


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_monitor_refuses_what_is_not_finite_and_keeps_what_it_had(bad):
    monitor = ConvergenceMonitor()
    monitor.update(2)
    monitor.update(1)
    with pytest.raises(MarkerError, match="lower the learning rate"):
        monitor.update(bad)
    assert monitor.update(0.5) == cqi([2, 1, 0.5])[-1]


def test_a_run_whose_loss_never_falls_is_never_mature():
    losses = [math.log(10)] * 20
    assert maturity(losses, epoch_markers(losses, 1)).tolist() == [0.0] * 20
