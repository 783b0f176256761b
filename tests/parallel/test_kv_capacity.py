"""KV capacity, measured from the shards of the pools themselves."""

import pytest

from tests.models.tiny import read_config

PAGE_SIZE = 16


def bytes_of_a_token_on_a_device(engine):
    """KV bytes that one device holds for one token of its rank, over all layers."""
    runner = engine._engine.runner
    shard_bytes = sum(
        pool.addressable_shards[0].data.nbytes for pool in (runner._key_pages, runner._value_pages)
    )
    return shard_bytes / (runner.sizes.num_pages * PAGE_SIZE)


def tokens_in_all_shards(engine):
    """Distinct tokens that the instance keeps, from what lies on its devices."""
    runner = engine._engine.runner
    latents = runner._key_pages
    distinct = {shard.index[0].start or 0: shard.data.shape[0] for shard in latents.addressable_shards}
    layers = read_config("deepseek_v3")["num_hidden_layers"]
    return sum(distinct.values()) // layers * PAGE_SIZE


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_mla_keeps_dp_times_the_tokens_of_plain_tensor_parallelism_in_the_same_memory(engine, dp):
    plain = engine("deepseek_v3", tp=8)
    split = engine("deepseek_v3", tp=8, dp_size=dp, enable_dp_attention=True)
    assert bytes_of_a_token_on_a_device(split) == bytes_of_a_token_on_a_device(plain)
    assert tokens_in_all_shards(split) == dp * tokens_in_all_shards(plain)
    assert split.info.max_total_num_tokens == dp * plain.info.max_total_num_tokens
    assert tokens_in_all_shards(split) == split.info.max_total_num_tokens


def test_a_token_of_mla_costs_its_latent_and_rope_part_and_nothing_else(engine):
    config = read_config("deepseek_v3")
    numbers = config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    assert bytes_of_a_token_on_a_device(engine("deepseek_v3")) == numbers * 4
