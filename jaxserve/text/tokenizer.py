"""Text to token ids and back, from the tokenizer files of a checkpoint directory.

Owns `tokenizer.json` and `tokenizer_config.json`: encoding with or without special tokens, decoding,
which ids are special, which end a sequence, and the bytes each token stands for (incremental
decoding is built on those). Knows nothing of requests or of the engine.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import tokenizers

DecoderKind = Literal["byte_level", "sentencepiece", "other"]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The tokenizer files are missing or cannot be read; the message names the file."""


class Tokenizer:
    """A fast tokenizer with its configuration. Safe to share between tasks and threads."""

    def __init__(self, fast: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """`config` is the content of tokenizer_config.json."""
        fast.no_truncation()
        fast.no_padding()
        self.fast = fast
        self.config = config or {}
        self.special_tokens = _special_tokens(self.config)
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.decoder_kind: DecoderKind = _decoder_kind(fast)
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self._bytes: dict[int, bytes] = {}
        self._plain, self._prefix, self._suffix = self._added_by_config()

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Raises TokenizerError."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{file} is missing; a fast tokenizer (tokenizer.json) is needed")
        try:
            fast = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the binding raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {error}") from error
        named = read_json(directory / "special_tokens_map.json")  # where older files have some of them
        return cls(fast, {**named, **read_json(directory / "tokenizer_config.json")})

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included; a model's logits may be wider."""
        return self.fast.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset() if self.eos_token_id is None else frozenset((self.eos_token_id,))

    @functools.cached_property
    def max_token_chars(self) -> int:
        """The most characters one token stands for."""
        return max(map(len, self.fast.get_vocab(with_added_tokens=True)), default=1)

    # ---- text to ids ----

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens` adds what the checkpoint puts around plain text (often one bos)."""
        if not add_special_tokens:
            return self.fast.encode(text, add_special_tokens=False).ids
        ids = self.fast.encode(text, add_special_tokens=not self._plain).ids
        return [*self._prefix, *ids, *self._suffix] if self._prefix or self._suffix else ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        special = add_special_tokens and not self._plain
        batch = [e.ids for e in self.fast.encode_batch_fast(list(texts), add_special_tokens=special)]
        if add_special_tokens and (self._prefix or self._suffix):
            return [[*self._prefix, *ids, *self._suffix] for ids in batch]
        return batch

    # ---- ids to text ----

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; empty for ids the tokenizer does not know."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """One token alone as text; a part of a multi-byte character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.fast.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoder_kind == "byte_level":
            try:
                return bytes(BYTE_OF_CHAR[c] for c in token)
            except KeyError:  # an added token that holds characters outside the byte alphabet
                return token.encode("utf-8", "replace")
        if self.decoder_kind == "sentencepiece":
            byte = BYTE_TOKEN.fullmatch(token)
            if byte:
                return bytes((int(byte[1], 16),))
            return token.replace(SPACE_MARK, " ").encode("utf-8", "replace")
        return self.fast.decode([token_id], skip_special_tokens=False).encode()

    # ---- configuration ----

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.fast.token_to_id(token)

    def _added_by_config(self) -> tuple[bool, list[int], list[int]]:
        """(encode plainly, ids before, ids after): `add_bos_token` and `add_eos_token` win over
        the post-processor of tokenizer.json, as they do in the reference implementation."""
        around = self.fast.encode("", add_special_tokens=True).ids
        has_bos = bool(around) and around[0] == self.bos_token_id
        has_eos = bool(around) and around[-1] == self.eos_token_id and (len(around) > 1 or not has_bos)
        want_bos, want_eos = self.config.get("add_bos_token"), self.config.get("add_eos_token")
        bos = has_bos if want_bos is None or self.bos_token_id is None else bool(want_bos)
        eos = has_eos if want_eos is None or self.eos_token_id is None else bool(want_eos)
        if (bos, eos) == (has_bos, has_eos):
            return False, [], []
        prefix = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        suffix = [self.eos_token_id] if eos and self.eos_token_id is not None else []
        return True, prefix, suffix


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no file. Raises TokenizerError."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise TokenizerError(f"{path} is not a JSON object: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; an entry is a string or an AddedToken object with `content`."""
    out = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            out[name] = value
    return out


def _decoder_kind(fast: tokenizers.Tokenizer) -> DecoderKind:
    """Whether tokens stand for fixed bytes, and by which alphabet."""
    if fast.decoder is None:
        return "other"
    state = msgspec.json.decode(fast.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return "byte_level"
    if kinds == {"Metaspace"} and steps[0].get("replacement") == SPACE_MARK:
        return "sentencepiece"
    to_space = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    if "ByteFallback" in kinds and all(
        step["type"] in ("ByteFallback", "Fuse", "Strip") or step == to_space for step in steps
    ):
        return "sentencepiece"
    return "other"


def _byte_alphabet() -> dict[str, int]:
    """Source: GPT-2's byte-level BPE: printable bytes stand for themselves, the others for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    return alphabet | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()
