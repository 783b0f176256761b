"""One sequence on its way out: the tokens the engine made, as text, logprobs and a finish reason.

Owns incremental decoding and stop strings of one Generate. Knows nothing of HTTP.

A tracked sequence can be gone on with elsewhere: it shows a token and its text at once or not at all,
so that the tokens shown say exactly which text was. A resumed one begins with tokens shown elsewhere.
"""

from collections import deque
from typing import Any

from jaxserve.messages import Finish, Generate, Logprobs, Output
from jaxserve.server.errors import RequestError
from jaxserve.server.sampling import TextRules
from jaxserve.text.detokenizer import make_detokenizer
from jaxserve.text.stop import StopMatcher
from jaxserve.text.tokenizer import Tokenizer

Entry = list[Any]  # [logprob or None, token id, text or None]


class Sequence:
    """The state of one request's output; `feed` is called by the one task that reads the engine's stream.

    Everything is cumulative. `text` is final: it never holds a part of a stop string or of a character.
    """

    def __init__(
        self,
        request: Generate,
        rules: TextRules,
        tokenizer: Tokenizer | None,
        *,
        arrived_s: float,
        index: int = 0,
        public_rid: str | None = None,
        score_only: bool = False,
        logprob_text: bool = False,
        log_metrics: bool = True,
        tracked: bool = False,
        reply_id: str | None = None,
    ):
        """
        Args:
            arrived_s: when its request had come, by the service's clock.
            index: its place among the sequences of its HTTP request.
            public_rid: the id the client gave for all of them; `/abort_request` takes it.
            score_only: max_new_tokens was 0; the engine's one token is dropped.
            logprob_text: put each token's text into the logprob entries.
            tracked: `take_ids` will be called; see above.
            reply_id: the id in replies, where it is not the engine's.

        Raises RequestError when the request's `output_ids` go on after the sequence's end.
        """
        self.request = request
        self.rules = rules
        self.arrived_s = arrived_s
        self.index = index
        self.public_rid = public_rid or request.rid
        self.reply_id = reply_id or request.rid
        self.log_metrics = log_metrics
        self.token_ids: list[int] = []
        self.finish: dict[str, Any] | None = None
        self.cached_tokens = 0
        self.dp_rank = 0
        self.num_retractions = 0
        self.spec_steps = 0
        self.spec_drafted = 0
        self.spec_accepted = 0
        self.first_token_s: float | None = None  # since its request had come
        self.e2e_latency_s = 0.0
        self.closed = False  # the engine's stream is closed and the times are taken
        self.pending = False  # an event is due that its reader has not taken yet
        self.input_logprobs: list[Entry] = []
        self.input_top: list[list[Entry] | None] = []
        self.input_ids_logprobs: list[list[Entry] | None] = []
        self.output_logprobs: list[Entry] = []
        self.output_top: list[list[Entry]] = []
        self.output_ids_logprobs: list[list[Entry]] = []
        self._text: list[str] = []  # pieces; joined when somebody looks, so that a token costs no copy
        self._fresh: list[str] = []  # pieces that `take_text` has not given out
        self._tokenizer = tokenizer
        self._logprob_text = logprob_text and tokenizer is not None
        self._score_only = score_only
        self._detokenizer = (
            make_detokenizer(tokenizer, rules.skip_special_tokens, request.input_ids) if tokenizer else None
        )
        self._stop = StopMatcher(rules.stops, rules.keep_stop) if rules.stops else None
        self.tracked = tracked
        self._whole = (tracked or bool(request.output_ids)) and tokenizer is not None
        self._unshown: deque[tuple[int, int]] = deque()  # (token, characters up to the end of its text)
        self._unfinished: list[int] = []  # tokens after those, whose text is not known to its end
        self._unshown_text = ""
        self._shown_chars = 0
        self._fed_chars = 0  # of text from the detokenizer
        self._skip_chars = 0  # that `take_text` leaves out: they were sent elsewhere
        self._ids_taken = 0
        self.resumed_text = ""  # of the tokens shown elsewhere
        if request.output_ids:
            self._resume(request.output_ids)

    @property
    def text(self) -> str:
        """All text so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    def take_text(self) -> str:
        """The text since the last call; work is proportional to it."""
        fresh, self._fresh = "".join(self._fresh), []
        if self._skip_chars:
            skip = min(self._skip_chars, len(fresh))
            self._skip_chars -= skip
            fresh = fresh[skip:]
        return fresh

    def take_ids(self) -> list[int]:
        """The tokens shown since the last call."""
        at, self._ids_taken = self._ids_taken, len(self.token_ids)
        return self.token_ids[at:]

    def _add_text(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self._fresh.append(piece)

    def feed(self, output: Output) -> None:
        """Take one Output; after it `finish` may be set, by the engine or by a stop string."""
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        if output.dp_rank >= 0:
            self.dp_rank = output.dp_rank
        self.num_retractions = output.num_retractions or self.num_retractions
        if output.spec_steps:
            self.spec_steps = output.spec_steps
            self.spec_drafted, self.spec_accepted = output.spec_drafted, output.spec_accepted
        if output.prompt_logprobs is not None:
            self._take_prompt_logprobs(output.prompt_logprobs)
        finish = output.finish
        token_ids = [] if self._score_only else output.token_ids
        stopped = finish is not None and finish.matched is not None
        hidden = 1 if stopped and token_ids and not self.rules.keep_stop else 0
        if self._whole:
            matched, count = self._decode_whole(token_ids, len(token_ids) - hidden)
            self._show(everything=matched is not None or finish is not None)
        else:
            matched, count = self._decode(token_ids, len(token_ids) - hidden)
            self.token_ids += token_ids[:count]
        if output.logprobs is not None and count:
            self._take_logprobs(token_ids[:count], output.logprobs)
        if matched is not None:
            self.finish = {"type": "stop", "matched": matched}
        elif finish is not None:
            self._flush()
            if (self._score_only and finish.type != "abort") or finish.type == "length":
                self.finish = {"type": "length", "length": len(self.token_ids)}
            elif finish.type == "stop":
                self.finish = {"type": "stop", "matched": finish.matched}
            else:
                self.finish = {"type": "abort", "message": finish.message or "aborted"}
                if finish.status_code is not None:
                    self.finish |= {"status_code": finish.status_code, "err_type": None}

    def _decode(self, token_ids: list[int], shown: int) -> tuple[str | None, int]:
        """Add the first `shown` tokens to the text. (stop string or None, tokens up to it or all)."""
        if self._detokenizer is None:
            return None, len(token_ids)
        if self._stop is None:
            self._add_text(self._detokenizer.feed(token_ids[:shown]))
            return None, len(token_ids)
        for i in range(shown):
            may_stop = len(self.token_ids) + i + 1 >= self.request.sampling.min_new_tokens
            new, matched = self._stop.feed(self._detokenizer.feed(token_ids[i : i + 1]), may_stop)
            self._add_text(new)
            if matched is not None:
                return matched, i + 1
        return None, len(token_ids)

    # ---- tracked and resumed ----

    @property
    def came_complete(self) -> bool:
        """Whether the tokens that another worker showed are all: only the engine knows a grammar's end."""
        resumed, finish = self.request.output_ids, self.finish or {}
        return bool(resumed) and finish.get("type") == "stop" and len(self.token_ids) == len(resumed)

    def _decode_whole(self, token_ids: list[int], shown: int) -> tuple[str | None, int]:
        """As `_decode`, but text and tokens wait in `_unshown` and `_unshown_text`."""
        assert self._detokenizer is not None
        for i, token in enumerate(token_ids):
            piece = self._detokenizer.feed([token]) if i < shown else ""
            self._fed_chars += len(piece)
            self._unfinished.append(token)
            if not self._detokenizer.holds:
                self._unshown.extend((t, self._fed_chars) for t in self._unfinished)
                self._unfinished.clear()
            matched = None
            if self._stop is not None:
                may_stop = self._num_fed >= self.request.sampling.min_new_tokens
                piece, matched = self._stop.feed(piece, may_stop)
            self._unshown_text += piece
            if matched is not None:
                return matched, i + 1
        return None, len(token_ids)

    def _show(self, everything: bool) -> None:
        """Show what is complete: tokens whose text is final to its last character."""
        final = self._shown_chars + len(self._unshown_text)
        upto = self._shown_chars
        while self._unshown and (everything or self._unshown[0][1] <= final):
            token, upto = self._unshown.popleft()
            self.token_ids.append(token)
        if everything:
            upto = final
            self.token_ids += self._unfinished
            self._unfinished.clear()
        length = max(0, upto - self._shown_chars)
        self._add_text(self._unshown_text[:length])
        self._unshown_text = self._unshown_text[length:]
        self._shown_chars += length

    @property
    def _num_fed(self) -> int:
        return len(self.token_ids) + len(self._unshown) + len(self._unfinished)

    def _resume(self, token_ids: list[int]) -> None:
        """Take in tokens that another worker generated and showed."""
        sampling, finish = self.request.sampling, None
        if token_ids[-1] in sampling.stop_token_ids:
            finish = Finish("stop", matched=token_ids[-1])
        elif len(token_ids) == sampling.max_new_tokens:
            finish = Finish("length", length=len(token_ids))
        self.feed(Output(self.request.rid, token_ids=token_ids, finish=finish))
        stops_early = not set(sampling.stop_token_ids).isdisjoint(token_ids[:-1])
        if stops_early or not self._num_fed == len(token_ids) <= sampling.max_new_tokens:
            raise RequestError(
                "resume.token_ids goes on after the end of the sequence", param="resume.token_ids"
            )
        self.token_ids = list(token_ids)
        self._unshown.clear()
        self._unfinished.clear()
        self._fresh.clear()
        self._skip_chars = self._fed_chars - self._shown_chars
        held = self._stop.held if self._stop is not None else ""
        self.resumed_text = self.text + self._unshown_text + held
        self._ids_taken = len(self.token_ids)

    def _flush(self) -> None:
        if self._detokenizer is not None:
            tail = self._detokenizer.flush()
            if self._stop is not None:
                tail = self._stop.feed(tail, may_stop=False)[0] + self._stop.flush()
            self._add_text(tail)

    @property
    def has_no_text(self) -> bool:
        """Token ids only: the server has no tokenizer."""
        return self._tokenizer is None

    # ---- logprobs ----

    def _take_logprobs(self, token_ids: list[int], logprobs: Logprobs) -> None:
        for i, token in enumerate(token_ids):
            self.output_logprobs.append(self._entry(logprobs.values[i], token))
            if logprobs.top:
                self.output_top.append(self._entries(logprobs.top[i]))
            if logprobs.ids:
                self.output_ids_logprobs.append(self._entries(logprobs.ids[i]))

    def _take_prompt_logprobs(self, logprobs: Logprobs) -> None:
        """From logprob_start_len on; the first token of a sequence has none (null)."""
        start = max(0, self.request.logprob_start_len)
        for i, value in enumerate(logprobs.values):
            self.input_logprobs.append(self._entry(value, self.request.input_ids[start + i]))
        self.input_top = [self._entries(top) or None for top in logprobs.top]
        self.input_ids_logprobs = [self._entries(ids) or None for ids in logprobs.ids]

    def _entry(self, logprob: float | None, token: int) -> Entry:
        text = self._tokenizer.token_text(token) if self._logprob_text and self._tokenizer else None
        return [logprob, token, text]

    def _entries(self, pairs: list[tuple[float, int]]) -> list[Entry]:
        return [self._entry(logprob, token) for logprob, token in pairs]
