"""ServerConfig: one declaration behind flags, keywords and YAML, and what each mistake is told."""

import dataclasses
import json

import pytest

from jaxserve import foreign_flags
from jaxserve.config import ConfigError, ServerConfig

M = ("--model-path", "m")


def parse(*argv: str) -> ServerConfig:
    return ServerConfig.from_command_line(argv)


def config(**values) -> ServerConfig:
    return ServerConfig.from_keywords(**{"model_path": "m", **values})


def yaml_file(tmp_path, text: str) -> str:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    return str(file)


# ---- where values come from ----


def test_defaults_are_those_of_the_engine_users_come_from():
    got = parse(*M)
    assert (got.host, got.port, got.tp, got.dp_size, got.ep, got.page_size) == ("0.0.0.0", 30000, 1, 1, 1, 16)
    assert (got.enable_dp_attention, got.disable_radix_cache, got.stream_interval) == (False, False, 1)
    assert (got.dtype, got.load_format, got.device, got.api_key) == ("auto", "auto", "auto", None)


def test_flags_keywords_and_yaml_mean_the_same(tmp_path):
    file = yaml_file(tmp_path, "model-path: m\ntp_size: 4\ndp: 2\nenable-dp-attention: true\nport: 8000\n")
    flags = parse(*M, "--tp-size", "4", "--dp", "2", "--enable-dp-attention", "--port", "8000")
    assert flags == config(tp=4, data_parallel_size=2, enable_dp_attention=True, port=8000)
    assert flags == parse("--config", file)


def test_flags_win_over_yaml_under_any_alias(tmp_path):
    file = yaml_file(
        tmp_path, "model: from-yaml\ntensor_parallel_size: 4\npage_size: 32\nskip_tokenizer_init: true\n"
    )
    got = parse("--config", file, "--tp", "2", "--model-path", "from-flag", "--no-skip-tokenizer-init")
    assert (got.model_path, got.tp, got.page_size, got.skip_tokenizer_init) == ("from-flag", 2, 32, False)


def test_empty_yaml_changes_nothing(tmp_path):
    assert parse("--config", yaml_file(tmp_path, ""), *M) == parse(*M)


@pytest.mark.parametrize(
    "alias, name, value",
    [
        ("model", "model_path", "x"),
        ("tp_size", "tp", 2),
        ("tensor_parallel_size", "tp", 2),
        ("dp", "dp_size", 2),
        ("data_parallel_size", "dp_size", 2),
        ("ep_size", "ep", 1),
        ("expert_parallel_size", "ep", 1),
    ],
)
def test_alias_is_taken_as_keyword_and_as_flag(alias, name, value):
    base = {} if name == "model_path" else {"model_path": "m"}
    assert getattr(ServerConfig.from_keywords(**base, **{alias: value}), name) == value
    assert getattr(parse(*M, f"--{alias.replace('_', '-')}", str(value)), name) == value


@pytest.mark.parametrize("given, taken", [("half", "float16"), ("float", "float32"), ("float16", "float16")])
def test_value_has_other_names(tmp_path, given, taken):
    file = yaml_file(tmp_path, f"model-path: m\ndtype: {given}\n")
    for got in (parse(*M, "--dtype", given), parse("--config", file), config(dtype=given)):
        assert got.dtype == taken


def test_list_is_taken_from_flags_yaml_and_keywords(tmp_path):
    file = yaml_file(
        tmp_path, "model-path: m\ncors-allowed-origins: [https://a.example, https://b.example]\n"
    )
    origins = ["https://a.example", "https://b.example"]
    got = parse(*M, "--cors-allowed-origins", *origins)
    assert got == parse("--config", file) == config(cors_allowed_origins=origins)
    assert got.cors_allowed_origins == tuple(origins) and config().cors_allowed_origins == ()
    assert ServerConfig.from_keywords(**json.loads(json.dumps(got.to_dict()))) == got


def test_every_key_has_a_flag_with_help_and_survives_the_way_through_flags():
    """The launcher hands the configuration to the engine's process as JSON of plain values."""
    text = ServerConfig.parser().format_help()
    for field in dataclasses.fields(ServerConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"]
    got = parse(*M, "--tp", "8", "--dp-size", "4", "--enable-dp-attention", "--mem-fraction-static", "0.5")
    assert ServerConfig.from_keywords(**got.to_dict()) == got


def test_dp_size_counts_as_attention_groups_only_with_the_flag():
    assert config(tp=4, dp_size=2).attention_dp == 1
    assert config(tp=4, dp_size=2, enable_dp_attention=True).attention_dp == 2
    assert config(tp=4, dp_size=1, enable_dp_attention=True).attention_dp == 1


# ---- what is refused, and how ----


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"model_path": ""},
            "model_path is missing; name a directory, a hub id, a GGUF file or a converted checkpoint",
        ),
        (
            {"dtype": "int8"},
            "dtype='int8' is not valid; use one of 'auto', 'bfloat16', 'float16', 'float32'",
        ),
        (
            {"cors_allowed_origins": "https://a.example"},
            "cors_allowed_origins='https://a.example' must be a list of str",
        ),
        ({"cors_allowed_origins": [1]}, "cors_allowed_origins=1 must be of type str, got int"),
        (
            {"load_format": "pickle"},
            "load_format='pickle' is not valid; use one of 'auto', 'safetensors', 'gguf', 'orbax', 'dummy'",
        ),
        ({"device": "tpu"}, "device='tpu' is not valid; use one of 'auto', 'cpu', 'cuda'"),
        ({"port": "80"}, "port='80' must be of type int, got str"),
        ({"port": True}, "port=True must be of type int, got bool"),
        ({"tp": 1.5}, "tp=1.5 must be of type int, got float"),
        ({"tp": None}, "tp=None must be of type int, got NoneType"),
        ({"disable_radix_cache": 1}, "disable_radix_cache=1 must be of type bool, got int"),
        ({"mem_fraction_static": "0.5"}, "mem_fraction_static='0.5' must be of type float, got str"),
        ({"port": -1}, "port=-1 is too small; 0 is the least"),
        ({"port": 65536}, "port=65536 must be 65535 or less"),
        ({"tp": 0}, "tp=0 is too small; 1 is the least"),
        ({"ep_num_redundant_experts": -1}, "ep_num_redundant_experts=-1 is too small; 0 is the least"),
        (
            {"eplb_rebalance_num_iterations": 0},
            "eplb_rebalance_num_iterations=0 is too small; 1 is the least",
        ),
        (
            {"eplb_rebalance_layers_per_chunk": 0},
            "eplb_rebalance_layers_per_chunk=0 is too small; 1 is the least",
        ),
        (
            {"tp": 2, "enable_eplb": True},
            "enable_eplb needs ep > 1; with ep=1 every device has a share of all experts: loads are even",
        ),
        (
            {"tp": 2, "ep": 2, "ep_num_redundant_experts": 2},
            "ep_num_redundant_experts=2 needs enable_eplb, which decides whom the extra slots go to",
        ),
        ({"context_length": 1}, "context_length=1 is too small; 2 is the least"),
        ({"chunked_prefill_size": 8}, "chunked_prefill_size=8 is too small; 16 is the least"),
        (
            {"shutdown_grace_period_secs": -0.5},
            "shutdown_grace_period_secs=-0.5 is too small; 0 is the least",
        ),
        ({"mem_fraction_static": 1.0}, "mem_fraction_static=1.0 must lie between 0 and 1"),
        ({"mem_fraction_static": 0}, "mem_fraction_static=0 must lie between 0 and 1"),
        ({"page_size": 24}, "page_size=24 must be a power of two, such as 16 or 64"),
        ({"node_rank": 1}, "node_rank=1 must lie in 0..0 (nnodes=1)"),
        (
            {"nnodes": 2, "tp": 2},
            "dist_init_addr is missing; with nnodes > 1 name host 0 as host:port",
        ),
        (
            {"tp": 8, "dp_size": 3, "enable_dp_attention": True},
            "Constraint tp_size % dp_size == 0 not satisfied: tp=8, dp_size=3; use dp_size 1, 2, 4, 8",
        ),
        ({"tp": 4, "ep": 3}, "ep=3 does not divide tp=4; use ep 1, 2, 4"),
        ({"tp": 2, "tp_size": 4}, "tp is given twice (once as 'tp_size')"),
        (
            {"speculative_algorithm": "EAGLE3"},
            "speculative_algorithm='EAGLE3' is not valid; use one of 'NGRAM', 'NEXTN', 'EAGLE'",
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "other"},
            "speculative_draft_model_path=other: a draft model of its own is not served; EAGLE reads the "
            "layer in model_path; leave it out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 4},
            "speculative_eagle_topk=4 is not served: drafts are a chain, not a tree; use 1",
        ),
        (
            {
                "speculative_algorithm": "NEXTN",
                "speculative_num_steps": 3,
                "speculative_num_draft_tokens": 8,
            },
            "speculative_num_draft_tokens=8 must be speculative_num_steps + 1 = 4: the last token and a "
            "guess a step",
        ),
        (
            {"speculative_algorithm": "NGRAM", "num_continuous_decode_steps": 4},
            "num_continuous_decode_steps=4 does not go with speculative_algorithm=NGRAM: guesses are checked "
            "step by step; leave one of them out",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_num_steps": 3},
            "speculative_num_steps=3 does not go with speculative_algorithm=NGRAM; leave it out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "speculative_ngram_min_match_window_size": 3},
            "speculative_ngram_min_match_window_size=3 does not go with speculative_algorithm=NEXTN; "
            "leave it out",
        ),
        (
            {"speculative_algorithm": "NEXTN", "tp": 2, "ep": 2, "enable_eplb": True},
            "enable_eplb does not go with speculative_algorithm=NEXTN, whose layer's experts stay where they "
            "are; leave one of them out",
        ),
        (
            {"speculative_num_draft_tokens": 4},
            "speculative_num_draft_tokens=4 needs speculative_algorithm; use 'NGRAM' or 'NEXTN'",
        ),
        (
            {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 1},
            "speculative_num_draft_tokens=1 is too small; 2 is the least",
        ),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_ngram_min_match_window_size": 5,
                "speculative_ngram_max_match_window_size": 4,
            },
            "speculative_ngram_min_match_window_size=5 exceeds speculative_ngram_max_match_window_size=4",
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_mistake_is_told_with_key_value_and_what_is_valid(values, message):
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert str(error.value) == message


def test_unknown_key_is_told_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        config(tensor_parallel=2)
    assert str(error.value).startswith(
        "unknown key 'tensor_parallel'; known keys: model_path, tokenizer_path, "
    )
    assert all(field.name in str(error.value) for field in dataclasses.fields(ServerConfig))


@pytest.mark.parametrize("dp_size", [3, 5, 6])
def test_dp_size_that_does_not_divide_tp_ends_with_the_sentence_of_the_guide(dp_size, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*M, "--tp", "8", "--dp-size", str(dp_size), "--enable-dp-attention")
    assert end.value.code == 2
    assert "Constraint tp_size % dp_size == 0 not satisfied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "model_path is missing"),
        ((*M, "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        ((*M, "--port", "many"), "argument --port: invalid int value: 'many'"),
        ((*M, "--no-such-flag"), "unrecognized arguments: --no-such-flag"),
        ((*M, "--enable-dp"), "unrecognized arguments: --enable-dp"),  # abbreviations would break later
        ((*M, "--page-size", "3"), "page_size=3 must be a power of two"),
    ],
)
def test_flag_error_ends_with_status_2_and_says_why(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b\n", "expected keys and values, got list"),
        ("just words", "expected keys and values, got str"),
        ("a: [1", "not YAML"),
        ("no_such_key: 1", "unknown key 'no_such_key'; known keys: model_path"),
        ("tp: four", "tp='four' must be of type int, got str"),
        ("tp: 2\ntp_size: 2", "tp is given twice (once as 'tp_size')"),
        ("port: 8000.0", "port=8000.0 must be of type int, got float"),
    ],
)
def test_bad_yaml_ends_with_status_2_and_says_why(tmp_path, text, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", yaml_file(tmp_path, text), *M)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_yaml_file_ends_with_status_2_and_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", str(tmp_path / "none.yaml"), *M)
    assert end.value.code == 2
    assert f"config={tmp_path}/none.yaml: No such file or directory" in capsys.readouterr().err


# ---- the commands of the guide that users come with ----

V3 = ("--model-path", "deepseek-ai/DeepSeek-V3")
LLAMA = ("--model-path", "meta-llama/Meta-Llama-3.1-70B-Instruct")
NODE = (
    *V3, "--tp", "16", "--dp-size", "8", "--ep", "16", "--enable-dp-attention", "--nnodes", "2",
    "--dist-init-addr", "<MASTER_NODE_IP>:29500", "--moe-a2a-backend", "deepep",
    "--mem-fraction-static", "0.8",
)  # fmt: skip
DEEPEP = ("--moe-a2a-backend", "deepep", "--moe-runner-backend", "deep_gemm")
GUIDE = [
    (
        "basic attention data parallelism",
        (*V3, "--tp", "8", "--dp-size", "8", "--enable-dp-attention"),
        {"tp": 8, "dp_size": 8, "enable_dp_attention": True},
    ),
    (
        "with expert parallelism",
        (*V3, "--tp", "8", "--dp-size", "8", "--ep", "8", "--enable-dp-attention", *DEEPEP),
        {"tp": 8, "dp_size": 8, "ep": 8, "moe_a2a_backend": "deepep", "moe_runner_backend": "deep_gemm"},
    ),
    (
        "node 0 of two",
        (*NODE, "--node-rank", "0"),
        {"tp": 16, "nnodes": 2, "node_rank": 0, "dist_init_addr": "<MASTER_NODE_IP>:29500"},
    ),
    ("node 1 of two", (*NODE, "--node-rank", "1"), {"node_rank": 1, "ep": 16, "mem_fraction_static": 0.8}),
    ("a worker of the gateway", (*LLAMA, "--tp", "4", "--port", "8000"), {"tp": 4, "port": 8000}),
    ("worker 1 without it", (*V3, "--tp", "8", "--port", "8000"), {"tp": 8, "attention_dp": 1}),
    ("worker 2 without it", (*V3, "--tp", "8", "--port", "8001"), {"port": 8001}),
    (
        "a valid divisor",
        (*V3, "--tp", "8", "--dp-size", "4", "--enable-dp-attention"),
        {"dp_size": 4, "attention_dp": 4},
    ),
    # The co-launcher takes these for each engine that it starts.
    (
        "two replicas of four",
        (*LLAMA, "--tp", "4", "--dp-size", "2", "--host", "0.0.0.0", "--port", "30000"),
        {"tp": 4, "dp_size": 2, "attention_dp": 1},
    ),
    (
        "production, apart from the router's own flags",
        (
            *V3, "--tp", "8", "--dp-size", "8", "--ep", "8", "--enable-dp-attention",
            "--moe-a2a-backend", "deepep", "--enable-two-batch-overlap", "--enable-eplb",
        ),
        {"enable_two_batch_overlap": True, "enable_eplb": True},
    ),
]  # fmt: skip


def test_foreign_flag_that_asks_for_what_is_had_is_taken_with_a_log_line(tmp_path, caplog):
    """As a flag with or without a value, in YAML and as a keyword."""
    plain = parse("--model-path", "m", "--tp", "2")
    file = tmp_path / "server.yaml"
    file.write_text("model-path: m\ntp: 2\ntrust-remote-code: true\n")
    foreign = ("--trust-remote-code", "--attention-backend", "fa3", "--cuda-graph-bs", "1", "2")
    for config in (
        parse("--model-path", "m", *foreign, "--tp", "2"),
        parse("--config", str(file)),
        ServerConfig.from_keywords(model_path="m", tp=2, trust_remote_code=True),
    ):
        assert config == plain
    line = "trust_remote_code changes nothing here: no code of a checkpoint is run"
    assert [message for message in caplog.messages if message == line] == [line] * 3


def test_foreign_flag_that_asks_for_more_is_refused_with_the_way_out(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--model-path", "m", "--enable-trace")
    assert end.value.code == 2
    assert "error: enable_trace is not supported: the gateway writes traces" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="lora_paths is not supported: LoRA is not served yet"):
        ServerConfig.from_keywords(model_path="m", lora_paths=["x"])


@pytest.mark.parametrize(
    "flags",
    [
        "--enable-auto-tool-choice --nccl-port 5000 --enable-p2p-check --tokenizer-mode auto",
        "--decode-log-interval 40 --log-requests-level 2 --show-time-cost --tokenizer-worker-num 4",
        "--disable-cuda-graph-padding --torch-compile-max-bs 32 --disable-shared-experts-fusion",
        "--triton-attention-num-kv-splits 8",
    ],
)
def test_flags_of_other_servers_that_change_nothing_are_taken(flags):
    assert parse(*M, *flags.split(), "--tp", "2") == parse(*M, "--tp", "2")


@pytest.mark.parametrize(
    "flag, cure",
    [
        ("--max-model-len=8", "--context-length"),
        ("--gpu-memory-utilization=0.9", "--mem-fraction-static"),
        ("--download-dir=x", "HF_HOME"),
        ("--json-model-override-args={}", "config.json"),
        ("--preferred-sampling-params={}", "generation_config.json"),
        ("--ssl-keyfile=x", "--tls-cert-path"),
        ("--ssl-certfile=x", "--tls-cert-path"),
        ("--weight-version=x", "--served-model-name"),
        ("--allow-auto-truncate", "shorten"),
        ("--is-embedding", "not served"),
    ],
)
def test_flags_of_other_servers_that_ask_for_more_name_the_cure(flag, cure, capsys):
    with pytest.raises(SystemExit):
        parse(*M, flag)
    _, refused, told = capsys.readouterr().err.rpartition("is not supported: ")
    assert refused and cure in told


def test_foreign_flags_are_none_of_ours():
    ours = {name for f in dataclasses.fields(ServerConfig) for name in (f.name, *f.metadata["aliases"])}
    assert not ours & {*foreign_flags.WITHOUT_EFFECT, *foreign_flags.REFUSED}
    assert not foreign_flags.WITHOUT_EFFECT.keys() & foreign_flags.REFUSED.keys()


@pytest.mark.parametrize("argv, values", [row[1:] for row in GUIDE], ids=[row[0] for row in GUIDE])
def test_command_of_the_guide_parses_to_what_it_says(argv, values):
    got = parse(*argv)
    assert {name: getattr(got, name) for name in values} == values
