"""What the configuration keys of speculative decoding mean together. Nothing here imports jax."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import ServerConfig


def refusal(config: "ServerConfig") -> str | None:
    """Why the keys do not go together: names key, value and constraint."""
    given = [
        f.name
        for f in dataclasses.fields(config)
        if f.name.startswith("speculative_") and getattr(config, f.name) is not None
    ]
    if given and config.speculative_algorithm is None:
        return f"{given[0]}={getattr(config, given[0])} needs speculative_algorithm; use 'NGRAM'"
    shortest, longest = ngram_window(config)
    if shortest > longest:
        return (
            f"speculative_ngram_min_match_window_size={shortest} exceeds "
            f"speculative_ngram_max_match_window_size={longest}"
        )
    return None


def ngram_window(config: "ServerConfig") -> tuple[int, int]:
    """(least, most) tokens that NGRAM matches."""
    shortest = config.speculative_ngram_min_match_window_size
    longest = config.speculative_ngram_max_match_window_size
    return shortest or min(2, longest or 2), longest or max(12, shortest or 12)


def num_drafts(config: "ServerConfig") -> int:
    """Guesses of one request and step at most; 0 without speculative decoding."""
    if config.speculative_algorithm is None:
        return 0
    return (config.speculative_num_draft_tokens or 8) - 1
