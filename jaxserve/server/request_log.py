"""A line of the log for a request for tokens that has ended, with `--log-requests`."""

import logging

from starlette.types import Scope

from jaxserve.server.sequence import Sequence
from jaxserve.server.worker_headers import SEQUENCES

log = logging.getLogger(__name__)


def log_request(request_id: str, scope: Scope, status: int, duration_s: float) -> None:
    """`request_id`: that of its header, which its answer has too. Prompts count once, whatever n is."""
    sequences: list[Sequence] = scope.get(SEQUENCES, [])
    prompts = {id(s.request.input_ids): len(s.request.input_ids) for s in sequences}
    first_s = min((s.first_token_s for s in sequences if s.first_token_s is not None), default=None)
    log.info(
        "%s %s %d: %d prompt tokens, %d completion tokens, first after %s s, ended after %.3f s",
        *(request_id, scope["path"], status, sum(prompts.values()), sum(len(s.token_ids) for s in sequences)),
        *("-" if first_s is None else f"{first_s:.3f}", duration_s),
    )
