"""Which cached prefixes a model with recurrent states goes on from; the device checks each state it reads."""

import pytest

from jaxserve.messages import Finish, Generate, Sampling
from tests.engine.test_scheduler import ask, expected, make, run

PREFIX = [7, 8, 9, 7, 8, 9, 1, 1]  # two pages


def chunks_of(plan):
    return [(c.request.spec.rid, c.start, c.length, c.state_from, c.state_kept) for c in plan.ranks[0].chunks]


def served(scheduler, device, *specs):
    live = [scheduler.submit(spec) for spec in specs]
    run(scheduler, device)
    scheduler.check()
    for spec, request in zip(specs, live):
        assert request.tokens[len(spec.input_ids) :] == expected(spec)
    return [request.cached_tokens for request in live]


def held(scheduler) -> int:
    return scheduler.ranks[0].checkpoints.num_held


def test_same_prompt_goes_on_from_the_end_of_its_last_full_page():
    scheduler, device = make(num_checkpoints=4)
    prompt = list(range(11))
    assert served(scheduler, device, ask("a", prompt)) == [0]
    assert served(scheduler, device, ask("b", prompt), ask("c", [*prompt, 40, 41])) == [8, 8]


def test_prompt_is_cut_where_its_state_is_kept_and_both_parts_run_in_one_step():
    scheduler, _ = make(num_slots=2, num_checkpoints=3)
    scheduler.submit(ask("a", list(range(11))))
    assert chunks_of(scheduler.plan()) == [("a", 0, 8, -1, 2), ("a", 8, 3, -1, -1)]


def test_shared_prefix_is_computed_once_more_to_keep_its_state_and_then_never_again():
    scheduler, device = make(num_checkpoints=4)
    assert served(scheduler, device, ask("a", [*PREFIX, *range(20, 26)])) == [0]
    scheduler.submit(ask("b", [*PREFIX, *range(30, 35)]))
    plan = scheduler.plan()
    assert [chunk[1:3] for chunk in chunks_of(plan)] == [(0, 8), (8, 4), (12, 1)]
    device.launch(plan)
    scheduler.abort("b", Finish("abort"))  # what a launched step keeps stays right
    assert served(scheduler, device, ask("c", [*PREFIX, *range(40, 46)])) == [8]


def test_equal_prompts_of_one_step_do_not_read_what_it_writes():
    scheduler, device = make(prefill_tokens=32, num_checkpoints=4)
    for rid in "ab":
        scheduler.submit(ask(rid, list(range(9))))
    plan = scheduler.plan()
    assert [chunk[:4] for chunk in chunks_of(plan)] == [
        ("a", 0, 8, -1), ("a", 8, 1, -1), ("b", 0, 8, -1), ("b", 8, 1, -1),
    ]  # fmt: skip
    assert [chunk[4] >= 0 for chunk in chunks_of(plan)] == [True, False, False, False]
    device.launch(plan)
    assert held(scheduler) == 1


def test_decoding_keeps_no_state_however_long_it_goes_on():
    """Its steps run ahead of stops; a next turn computes the answer again, from its prompt's state."""
    scheduler, device = make(num_checkpoints=4)
    first = ask("a", list(range(9)), new=30)
    assert served(scheduler, device, first) == [0]
    assert held(scheduler) == 1
    assert served(scheduler, device, ask("b", [*range(9), *expected(first), 5])) == [8]


def test_stop_that_is_seen_a_step_late_leaves_no_trace():
    scheduler, device = make(num_checkpoints=4)
    prompt = list(range(9))
    seventh = expected(ask("a", prompt, new=9))[6]
    sampling = Sampling(max_new_tokens=30, stop_token_ids=(seventh,))
    spec = Generate(rid="a", input_ids=prompt, sampling=sampling)
    assert served(scheduler, device, spec) == [0]
    assert served(scheduler, device, ask("b", [*prompt, *expected(spec), 3], new=6)) == [8]


def test_least_recently_used_state_makes_room_for_the_next():
    scheduler, device = make(num_checkpoints=2)
    prompts = [[start] * 5 for start in (10, 20, 30)]
    for i, prompt in enumerate([*prompts[:2], prompts[0], prompts[2]]):
        served(scheduler, device, ask(str(i), prompt))
    assert held(scheduler) == 2
    assert served(scheduler, device, ask("old", prompts[0])) == [4]
    assert served(scheduler, device, ask("gone", prompts[1])) == [0]


@pytest.mark.parametrize("num_checkpoints", [0, 1])
def test_few_or_no_rows_cost_time_and_never_an_answer(num_checkpoints):
    scheduler, device = make(num_checkpoints=num_checkpoints)
    specs = [ask(f"{turn}{i}", [*PREFIX, i, 5, 6, 7, 8]) for turn in range(2) for i in range(3)]
    hits = [served(scheduler, device, spec)[0] for spec in specs]
    assert (sum(hits) > 0) == bool(num_checkpoints)


def test_flush_forgets_states_with_their_pages():
    scheduler, device = make(num_checkpoints=4)
    served(scheduler, device, ask("a", list(range(9))))
    scheduler.flush()
    scheduler.check()
    assert held(scheduler) == 0


def test_rank_is_chosen_by_what_it_need_not_compute():
    """Pages without a state are no reason to go there."""
    scheduler, device = make(num_checkpoints=0)
    served(scheduler, device, ask("a", PREFIX))
    assert scheduler.ranks[0].num_cached_tokens([*PREFIX, 1], "") == 0
    kept, device = make(num_checkpoints=1)
    served(kept, device, ask("a", [*PREFIX, 1]))
    assert kept.ranks[0].num_cached_tokens([*PREFIX, 1], "") == 8
