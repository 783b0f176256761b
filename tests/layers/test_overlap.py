"""Two halves of a step: cut and joined again, and independent of each other in the compiled program."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.batch import Bucket
from jaxserve.layers.overlap import Cut
from jaxserve.layers.step_context import QueryBlocks, StepContext
from jaxserve.mesh import Layout, make_mesh

COLLECTIVES = ("all-gather", "all-to-all", "reduce-scatter", "all-reduce", "collective-permute")


def context(R, P, ranks=1, mesh=None, blocks=(), two_batches=True):
    T = ranks * (R + P)
    return StepContext(
        key_pages=jnp.zeros(1),
        value_pages=jnp.zeros(1),
        page_table_SN=jnp.zeros((1, 1), jnp.int32),
        position_T=jnp.arange(T),
        slot_T=jnp.arange(T) + 100,
        context_len_R=jnp.arange(ranks * R) + 10 if R else None,
        blocks=QueryBlocks(*jnp.array(blocks, jnp.int32).T) if blocks else None,
        block_size=4,
        num_pages=1,
        page_size=4,
        mesh=mesh,
        two_batches=two_batches,
    )


def test_tokens_of_every_rank_are_cut_in_two_and_joined_again():
    step = context(5, 2, ranks=2, mesh=make_mesh(Layout(2, dp=2), jax.devices()))
    cut = Cut.of(step)
    assert cut == Cut(tokens=4, rows=4)
    first, second = cut.halve(step)
    assert first.position_T.tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    assert second.position_T.tolist() == [4, 5, 6, 11, 12, 13]
    assert (first.R, second.R) == (4, 1)
    assert first.context_len_R.tolist() == [10, 11, 12, 13, 15, 16, 17, 18]
    assert second.context_len_R.tolist() == [14, 19]
    assert second.slot_T.tolist() == [104, 105, 106, 111, 112, 113]
    whole = cut.join(step, *cut.split(step, step.position_T))
    assert whole.tolist() == list(range(14))


def test_rows_that_fit_into_the_first_half_are_all_there():
    first, second = Cut(tokens=4, rows=3).halve(context(3, 5))
    assert (first.R, first.context_len_R.tolist()) == (3, [10, 11, 12])
    assert (second.R, second.context_len_R) == (0, None)


def test_query_block_across_the_cut_is_in_both_halves_with_its_part():
    blocks = [(7, 0, 3, 5), (8, 3, 4, 20), (9, 7, 1, 0), (-1, 0, 0, 0)]
    first, second = Cut(tokens=4, rows=0).halve(context(0, 8, blocks=blocks))
    _, start, length, _ = first.blocks
    assert (start.tolist(), length.tolist()) == ([0, 3, 0, 0], [3, 1, 0, 0])
    slot, start, length, position = second.blocks
    assert (start.tolist(), length.tolist()) == ([0, 0, 3, 0], [0, 3, 1, 0])
    assert (slot[1:3].tolist(), position[1:3].tolist()) == ([8, 9], [21, 0])


def test_step_of_one_token_runs_whole():
    assert Cut.of(context(1, 0)) is None
    assert Cut.of(context(4, 0, two_batches=False)) is None
    assert Cut.of(context(2, 0)) == Cut(tokens=1, rows=1)


class Program:
    """The entry of a compiled program: what each operation is, where it comes from, what it needs."""

    def __init__(self, text):
        entry = text[text.index("\nENTRY ") :].splitlines()[1:]
        self.operands, self.kind, self.scope = {}, {}, {}
        for line in entry:
            if made := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = .*? ([a-z][\w-]*)\(", line):
                name, kind = made[1], made[2]
                self.operands[name] = re.findall(r"%[\w.-]+", line[made.end() :])
                self.kind[name] = kind
                scope = re.search(r'op_name="([^"]*)"', line)
                self.scope[name] = scope[1] if scope else ""

    def find(self, kinds, half, block):
        scope = f"half{half}/block{block}/experts/"
        return {n for n, kind in self.kind.items() if kind in kinds and scope in self.scope[n]}

    def needs(self, names):
        """Everything that must be done before these are."""
        seen, left = set(), list(names)
        while left:
            for operand in self.operands.get(left.pop(), ()):
                if operand in self.operands and operand not in seen:
                    seen.add(operand)
                    left.append(operand)
        return seen


@pytest.mark.parametrize("backend", ["allgather", "all_to_all"])
def test_what_a_half_sends_waits_for_no_experts_of_the_other_half(engine, backend):
    layout = {"tp": 2, "dp_size": 2, "ep": 2, "enable_dp_attention": True, "moe_a2a_backend": backend}
    runner = engine("mixtral", **layout, enable_two_batch_overlap=True)._engine.runner
    for key, program in runner._programs.items():
        if not isinstance(key, Bucket):
            continue
        graph = Program(program.as_text())
        for block in (0, 1):
            for half in (0, 1):
                sends = graph.find(COLLECTIVES, half, block)
                own, others = (graph.find(("while",), h, block) for h in (half, 1 - half))
                assert len(sends) >= 3 and own and others
                assert graph.needs(own) & sends  # or the graph would say nothing
                assert not graph.needs(sends) & others
                assert not graph.needs(others) & sends
        # The first half goes on to the next block while the second one's experts compute.
        assert not graph.needs(graph.find(COLLECTIVES, 0, 1)) & graph.find(("while",), 1, 0)
