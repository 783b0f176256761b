"""Every file in configs/ loads, is commented, fits the devices it names, and matches its manifest."""

import re
from pathlib import Path

import pytest
import yaml

from jaxserve.check import check
from jaxserve.config import ServerConfig, read_yaml
from jaxserve.mesh import layout_of
from router.config import RouterConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
KUBERNETES = CONFIGS / "kubernetes"
SHAPES = ROOT / "tools" / "shapes"

# file -> (shape, device, mesh, the least KV tokens that are worth a deployment)
DEPLOYMENTS = {
    "llama-8b": ("llama-3.1-8b", "h100", (1, 1, 1), 400_000),
    "llama-70b": ("llama-3.1-70b", "h100", (1, 1, 4), 400_000),
    "deepseek-v3": ("deepseek-v3", "h200", (8, 1, 1), 3_000_000),
    "deepseek-v3-2-nodes": ("deepseek-v3", "h100", (8, 2, 1), 2_000_000),
    "kimi-k2": ("kimi-k2", "h200", (16, 1, 1), 10_000_000),
    "minimax-m2": ("minimax-m2", "h100", (1, 8, 1), 1_000_000),
    "qwen3-moe": ("qwen3-235b-a22b", "h100", (2, 4, 1), 500_000),
}
DEMOS = {"demo": "tools/shapes/smollm2-135m.json", "demo-mesh": "configs/tiny-deepseek"}
ENGINE_FILES = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "router"]


def load(path, **override):
    return ServerConfig.from_keywords(**{**read_yaml(str(path)), **override})


def test_every_file_is_held_to_something_here():
    assert {path.stem for path in ENGINE_FILES} == {*DEPLOYMENTS, *DEMOS}
    assert {path.name for path in KUBERNETES.iterdir()} == {"llama-8b.yaml", "deepseek-v3-2-nodes.yaml"}


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path):
    """On its own line, unless its value names the thing itself."""
    keys = [line for line in path.read_text().splitlines() if re.match(r"\w+:", line)]
    assert len(keys) == len(read_yaml(str(path)))
    bare = [
        line for line in keys if " # " not in line and not line.startswith(("device:", "served_model_name:"))
    ]
    assert bare == []


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_deployment_fits_its_devices(name):
    shape, gpu, mesh, least_tokens = DEPLOYMENTS[name]
    config = load(CONFIGS / f"{name}.yaml", model_path=str(SHAPES / f"{shape}.json"), load_format="dummy")
    report = check(config, gpu)
    assert layout_of(config).shape == mesh
    assert report.num_replicas == 1
    assert report.kv_tokens > least_tokens
    # Every rank can hold one sequence of full length.
    assert report.blueprint.max_req_len(report.num_pages) == config.context_length
    largest = max(report.blueprint.buckets(report.num_pages), key=lambda b: (b.num_tokens, b.rows))
    left = report.device.memory_bytes - report.cost.weight_bytes_of_device - report.kv_bytes_of_device
    assert report.cost.workspace_bytes(largest.num_tokens, largest.num_samples) < left / 2


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_sizes_in_comments_are_the_computed_ones(name):
    """`weights (N GiB)` and `KV (N GiB)` beside mem_fraction_static, where they are given."""
    shape, gpu, *_ = DEPLOYMENTS[name]
    path = CONFIGS / f"{name}.yaml"
    report = check(load(path, model_path=str(SHAPES / f"{shape}.json"), load_format="dummy"), gpu)
    text = path.read_text()
    for noun, size in (
        ("weights", report.cost.weight_bytes_of_device),
        ("KV", report.kv_bytes_of_device),
    ):
        for stated in re.findall(rf"{noun} \((\d+) GiB\)", text):
            assert int(stated) == round(size / 2**30)
    for stated in re.findall(r"the model could (\d+)", text):
        assert int(stated) == report.blueprint.model.max_position


@pytest.mark.parametrize("name", DEMOS)
def test_demo_fits_a_laptop(name):
    config = load(CONFIGS / f"{name}.yaml", model_path=str(ROOT / DEMOS[name]), load_format="dummy")
    report = check(config, memory_bytes=8 * 2**30 // config.tp)
    assert report.blueprint.on_cpu and report.kv_tokens == 16_384


def test_mesh_demo_answers_on_eight_virtual_devices(engine):
    """The file's own keys, but for where it listens; two layouts, the same tokens."""
    values = read_yaml(str(CONFIGS / "demo-mesh.yaml"))
    path = str(ROOT / values.pop("model_path"))
    for name in ("host", "port", "served_model_name", "moe_a2a_backend"):
        values.pop(name)
    served = engine(path, **{**values, "skip_tokenizer_init": False})
    assert served.info.dp_size == 4 and served.info.num_devices == 8
    alone = {
        **values,
        "tp": 1,
        "dp_size": 1,
        "ep": 1,
        "enable_dp_attention": False,
        "skip_tokenizer_init": False,
    }
    asked = {"prompt": "Return the", "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    answer, expected = (made.generate(**asked) for made in (served, engine(path, **alone)))
    assert answer["output_ids"] == expected["output_ids"] and answer["text"] == expected["text"]
    assert len(answer["output_ids"]) == 12


# ---- Kubernetes ----


def manifests(name):
    return list(yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()))


def flags(container, **variables):
    """The container's arguments with Kubernetes' variables filled in."""
    out = []
    for argument in container["args"]:
        for variable, value in variables.items():
            argument = argument.replace(f"$({variable})", value)
        assert "$(" not in argument
        out.append(argument)
    return out


def test_one_gpu_manifest_says_what_the_configuration_says():
    by_kind = {(m["kind"], m["metadata"]["name"]): m for m in manifests("llama-8b")}
    pod = by_kind["Deployment", "llama-8b"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "jaxserve.launch_server"]
    config = ServerConfig.from_command_line(flags(container))
    same = load(CONFIGS / "llama-8b.yaml", port=8000, compile_cache_dir="/cache/xla")
    defaults = {"mem_fraction_static": None, "max_running_requests": None, "chunked_prefill_size": None}
    assert {**config.to_dict(), **defaults} == {**same.to_dict(), **defaults}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.tp
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.shutdown_grace_period_secs

    gateway = by_kind["Deployment", "gateway"]["spec"]["template"]
    (proxy,) = gateway["spec"]["containers"]
    values = {}
    for argument in flags(proxy):
        name, _, value = argument.removeprefix("--").partition("=")
        values[name.replace("-", "_")] = yaml.safe_load(value) if value else True
    routed = RouterConfig.from_keywords(**{**values, "selector": [values["selector"]]})
    assert routed.policy == "cache_aware" and routed.service_discovery_port == config.port
    assert tuple(f"{k}={v}" for k, v in pod["metadata"]["labels"].items()) == routed.selector
    assert gateway["spec"]["terminationGracePeriodSeconds"] > routed.shutdown_grace_period_secs
    # Several gateways agree through KV events, which need the tokenizer in the pod.
    assert by_kind["Deployment", "gateway"]["spec"]["replicas"] == 1 and routed.tokenizer_path is None
    assert by_kind["Service", "gateway"]["spec"]["selector"] == gateway["metadata"]["labels"]
    assert proxy["ports"] == [{"name": "http", "containerPort": routed.port}]
    assert by_kind["Role", "gateway"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    ]
    account = gateway["spec"]["serviceAccountName"]
    assert by_kind["RoleBinding", "gateway"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert ("ServiceAccount", account) in by_kind


@pytest.mark.parametrize("rank", [0, 1])
def test_two_host_manifest_says_what_the_configuration_says(rank):
    group, service = manifests("deepseek-v3-2-nodes")
    template = group["spec"]["leaderWorkerTemplate"]
    pod = template["workerTemplate" if rank else "leaderTemplate"]
    (container,) = pod["spec"]["containers"]
    size = template["size"]
    variables = {"LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(rank), "LWS_LEADER_ADDRESS": "leader"}
    config = ServerConfig.from_command_line(flags(container, **variables))
    same = load(
        CONFIGS / "deepseek-v3-2-nodes.yaml", model_path="/models/DeepSeek-V3", node_rank=rank,
        dist_init_addr="leader:29500", port=8000, follower_health_port=8000, compile_cache_dir="/cache/xla",
    )  # fmt: skip
    free = {"mem_fraction_static": None, "chunked_prefill_size": None, "dist_timeout": None}
    assert {**config.to_dict(), **free} == {**same.to_dict(), **free}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.local_devices == 8
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    selected = service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert selected == (rank == 0)  # only the leader serves HTTP


@pytest.mark.parametrize("name", ["llama-8b", "deepseek-v3-2-nodes"])
def test_every_volume_that_is_mounted_is_declared(name):
    for manifest in manifests(name):
        spec = manifest.get("spec", {})
        pods = [
            spec.get("template"),
            *(v for v in spec.get("leaderWorkerTemplate", {}).values() if isinstance(v, dict)),
        ]
        for pod in filter(None, pods):
            declared = {volume["name"] for volume in pod["spec"].get("volumes", [])}
            for container in pod["spec"]["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} == declared
