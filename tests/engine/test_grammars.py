"""Requests whose output follows a grammar: what they say, that others do not notice, and how they end."""

import asyncio
import threading

import msgspec
import pytest
from llguidance import LLMatcher

from jaxserve.engine.constraints import Constraints
from jaxserve.messages import Abort, Generate, Sampling
from jaxserve.text.grammar import GrammarError
from jaxserve.text.tokenizer import Tokenizer
from tests.engine.asking import Followed, Golden, ask, check_greedy, golden_rows, raw
from tests.text import tiny_tokenizer

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]  # a page and a bit
EOS = 1  # the tokenizer's; the model's is 2, and either ends an output
ENDS = (EOS, 2)
SEVEN = 4 + ord("7")  # behind four special tokens come those of one byte
DIGITS = LLMatcher.grammar_from_regex("(yes|no)[0-9]{3}")
OPEN_END = LLMatcher.grammar_from_regex("[a-f]{3,12}")
JSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"name": {"enum": ["hello", "world"]}, "sizes": {"type": "array", "maxItems": 3}},
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
    | {"x-guidance": {"whitespace_flexible": False}}
)
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 11},
    "seeded and filtered": {"seed": 12, "temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.01},
    "penalized": {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "biased": {"temperature": 0.0, "logit_bias": {53: 4.0, 54: 4.5}},
}
LAYOUTS = {
    "one device": ("llama", {}),
    "tp2": ("llama", {"tp": 2}),
    "dpa2-tp4": ("qwen3", {"tp": 4, "dp_size": 2, "enable_dp_attention": True}),
    "several steps a launch": ("llama", {"num_continuous_decode_steps": 5}),
    "guesses": ("llama", {"speculative_algorithm": "NGRAM"}),
    "recurrent": ("minimax_text", {}),
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return tiny_tokenizer.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture(scope="module")
def served(engine, tokenizer_dir):
    """`served(layout)`: an engine that knows the tiny tokenizer's tokens."""

    def make(layout="one device", **options):
        family, own = LAYOUTS[layout]
        known = {"skip_tokenizer_init": False, "tokenizer_path": str(tokenizer_dir)}
        return engine(family, grammar_backend="llguidance", **known, **own, **options)

    return make


def request(rid: str, grammar: str, prompt=PROMPT, output_ids=(), **sampling) -> Generate:
    after = tuple(sampling.pop("grammar_after", ()))
    given = {"max_new_tokens": 40, "temperature": 0.0, "stop_token_ids": (EOS,), **sampling}
    sampling = Sampling(**given, grammar=grammar, grammar_after=after)
    return Generate(rid=rid, input_ids=prompt, sampling=sampling, output_ids=list(output_ids))


def ids(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(tokenizer, tokens) -> str:
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


# ---- what is said ----


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_follows_its_grammar_and_ends_with_it(served, tokenizer, layout, sampling):
    """More requests than slots; some have no grammar, and one of those has to go on for longest."""
    engine = served(layout)
    many = [request(f"{i}", DIGITS, [*PROMPT, 30 + i], **sampling) for i in range(5)]
    plain = [request(f"plain {i}", "", [*PROMPT, 30 + i], max_new_tokens=20) for i in range(2)]
    *came, free, other = raw(engine, *many, *plain)
    for outputs in came:
        said = text(tokenizer, ids(outputs))
        assert said[:-3] in ("yes", "no") and said[-3:].isdigit()
        assert outputs[-1].finish.type == "stop" and outputs[-1].finish.matched is None
    alone = raw(engine, *plain)
    assert [ids(o) for o in (free, other)] == [ids(o) for o in alone]
    again = [raw(engine, one)[0] for one in many[:2]]
    assert [ids(o) for o in again] == [ids(o) for o in came[:2]]


def test_each_token_is_the_likeliest_that_the_grammar_allows(served, tokenizer):
    engine = served()
    [outputs] = raw(engine, request("whole", DIGITS))
    said = ids(outputs)
    steps = {0: "yn", 1: "eo", len(said) - 3: "0123456789", len(said) - 2: "0123456789"}
    for at, letters in steps.items():
        allowed = tokenizer.encode(" ".join(letters), add_special_tokens=False)[::2]
        if at == 1:
            allowed = tokenizer.encode("e" if text(tokenizer, said[:1]) == "y" else "o", False)
        reply = engine.generate(
            input_ids=[*PROMPT, *said[:at]],
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            token_ids_logprob=allowed,
        )
        scores = reply["meta_info"]["output_token_ids_logprobs"][0]
        assert said[at] == max(scores, key=lambda pair: pair[0])[1]


def test_json_of_a_schema_comes_whole(served, tokenizer):
    for seed in range(6):
        [outputs] = raw(served(), request(f"{seed}", JSON, max_new_tokens=300, temperature=1.0, seed=seed))
        if outputs[-1].finish.type == "stop":
            value = msgspec.json.decode(text(tokenizer, ids(outputs)))
            assert value["name"] in ("hello", "world") and len(value["sizes"]) <= 3
            return
    raise AssertionError("no draw came to its end")


def test_eos_comes_where_the_grammar_may_end(served, tokenizer):
    lengths = set()
    for seed in range(12):
        [outputs] = raw(served(), request(f"{seed}", OPEN_END, temperature=3.0, seed=seed))
        said = ids(outputs)
        finish = outputs[-1].finish
        assert finish.type == "stop"
        if finish.matched is not None:
            assert finish.matched in ENDS and finish.matched == said[-1]
            said = said[:-1]
        assert 3 <= len(text(tokenizer, said)) <= 12
        lengths.add(len(text(tokenizer, said)))
    assert len(lengths) > 1


def test_eos_ends_the_output_of_a_grammar_also_where_it_is_ignored(served):
    ends = set()
    for seed in range(12):
        one = request(f"{seed}", OPEN_END, temperature=3.0, seed=seed, stop_token_ids=())
        [outputs] = raw(served(), one)
        assert outputs[-1].finish.type == "stop"
        ends.add(outputs[-1].finish.matched)
    assert ends & {*ENDS}


def test_tokens_that_are_barred_come_where_the_grammar_allows_no_others(served, tokenizer):
    """Digits end the output and may not come before the 20th token; the grammar has nothing else."""
    digits = tuple(tokenizer.encode("0 1 2 3 4 5 6 7 8 9", add_special_tokens=False)[::2])
    one = request("barred", DIGITS, stop_token_ids=digits, min_new_tokens=20)
    [outputs] = raw(served(), one)
    said = text(tokenizer, ids(outputs))
    assert said[:-1] in ("yes", "no") and said[-1].isdigit()
    assert outputs[-1].finish.matched == ids(outputs)[-1]


def test_grammar_begins_behind_the_tokens_that_it_waits_for(served, tokenizer):
    """The thoughts of a model: greedy tokens without a grammar up to two of them, and with it behind them."""
    engine = served()
    [plain] = raw(engine, request("plain", ""))
    free = ids(plain)
    [outputs] = raw(engine, request("after", DIGITS, grammar_after=free[4:6]))
    said = ids(outputs)
    assert said[:6] == free[:6]
    assert text(tokenizer, said[6:])[:-3] in ("yes", "no")
    [never] = raw(engine, request("never", DIGITS, grammar_after=(EOS + 318,), max_new_tokens=12))
    assert ids(never) == free[:12]


def test_model_that_may_think_begins_with_the_opening_token_or_with_the_grammar(served, tokenizer):
    engine = served()
    [plain] = raw(engine, request("plain", ""))
    free = ids(plain)
    given = {"grammar_after": free[4:6], "grammar_opening": free[0]}
    [thinks] = raw(engine, request("thinks", DIGITS, **given))
    assert ids(thinks)[:6] == free[:6]
    assert text(tokenizer, ids(thinks)[6:])[:-3] in ("yes", "no")
    given = {"grammar_after": free[4:6], "grammar_opening": SEVEN, "logit_bias": {SEVEN: -100.0}}
    [answers] = raw(engine, request("answers", DIGITS, **given))
    assert text(tokenizer, ids(answers))[:-3] in ("yes", "no")


def test_logprobs_are_the_models_own(served):
    engine = served()
    one = msgspec.structs.replace(request("logprobs", DIGITS), return_logprob=True, top_logprobs_num=2)
    [outputs] = raw(engine, one)
    [plain] = raw(engine, request("plain", DIGITS))
    assert ids(outputs) == ids(plain)
    values = [value for output in outputs for value in output.logprobs.values]
    tops = [top for output in outputs for top in output.logprobs.top]
    assert all(top[0][0] >= value for top, value in zip(tops, values))
    assert any(top[0][0] > value for top, value in zip(tops, values)), "the grammar chose nothing here"


# ---- how it is run ----


def test_output_cut_anywhere_goes_on_in_its_grammar(served):
    engine = served()
    [outputs] = raw(engine, request("whole", JSON, max_new_tokens=30, temperature=1.0, seed=3))
    whole = ids(outputs)
    given = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    cuts = [request(f"{cut}", JSON, output_ids=whole[:cut], **given) for cut in range(1, len(whole))]
    for cut, rest in zip(cuts, raw(engine, *cuts)):
        assert [*cut.output_ids, *ids(rest)] == whole


def test_output_that_is_whole_already_ends_without_another_token(served):
    [outputs] = raw(served(), request("whole", DIGITS))
    [nothing] = raw(served(), request("again", DIGITS, output_ids=ids(outputs)))
    assert ids(nothing) == []
    assert nothing[-1].finish.type == "stop" and nothing[-1].prompt_tokens == len(PROMPT)


def test_output_that_does_not_follow_the_grammar_is_refused(served):
    [outputs] = raw(served(), request("wrong", DIGITS, output_ids=[40, 41]))
    assert outputs[-1].finish.status_code == 400
    assert outputs[-1].finish.message == "the grammar cannot be used: output_ids do not follow the grammar"


def test_retracted_requests_keep_their_place_in_the_grammar(served, tokenizer):
    """Pages for about half of what they all come to."""
    small = served(max_total_tokens=128, max_running_requests=4)
    long = LLMatcher.grammar_from_regex("(yes|no){20}[0-9]{20}")
    many = [request(f"{i}", long, [*PROMPT[:-1], 40 + i], max_new_tokens=90) for i in range(4)]
    came = raw(small, *many)
    assert sum(outputs[-1].num_retractions for outputs in came)
    for one, outputs in zip(many, came):
        assert ids(outputs) == ids(raw(small, one)[0])
        assert text(tokenizer, ids(outputs))[-20:].isdigit()


def test_grammars_keep_pace_with_others(served):
    """A step a token, for both, and no program compiled for it."""
    engine = served()
    before = engine.stats()["steps"]
    both = raw(engine, request("a", OPEN_END, max_new_tokens=3), request("b", "", max_new_tokens=20))
    assert len(ids(both[0])) == 3 and len(ids(both[1])) == 20
    assert engine.stats()["steps"] - before <= 20 + 3
    assert engine.stats()["compiles_after_ready"] == 0


def test_recorded_tokens_come_from_an_engine_with_grammars_too(served):
    golden = Golden.read("llama")
    check_greedy(golden, ask(served(), golden_rows(golden)))


# ---- how it fails ----


def test_grammar_that_no_token_can_follow_ends_its_request_alone(served, monkeypatch):
    """As in a model that has no token for some letter."""
    engine = served()
    vocabulary = engine._engine._constraints._vocabulary.result()
    fill = vocabulary.fill

    def without_digits(masks_RW, matchers):
        fill(masks_RW, matchers)
        for row, matcher in zip(masks_RW, matchers):
            if matcher.native.validate_tokens([SEVEN]):
                row.fill(0)

    monkeypatch.setattr(vocabulary, "fill", without_digits)
    good, bad = raw(engine, request("good", OPEN_END), request("bad", DIGITS))
    assert good[-1].finish.type == "stop"
    assert bad[-1].finish.status_code == 400
    assert bad[-1].finish.message == "the grammar: no token of this model can follow"
    assert len(ids(bad)) in (2, 3)  # no, yes


def test_wrong_grammar_is_refused_and_harms_nobody(served):
    wrong = request("wrong", '{"grammars": [{"json_schema": {"type": "zzz"}}]}')
    good, bad = raw(served(), request("good", DIGITS), wrong)
    assert good[-1].finish.type == "stop"
    assert bad[-1].finish.status_code == 400
    assert bad[-1].finish.message == "the grammar cannot be used: Invalid type: zzz"


def test_engine_without_grammars_refuses_them(engine):
    [outputs] = raw(engine(), request("none", DIGITS))
    assert outputs[-1].finish.status_code == 400
    assert outputs[-1].finish.message == "this engine serves no grammars"


class SlowVocabulary:
    """Is ready when it is told to be."""

    def __init__(self):
        self.told = threading.Event()

    def matcher(self, grammar):
        assert self.told.wait(60)
        raise GrammarError("it was too much")


@pytest.fixture
def slow(served):
    """(an engine, the vocabulary for which its grammars wait)."""
    engine, vocabulary = served(), SlowVocabulary()
    loop = engine._engine
    usual, loop._constraints = loop._constraints, Constraints(lambda: vocabulary)
    yield engine, vocabulary
    vocabulary.told.set()
    loop._constraints.close()
    loop._constraints = usual


def test_others_go_on_while_a_grammar_is_made_ready(slow):
    engine, vocabulary = slow

    async def run():
        waits = asyncio.ensure_future(follow(engine, request("waits", DIGITS)))
        other = await follow(engine, request("other", "", max_new_tokens=5))
        loads = await engine._connection.call("loads")
        vocabulary.told.set()
        return other, loads, await waits

    other, loads, waited = engine._run(run())
    assert len(ids(other)) == 5
    assert loads[0]["queues"]["grammar"] == 1
    assert waited[-1].finish.message == "the grammar cannot be used: it was too much"
    assert engine.loads()[0]["queues"]["grammar"] == 0


@pytest.mark.parametrize("everything", [False, True])
def test_request_that_waits_for_its_grammar_can_be_aborted(slow, everything):
    engine, _ = slow

    async def run():
        waits = asyncio.ensure_future(follow(engine, request("waits", DIGITS)))
        await asyncio.sleep(0)
        engine._connection.send(Abort([] if everything else ["waits"], all=everything))
        return await waits

    [output] = engine._run(run())
    assert output.finish.type == "abort" and output.prompt_tokens == len(PROMPT)
    assert not engine._engine._rids


async def follow(engine, one):
    return [output async for output in Followed(engine._connection, one)]
