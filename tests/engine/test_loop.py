"""When the loop looks after its pool: while nothing comes, and not before it has listened."""

import types

import pytest

from jaxserve.engine.loop import AUDIT_AFTER_S, EngineLoop
from jaxserve.engine.stats import Stats
from jaxserve.messages import Abort, Drain


class Scheduler:
    """With nothing to do; counts audits."""

    has_work = drafts_next = False
    ranks = ()

    def __init__(self):
        self.requests = {}
        self.num_audits = 0

    def plan(self):
        return None

    def abort(self, rid, finish):
        return None

    def check(self):
        self.num_audits += 1


class Script:
    """An endpoint that gives out what was written down, and keeps how long it was waited for."""

    def __init__(self, scheduler, *parts):
        self.scheduler, self.parts = scheduler, list(parts)
        self.waits: list[tuple[float | None, int]] = []  # and audits until then

    def receive(self, timeout_s):
        self.waits.append((timeout_s, self.scheduler.num_audits))
        return self.parts.pop(0)

    def send(self, message):
        pass


def run(*parts):
    scheduler = Scheduler()
    script = Script(scheduler, *parts, [Drain(0.0)])
    runner = types.SimpleNamespace(experts=None)
    EngineLoop(scheduler, runner, script, info=None, stats=Stats(1), clock=lambda: 0.0).run()
    return script.waits, scheduler.num_audits


def test_loop_listens_first_audits_once_when_nothing_came_and_then_sleeps_until_something_comes():
    quiet, message = [], [Abort(["unknown"])]
    waits, audits = run(message, message, quiet, message, quiet)
    assert waits == [
        (AUDIT_AFTER_S, 0),
        (AUDIT_AFTER_S, 0),
        (AUDIT_AFTER_S, 0),
        (None, 1),
        (AUDIT_AFTER_S, 1),
        (None, 2),
    ]
    assert audits == 3  # and once at the end


def test_audit_that_fails_ends_the_loop():
    scheduler = Scheduler()
    scheduler.check = lambda: pytest.fail("page 3 has two owners")
    loop = EngineLoop(scheduler, types.SimpleNamespace(experts=None), Script(scheduler, []), None, Stats(1))
    with pytest.raises(pytest.fail.Exception, match="two owners"):
        loop.run()
