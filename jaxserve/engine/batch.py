"""The arrays of one step: how a plan becomes one buffer, and how the device reads it.

Each dp rank's part of a step travels as one int32 row (floats are bit-cast), so a step costs one
transfer however many fields it has. `Packing` names the fields once, for both sides.

Fields are rank-local: slots, pages and token indices count within their rank. -1 is padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.constraints import MASK_BITS
from jaxserve.engine.plan import RankPlan
from jaxserve.engine.request import Request

NUM_BIASES = 384  # entries of a slot's logit-bias table; its stop tokens come first
NUM_LOGPROB_IDS = 32  # most `token_ids_logprob` of a request
NUM_TOP_LOGPROBS = 20  # most `top_logprobs_num` of a request
BARRED = -1e38  # of a token that may not come yet; where a grammar allows nothing else, it comes


@dataclass(frozen=True)
class Bucket:
    """The static shape of a step on one rank: decode rows first, then tokens of prompts."""

    rows: int  # decode rows at most
    num_tokens: int  # of rows and prompts together
    chunks: int  # prompts that tokens may belong to; 0: a step of decode alone, with a row for each token
    num_samples: int  # rows that may be sampled: at least rows + chunks
    block_size: int  # query tokens of an attention block

    @property
    def num_blocks(self) -> int:
        """Query blocks, enough for any split of the tokens over `chunks` prompts."""
        return min(self.num_tokens, self.num_tokens // self.block_size + self.chunks) if self.chunks else 0

    @property
    def num_updates(self) -> int:
        """Page-table entries that ride along; more go ahead in a program of their own."""
        return self.rows + (self.num_tokens // 8 if self.chunks else 0)


class Packing:
    """Named fields of fixed length in one int32 row."""

    def __init__(self, **fields: tuple[int, type]):
        self.slices: dict[str, tuple[slice, type]] = {}
        at = 0
        for name, (length, dtype) in fields.items():
            self.slices[name] = (slice(at, at + length), dtype)
            at += length
        self.length = at

    def views(self, row: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of one rank's row, as writable views."""
        return {name: row[part].view(dtype) for name, (part, dtype) in self.slices.items()}

    def unpack(self, packed_RM: jax.Array) -> dict[str, jax.Array]:
        """The fields of all ranks, each flat with the ranks one after the other.

        Without empty ones: partitioning a zero-sized array crashes XLA's CPU compiler (jaxlib 0.11.2).
        """
        out = {}
        for name, (part, dtype) in self.slices.items():
            if part.start == part.stop:
                continue
            field = packed_RM[:, part].reshape(-1)
            out[name] = jax.lax.bitcast_convert_type(field, jnp.float32) if dtype is np.float32 else field
        return out


def forward_packing(bucket: Bucket, with_states: bool = False) -> Packing:
    """`with_states`: for a model with recurrent layers; see `jaxserve.layers.kv.StateBlocks`."""
    r, t, b = bucket.rows, bucket.num_tokens, bucket.num_blocks
    i = np.int32
    states = dict(state_from=(b, i), state_end=(b, i), state_kept=(b, i)) if with_states else {}
    return Packing(
        slot=(t, i),  # of each token; -1 is padding
        token=(t, i),  # -1: the last that was sampled for the slot
        position=(t, i),
        row_len=(r, i),  # context length with the new token, of the decode rows; 0: the token is none
        block_slot=(b, i),
        block_start=(b, i),
        block_len=(b, i),
        block_pos=(b, i),
        sample_index=(bucket.num_samples, i),  # which of the T tokens is sampled from
        update_slot=(bucket.num_updates, i),
        update_index=(bucket.num_updates, i),
        update_page=(bucket.num_updates, i),
        **states,
    )


def pack_forward(bucket: Bucket, packing: Packing, plans: Sequence[RankPlan]) -> np.ndarray:
    """[ranks, packing.length] for the forward program."""
    packed = np.zeros((len(plans), packing.length), np.int32)
    for row, plan in zip(packed, plans):
        f = packing.views(row)
        for name in ("slot", "block_slot", "update_slot"):
            f[name].fill(-1)
        n = plan.num_rows
        if n:
            f["slot"][:n], f["row_len"][:n], f["token"][:n] = _decode_rows(plan)
            f["position"][:n] = f["row_len"][:n] - 1
        f["sample_index"][:n] = np.arange(n)
        set_blocks(f, bucket, plan)
        at, sample = plan.first_prompt_token, n
        for chunk in plan.chunks:
            end = at + chunk.length
            f["slot"][at:end] = chunk.request.slot
            f["token"][at:end] = chunk.request.tokens[chunk.start : chunk.start + chunk.length]
            f["position"][at:end] = np.arange(chunk.start, chunk.start + chunk.length)
            if chunk.samples:
                f["sample_index"][sample] = end - 1
                sample += 1
            at = end
        if "state_from" in f:
            _fill_states(bucket, f, plan)
        _pack_updates(f, plan)
    return packed


def set_blocks(fields: dict[str, np.ndarray], bucket: Bucket, plan: RankPlan) -> None:
    """The query blocks of the prompts' tokens; none for a request that has left."""
    at, block = plan.first_prompt_token, 0
    for chunk in plan.chunks:
        here = range(0, chunk.length, bucket.block_size) if chunk.request.slot >= 0 else ()
        for offset in here:
            fields["block_slot"][block] = chunk.request.slot
            fields["block_start"][block] = at + offset
            fields["block_len"][block] = min(bucket.block_size, chunk.length - offset)
            fields["block_pos"][block] = chunk.start + offset
            block += 1
        at += chunk.length


def _fill_states(bucket: Bucket, f: dict[str, np.ndarray], plan: RankPlan) -> None:
    for name in ("state_from", "state_end", "state_kept"):
        f[name].fill(-1)
    block = 0
    for chunk, following in zip(plan.chunks, [*plan.chunks[1:], None]):
        first, block = block, block - (-chunk.length // bucket.block_size)
        f["state_from"][first:block] = chunk.state_from
        f["state_kept"][block - 1] = chunk.state_kept
        if following is None or following.request is not chunk.request:
            f["state_end"][block - 1] = chunk.request.slot


def _decode_rows(plan: RankPlan) -> tuple[list[int], list[int], list[int]]:
    """Slots, context lengths and tokens of the decode rows; a token still on the device is -1."""
    slots, lens, tokens = [], [], []
    for request in plan.decode:
        slots.append(request.slot)
        lens.append(request.computed)
        tokens.append(request.tokens[-1] if request.pending == 1 else -1)  # 1: what this step samples
        for number, token in enumerate(plan.drafts.get(request, ()), 1):
            slots.append(request.slot)
            lens.append(request.computed + number)
            tokens.append(token)
    return slots, lens, tokens


def decode_packing(bucket: Bucket) -> Packing:
    """For several decode steps in one program."""
    r, u, i = bucket.rows, bucket.num_updates, np.int32
    return Packing(
        slot=(r, i),  # -1 is padding
        token=(r, i),  # -1: the last that was sampled for the slot
        row_len=(r, i),  # context length with the first new token; 0 is padding
        row_count=(r, i),  # steps in which the row takes part
        position=(r, i),  # of the first token that is sampled
        seed=(r, i),
        temperature=(r, np.float32),
        update_slot=(u, i),
        update_index=(u, i),
        update_page=(u, i),
    )


def pack_decode(packing: Packing, plans: Sequence[RankPlan]) -> np.ndarray:
    """[ranks, packing.length] for the program of several decode steps."""
    packed = np.zeros((len(plans), packing.length), np.int32)
    for row, plan in zip(packed, plans):
        f = packing.views(row)
        for name in ("slot", "update_slot"):
            f[name].fill(-1)
        n, rows = len(plan.decode), list(zip(plan.decode, plan.counts))
        f["slot"][:n] = [r.slot for r in plan.decode]
        f["token"][:n] = [r.tokens[-1] if r.pending == count else -1 for r, count in rows]
        f["row_len"][:n] = [r.computed - count + 1 for r, count in rows]
        f["row_count"][:n] = plan.counts
        f["position"][:n] = [len(r.tokens) + r.pending - count for r, count in rows]
        f["seed"][:n] = [r.seed for r in plan.decode]
        f["temperature"][:n] = [r.spec.sampling.temperature for r in plan.decode]
        _pack_updates(f, plan)
    return packed


def _pack_updates(fields: dict[str, np.ndarray], plan: RankPlan) -> None:
    if plan.table_updates:
        m = len(plan.table_updates)
        names = ("update_slot", "update_index", "update_page")
        for name, column in zip(names, np.array(plan.table_updates, np.int32).T):
            fields[name][:m] = column


UPDATE_CHUNK = 1024
UPDATE_PACKING = Packing(
    update_slot=(UPDATE_CHUNK, np.int32),
    update_index=(UPDATE_CHUNK, np.int32),
    update_page=(UPDATE_CHUNK, np.int32),
)


def pack_overflow(plans: Sequence[RankPlan], room: int) -> list[np.ndarray]:
    """Take the page-table entries beyond `room` a rank out of the plans, in buffers of their own."""
    buffers = []
    while any(len(plan.table_updates) > room for plan in plans):
        packed = np.zeros((len(plans), UPDATE_PACKING.length), np.int32)
        for row, plan in zip(packed, plans):
            f = UPDATE_PACKING.views(row)
            f["update_slot"].fill(-1)
            if len(plan.table_updates) > room:
                now, plan.table_updates = plan.table_updates[:UPDATE_CHUNK], plan.table_updates[UPDATE_CHUNK:]
                m = len(now)
                f["update_slot"][:m], f["update_index"][:m], f["update_page"][:m] = np.array(now).T
        buffers.append(packed)
    return buffers


def sample_packing(num_samples: int, random: bool, with_filters: bool, with_logprobs: bool) -> Packing:
    n, i, f = num_samples, np.int32, np.float32
    fields: dict[str, tuple[int, type]] = dict(slot=(n, i))
    if random:
        fields |= dict(position=(n, i), seed=(n, i), temperature=(n, f))
    if with_filters:
        fields |= dict(
            top_k=(n, i), top_p=(n, f), min_p=(n, f), frequency=(n, f), presence=(n, f), repetition=(n, f),
            first_bias=(n, i), has_mask=(n, i),
        )  # fmt: skip
    if with_logprobs:
        fields |= dict(logprob_ids=(n * NUM_LOGPROB_IDS, i))
    return Packing(**fields)


def pack_sample(num_samples: int, packing: Packing, plans: Sequence[RankPlan]) -> np.ndarray:
    """[ranks, packing.length] for a sample program; rows in the order of `RankPlan.sample_rows`."""
    packed = np.zeros((len(plans), packing.length), np.int32)
    for row, plan in zip(packed, plans):
        f = packing.views(row)
        f["slot"].fill(-1)
        rows = list(plan.sample_rows())
        n = len(rows)
        if not n:
            continue
        requests = [request for request, _ in rows]
        f["slot"][:n] = [r.slot for r in requests]
        if "seed" in f:
            params = [r.spec.sampling for r in requests]
            f["position"][:n] = [len(r.tokens) + r.pending - 1 + number for r, number in rows]
            f["seed"][:n] = [r.seed for r in requests]
            f["temperature"][:n] = [s.temperature for s in params]
        if "top_k" in f:
            f["top_p"].fill(1)
            f["repetition"].fill(1)
            f["top_k"][:n] = [s.top_k for s in params]
            f["top_p"][:n] = [s.top_p for s in params]
            f["min_p"][:n] = [s.min_p for s in params]
            f["frequency"][:n] = [s.frequency_penalty for s in params]
            f["presence"][:n] = [s.presence_penalty for s in params]
            f["repetition"][:n] = [s.repetition_penalty for s in params]
            f["first_bias"][:n] = [first_bias(r, number) for r, number in rows]
            f["has_mask"][:n] = [r.has_mask for r in requests]
        if "logprob_ids" in f:
            ids = f["logprob_ids"].reshape(num_samples, NUM_LOGPROB_IDS)
            for i, request in enumerate(requests):
                wanted = request.spec.token_ids_logprob
                ids[i, : len(wanted)] = wanted
    return packed


def first_bias(request: Request, number: int) -> int:
    """Where a row's bias entries start, `number` drafts on: past stop tokens once it may stop; -1: none."""
    sampling = request.spec.sampling
    if not request.needs_bias:
        return -1
    return 0 if request.num_outputs + number <= sampling.min_new_tokens else len(sampling.stop_token_ids)


def bias_table(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, what is added to their logits), padded with -1; stop tokens first, barred."""
    ids = np.full(NUM_BIASES, -1, np.int32)
    values = np.zeros(NUM_BIASES, np.float32)
    sampling = request.spec.sampling
    entries = [(t, BARRED) for t in sampling.stop_token_ids] + list(sampling.logit_bias.items())
    for i, (token, bias) in enumerate(entries):
        ids[i], values[i] = token, bias
    return ids, values


def score_packing(bucket: Bucket) -> Packing:
    """For the logprobs of prompt tokens: what follows each token, and which ids are asked for."""
    t, c = bucket.num_tokens, bucket.chunks
    return Packing(target=(t, np.int32), chunk=(t, np.int32), ids=(c * NUM_LOGPROB_IDS, np.int32))


def pack_score(bucket: Bucket, packing: Packing, plans: Sequence[RankPlan]) -> np.ndarray:
    packed = np.zeros((len(plans), packing.length), np.int32)
    for row, plan in zip(packed, plans):
        f = packing.views(row)
        ids = f["ids"].reshape(bucket.chunks, NUM_LOGPROB_IDS)
        at = plan.first_prompt_token
        for number, chunk in enumerate(plan.chunks):
            following = chunk.request.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
            f["target"][at : at + len(following)] = following
            f["chunk"][at : at + chunk.length] = number
            wanted = chunk.request.spec.token_ids_logprob
            ids[number, : len(wanted)] = wanted
            at += chunk.length
    return packed


PREPARE_TOKENS = 1024
PREPARE_PACKING = Packing(
    slot=(1, np.int32),  # -1: nothing to do on this rank
    first=(1, np.int32),  # 1: forget what the slot counted before
    prompt=(PREPARE_TOKENS, np.int32),
    output=(PREPARE_TOKENS, np.int32),
    bias_id=(NUM_BIASES, np.int32),
    bias_value=(NUM_BIASES, np.float32),
)


def pack_prepare(num_ranks: int, request: Request) -> list[np.ndarray]:
    """Buffers that set a slot's sampling state: what its tokens were so far, and its biases."""
    prompt, output = request.tokens[: request.prompt_len], request.tokens[request.prompt_len :]
    parts = range(0, max(len(prompt), len(output), 1), PREPARE_TOKENS)
    buffers = []
    for at in parts:
        packed = np.full((num_ranks, PREPARE_PACKING.length), -1, np.int32)
        f = PREPARE_PACKING.views(packed[request.rank])
        f["slot"][0], f["first"][0] = request.slot, at == 0
        for name, tokens in (("prompt", prompt), ("output", output)):
            part = tokens[at : at + PREPARE_TOKENS]
            f[name][: len(part)] = part
        f["bias_id"][:], f["bias_value"][:] = bias_table(request)
        buffers.append(packed)
    return buffers


def mask_words(vocab_size: int) -> int:
    """Of one mask."""
    return -(-vocab_size // MASK_BITS)


def mask_packings(num_slots: int, vocab_size: int) -> dict[int, Packing]:
    """By the number of masks that go to the devices at once: a step's are padded to the next."""
    sizes, words = [1], mask_words(vocab_size)
    while sizes[-1] < num_slots:
        sizes.append(min(8 * sizes[-1], num_slots))
    return {n: Packing(slot=(n, np.int32), mask=(n * words, np.int32)) for n in sizes}
