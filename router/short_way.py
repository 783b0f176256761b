"""The short way of a data request: without a task, from the client's protocol to the worker's and back.

Most requests are whole when they come, find an idle connection and get one whole answer. A task that waits
for it, its future and its coroutines cost a fifth of such a request, so protocols call methods here instead.
Whatever else happens makes the request the ASGI application's, which goes on from where it stands: it alone
streams, retries, waits and tells errors.
"""

from typing import TYPE_CHECKING

from router.call import ROUTES, Call, new_request_id
from router.errors import RequestError
from router.exchange import Exchange
from router.headers import ClientHeaders, read_headers
from router.proxy import RETRYABLE, Proxy

if TYPE_CHECKING:
    from router.http_server import Request


class ShortWay:
    """One request on the short way, or what was done for it there: `exchange` may be under way."""

    __slots__ = ("call", "client", "exchange", "proxy", "request", "started_s")

    def __init__(self, proxy: Proxy, request: "Request", client: ClientHeaders, call: Call) -> None:
        self.proxy = proxy
        self.request = request
        self.client = client
        self.call = call
        self.exchange: Exchange = None  # type: ignore[assignment]
        self.started_s = proxy.loop.time()

    @classmethod
    def take(cls, proxy: Proxy, request: "Request") -> bool:
        """Start `request`, whose body is there; False: ask the application, which finds what was done."""
        if not proxy.short or (proxy.exact is not None and proxy.exact.subscriptions):
            return False
        head = request.head
        client, route = head.client, ROUTES[head.path]
        if client is None:
            client = head.client = read_headers(head.headers, proxy.id_ranks)
        try:
            proxy.keys.check(client.authorization, client.x_api_key)
            request_id = client.request_id or new_request_id(route.id_prefix)
            call = proxy.read(route, client, request_id, bytes(request.body))
        except RequestError:
            return False  # found again there, and told
        request.body = b""
        way = request.begun = cls(proxy, request, client, call)
        if call.stream or not way._send():
            return False
        request.begun = None  # not both ways: what refers to itself waits for the garbage collector
        return True

    def _send(self) -> bool:
        """Begin an exchange; False: there is no worker, or no connection to it yet."""
        proxy, request = self.proxy, self.request
        try:
            worker, admission = proxy.select(self.call, [])
        except RequestError:
            return False
        exchange = self.exchange = Exchange(proxy, self.call, worker, admission, self.started_s)
        proxy.concurrency.running += 1
        try:
            sent = exchange.send(request.head.method, request.head.target, self.client)
        except Exception:
            self._end()
            raise
        if sent:
            exchange.connection.listener = self._news  # type: ignore[union-attr]  # it has sent
            request.connection.on_lost = self._client_left
            request.flow.resume_reading()
        return sent

    def _news(self) -> None:
        """Something has come from the worker: bytes, the end or an error."""
        request, exchange, connection = self.request, self.exchange, self.exchange.connection
        assert connection is not None
        if not connection.status and connection.error is None:
            return
        answered = False
        try:
            if connection.error is None and exchange.whole() and exchange.status not in RETRYABLE:
                if connection.complete:
                    exchange.body = connection.take()
                    answered = exchange.answer_whole(request)
                elif not connection.paused:
                    return  # its rest will come
        except Exception as error:
            request.fail(error)
            answered = True
        if answered:
            self._end()
        else:
            connection.listener = request.connection.on_lost = None
            request.begun = self
            request.ask_application()

    def _client_left(self) -> None:
        self.proxy.recorder.client_left(self.call.path)
        self._end()

    def _end(self) -> None:
        self.request.connection.on_lost = None
        self.exchange.close()
        self.proxy.concurrency.leave()
