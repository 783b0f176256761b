"""The official client against a real server."""

import openai
import pytest
from fake_engine import FakeEngine
from live_server import Running, make_app

HELLO = [{"role": "user", "content": "hello"}]
USAGE = {"include_usage": True}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client, **how):
    return client.chat.completions.create(model="tiny/model", messages=how.pop("messages", HELLO), **how)


def complete(client, **how):
    return client.completions.create(model="tiny/model", prompt=how.pop("prompt", "hello"), **how)


# ---- models ----


def test_models_are_the_one_that_is_served(client):
    assert [m.id for m in client.models.list()] == ["tiny/model"]
    assert client.models.retrieve("tiny/model").owned_by == "jaxserve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


# ---- chat ----


def test_chat_renders_the_template_and_answers(client, server):
    reply = chat(client)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert choice.finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.model == "tiny/model"
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert server.engine.requests[0].input_ids == server.tokenizer.encode(prompt)
    assert reply.id == server.engine.requests[0].rid


def test_usage_counts_prompt_once_and_all_samples(client, server):
    usage = chat(client, n=2).usage
    prompt = len(server.engine.requests[0].input_ids)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 8, prompt + 8)
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_chat_n_gives_indexed_choices(client):
    assert [c.index for c in chat(client, n=3).choices] == [0, 1, 2]


def test_chat_parameters_reach_the_engine(client, server):
    more = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "ignore_eos": True,
        "stop_token_ids": [9], "priority": 3, "cache_salt": "s", "routed_dp_rank": 1, "rid": "mine",
    }  # fmt: skip
    chat(
        client, max_tokens=7, temperature=0, top_p=0.5, seed=3, frequency_penalty=0.1, presence_penalty=0.2,
        logit_bias={"5": 2}, extra_body=more,
    )  # fmt: skip
    request = server.engine.requests[0]
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.0, 0.5, 3)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.1, 0.2)
    assert (sampling.logit_bias, sampling.min_new_tokens, sampling.stop_token_ids) == ({5: 2.0}, 1, (9,))
    assert (request.priority, request.cache_salt, request.dp_rank, request.rid) == (3, "s", 1, "mine")


def test_max_completion_tokens_is_max_tokens(client):
    reply = chat(client, max_completion_tokens=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2


def test_chat_without_max_tokens_may_fill_the_context(client, server):
    chat(client)
    request = server.engine.requests[0]
    assert request.sampling.max_new_tokens == 500 - len(request.input_ids)


def test_defaults_of_the_openai_routes_are_the_models(client, server, tokenizer):
    chat(client)
    complete(client)
    for request in server.engine.requests:
        assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.9)
        assert request.sampling.top_k == -1
    server.generate(text="x")
    assert server.engine.requests[-1].sampling.temperature == 1.0
    engine = FakeEngine(lambda request: [5])
    running = Running(make_app(engine, tokenizer, sampling_defaults="openai"))
    chat(openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none"))
    assert engine.requests[0].sampling.temperature == 1.0
    running.stop()
    running.thread.join(5)


def test_chat_stop_string(client):
    choice = chat(client, stop=["wor"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("hello ", "stop")
    assert choice.matched_stop == "wor"


def test_chat_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [c.token for c in content] == ["hello", " ", "world", "</s>"]
    assert content[0].bytes == list(b"hello")
    assert content[0].logprob == -0.5
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]


def test_chat_text_parts(client, server):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    chat(client, messages=[{"role": "user", "content": parts}])
    assert "user\nhello world" in server.tokenizer.decode(server.engine.requests[0].input_ids)


def test_chat_continues_the_final_message(client, server):
    messages = [*HELLO, {"role": "assistant", "content": "the"}]
    chat(client, messages=messages, extra_body={"continue_final_message": True})
    text = server.tokenizer.decode(server.engine.requests[0].input_ids, False)
    assert text.endswith("<|im_start|>assistant\nthe")


def test_chat_takes_token_ids_for_messages(client, server):
    chat(client, messages=[], extra_body={"input_ids": [5, 6]})
    assert server.engine.requests[0].input_ids == [5, 6]


def test_token_ids_and_meta_info_on_demand(client, server):
    choice = chat(client, extra_body={"return_token_ids": True, "return_meta_info": True}).choices[0]
    assert choice.token_ids == [*server.tokenizer.encode("hello world"), 1]
    assert choice.meta_info["completion_tokens"] == 4
    plain = chat(client).choices[0].to_dict()
    assert "token_ids" not in plain and "meta_info" not in plain


def test_chat_stream(client):
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["hello", " ", "world"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_chat_stream_usage_is_the_last_chunk(client):
    chunks = list(chat(client, stream=True, stream_options=USAGE))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert all(c.usage is None for c in chunks[:-1])


def test_chat_stream_of_n_joins_to_n_texts(client):
    texts = {}
    for chunk in chat(client, stream=True, n=3):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: "hello world", 1: "hello world", 2: "hello world"}


def test_chat_stream_logprobs_cover_every_token_once(client):
    tokens = []
    for chunk in chat(client, stream=True, logprobs=True, top_logprobs=1):
        if chunk.choices[0].logprobs:
            tokens += [c.token for c in chunk.choices[0].logprobs.content]
    assert tokens == ["hello", " ", "world", "</s>"]


def test_chat_stream_token_ids_cover_every_token_once(client, server):
    chunks = chat(client, stream=True, extra_body={"return_token_ids": True})
    ids = [t for c in chunks for t in getattr(c.choices[0], "token_ids", None) or []]
    assert ids == [*server.tokenizer.encode("hello world"), 1]


def test_chat_stream_holds_stop_strings_back(client):
    chunks = list(chat(client, stream=True, stop=" wor"))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


# ---- completions ----


def test_completion_of_a_string(client):
    reply = complete(client)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("hello world", "stop")
    assert reply.object == "text_completion"


def test_completion_default_is_sixteen_tokens(client, server):
    complete(client)
    assert server.engine.requests[0].sampling.max_new_tokens == 16


@pytest.mark.parametrize(
    "prompt, ids",
    [([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])],
)
def test_completion_of_token_ids(client, server, prompt, ids):
    reply = complete(client, prompt=prompt)
    assert [r.input_ids for r in server.engine.requests] == ids
    assert [c.index for c in reply.choices] == list(range(len(ids)))


def test_completion_of_several_prompts_with_n(client, server):
    server.engine.script = lambda r: list(r.input_ids)
    reply = complete(client, prompt=["hello", "the"], n=2)
    assert [c.text for c in reply.choices] == ["hello", "hello", "the", "the"]
    prompts = len(server.tokenizer.encode("hello")) + len(server.tokenizer.encode("the"))
    assert reply.usage.prompt_tokens == prompts


def test_completion_echo_with_logprobs(client):
    reply = complete(client, prompt="hello ", echo=True, logprobs=1, max_tokens=1)
    assert reply.choices[0].text == "hello hello"
    logprobs = reply.choices[0].logprobs
    assert logprobs.tokens == ["hello", " ", "hello"]
    assert logprobs.token_logprobs == [None, -0.25, -0.5]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[2]["hello"] == -0.5
    assert logprobs.text_offset == [0, 5, 6]


def test_completion_echo_of_token_ids(client, server):
    ids = server.tokenizer.encode("the ")
    assert complete(client, prompt=ids, echo=True, max_tokens=1).choices[0].text == "the hello"


def test_completion_scores_a_prompt_without_generating(client):
    reply = complete(client, prompt="hello ", echo=True, logprobs=0, max_tokens=0)
    assert reply.choices[0].text == "hello "
    assert reply.choices[0].logprobs.token_logprobs == [None, -0.25]
    assert reply.usage.completion_tokens == 0


def test_completion_stream_joins_to_the_text(client):
    chunks = list(
        complete(client, stream=True, echo=True, logprobs=0, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "hellohello world"
    offsets = [o for c in chunks[:-1] for o in c.choices[0].logprobs.text_offset]
    assert offsets == [0, 5, 10, 11, 16]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 5


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("route", [chat, complete])
def test_stream_tells_the_usage_so_far_in_every_chunk_of_its_choice(client, route, at_end):
    options = {"continuous_usage_stats": True, "include_usage": at_end}
    chunks = list(route(client, stream=True, n=2, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks if not chunk.choices] == [8] * at_end
    for index in range(2):
        usages = [c.usage for c in chunks if c.choices and c.choices[0].index == index]
        counts = [usage.completion_tokens for usage in usages]
        assert counts == sorted(counts) and counts[-1] == 4 and len(set(counts)) > 2
        assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in usages)


def test_best_of_equal_to_n_is_taken(client):
    assert len(complete(client, n=2, best_of=2).choices) == 2


# ---- errors ----


def test_errors_are_the_clients_own_types(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=-1)
    assert caught.value.body["param"] == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)


def test_engine_death_in_a_stream_is_an_error_of_the_client(client, server):
    server.engine.delay_s = 0.02
    server.say("abcdefghijkl")
    with pytest.raises(openai.APIError, match="dead"):
        for _ in chat(client, stream=True):
            server.engine.dead = True
