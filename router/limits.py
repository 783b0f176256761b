"""Who may ask and how much at once: API keys, a concurrency limit with a bounded queue, token rates.

Clocks are injected; waiting is on futures, never by polling.
"""

import asyncio
import hmac
from collections import OrderedDict, deque
from collections.abc import Callable

from router.errors import RequestError


class Keys:
    """The accepted bearer tokens, each with the name it is limited under.

    Without a client's key (`api_key`, `named`) everyone may ask. With an operator's (`control`, each
    id:name:role:key) only those of role admin may change workers; both roles may ask.
    """

    def __init__(
        self, api_key: str | None, named: tuple[str, ...] = (), control: tuple[str, ...] = ()
    ) -> None:
        self.tokens: list[tuple[bytes, str]] = []
        if api_key:
            self.tokens.append((api_key.encode(), "default"))
        for item in named:
            name, _, token = item.partition(":")
            self.tokens.append((token.encode(), name))
        self.guarded = bool(self.tokens)
        self.has_roles = bool(control)
        self.admins: set[str] = set()
        for item in control:
            key_id, _, role, token = item.split(":", 3)
            self.tokens.append((token.encode(), key_id))
            if role == "admin":
                self.admins.add(key_id)

    def check(self, authorization: bytes | None, x_api_key: bytes | None = None) -> str:
        """The caller's name; "anonymous" when everyone may ask. Raises RequestError(401).

        Takes `Authorization: Bearer TOKEN` or, as Anthropic clients send it, `x-api-key: TOKEN`.
        """
        return self._caller(authorization, x_api_key) if self.guarded else "anonymous"

    def check_admin(self, authorization: bytes | None, x_api_key: bytes | None = None) -> None:
        """Whether the caller may change workers. Raises RequestError(401, 403)."""
        if not self.has_roles:
            self.check(authorization, x_api_key)
        elif self._caller(authorization, x_api_key) not in self.admins:
            raise RequestError(403, "forbidden", "this needs a key of role admin", type="permission_error")

    def _caller(self, authorization: bytes | None, x_api_key: bytes | None) -> str:
        given = x_api_key
        if authorization is not None:
            scheme, _, given = authorization.partition(b" ")
            if scheme.lower() != b"bearer":
                given = None
        found = None
        if given is not None:
            for token, name in self.tokens:  # all of them: the time tells nothing
                if hmac.compare_digest(token, given.strip()):
                    found = name
        if found is None:
            raise RequestError(
                401,
                "invalid_api_key",
                "missing or wrong API key; send 'Authorization: Bearer KEY'",
                type="authentication_error",
                headers=((b"www-authenticate", b'Bearer realm="data-plane"'),),
            )
        return found


class Concurrency:
    """At most `limit` requests at once (-1: any number), `queue_size` more wait in order of arrival."""

    def __init__(self, limit: int, queue_size: int, queue_timeout_s: float) -> None:
        self.limit = limit
        self.queue_size = queue_size
        self.queue_timeout_s = queue_timeout_s
        self.running = 0
        self.queue: deque[asyncio.Future] = deque()
        self._idle: asyncio.Future | None = None

    async def enter(self) -> None:
        """Take a place, waiting in the queue if need be. Whoever enters owes one `leave()`.

        Raises RequestError: 429 when the queue is full, 408 when the wait was too long.
        """
        if self.limit < 0 or (self.running < self.limit and not self.queue):
            self.running += 1
            return
        if len(self.queue) >= self.queue_size:
            raise RequestError(
                429,
                "admission_queue_full",
                f"{self.running} requests run and {len(self.queue)} wait; try again later",
                type="rate_limit_error",
                retry_after_s=1,
            )
        place = asyncio.get_running_loop().create_future()
        self.queue.append(place)
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                await place
        except TimeoutError:
            self._give_up(place)
            raise RequestError(
                408,
                "admission_queue_timeout",
                f"no place came free within {self.queue_timeout_s:g} s",
                type="rate_limit_error",
                retry_after_s=2,
            ) from None
        except asyncio.CancelledError:
            self._give_up(place)
            raise

    def leave(self) -> None:
        """Give a place back; the longest waiting request takes it."""
        while self.queue:
            place = self.queue.popleft()
            if not place.done():
                place.set_result(None)  # the place changes hands: `running` stays
                return
        self.running -= 1
        if not self.running and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def wait_idle(self) -> None:
        """Until nobody is inside."""
        while self.running:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    def _give_up(self, place: asyncio.Future) -> None:
        if place.done() and not place.cancelled():  # it was handed a place at the same moment
            self.leave()
        else:
            place.cancel()
            if place in self.queue:
                self.queue.remove(place)


class TokenRate:
    """Prompt and completion tokens a second of each caller; a bucket holds ten seconds' worth.

    A request is admitted when the bucket is not in debt and then charged in full, so one prompt larger
    than the bucket still passes, and is paid off before the next. What nobody computed is given back.
    """

    BURST_S = 10.0
    MAX_CALLERS = 100_000

    def __init__(self, tokens_per_s: float | None, clock: Callable[[], float]) -> None:
        self.tokens_per_s = tokens_per_s
        self.clock = clock
        self.on_charged: Callable[[str, int], None] | None = None  # for other processes to hear of
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, at time

    @property
    def is_limited(self) -> bool:
        return self.tokens_per_s is not None

    def admit(self, caller: str, tokens: int) -> None:
        """Charge a prompt. Raises RequestError(429) with the time until the bucket is out of debt."""
        rate = self.tokens_per_s
        if rate is None:
            return
        left = self._left(caller, rate)
        if left < 0:
            raise RequestError(
                429,
                "token_rate_exceeded",
                f"more than {rate:g} tokens a second; try again in {-left / rate:.1f} s",
                type="rate_limit_error",
                retry_after_s=-left / rate,
            )
        self._set(caller, left - tokens)
        if self.on_charged is not None:
            self.on_charged(caller, tokens)

    def heard(self, caller: str, tokens: int) -> None:
        """Another gateway process has charged `caller`."""
        if self.tokens_per_s is not None:
            self._set(caller, self._left(caller, self.tokens_per_s) - tokens)

    def charge(self, caller: str, tokens: int) -> None:
        """Charge what was generated, after the fact; give back what is negative."""
        if self.tokens_per_s is not None:
            self._set(caller, self._left(caller, self.tokens_per_s) - tokens)
            if self.on_charged is not None:
                self.on_charged(caller, tokens)

    def _left(self, caller: str, rate: float) -> float:
        full = rate * self.BURST_S
        left, at = self.buckets.get(caller, (full, self.clock()))
        return min(full, left + (self.clock() - at) * rate)

    def _set(self, caller: str, left: float) -> None:
        self.buckets[caller] = (left, self.clock())
        self.buckets.move_to_end(caller)
        if len(self.buckets) > self.MAX_CALLERS:
            self.buckets.popitem(last=False)
