"""Grammars of requests on the host: what a request's own state is, and what others can do to it."""

import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

from jaxserve.engine.constraints import Constraints
from jaxserve.messages import Generate, Sampling
from jaxserve.text.matcher import Vocabulary
from jaxserve.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer

EOS, SIZE = 1, 320
GROWING = LLMatcher.grammar_from_regex("(?s:.*)e(?s:.{300})b(?s:.*)")  # each text has states of its own


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    tokenizer = Tokenizer.from_dir(tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxserve.text.matcher.LIMITS", LLParserLimits(max_lexer_states=1000))
        patch.setattr("jaxserve.text.matcher.NUM_FAMILIES", 1)
        yield Vocabulary(tokenizer, SIZE, {EOS})


def ready(constraints, rid):
    constraints.prepare(Generate(rid=rid, input_ids=[5], sampling=Sampling(grammar=GROWING)))
    while not (made := constraints.take_ready()):
        pass
    return made[0][1]


def write(constraints, constraint, seed, most=60):
    """Tokens that follow the grammar, until there are so many or it fails."""
    chosen, mask = random.Random(seed), np.zeros((1, SIZE // 32), np.int32)
    for count in range(most):
        constraints.fill(mask, [constraint])
        if constraint.error:
            return count
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if constraint.accept(chosen.choice(allowed.tolist())):
            return count
    return most


def test_what_others_have_used_up_of_a_lexer_ends_no_request(vocabulary):
    constraints = Constraints(lambda: vocabulary)
    families = []
    for seed in range(30):
        constraint = ready(constraints, f"{seed}")
        families.append(constraint.matcher.family)
        assert write(constraints, constraint, seed) == 60, constraint.error
    assert len({id(family) for family in families}) > 1, "the limit was never met"
    constraints.close()


def test_grammar_that_meets_the_limit_by_itself_ends_its_request_and_no_other(vocabulary):
    constraints = Constraints(lambda: vocabulary)
    assert write(constraints, ready(constraints, "long"), 1, most=2000) < 2000
    assert write(constraints, ready(constraints, "short"), 2) == 60
    constraints.close()
