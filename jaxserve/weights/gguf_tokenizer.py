"""The tokenizer inside a GGUF file, written as `tokenizer.json` and `tokenizer_config.json`.

Two models are known: `gpt2` (byte-level BPE with one of the named pre-tokenizers) and `llama`
(SentencePiece BPE, where merges follow from the scores, with byte fallback).
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.weights.checkpoint import CheckpointError
from jaxserve.weights.gguf_file import GGUFFile

logger = logging.getLogger(__name__)

_VERSION = 1  # of what is written; a new number makes every cached directory stale
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"


def tokenizer_directory(file: GGUFFile, config: dict[str, Any]) -> Path:
    """A directory with the file's tokenizer, built once and kept in the user's cache.

    Raises: CheckpointError for a tokenizer model or pre-tokenizer that is not known.
    """
    # The file's metadata and what we make of it decide the content, nothing else.
    digest = xxhash.xxh3_64_hexdigest(f"{_VERSION} {file.digest}".encode())
    parent = _cache_dir()
    target = parent / digest
    if (target / "tokenizer_config.json").exists():
        return target
    tokenizer = build_tokenizer(file)
    partial = Path(tempfile.mkdtemp(dir=parent, prefix=f".{digest}-"))
    tokenizer.save(str(partial / "tokenizer.json"))
    text = json.dumps(tokenizer_config(file, config), ensure_ascii=False, indent=2)
    (partial / "tokenizer_config.json").write_text(text, encoding="utf-8")
    try:
        partial.rename(target)
    except OSError:  # another process was first, with the same content
        shutil.rmtree(partial)
    return target


def _cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(home) if home else Path.home() / ".cache") / "jaxserve" / "gguf-tokenizers"
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    path = Path(tempfile.mkdtemp(prefix="jaxserve-gguf-tokenizers-"))
    logger.warning("no writable cache directory; the tokenizer is written to %s", path)
    return path


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The `tokenizers` tokenizer. Raises CheckpointError."""
    model = file.metadata.get("tokenizer.ggml.model")
    if model not in _MODELS:
        raise CheckpointError(
            f"{file.path}: tokenizer model {model!r} is not known; known are {', '.join(_MODELS)}. "
            "Name a directory of tokenizer files with --tokenizer-path instead"
        )
    tokens = _tokens(file)
    tokenizer = _MODELS[model](file, tokens)
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    kinds = dict(zip(tokens, types))
    special = [
        t for t in tokens if kinds.get(t) == _CONTROL or (model == "llama" and kinds.get(t) == _UNKNOWN)
    ]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens if kinds.get(t) == _USER_DEFINED])
    _add_post_processor(file, tokenizer, tokens)
    return tokenizer


def tokenizer_config(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `tokenizer_config.json`; absent ones are left out."""
    tokens = _tokens(file)
    out: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(file, "bos"),
        "add_eos_token": _adds(file, "eos"),
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None:
            out[f"{ours}_token"] = _token(file, tokens, token_id)
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        out["chat_template"] = template
    return out


def _tokens(file: GGUFFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{file.path}: metadata key tokenizer.ggml.tokens is missing")
    return tokens


def _token(file: GGUFFile, tokens: list[str], token_id: int) -> str:
    if token_id >= len(tokens):
        raise CheckpointError(f"{file.path}: special token id {token_id} is outside its {len(tokens)} tokens")
    return tokens[token_id]


# ---- byte-level BPE ----

# Words: contractions, letters with one leading sign, digits (1 or up to 3), signs, line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _split("{1,3}"),
    "llama3": lambda: _split("{1,3}"),
    "qwen2": lambda: _split(""),
}
# A word that is a token as a whole is not split by merges; these put a BOS before the text unasked.
_LLAMA3 = ("llama-bpe", "llama3")


def _byte_level_bpe(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre is None:
        logger.warning("%s: names no pre-tokenizer; words are split as by gpt-2", file.path)
        pre = "default"
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {pre!r} is not known; known are {', '.join(_PRE_TOKENIZERS)}. "
            "Name a directory of tokenizer files with --tokenizer-path instead"
        )
    merges = [_pair(file, merge) for merge in file.metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre in _LLAMA3)
    except Exception as error:  # the library raises plain Exception for a merge outside the vocabulary
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges has {merge!r}, expected two tokens")
    return left, right


# ---- SentencePiece BPE ----


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.scores: expected {len(tokens)} scores, got {len(scores or ())}"
        )
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    plain = {t for t, kind in zip(tokens, types) if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = _token(file, tokens, file.metadata.get("tokenizer.ggml.unknown_token_id", 0))
    merges = _merges_by_score({t: i for t, i in vocab.items() if not types or t in plain}, scores)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        to_text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best made token first.

    SentencePiece always joins the pair whose result scores highest; a merge list in that order
    does the same. Ties go to the lower ids of the parts.
    """
    merges = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


# ---- what is put around a text ----


def _adds(file: GGUFFile, kind: str) -> bool:
    given = file.metadata.get(f"tokenizer.ggml.add_{kind}_token")
    if given is not None:
        return bool(given)
    model, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return kind == "bos" and (model == "llama" or pre in _LLAMA3)


def _add_post_processor(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    around = {}
    for kind in ("bos", "eos"):
        token_id = file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None and _adds(file, kind):
            around[kind] = (_token(file, tokens, token_id), token_id)
    if around:
        first = [f"{around['bos'][0]}:0"] if "bos" in around else []
        last = [f"{around['eos'][0]}:0"] if "eos" in around else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A:0", *last], special_tokens=list(dict.fromkeys(around.values()))
        )
