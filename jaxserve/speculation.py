"""What the configuration keys of speculative decoding mean together. Nothing here imports jax."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import ServerConfig

NGRAM_DRAFTS, NEXTN_DRAFTS = 7, 1  # of a request and step, by default
OF_NEXTN = ("speculative_num_steps", "speculative_eagle_topk", "speculative_draft_model_path")
OF_NGRAM = ("speculative_ngram_min_match_window_size", "speculative_ngram_max_match_window_size")


def refusal(config: "ServerConfig") -> str | None:
    """Why the keys do not go together: names key, value and constraint."""
    given = {
        f.name: value
        for f in dataclasses.fields(config)
        if f.name.startswith("speculative_") and (value := getattr(config, f.name)) is not None
    }
    algorithm = config.speculative_algorithm
    if algorithm is None:
        if not given:
            return None
        name = next(iter(given))
        return f"{name}={given[name]} needs speculative_algorithm; use 'NGRAM' or 'NEXTN'"
    if (steps := config.num_continuous_decode_steps or 1) > 1:
        return (
            f"num_continuous_decode_steps={steps} does not go with speculative_algorithm={algorithm}: "
            "guesses are checked step by step; leave one of them out"
        )
    for name in OF_NGRAM if uses_nextn(config) else OF_NEXTN:
        if name in given:
            return f"{name}={given[name]} does not go with speculative_algorithm={algorithm}; leave it out"
    shortest, longest = ngram_window(config)
    if shortest > longest:
        return (
            f"speculative_ngram_min_match_window_size={shortest} exceeds "
            f"speculative_ngram_max_match_window_size={longest}"
        )
    return _nextn_refusal(config) if uses_nextn(config) else None


def _nextn_refusal(config: "ServerConfig") -> str | None:
    if config.speculative_draft_model_path not in (None, config.model_path):
        return (
            f"speculative_draft_model_path={config.speculative_draft_model_path}: a draft model of its own "
            f"is not served; {config.speculative_algorithm} reads the layer in model_path; leave it out"
        )
    if config.speculative_eagle_topk not in (None, 1):
        return (
            f"speculative_eagle_topk={config.speculative_eagle_topk} is not served: drafts are a chain, not "
            "a tree; use 1"
        )
    tokens, steps = config.speculative_num_draft_tokens, config.speculative_num_steps
    if tokens is not None and steps is not None and tokens != steps + 1:
        return (
            f"speculative_num_draft_tokens={tokens} must be speculative_num_steps + 1 = {steps + 1}: the "
            "last token and a guess a step"
        )
    if config.enable_eplb:
        return (
            f"enable_eplb does not go with speculative_algorithm={config.speculative_algorithm}, whose "
            "layer's experts stay where they are; leave one of them out"
        )
    return None


def uses_nextn(config: "ServerConfig") -> bool:
    """Whether the model's own layer guesses. EAGLE without a draft model is what others call that, too."""
    return config.speculative_algorithm in ("NEXTN", "EAGLE")


def ngram_window(config: "ServerConfig") -> tuple[int, int]:
    """(least, most) tokens that NGRAM matches."""
    shortest = config.speculative_ngram_min_match_window_size
    longest = config.speculative_ngram_max_match_window_size
    return shortest or min(2, longest or 2), longest or max(12, shortest or 12)


def num_drafts(config: "ServerConfig") -> int:
    """Guesses of one request and step at most; 0 without speculative decoding."""
    if config.speculative_algorithm is None:
        return 0
    if config.speculative_num_draft_tokens is not None:
        return config.speculative_num_draft_tokens - 1
    return config.speculative_num_steps or (NEXTN_DRAFTS if uses_nextn(config) else NGRAM_DRAFTS)
