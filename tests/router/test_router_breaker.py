"""The circuit breaker as a state machine, with a clock that tests turn by hand."""

from hypothesis import given
from hypothesis import strategies as st

from router.breaker import NORMAL, PROBE, REFUSED, Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker(clock=None, **settings) -> Breaker:
    settings = {"failure_threshold": 3, "success_threshold": 1, "timeout_s": 10.0, **settings}
    return Breaker(clock or Clock(), **settings)


def opened(clock, **settings) -> Breaker:
    b = breaker(clock, **settings)
    for _ in range(b.failure_threshold):
        b.failure(NORMAL)
    assert b.state == "open"
    return b


def test_opens_after_the_threshold_of_failures_in_a_row():
    b = breaker()
    b.failure(NORMAL)
    b.failure(NORMAL)
    assert b.state == "closed"
    b.failure(NORMAL)
    assert b.state == "open" and b.admit() == REFUSED


def test_success_between_failures_starts_the_count_again():
    b = breaker()
    for _ in range(5):
        b.failure(NORMAL)
        b.failure(NORMAL)
        b.success(NORMAL)
    assert b.state == "closed"


def test_half_open_admits_one_probe_at_a_time():
    clock = Clock()
    b = opened(clock)
    clock.now += 10
    assert b.admit() == PROBE and b.state == "half_open"
    assert b.admit() == REFUSED and b.admit() == REFUSED


def test_good_probe_closes_it():
    clock = Clock()
    b = opened(clock)
    clock.now += 10
    b.success(b.admit())
    assert b.state == "closed" and b.admit() == NORMAL


def test_bad_probe_opens_it_for_twice_the_time():
    clock = Clock()
    b = opened(clock)
    clock.now += 10
    b.failure(b.admit())
    clock.now += 19.9
    assert b.admit() == REFUSED
    clock.now += 0.2
    assert b.admit() == PROBE


def test_open_time_stops_growing_at_its_maximum():
    clock = Clock()
    b = opened(clock, timeout_max_s=30.0)
    for _ in range(6):
        clock.now += 30
        b.failure(b.admit())
    assert b.timeout_s == 30.0


def test_forgotten_probe_leaves_room_for_another():
    clock = Clock()
    b = opened(clock)
    clock.now += 10
    b.forget(b.admit())
    assert b.state == "half_open" and b.admit() == PROBE


def test_late_outcome_of_an_old_request_decides_nothing_in_half_open():
    clock = Clock()
    b = opened(clock)
    clock.now += 10
    assert b.admit() == PROBE
    b.failure(NORMAL)
    b.success(NORMAL)
    assert b.state == "half_open" and b.admit() == REFUSED


def test_disabled_breaker_never_opens():
    b = breaker(enabled=False)
    for _ in range(100):
        b.failure(NORMAL, 10)
    assert b.state == "closed"


def test_weight_counts_as_that_many_failures():
    b = breaker()
    b.failure(NORMAL, 2)
    assert b.closed
    b.failure(NORMAL, 2)
    assert b.state == "open"


EVENTS = st.lists(
    st.one_of(
        st.just(("admit",)),
        st.tuples(st.just("wait"), st.floats(0, 40)),
        st.tuples(st.sampled_from(["success", "failure", "forget"]), st.integers(0, 3)),
    ),
    max_size=80,
)


@given(EVENTS, st.integers(1, 4), st.integers(1, 3))
def test_any_history_keeps_the_invariants(events, failure_threshold, success_threshold):
    clock = Clock()
    changes = []
    b = Breaker(
        clock,
        failure_threshold=failure_threshold,
        success_threshold=success_threshold,
        timeout_s=10,
        on_change=lambda old, new: changes.append((old, new)),
    )
    running = []
    for event in events:
        if event[0] == "admit":
            state, due = b.state, b.probe_due()
            admission = b.admit()
            assert (admission == NORMAL) == (state == "closed")
            assert (admission == PROBE) == (state != "closed" and due)
            if admission:
                running.append(admission)
        elif event[0] == "wait":
            clock.now += event[1]
        elif running:
            getattr(b, event[0])(running.pop(event[1] % len(running)))
        assert running.count(PROBE) <= 1
        assert b.probing == (running.count(PROBE) == 1)
        assert b.failures < failure_threshold and 10 <= b.timeout_s <= 30
    allowed = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}
    assert set(changes) <= allowed
