"""Conversion to orbax: what comes out is the source, and nothing half-written is a checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxserve.weights import Checkpoint, CheckpointError, open_checkpoint
from jaxserve.weights.orbax import BEGUN, MANIFEST
from tests.models.tiny import read_config, read_tensors
from tests.weights.tiny import LLAMA, llama_tensors, to_gguf_names, write_directory, write_gguf
from tools import convert_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path) -> Path:
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in llama_tensors().items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    folder = write_directory(tmp_path / "source", tensors, CONFIG)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "training_args.bin").write_bytes(b"not for serving")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """One conversion (of float32 tensors) for the tests that damage a copy of it."""
    folder = tmp_path_factory.mktemp("converted")
    write_directory(folder / "source", llama_tensors(), CONFIG)
    assert run(folder / "source", folder / "done") == 0
    return folder


def run(source, target, *more) -> int:
    return convert_checkpoint.main(["--from", str(source), "--to", str(target), *more])


def run_in_a_process(program: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)


def assert_same_tensors(got: Checkpoint, expected: Checkpoint):
    assert sorted(got.tensors) == sorted(expected.tensors)
    for name, info in expected.tensors.items():
        values = got.read(name)
        assert (values.dtype, values.shape) == (info.dtype, info.shape), name
        np.testing.assert_array_equal(values.view(np.uint8), expected.read(name).view(np.uint8), err_msg=name)


def test_a_conversion_keeps_every_bit_config_and_tokenizer(source, tmp_path):
    assert run(source, tmp_path / "out", "--verify") == 0
    got = open_checkpoint(tmp_path / "out")
    assert isinstance(got, Checkpoint)
    assert_same_tensors(got, open_checkpoint(source))
    assert got.config == CONFIG
    assert got.generation_config == {"eos_token_id": 2}
    assert sorted(entry.name for entry in got.tokenizer_dir.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "items",
        MANIFEST,
        "tokenizer.json",
    ]


def test_there_is_one_item_a_layer_and_one_a_tensor_outside(source, tmp_path):
    assert run(source, tmp_path / "out") == 0
    items = json.loads((tmp_path / "out" / MANIFEST).read_text())["items"]
    assert sorted(items) == [
        "model.embed_tokens.weight",
        "model.layers.0",
        "model.layers.1",
        "model.norm.weight",
    ]
    assert len(items["model.layers.0"]) == 9
    entry = items["model.layers.0"]["model.layers.0.mlp.up_proj.weight"]
    assert (entry["shape"], entry["dtype"], len(entry["xxh3_128"])) == ([96, 64], "bfloat16", 32)


def test_a_large_layer_becomes_several_items(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint, "MAX_ITEM_BYTES", 2 * 96 * 64 * 2)
    opened = open_checkpoint(source)
    plan = convert_checkpoint.plan_items(opened, convert_checkpoint.target_dtypes(opened, "auto"))
    parts = [(item, len(names), size) for item, names, size in plan if "layers.1." in item]
    # Seven matrices of 12, 12, 12, 8, 8, 4 and 4 KiB and two norms of 128 bytes, in at most 24 KiB each.
    assert [item for item, _, _ in parts] == [f"model.layers.1.part{n}" for n in range(len(parts))]
    assert len(parts) in (3, 4)
    assert sum(count for _, count, _ in parts) == 9
    assert sum(size for _, _, size in parts) == 2 * (3 * 96 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 2 * 64)
    assert all(size <= 2 * 96 * 64 * 2 for _, _, size in parts)
    assert run(source, tmp_path / "out", "--verify") == 0
    assert_same_tensors(open_checkpoint(tmp_path / "out"), open_checkpoint(source))


@pytest.mark.parametrize(
    "index",
    [
        (slice(8, 24), slice(None)),
        (slice(None), slice(3, 9)),
        (slice(4, 5), slice(60, 64)),
        (slice(2, 2), slice(None)),
    ],
)
def test_a_part_of_a_tensor_is_what_slicing_the_whole_gives(converted, index):
    checkpoint = open_checkpoint(converted / "done")
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name, index), checkpoint.read(name)[index])


def test_dtype_converts_floating_tensors_and_says_so_in_the_config(source, tmp_path):
    assert run(source, tmp_path / "out", "--dtype", "float32", "--verify") == 0
    got = open_checkpoint(tmp_path / "out")
    assert {info.dtype.name for info in got.tensors.values()} == {"float32"}
    assert got.config["torch_dtype"] == "float32"
    before = open_checkpoint(source)
    for name in before.tensors:
        np.testing.assert_array_equal(got.read(name), before.read(name).astype(np.float32))


def test_a_value_beyond_float16_is_refused_not_made_infinite(tmp_path, capsys):
    write_directory(tmp_path / "source", {"a.weight": np.array([[1e5]], np.float32)})
    assert run(tmp_path / "source", tmp_path / "out", "--dtype", "float16") == 1
    assert "tensor a.weight has values beyond float16's 65504" in unwrapped(capsys)


def test_what_a_model_reads_in_float32_is_not_narrowed(tmp_path):
    """Scales of blocks, and the biases of a router's choice, of which 2**-8 of 5 is more than they differ."""
    rng, tensors = np.random.default_rng(0), dict(read_tensors("deepseek_v3"))
    config = read_config("deepseek_v3")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    wide = [name for name in tensors if name.endswith("e_score_correction_bias")]
    for name in wide:
        tensors[name] = rng.uniform(5, 6, tensors[name].shape).astype(np.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = tensors[name].shape
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    scale = f"{name}_scale_inv"
    tensors[scale] = rng.uniform(1, 2, (-(-rows // 16), -(-columns // 16))).astype(np.float32)
    source = write_directory(tmp_path / "source", tensors, config)
    assert run(source, tmp_path / "out", "--dtype", "bfloat16", "--verify") == 0
    got = open_checkpoint(tmp_path / "out")
    assert wide and all(got.tensors[name].dtype == np.float32 for name in (*wide, scale))
    np.testing.assert_array_equal(got.read(scale), tensors[scale])
    assert got.tensors["model.norm.weight"].dtype.name == "bfloat16"


def test_a_gguf_file_converts_with_its_tokenizer(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", LLAMA, to_gguf_names(llama_tensors()), gguf.GGMLQuantizationType.Q8_0)
    assert run(path, tmp_path / "out", "--verify") == 0
    got, before = open_checkpoint(tmp_path / "out"), open_checkpoint(path)
    assert got.config == before.config
    assert (got.tokenizer_dir / "tokenizer.json").read_text() == (
        before.tokenizer_dir / "tokenizer.json"
    ).read_text()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert got.tensors[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.read(name), before.read(name).astype(ml_dtypes.bfloat16))
    assert got.tensors["model.norm.weight"].dtype == np.float32


# ---- interruption ----


def test_an_interrupted_conversion_is_no_checkpoint_and_continues_where_it_stopped(
    source, tmp_path, monkeypatch, capsys
):
    target = tmp_path / "out"
    write_item, written = convert_checkpoint.write_item, []

    def stop_in_the_third(path, item, arrays):
        if len(written) == 2:
            (path / "items" / f"{item}.orbax-checkpoint-tmp-7").mkdir()
            (path / "items" / item).mkdir()
            (path / "items" / item / "half").write_bytes(b"x")
            raise KeyboardInterrupt
        written.append(item)
        write_item(path, item, arrays)

    monkeypatch.setattr(convert_checkpoint, "write_item", stop_in_the_third)
    assert run(source, target) == 130
    assert "give the same command again" in unwrapped(capsys)
    with pytest.raises(
        CheckpointError, match=r"its conversion was interrupted; run tools\.convert_checkpoint again"
    ):
        open_checkpoint(target)

    again = []
    monkeypatch.setattr(
        convert_checkpoint,
        "write_item",
        lambda path, item, arrays: again.append(item) or write_item(path, item, arrays),
    )
    assert run(source, target, "--verify") == 0
    assert len(written) == 2 and len(again) == 2 and not set(written) & set(again)
    assert "20 tensors in 4 items, 2 of them from before" in unwrapped(capsys)
    assert_same_tensors(open_checkpoint(target), open_checkpoint(source))
    assert sorted(p.name for p in (target / "items").iterdir() if p.is_dir()) == sorted(written + again)


def test_a_killed_conversion_is_no_checkpoint_and_can_be_completed(source, tmp_path):
    """SIGKILL between an item's arrays and its record: the item counts as not written."""
    target = tmp_path / "out"
    program = (
        "import os, signal\n"
        "from jaxserve.weights import orbax\n"
        "from tools import convert_checkpoint\n"
        "write_json = orbax.write_json\n"
        "def kill(path, value):\n"
        "    if path.name == 'model.layers.1.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write_json(path, value)\n"
        "orbax.write_json = kill\n"
        f"convert_checkpoint.main(['--from', {str(source)!r}, '--to', {str(target)!r}])\n"
    )
    done = run_in_a_process(program)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (target / "items" / "model.layers.1").is_dir()
    with pytest.raises(CheckpointError, match="its conversion was interrupted"):
        open_checkpoint(target)
    assert run(source, target, "--verify") == 0
    assert_same_tensors(open_checkpoint(target), open_checkpoint(source))


def test_a_full_disk_is_an_error_message_and_the_conversion_can_be_completed(source, tmp_path):
    target = tmp_path / "out"
    program = (
        "import resource, signal\n"
        "from tools import convert_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        f"raise SystemExit(convert_checkpoint.main(['--from', {str(source)!r}, '--to', {str(target)!r}]))\n"
    )
    done = run_in_a_process(program)
    said = " ".join(done.stderr.decode().split())
    assert done.returncode == 1 and "not written" in said and "Traceback" not in said, said
    assert run(source, target, "--verify") == 0
    assert_same_tensors(open_checkpoint(target), open_checkpoint(source))


def test_a_conversion_that_ends_before_it_wrote_anything_can_be_begun_again(source, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / f".{BEGUN}.partial").write_text("{")
    assert run(source, target, "--verify") == 0
    (tmp_path / "marked").mkdir()
    described = convert_checkpoint.describe(open_checkpoint(source), "auto")
    (tmp_path / "marked" / BEGUN).write_text(json.dumps(described))
    assert run(source, tmp_path / "marked", "--verify") == 0


def test_a_resumed_conversion_refuses_another_source_or_dtype(source, tmp_path, monkeypatch, capsys):
    def stop(path, item, arrays):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert_checkpoint, "write_item", stop)
        assert run(source, tmp_path / "out") == 130
    assert run(source, tmp_path / "out", "--dtype", "float32") == 1
    assert "holds a conversion of" in unwrapped(capsys)
    changed = {n: t + 1 for n, t in llama_tensors().items()}
    write_directory(source, changed, CONFIG)
    assert run(source, tmp_path / "out") == 1
    assert "with another files" in unwrapped(capsys)


def test_a_finished_conversion_is_left_alone(converted, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in (converted / "done").rglob("*")}
    assert run(converted / "source", converted / "done") == 0
    assert "already converted" in unwrapped(capsys)
    assert {p: p.stat().st_mtime_ns for p in (converted / "done").rglob("*")} == before


def test_a_directory_with_other_files_is_not_written_into(source, tmp_path, capsys):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    assert run(source, target) == 1
    assert "not empty and not a conversion (thesis.txt)" in unwrapped(capsys)
    assert [entry.name for entry in target.iterdir()] == ["thesis.txt"]


def test_two_conversions_do_not_write_into_one_directory(source, tmp_path, capsys):
    with convert_checkpoint._owned(tmp_path / "out"):
        assert run(source, tmp_path / "out") == 1
    assert "another conversion is writing here" in unwrapped(capsys)


def test_a_bad_source_is_an_error_message_not_a_traceback(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "error:" in (text := unwrapped(capsys)) and "no such file or directory" in text


# ---- damage ----


def test_a_flipped_bit_is_found_when_a_tensor_is_read_and_by_verify(converted, tmp_path, capsys):
    """In every data file of every item: damage is an error that names the tensor, or changes nothing."""
    original, target = open_checkpoint(converted / "done"), tmp_path / "out"
    shutil.copytree(converted / "done", target)
    data = [p for p in sorted(target.glob("items/*/ocdbt.process_0/d/*")) if p.stat().st_size > 4096]
    assert len(data) >= 3  # the embedding and two layers, each in one file or in several
    found = set()
    for path in data:
        content = path.read_bytes()
        for at in (len(content) // 3, len(content) // 2):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            damaged = []
            for name in original.tensors:
                try:
                    values = open_checkpoint(target).read(name)
                except CheckpointError as error:
                    assert name in str(error)
                    damaged.append(name)
                else:
                    np.testing.assert_array_equal(values, original.read(name))
            assert len(damaged) <= 1, (path, damaged)  # none where the byte is of no use to a reader
            found.update(damaged)
            assert run(converted / "source", target, "--verify") == (1 if damaged else 0)
            assert all(f"tensor {name}" in text for text in [unwrapped(capsys)] for name in damaged)
        path.write_bytes(content)
    assert len(found) >= 3
    assert run(converted / "source", target, "--verify") == 0


def test_verify_finds_a_source_that_changed(converted, tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    tensors["extra.weight"] = np.ones(2, np.float32)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    other = open_checkpoint(write_directory(tmp_path / "other", tensors, CONFIG))
    with convert_checkpoint._progress(convert_checkpoint.Console(stderr=True)) as progress:
        wrong = convert_checkpoint.verify(other, converted / "done", "auto", progress)
    assert wrong == [
        f"tensor extra.weight is missing from {converted / 'done'}",
        f"tensor model.layers.0.mlp.up_proj.weight is not in {tmp_path / 'other'}",
        f"tensor model.norm.weight [64] differs from {tmp_path / 'other' / 'model.safetensors'}",
    ]


def test_a_missing_item_or_data_file_is_named(converted, tmp_path):
    shutil.copytree(converted / "done", tmp_path / "out")
    for path in (tmp_path / "out" / "items" / "model.layers.0").glob("ocdbt.process_0/d/*"):
        if path.stat().st_size > 4096:
            path.unlink()
    with pytest.raises(
        CheckpointError, match=r"items/model\.layers\.0: tensor model\.layers\.0\S+ \[.*\] cannot be read"
    ):
        open_checkpoint(tmp_path / "out").read("model.layers.0.mlp.up_proj.weight")
    shutil.rmtree(tmp_path / "out" / "items" / "model.layers.0")
    with pytest.raises(CheckpointError, match=r"items/model\.layers\.0: missing; .* lists 9 tensors"):
        open_checkpoint(tmp_path / "out")


def test_a_manifest_alone_decides_what_is_a_checkpoint(converted, tmp_path):
    shutil.copytree(converted / "done", tmp_path / "out")
    manifest = (tmp_path / "out" / MANIFEST).read_text()
    (tmp_path / "out" / MANIFEST).write_text(manifest[: len(manifest) // 2])
    with pytest.raises(CheckpointError, match=r"jaxserve_manifest\.json: not readable as JSON"):
        open_checkpoint(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99, this version reads 1; convert the source again"):
        open_checkpoint(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).rename(tmp_path / "out" / BEGUN)
    with pytest.raises(CheckpointError, match="its conversion was interrupted"):
        open_checkpoint(tmp_path / "out")


def unwrapped(capsys) -> str:
    """What was printed, without the line breaks of an 80-column console."""
    return " ".join(capsys.readouterr().err.split())
