"""One revived weight among the 302 million of BERT-Large is found, in little memory."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

pytestmark = pytest.mark.slow

ENCODER_WEIGHTS = 24 * (4 * 1024 * 1024 + 2 * 4096 * 1024)
LAYER = "encoder.layer.17.intermediate.dense.weight"
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A randomly initialised BERT-Large in bf16, nine of ten weights pruned, in shards of 200 MB."""
    folder = tmp_path_factory.mktemp("large") / "sparse"
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = BertForPreTraining(BertConfig(**LARGE))
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".weight") and "encoder.layer" in name and weight.ndim == 2:
                weight[torch.arange(weight.shape[0]) % 10 != 0] = 0.0
    model.save_pretrained(folder, max_shard_size="200MB")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def revived(sparse):
    """The same files, one weight of one shard excepted."""
    folder = sparse.with_name("revived")
    folder.mkdir()
    for file in sparse.iterdir():
        os.link(file, folder / file.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / index[f"bert.{LAYER}"]
    shard.unlink()
    shutil.copyfile(sparse / shard.name, shard)
    with open(shard, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[f"bert.{LAYER}"]
        assert entry["dtype"] == "BF16" and entry["shape"] == [4096, 1024]
        at = 8 + length + entry["data_offsets"][0] + 2 * (1234 * 1024 + 567)
        file.seek(at)
        assert file.read(2) == b"\0\0"
        file.seek(at)
        file.write(np.uint16(1).tobytes())  # the smallest number bf16 has, 9e-41
    yield folder
    shutil.rmtree(folder)


def measured(*arguments: object) -> tuple[int, dict, int]:
    """Exit code, JSON and peak memory in MiB of a verb as a program."""
    program = (
        "import sys; from pruneofa.cli.main import main; code = main()\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "sys.stderr.write(peak.split()[1]); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run.returncode, json.loads(run.stdout), int(run.stderr) // 1024


def test_verify_names_the_layer_of_the_one_weight(sparse, revived):
    code, found, peak = measured("verify", sparse, revived)
    assert code == 1
    assert found["revived"] == [{"layer": LAYER, "count": 1}]
    assert found["missing"] == [] and found["layers"] == 24 * 6 + 1
    assert found["checked"] == pytest.approx(0.9 * ENCODER_WEIGHTS, rel=1e-3)
    assert peak < 300, f"{peak} MiB"


def test_verify_finds_nothing_in_an_equal_model(sparse):
    code, found, peak = measured("verify", sparse, sparse)
    assert code == 0 and found["ok"] and found["extra_zeros"] == 0
    assert peak < 300, f"{peak} MiB"


def test_inspect(sparse, revived):
    code, found, peak = measured("inspect", sparse)
    assert code == 0
    assert found["weights"] == ENCODER_WEIGHTS == 301_989_888
    assert found["encoder"] == pytest.approx(0.9, abs=1e-3)
    assert found["sizes"]["dense_fp32"] == 4 * ENCODER_WEIGHTS
    assert peak < 300, f"{peak} MiB"
    other = measured("inspect", revived)[1]
    assert other["nonzeros"] == found["nonzeros"] + 1 and other["pattern_hash"] != found["pattern_hash"]
