"""Every engine command of SGLang's data-parallelism guide, module names changed: parsed, laid out on the
devices it is meant for, and, where 8 virtual devices suffice, launched with a tiny model.

The gateway's commands are in tests/router/test_router_guide.py; here are the engines that they start.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxserve.check import check
from jaxserve.config import ServerConfig
from router.launch_server import make_parser, make_plan
from tests.models.tiny import Golden

SHAPES = Path(__file__).parents[1] / "tools" / "shapes"
DEEPSEEK, LLAMA = "deepseek-ai/DeepSeek-V3", "meta-llama/Meta-Llama-3.1-70B-Instruct"
MODELS = {DEEPSEEK: ("deepseek-v3", "h200", "deepseek_v3"), LLAMA: ("llama-3.1-70b", "h100", "llama")}
DPA8 = f"--model-path {DEEPSEEK} --tp 8 --dp-size 8 --enable-dp-attention"
DPA8_EP8 = (
    f"--model-path {DEEPSEEK} --tp 8 --dp-size 8 --ep 8 --enable-dp-attention --moe-a2a-backend deepep "
    "--moe-runner-backend deep_gemm"
)
PRODUCTION = (
    f"--model-path {DEEPSEEK} --tp 8 --dp-size 8 --ep 8 --enable-dp-attention --moe-a2a-backend deepep "
    "--enable-two-batch-overlap --enable-eplb"
)
TWO_NODES = (
    f"--model-path {DEEPSEEK} --tp 16 --dp-size 8 --ep 16 --enable-dp-attention --nnodes 2 --node-rank {{}} "
    "--dist-init-addr 10.0.0.1:29500 --moe-a2a-backend deepep --mem-fraction-static 0.8"
)


@dataclass(frozen=True)
class Command:
    """One command, and what it means.

    Attributes:
        mesh: (dp, ep, tp).
        backend: how tokens reach experts; None for a dense model.
    """

    section: str
    flags: str
    mesh: tuple[int, int, int]
    backend: str | None
    keys: dict = field(default_factory=dict)  # further keys that its flags set


LAUNCHED = [
    Command("Basic DPA setup", DPA8, (8, 1, 1), "none"),
    Command("DPA + EP", DPA8_EP8, (8, 1, 1), "all_to_all", {"moe_runner_backend": "deep_gemm"}),
    Command("DP + EP + TP, recommended", DPA8_EP8, (8, 1, 1), "all_to_all"),
    Command("Multi-Node DPA, node 0", TWO_NODES.format(0), (8, 2, 1), "all_to_all",
            {"nnodes": 2, "node_rank": 0, "mem_fraction_static": 0.8}),
    Command("Multi-Node DPA, node 1", TWO_NODES.format(1), (8, 2, 1), "all_to_all",
            {"nnodes": 2, "node_rank": 1, "dist_init_addr": "10.0.0.1:29500"}),
    Command("Separate Launch, nodes 1 and 2", f"--model-path {LLAMA} --tp 4 --port 8000", (1, 1, 4), None,
            {"port": 8000}),
    Command("Standard DP for MLA, worker 1", f"--model-path {DEEPSEEK} --tp 8 --port 8000", (1, 1, 8), "none",
            {"port": 8000}),
    Command("Standard DP for MLA, worker 2", f"--model-path {DEEPSEEK} --tp 8 --port 8001", (1, 1, 8), "none",
            {"port": 8001}),
    Command("DPA Not Activating", DPA8, (8, 1, 1), "none"),
    Command("TP/DP Size Constraint", f"--model-path {DEEPSEEK} --tp 8 --dp-size 4 --enable-dp-attention",
            (4, 1, 2), "none"),
    Command("Production, the engine", PRODUCTION, (8, 1, 1), "all_to_all",
            {"enable_two_batch_overlap": True, "enable_eplb": True, "ep_num_redundant_experts": 0}),
]  # fmt: skip
# What `router.launch_server` is given, without its own --router-... flags; engines, and each one's mesh.
CO_LAUNCHED = [
    (f"--model-path {LLAMA} --tp 4 --dp-size 2 --host 0.0.0.0 --port 30000", 2, (1, 1, 4)),
    (f"--model-path {LLAMA} --tp 4 --dp-size 4 --host 0.0.0.0 --port 30000", 4, (1, 1, 4)),
    (f"--model-path {LLAMA} --tp 4 --dp-size 2", 2, (1, 1, 4)),
]


def parse(flags):
    return ServerConfig.from_command_line(shlex.split(flags))


def on_paper(flags):
    """The report for the real model's shape on the devices it is meant for."""
    config = parse(flags)
    shape, gpu, _ = MODELS[config.model_path]
    words = shlex.split(flags)
    words[words.index("--model-path") + 1] = str(SHAPES / f"{shape}.json")
    config = ServerConfig.from_command_line([*words, "--load-format", "dummy"])
    return check(config, "h100" if config.nnodes > 1 else gpu)


def by_section(command):
    return command.section.replace(" ", "-")


@pytest.mark.parametrize("command", LAUNCHED, ids=by_section)
def test_command_means_this_layout(command):
    config = parse(command.flags)
    for name, value in command.keys.items():
        assert getattr(config, name) == value
    report = on_paper(command.flags)
    assert report.num_replicas == 1
    assert report.blueprint.layout.shape == command.mesh
    assert report.blueprint.expert_backend == command.backend or command.backend is None
    assert report.kv_tokens > 100_000


@pytest.mark.parametrize("command", [c for c in LAUNCHED if "--nnodes" not in c.flags], ids=by_section)
def test_command_serves_a_tiny_model_with_the_recorded_tokens(command, engine):
    """Those of two nodes need 16 devices: tests/multihost starts such processes."""
    config = parse(command.flags)
    _, _, family = MODELS[config.model_path]
    default = ServerConfig.from_keywords(model_path=config.model_path).to_dict()
    given = {name: value for name, value in config.to_dict().items() if value != default[name]}
    given.pop("port", None)
    served = engine(family, **given)
    assert (served.info.num_devices, served.info.dp_size) == (config.tp, config.attention_dp)
    golden = Golden.read(family)
    replies = served.generate(
        input_ids=[prompt.tolist() for prompt in golden.prompts],
        sampling_params={"temperature": 0, "max_new_tokens": golden.greedy.shape[1], "ignore_eos": True},
    )
    assert [list(reply["output_ids"]) for reply in replies] == golden.greedy.tolist()


@pytest.mark.parametrize("flags, count, mesh", CO_LAUNCHED)
def test_co_launched_engines_are_valid_servers_on_devices_of_their_own(flags, count, mesh):
    replicas = make_plan(make_parser(), shlex.split(flags)).replicas
    configs = [ServerConfig.from_command_line(replica.command[3:]) for replica in replicas]
    assert len(configs) == count
    assert [c.base_gpu_id for c in configs] == [i * configs[0].tp for i in range(count)]
    for config, replica in zip(configs, replicas):
        assert (config.host, config.port) == ("127.0.0.1", replica.port)
        assert on_paper(shlex.join(replica.command[3:])).blueprint.layout.shape == mesh


def test_co_launched_production_engine_has_the_flags_of_the_guide():
    (replica,) = make_plan(make_parser(), shlex.split(PRODUCTION)).replicas
    config = ServerConfig.from_command_line(replica.command[3:])
    assert (config.enable_two_batch_overlap, config.enable_eplb) == (True, True)
    assert on_paper(shlex.join(replica.command[3:])).blueprint.two_batches


@pytest.mark.parametrize("dp", [3, 5, 6])
def test_sizes_that_the_guide_calls_invalid_are_refused_in_its_words(dp, capsys):
    flags = f"--model-path {DEEPSEEK} --tp 8 --dp-size {dp} --enable-dp-attention"
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert (
        f"Constraint tp_size % dp_size == 0 not satisfied: tp=8, dp_size={dp}; use dp_size 1, 2, 4, 8"
        in error
    )


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_sizes_that_the_guide_calls_valid_are(dp):
    flags = f"--model-path {DEEPSEEK} --tp 8 --dp-size {dp} --enable-dp-attention"
    assert on_paper(flags).blueprint.layout.shape == (dp, 1, 8 // dp)


def test_dp_attention_at_dp_1_switches_itself_off_with_a_log_line(caplog):
    with caplog.at_level("INFO"):
        report = on_paper(f"--model-path {DEEPSEEK} --tp 8 --dp-size 1 --enable-dp-attention")
    assert report.blueprint.layout.shape == (1, 1, 8)
    assert "enable_dp_attention is off: it needs dp_size > 1, and dp_size is 1" in caplog.text


@pytest.mark.parametrize(
    "tp, dp, gain",
    [(8, 2, "keeps no more KV than tp=8 alone"), (16, 4, "keeps 2 times as much KV as tp=16 alone")],
)
def test_dp_attention_on_grouped_queries_warns_and_works(tp, dp, gain, caplog):
    """Llama-70B has 8 KV heads: plain tensor parallelism over 16 devices keeps each twice."""
    report = on_paper(f"--model-path {LLAMA} --tp {tp} --dp-size {dp} --enable-dp-attention")
    assert report.blueprint.layout.dp == dp
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert gain in warning.getMessage() and "8 KV heads" in warning.getMessage()


def test_dp_attention_on_latents_does_not_warn(caplog):
    on_paper(DPA8)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_dp_size_without_dp_attention_is_full_replicas():
    report = on_paper(f"--model-path {DEEPSEEK} --tp 8 --dp-size 2")
    assert (report.num_replicas, report.blueprint.layout.shape) == (2, (1, 1, 8))
