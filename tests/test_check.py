"""The preflight: it refuses what the engine refuses, and says what the engine then is."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jaxserve import check as preflight
from jaxserve.check import check, find_hf_config, lines
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.engine.blueprint import draw_on_paper
from jaxserve.weights import CheckpointError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHAPES = ROOT / "tools" / "shapes"
FAMILIES = sorted(file.parent.name for file in GOLDEN.glob("*/config.json"))


def shape(name, **options):
    return ServerConfig.from_keywords(model_path=str(SHAPES / f"{name}.json"), load_format="dummy", **options)


def test_llama_8b_on_one_h100():
    report = check(shape("llama-3.1-8b"), "h100")
    # 8,030,261,248 parameters of two bytes; 2 x 32 layers x 8 heads x 128 numbers of two bytes a token.
    assert report.cost.weight_bytes_of_device == 16_060_522_496
    assert report.cost.kv_bytes_of_token == 131_072
    pool_bytes = int(79.1 * 2**30) * 0.88 - 16_060_522_496
    assert report.num_pages == pool_bytes // (16 * 131_072)
    assert report.kv_tokens == report.num_pages * 16
    assert [b.rows for b in report.blueprint.buckets(report.num_pages) if not b.chunks] == [
        8, 16, 32, 64, 128, 256,
    ]  # fmt: skip


def test_llama_8b_in_8_bits_on_one_h100(capsys):
    options = {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}
    report = check(shape("llama-3.1-8b", **options), "h100")
    # A layer: 218,103,808 numbers of a byte, 43,008 channels with a scale of four. Beyond the layers:
    # embedding and head of 128,256 x 4,096 in two bytes, and 65 norms.
    linear = 32 * (218_103_808 + 43_008 * 4)
    assert report.cost.weight_bytes_of_device == linear + 2 * 128_256 * 4096 * 2 + 65 * 4096 * 2
    assert report.cost.kv_bytes_of_token == 65_536
    few, many = (report.cost.prefill(tokens, 128) for tokens in (8, 2048))
    assert [work.kind for work in few.works] == ["gemm", "prefill_attention", "gemm"]
    assert [work.kind for work in many.works] == ["gemm", "fp8_gemm", "prefill_attention", "gemm"]
    assert many.works[1].flops == 2 * 2048 * 32 * 218_103_808
    assert many.flops == check(shape("llama-3.1-8b"), "h100").cost.prefill(2048, 128).flops
    argv = ["--model-path", str(SHAPES / "llama-3.1-8b.json"), "--load-format", "dummy"]
    assert preflight.main([*argv, "--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3"]) == 0
    assert "bfloat16 with linear weights in fp8, KV in float8_e4m3fn: 8.03 B" in capsys.readouterr().out


def test_printed_report_names_every_part(capsys):
    argv = ["--model-path", str(SHAPES / "deepseek-v3.json"), "--load-format", "dummy", "--gpu", "h200"]
    argv += ["--tp", "8", "--dp-size", "8", "--ep", "8", "--enable-dp-attention"]
    assert preflight.main([*argv, "--enable-two-batch-overlap"]) == 0
    assert "steps run as two halves in turn" in capsys.readouterr().out
    assert preflight.main(argv) == 0
    out = capsys.readouterr().out
    assert "DeepseekV3ForCausalLM, bfloat16: 671.03 B parameters, 36.62 B multiplied with each token" in out
    assert "8 devices on 1 host: mesh dp 8 x ep 1 x tp 1, attention groups of 1" in out
    assert "256 experts in 58 layers, 8 a token; dispatch: auto" in out
    assert "70,272 bytes a token and device" in out
    assert "decode rows of a dp rank: 8 16 32 64 128 256" in out
    assert "58 all_gather over 8 devices" in out
    for part in ("weights", "KV (mem_fraction_static=0.88", "workspace, estimated", "floor ms", "MB sent"):
        assert part in out


def test_redundant_experts_take_memory_and_leave_less_for_kv():
    """An expert of DeepSeek-V3 has 3 x 7168 x 2048 numbers of one byte, and a float32 for 128 x 128 of them;
    of 32 a layer 4 are on each device, in 58 layers."""
    layout = {"tp": 8, "dp_size": 8, "ep": 8, "enable_dp_attention": True}
    plain = check(shape("deepseek-v3", **layout), "h200", int(300e9))
    report = check(
        shape("deepseek-v3", **layout, enable_eplb=True, ep_num_redundant_experts=32), "h200", int(300e9)
    )
    more_bytes = 58 * 4 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert report.cost.weight_bytes_of_device - plain.cost.weight_bytes_of_device == more_bytes
    assert report.blueprint.weight_bytes_of_device - plain.blueprint.weight_bytes_of_device == more_bytes
    assert report.cost.redundant_bytes_of_device == pytest.approx(more_bytes)
    assert plain.kv_tokens - report.kv_tokens == pytest.approx(more_bytes / 70_272 * 8, rel=1e-3)
    assert report.cost.num_params == plain.cost.num_params
    assert report.cost.active_params == pytest.approx(plain.cost.active_params)
    text = "\n".join(lines(report))
    assert "288 physical experts a layer, 36 a device: 32 redundant ones take 9.52 GiB a device" in text


def test_redundant_experts_that_do_not_divide_are_refused_with_numbers_that_do():
    config = shape("deepseek-v3", tp=8, ep=8, enable_eplb=True, ep_num_redundant_experts=30)
    message = (
        "ep_num_redundant_experts=30: 286 physical experts do not divide over 8 devices; "
        "use 2 redundant experts more or 6 fewer"
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check(config, "h200")


def test_two_halves_on_one_device_are_off_with_a_log_line(caplog):
    with caplog.at_level("INFO"):
        report = check(shape("llama-3.1-8b", enable_two_batch_overlap=True), "h100")
    assert not report.blueprint.two_batches
    assert "enable_two_batch_overlap is off: one device sends nothing" in caplog.text


def test_balancing_with_other_dp_than_ep_logs_a_hint(caplog):
    with caplog.at_level("INFO"):
        for dp in (4, 8):
            layout = {"tp": 8, "dp_size": dp, "enable_dp_attention": True, "ep": 8}
            check(shape("deepseek-v3", **layout, enable_eplb=True), "h200", int(300e9))
    hints = [r.getMessage() for r in caplog.records if r.getMessage().startswith("enable_eplb")]
    assert len(hints) == 1 and "enable_eplb with dp_size=4 and ep=8" in hints[0]


def test_recurrent_states_are_counted_beside_weights_and_kv(capsys):
    """70 layers x 64 heads x 128 x 128 float32 are 280 MiB a sequence, an eighth of it on a device."""
    report = check(shape("minimax-text-01", tp=8), "h200")
    assert report.cost.state_bytes_of_sequence == 35 * 2**20
    states = report.blueprint.state_bytes_of_device
    assert states == (32 + 32) * 35 * 2**20
    pool_bytes = int(139.8 * 2**30) * 0.88 - report.cost.weight_bytes_of_device - states
    assert report.num_pages == pool_bytes // (16 * 5_120)
    assert (
        "  2.19 GiB recurrent states: 35.00 MiB each of 32 running requests and 32 cached prefixes"
        in "\n".join(lines(report))
    )
    bare = check(shape("minimax-text-01", tp=8, disable_radix_cache=True), "h200")
    assert bare.blueprint.state_bytes_of_device == 32 * 35 * 2**20


def test_states_that_leave_no_room_are_named_with_what_lowers_them():
    with pytest.raises(
        ConfigError, match=r"and recurrent states 35.00 GiB .*, or lower max_running_requests=512"
    ):
        check(shape("minimax-text-01", tp=8, max_running_requests=512), "h200")


def test_recurrent_states_cannot_be_cut_into_two_halves_of_a_step():
    config = shape("minimax-text-01", tp=8, enable_two_batch_overlap=True)
    with pytest.raises(
        ConfigError, match="enable_two_batch_overlap: this model's recurrent states go from token"
    ):
        draw_on_paper(config, find_hf_config(config))


def test_recurrent_states_cannot_take_back_a_guess():
    with pytest.raises(
        ConfigError, match="speculative_algorithm=NGRAM: this model's recurrent state cannot take"
    ):
        check(shape("minimax-text-01", tp=8, speculative_algorithm="NGRAM"), "h200")


def test_layer_that_guesses_is_counted_only_where_it_is_used():
    plain, guessing = (
        check(shape("deepseek-v3", tp=16, nnodes=2, dist_init_addr="h:1", ep=16, **flags), "h200").blueprint
        for flags in ({}, {"speculative_algorithm": "NEXTN"})
    )
    assert guessing.page_bytes / plain.page_bytes == 62 / 61
    assert guessing.weight_bytes_of_device > plain.weight_bytes_of_device


def test_report_needs_no_gpu_and_no_weights(tmp_path):
    """A process of its own, in which no backend is ever asked for devices."""
    (tmp_path / "config.json").write_text((GOLDEN / "qwen3" / "config.json").read_text())
    code = (
        "import sys\n"
        "from jaxserve.check import main\n"
        f"status = main(['--model-path', {str(tmp_path)!r}, '--tp', '2'])\n"
        "from jax._src import xla_bridge\n"
        "sys.exit('a backend was started' if xla_bridge.backends_are_initialized() else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Qwen3ForCausalLM" in done.stdout


LAYOUTS = [{}, {"tp": 2}, {"tp": 4, "dp_size": 2, "enable_dp_attention": True}]


@pytest.mark.parametrize("options", LAYOUTS, ids=["tp1", "tp2", "tp4-dpa2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_on_every_layout(family, options):
    config = ServerConfig.from_keywords(model_path=str(GOLDEN / family), device="cpu", **options)
    report = check(config)
    layout = report.blueprint.layout
    assert report.cost.weight_bytes_of_device == report.blueprint.weight_bytes_of_device
    assert report.cost.weight_bytes_of_device >= report.cost.weight_bytes / layout.num_devices
    assert 0 < report.cost.active_params <= report.cost.num_params
    for step in (report.cost.decode(2, 64), report.cost.prefill(32, 64)):
        assert step.flops > 0 and step.num_bytes > 0
        assert (step.collective_bytes > 0) == (layout.num_devices > 1)
    assert any(family in line or "parameters" in line for line in lines(report))


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("deepseek_v3", {"tp": 4, "dp_size": 2, "ep": 4, "enable_dp_attention": True}),
        ("minimax_text", {"tp": 4, "dp_size": 2, "enable_dp_attention": True}),
    ],
    ids=["llama", "deepseek-dpa2-ep4", "minimax-tp4-dpa2"],
)
def test_engine_becomes_what_the_report_says(engine, family, options):
    """Held against the engine's own account, and its arrays' shards."""
    made = engine(family, **options)
    runner = made._engine.runner
    config = ServerConfig.from_keywords(
        model_path=str(GOLDEN / family), device="cpu", dtype="float32", max_running_requests=4,
        chunked_prefill_size=32, max_total_tokens=1024, **options,
    )  # fmt: skip
    report = check(config)
    info = made.info
    assert report.kv_tokens == info.max_total_num_tokens
    assert report.blueprint.max_req_len(report.num_pages) == info.max_req_len
    assert report.blueprint.num_slots * report.blueprint.layout.dp == info.max_running_requests
    assert report.cost.weight_bytes == info.weight_bytes
    assert sorted(report.blueprint.buckets(report.num_pages), key=str) == sorted(runner.buckets, key=str)
    device = runner._leaves[0].sharding.mesh.devices.flat[0]
    on_device = [
        s.data.nbytes for leaf in runner._leaves for s in leaf.addressable_shards if s.device == device
    ]
    assert report.cost.weight_bytes_of_device == sum(on_device)
    pools = (runner._key_pages, runner._value_pages)
    kept = [s.data.nbytes for pool in pools for s in pool.addressable_shards if s.device == device]
    assert report.kv_bytes_of_device == sum(kept)
    states = [s.data.nbytes for pool in runner._states for s in pool.addressable_shards if s.device == device]
    assert report.blueprint.state_bytes_of_device == sum(states)


def test_cpu_has_sample_programs_for_two_numbers_of_rows_at_most():
    """Each number takes four programs; 32 slots and 4 chunks of a prompt give up to 36 tokens a step."""
    for slots, want in ((1, {2}), (8, {12}), (12, {16}), (13, {8, 17}), (32, {8, 36})):
        config = ServerConfig.from_keywords(model_path=str(GOLDEN / "llama"), max_running_requests=slots)
        blueprint = draw_on_paper(config, find_hf_config(config), on_cpu=True)
        assert {bucket.num_samples for bucket in blueprint.buckets(num_pages=64)} == want


REFUSED = {
    "heads": ("llama", {"tp": 3}, "attention heads do not divide over 3 devices"),
    "ep_dense": ("llama", {"tp": 2, "ep": 2}, "ep=2: this model has no experts; use ep 1"),
    "ep_dp": ("mixtral", {"tp": 8, "dp_size": 4, "ep": 2, "enable_dp_attention": True}, "not a multiple of"),
    "context": ("llama", {"context_length": 100000}, "context_length=100000 exceeds the model's"),
    "room": ("llama", {"max_total_tokens": 10**10}, "lower max_total_tokens"),
    "small": ("llama", {"mem_fraction_static": 1e-9}, "leave no page of KV"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusal_is_word_for_word_the_engines(case, compile_cache):
    import jaxserve

    family, options, expected = case
    options = {"device": "cpu", "compile_cache_dir": compile_cache, **options}
    # Tests have 8 virtual devices, which share the host's memory; a server makes as many as it needs.
    memory = psutil.virtual_memory().total // 8
    with pytest.raises(ConfigError) as of_check:
        check(ServerConfig.from_keywords(model_path=str(GOLDEN / family), **options), None, memory)
    with pytest.raises(ConfigError) as of_engine:
        jaxserve.Engine(model_path=str(GOLDEN / family), skip_tokenizer_init=True, **options)
    assert expected in str(of_check.value)
    assert str(of_check.value) == str(of_engine.value)


def test_refusal_ends_with_status_2_on_standard_error(capsys):
    argv = ["--model-path", str(SHAPES / "deepseek-v3.json"), "--load-format", "dummy", "--tp", "8"]
    assert preflight.main([*argv, "--gpu", "h100"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "jaxserve: weights take 79.41 GiB a device and leave no page of KV in the 69.61"
    )


def test_smaller_memory_leaves_fewer_tokens():
    whole = check(shape("llama-3.1-8b"), "h100", 80 * 10**9)
    half = check(shape("llama-3.1-8b"), "h100", 40 * 10**9)
    assert whole.kv_bytes_of_device - half.kv_bytes_of_device == pytest.approx(0.88 * 40e9, rel=1e-4)


def test_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="gpu='h300' is unknown; use one of a100, h100, h200, b200, l40s"):
        check(shape("llama-3.1-8b"), "h300")


@pytest.mark.parametrize("memory", ["0", "-4"])
def test_memory_must_be_positive(memory, capsys):
    argv = ["--model-path", str(SHAPES / "llama-3.1-8b.json"), "--load-format", "dummy"]
    assert preflight.main([*argv, "--device-memory-gb", memory]) == 2
    assert "must be a positive number" in capsys.readouterr().err


def test_native_data_parallelism_is_reported_as_replicas():
    report = check(shape("llama-3.1-70b", tp=4, dp_size=2), "h100")
    assert (report.num_replicas, report.blueprint.layout.num_devices) == (2, 4)
    assert any("2 full replicas" in line for line in lines(report))


def test_hub_model_is_read_from_the_cache_and_never_fetched(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = ServerConfig.from_keywords(model_path="owner/model")
    with pytest.raises(CheckpointError, match=r"owner/model: its config.json is not in the hub cache"):
        find_hf_config(config)
    commit = "0" * 40
    folder = tmp_path / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    assert find_hf_config(config) == {"architectures": ["X"]}


def test_path_that_is_nothing_is_refused_as_the_engine_does(tmp_path):
    config = ServerConfig.from_keywords(model_path=str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        find_hf_config(config)


def test_help_lists_the_servers_flags_too(capsys):
    assert preflight.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--gpu" in out and "--mem-fraction-static" in out
