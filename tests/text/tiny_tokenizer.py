"""Tokenizers small enough to build in a test, one for each kind of decoder."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.text import tokenizer as text_tokenizer

WORDS = ("hello", "world", "stop", "the", "and", "ing")
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """Every byte is a token, and a few words are; ids 0 to 3 are special."""
    alphabet = sorted(text_tokenizer.BYTE_OF_CHAR, key=text_tokenizer.BYTE_OF_CHAR.__getitem__)
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                merges.append((word[: end - 1], word[end - 1]))
                vocab[word[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, unknown characters as byte tokens."""
    space = text_tokenizer.SPACE_MARK
    pieces = [space, *"abcdefghijklmnopqrstuvwxyz.,!", space + "t", space + "th", space + "the"]
    vocab = {
        t: i for i, t in enumerate(("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces))
    }
    merges = [(space, "t"), (space + "t", "h"), (space + "th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """A decoder whose text depends on neighbouring tokens."""
    vocab = {t: i for i, t in enumerate(("[UNK]", "hello", "world", "##ly", "##s", "and", "!"))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def write(directory: Path, fast: Tokenizer | None = None, **config: object) -> Path:
    """tokenizer.json and tokenizer_config.json, as a checkpoint has them."""
    (fast or byte_level()).save(str(directory / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**defaults, **config}))
    return directory
