"""What docs/guides/hugging-face.md does with an export in mlx-lm: quantized models write text, its server answers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
from support.checkpoints import create
from support.published_models import random_tokens, save_tokenizer
from support.small_models import rough_weights, small_model

import parity.libraries.mlx_lm
from mlx_moe.config import MoEConfig
from mlx_moe.hub.export import export
from mlx_moe.storage import checkpoint
from mlx_moe.storage.checkpoint import TrainerState

EXPERTS = MoEConfig(n_experts=4, top_k=2)
SECONDS = 120  # for a server to start on a busy machine


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Mixtral of 64 by 128: mlx-lm quantizes rows in groups of 64."""
    folder = tmp_path_factory.mktemp("exported")
    config = small_model("llama", vocab_size=96, d_model=64, d_ff=128, moe=EXPERTS)
    (folder / "tokenizer").mkdir()
    save_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    state = TrainerState(2, 0, "torch")
    weights = rough_weights(config, 0)
    create(folder / "ours", config, state, lambda name: [weights[name]], folder / "tokenizer")
    assert export(checkpoint.load(folder / "ours"), folder / "theirs", "mixtral") == "mixtral"
    return folder / "theirs"


@pytest.mark.filterwarnings("default")  # mlx-lm's own
@pytest.mark.parametrize(("bits", "error"), [(4, 0.5), (8, 0.05)])
def test_quantized(bits, error, exported, tmp_path, monkeypatch):
    import mlx_lm
    from mlx_lm.convert import main

    out = tmp_path / "quantized"
    arguments = ["-q", "--q-bits", str(bits), "--hf-path", str(exported), "--mlx-path", str(out)]
    monkeypatch.setattr("sys.argv", ["mlx_lm.convert", *arguments])
    main()
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == bits
    tokens = random_tokens()
    exact, rounded = (parity.libraries.mlx_lm.logits(folder, tokens) for folder in (exported, out))
    difference = np.abs(rounded - exact).mean() / exact.std()
    assert 1e-4 < difference < error
    text = mlx_lm.generate(*mlx_lm.load(str(out)), prompt="w1 w2", max_tokens=5)
    assert len(text.split()) == 5


def test_served(exported):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", "--model", exported, "--port", str(port)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"prompt": "w1 w2", "max_tokens": 5, "temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        answer = asked(request, server)
    finally:
        server.terminate()
        server.communicate(timeout=SECONDS)
    assert len(answer["choices"][0]["text"].split()) == 5
    assert answer["usage"]["completion_tokens"] == 5


def asked(request, server):
    """The answer, once the server listens."""
    until = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.loads(response.read())
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.2)
    raise AssertionError(server.communicate(timeout=SECONDS)[0])
