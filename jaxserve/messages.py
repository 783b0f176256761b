"""Messages between the HTTP process and the engine process.

Typed msgspec structs on a msgpack wire; nothing is pickled. The same structs are passed by
reference when the engine runs in-process (`jaxserve.Engine`). No jax, no text: token ids only.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Protocol

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are chosen. Ranges are checked where a request enters."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()  # complete: end-of-sequence ids are in it unless ignored
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: the engine draws one when the request arrives
    grammar: str = ""  # what the output must be, see `jaxserve.text.grammar`; empty: anything
    grammar_opening: int | None = None  # `grammar_after` counts only where the output begins with this token
    grammar_after: tuple[
        int, ...
    ] = ()  # the grammar begins behind these tokens of the output (thoughts' end)


class Generate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Generate one sequence. `n` samples of a prompt are `n` of these, each with its own rid."""

    rid: str
    input_ids: list[int]
    sampling: Sampling
    return_logprob: bool = False
    logprob_start_len: int = -1  # first prompt position whose logprob is wanted; -1: none
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    priority: int = 0  # larger is served first
    cache_salt: str = ""  # prefixes are shared only under an equal salt
    dp_rank: int | None = None  # None: the engine chooses
    # Tokens generated elsewhere already: they follow the prompt, count as this sequence's own output
    # (length, penalties, positions of the seeded randomness), and are not sent again.
    output_ids: list[int] = []


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests (every request when `all`); each gets a last Output with an Abort finish."""

    rids: list[str] = []
    all: bool = False


class Call(msgspec.Struct, frozen=True, tag=True):
    """A question or command to the engine, answered by one Reply.

    flush_cache: forget every unused cached prefix; refused while requests run.
    loads: one dict a data-parallel rank, with the keys of `/v1/loads`.
    stats: counters since the start, for `/metrics`: see `jaxserve.engine.stats.Stats.snapshot`.
    watch_cache: from now on send CacheEvents; the first rebuild what is cached, and come before the Reply.
    start_, stop_, dump_expert_record: how often each expert is chosen meanwhile; refused for a dense model.
    """

    call_id: int
    method: Literal[
        "flush_cache",
        "loads",
        "stats",
        "watch_cache",
        "start_expert_record",
        "stop_expert_record",
        "dump_expert_record",
    ]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what there is, then exit. Who sends it has stopped asking for more."""

    grace_s: float


class Finish(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a sequence ended. For `stop`, `matched` is the token id, None at the end of a grammar; for `abort`,
    `message` says why."""

    type: Literal["stop", "length", "abort"]
    matched: int | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None


class Logprobs(msgspec.Struct, frozen=True, omit_defaults=True):
    """Natural-log probabilities, one entry a token; `top` and `ids` hold (logprob, token id) pairs."""

    values: list[float | None]
    top: list[list[tuple[float, int]]] = []
    ids: list[list[tuple[float, int]]] = []


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a step added to one request. The last one carries `finish`; an aborted request has one too."""

    rid: str
    token_ids: list[int] = []  # new tokens only; a matched stop token is included
    finish: Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    dp_rank: int = -1  # -1: as told before
    num_retractions: int = 0
    logprobs: Logprobs | None = None  # of token_ids
    prompt_logprobs: Logprobs | None = None  # with the first output; from logprob_start_len on
    queue_time_s: float | None = None  # with the first output
    spec_steps: int = 0  # decode steps so far, with speculative decoding; 0 without it
    spec_drafted: int = 0  # tokens guessed so far
    spec_accepted: int = 0  # of them right


class RankLoad(msgspec.Struct, frozen=True, array_like=True):
    """How busy one dp rank is."""

    running: int
    waiting: int
    queued_tokens: int  # prompt tokens not computed yet
    kv_usage: float  # share of the KV pages in use


class Outputs(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What a step made. Most requests get tokens and nothing else is to be said of them."""

    items: list[Output]
    tokens: dict[str, list[int]] = {}  # rid -> new tokens, of requests that are not in `items`
    loads: list[RankLoad] = []  # by dp rank; now and then, and with the last output before idleness


class CacheEvent(msgspec.Struct, frozen=True, array_like=True):
    """A change of a rank's prefix cache, in pages named by their hashes (PROTOCOL.md, section 3)."""

    kind: Literal["stored", "removed", "cleared"]
    rank: int
    parent: int | None  # stored: the page above; None where a sequence starts
    pages: bytes  # big-endian 64-bit hashes, one after the other


class CacheEvents(msgspec.Struct, frozen=True, tag=True):
    """In order, each before the outputs of any request that it helps."""

    items: list[CacheEvent]


class Reply(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    ok: bool
    value: Any = None  # plain data
    message: str = ""


class Info(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the HTTP process needs to know of the engine; sent once, when every program is compiled."""

    model_path: str
    architectures: list[str]
    model_type: str
    dtype: str
    vocab_size: int
    context_len: int
    eos_token_ids: list[int]
    tokenizer_dir: str  # files of the tokenizer and the chat template
    generation_config: dict[str, Any]  # the model's own sampling defaults
    page_size: int
    max_total_num_tokens: int  # KV capacity of the instance in tokens, all dp ranks
    max_req_len: int  # the longest prompt plus output one request may have
    max_running_requests: int
    quantization: str = ""  # what was asked for; empty: as the checkpoint has it
    kv_cache_dtype: str = ""
    chunked_prefill_size: int = 0  # prompt tokens of one step and rank; 0: not told
    dp_size: int
    instance_id: str
    device_kind: str
    num_devices: int
    weight_bytes: int
    kv_cache_bytes: int
    load_weights_s: float
    compile_s: float
    startup_s: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line for the person who waits: `done` of `total` in one phase of the engine's start."""

    phase: str
    done: int
    total: int


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; the process ends after sending this."""

    kind: Literal["config", "internal"]
    message: str


ToEngine = Generate | Abort | Call | Drain
FromEngine = Outputs | CacheEvents | Reply | Info | Progress | Fatal


class EngineClient(Protocol):
    """How the HTTP layer and `jaxserve.Engine` reach an engine, in this process or another one."""

    @property
    def info(self) -> Info: ...

    @property
    def loads(self) -> list[RankLoad]:
        """Every dp rank's load as the engine last told it."""
        ...

    def generate(self, request: Generate, take: Callable[[Output], bool]) -> AsyncIterator[None]:
        """Submit at once; hand each output to `take` when it comes, up to and with the one that has `finish`.

        The iterator yields when `take` has said True since the last time, and ends after the finish: one
        that waits is not woken for every token. What `take` raises, the iterator raises. Closing it early
        aborts the request; nothing is taken afterwards. Raises EngineDeadError when the engine is gone,
        EngineRefusal when the rid is in use by a running request.
        """
        ...

    async def abort(self, rids: list[str], all: bool = False) -> None: ...

    async def call(self, method: str) -> Any:
        """Raises EngineRefusal with the engine's message when it says no."""
        ...

    async def watch_cache(self, take: Callable[[list[CacheEvent]], None]) -> None:
        """Hand every change of the prefix cache to `take`, in order; called once in an engine's life.

        What is cached already has been handed over as `stored` events when this returns.
        """
        ...


class EngineDeadError(RuntimeError):
    """The engine process ended or stopped answering."""


class EngineRefusal(RuntimeError):
    """The engine understood a call and refused it."""
