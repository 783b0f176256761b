"""One sequence on its way out: the tokens the engine made, as text, logprobs and a finish reason.

Owns incremental decoding and stop strings of one Generate. Knows nothing of HTTP.
"""

from typing import Any

from jaxserve.messages import Generate, Logprobs, Output
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
        index: int = 0,
        public_rid: str | None = None,
        score_only: bool = False,
        logprob_text: bool = False,
        log_metrics: bool = True,
    ):
        """
        Args:
            index: its place among the sequences of its HTTP request.
            public_rid: the id the client gave for all of them; `/abort_request` takes it.
            score_only: max_new_tokens was 0; the engine's one token is dropped.
            logprob_text: put each token's text into the logprob entries.
        """
        self.request = request
        self.rules = rules
        self.index = index
        self.public_rid = public_rid or request.rid
        self.log_metrics = log_metrics
        self.token_ids: list[int] = []
        self.finish: dict[str, Any] | None = None
        self.cached_tokens = 0
        self.dp_rank = 0
        self.num_retractions = 0
        self.started_s = 0.0
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

    @property
    def text(self) -> str:
        """All text so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    def take_text(self) -> str:
        """The text since the last call; work is proportional to it."""
        fresh, self._fresh = "".join(self._fresh), []
        return fresh

    def _add_text(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self._fresh.append(piece)

    def feed(self, output: Output) -> None:
        """Take one Output; after it `finish` may be set, by the engine or by a stop string."""
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        self.dp_rank = output.dp_rank
        self.num_retractions = output.num_retractions or self.num_retractions
        if output.prompt_logprobs is not None:
            self._take_prompt_logprobs(output.prompt_logprobs)
        finish = output.finish
        token_ids = [] if self._score_only else output.token_ids
        stopped = finish is not None and finish.type == "stop"
        hidden = 1 if stopped and token_ids and not self.rules.keep_stop else 0
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
