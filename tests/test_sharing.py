"""Engines of one process share the programs that are the same, and no others."""

import pytest

from jaxserve.ops.kv_write import reference


def programs(served):
    return {key: id(program) for key, program in served._engine.runner._programs.items()}


def test_engine_without_a_cache_has_the_programs_of_one_with_it(engine):
    assert programs(engine("qwen2", disable_radix_cache=True)) == programs(engine("qwen2"))


def test_another_family_shares_what_makes_no_use_of_its_blocks(engine):
    one, other = programs(engine("qwen2")), programs(engine("qwen3"))
    forward = {key for key in one if hasattr(key, "num_tokens")}
    assert len(forward) == 2 and one.keys() == other.keys()
    assert {key for key in one if one[key] != other[key]} == forward


@pytest.mark.parametrize(
    "options", [{"max_total_tokens": 512}, {"page_size": 4}, {"tp": 2}, {"dtype": "bfloat16"}]
)
def test_other_arrays_make_other_steps(engine, options):
    one, other = programs(engine("qwen2")), programs(engine("qwen2", **options))
    assert not {one[key] for key in one if hasattr(key, "num_tokens")} & set(other.values())


@pytest.mark.parametrize("family, options", [("qwen2", {"tp": 2}), ("gemma3", {})], ids=["cut", "tied"])
def test_another_head_is_not_shared(engine, family, options):
    one, other = programs(engine("qwen2")), programs(engine(family, **options))
    heads = {key for key in one if isinstance(key, tuple)}
    assert heads and not any(one[key] == other[key] for key in heads)


def test_engine_apart_is_traced_with_what_is_patched(engine, monkeypatch):
    seen, cached = [], reference.cached

    def noted(x, dtype):
        seen.append(x.shape)
        return cached(x, dtype)

    engine("qwen2")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "cached", noted)
        patched = engine("qwen2", apart="writes are counted")
    assert seen
    assert not set(programs(patched).values()) & set(programs(engine("qwen2")).values())
