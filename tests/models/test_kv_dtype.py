"""A KV cache in float8: tokens are those of an engine that rounds keys and values, and twice as many fit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.ops.kv_write import reference
from jaxserve.ops.kv_write.cached import cached
from tests.models.tiny import Golden, read_config

GREEDY = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
DPA = {"tp": 2, "dp_size": 2, "enable_dp_attention": True}


def tokens(served, family):
    prompts = [prompt.tolist() for prompt in Golden.read(family).prompts]
    return [list(reply["output_ids"]) for reply in served.generate(input_ids=prompts, sampling_params=GREEDY)]


def rounded(x, dtype):
    """Float8's rounding from its definition: 3 bits of mantissa, exponents from -6, at most 448."""
    exponent = jnp.maximum(jnp.frexp(x)[1] - 1, -6)
    step = jnp.ldexp(jnp.ones_like(x), exponent - 3)
    return jnp.clip(jnp.round(x / step) * step, -448, 448).astype(dtype)


@pytest.mark.parametrize(
    "family, layout", [("llama", {}), ("gemma3", {}), ("llama", DPA), ("deepseek_v3", DPA)]
)
def test_tokens_are_those_of_an_engine_that_rounds_keys_and_values(family, layout, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reference, "cached", rounded)
        rounding = engine(family, random_seed=8)  # a key of its own; greedy requests need no seed
    want = tokens(rounding, family)
    assert want != [row[:16] for row in Golden.read(family).greedy.tolist()], "rounding must show"
    served = engine(family, kv_cache_dtype="fp8_e4m3", **layout)
    assert tokens(served, family) == want
    assert tokens(served, family) == want  # from the prefix cache
    assert served.info.kv_cache_dtype == "float8_e4m3fn"


def test_values_beyond_448_are_cut_and_make_no_nan():
    x = np.array([0.0, 3.3, -0.001, 448.0, 460.0, 1e6, -1e9, 2**-9, 2**-11], np.float32)
    got = np.asarray(cached(jnp.asarray(x), jnp.float8_e4m3fn), np.float32)
    want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got, np.asarray(rounded(jnp.asarray(x), jnp.float32)))


def blueprint(family, **options):
    config = ServerConfig.from_keywords(model_path="m", **options)
    return draw_on_paper(config, {**read_config(family), "dtype": "bfloat16"})


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_twice_as_many_pages_fit(family):
    memory = 10 * 2**20
    wide, narrow = blueprint(family), blueprint(family, kv_cache_dtype="fp8_e4m3")
    assert narrow.page_bytes_of_device * 2 == wide.page_bytes_of_device
    assert narrow.num_pages(memory, 0) // 2 == wide.num_pages(memory, 0)


def test_bfloat16_cache_of_a_float32_model(engine):
    served = engine("llama", kv_cache_dtype="bfloat16")
    assert served.info.kv_cache_bytes * 2 == engine("llama").info.kv_cache_bytes
    assert len(tokens(served, "llama")[0]) == 16


def test_pool_that_the_kernels_could_not_address_is_cut():
    """Of 2**31 to 2**32 one-byte elements; smaller and larger ones are not."""
    narrow = blueprint("llama", kv_cache_dtype="fp8_e4m3")
    page = narrow.page_bytes_of_device // 2  # of one pool

    def pages(pool_bytes):
        return narrow.num_pages(int(2 * pool_bytes / narrow.mem_fraction) + 4096, 0)

    assert pages(2**31 - page) * page <= 2**31
    assert pages(3 * 2**30) == 2**31 // page
    assert pages(5 * 2**30) >= 5 * 2**30 // page
    wide = blueprint("llama")
    assert wide.num_pages(int(6 * 2**30 / wide.mem_fraction), 0) * page * 2 > 2.9 * 2**30


def test_unknown_dtype_is_refused_with_the_choices():
    with pytest.raises(
        ConfigError, match=r"kv_cache_dtype='fp8_e5m2' is not valid; use one of 'auto'.*'fp8_e4m3'"
    ):
        ServerConfig.from_keywords(model_path="m", kv_cache_dtype="fp8_e5m2")
    with pytest.raises(ConfigError, match="quantization='awq' is not valid; use one of 'fp8', 'int8'"):
        ServerConfig.from_keywords(model_path="m", quantization="awq")
