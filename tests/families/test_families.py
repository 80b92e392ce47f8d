"""A family is data in one place: its names occur nowhere else, and a new one needs nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel

import pruneofa
from pruneofa import families
from pruneofa.engine import engine, reference
from pruneofa.engine.engine import Engine
from pruneofa.errors import InputError
from pruneofa.formats import pattern
from pruneofa.formats.architecture import read_architecture
from pruneofa.formats.pack import pack
from pruneofa.formats.unpack import unpack
from tests.tiny import LAYERS, write_folder

SOURCE = Path(pruneofa.__file__).parent
# Names of others: files and a key of sentence-transformers.
OTHERS = re.compile(r"sentence_[a-z-]+_config\.json|sbert_ce_default_activation_function")
NEW = replace(
    families.FAMILIES[0],
    title="Novel",
    model_type="novel",
    prefix="novel",
    classes={"embedding": "NovelModel", "classification": "NovelForSequenceClassification"},
    pretraining=None,
    layers="blocks",
    layer=replace(families.FAMILIES[0].layer, query="attn.q", key="attn.k", value="attn.v", output="ffn.out"),
)


def test_no_other_file_names_a_family():
    named = [
        f"{file.relative_to(SOURCE)}: {line.strip()}"
        for file in sorted(SOURCE.rglob("*"))
        if file.suffix in (".py", ".pyi", ".j2", ".html", ".js") and file.parent != SOURCE / "families"
        for line in file.read_text(encoding="utf-8").splitlines()
        if any(name in OTHERS.sub("", line).lower() for name in families.model_types())
    ]
    assert not named, "\n".join(named)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.title)
def test_a_family_names_what_transformers_has(family):
    import torch
    import transformers

    for task, name in family.classes.items():
        cls = getattr(transformers, name)
        assert cls.base_model_prefix == family.prefix and cls.config_class.model_type == family.model_type
        with torch.device("meta"):
            model = cls(cls.config_class())
        modules, parameters = dict(model.base_model.named_modules()), dict(model.named_parameters())
        layer = modules[f"{family.layers}.0"]
        assert set(family.layer.modules().values()) <= dict(layer.named_modules()).keys()
        assert {*family.tables.values(), family.embedding_norm} <= modules.keys()
        assert {family.layers.partition(".")[0], *family.base_modules()} >= {n.partition(".")[0] for n in modules if n}
        assert all(hasattr(model.config, key) for key in vars(family.keys).values())
        if bias := family.relative_bias:
            assert modules[bias.table].num_embeddings == bias.buckets == getattr(model.config, bias.key)
        heads = {families.base_name(n).partition(".")[0] for n in parameters if not n.startswith(f"{family.prefix}.")}
        assert task == "embedding" or heads <= family.head_modules()


@pytest.fixture
def new_family(monkeypatch):
    """A family that nothing but the tuple knows."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, NEW))
    monkeypatch.setattr(engine, "native", reference)
    monkeypatch.delenv("PRUNEOFA_ISA", raising=False)


def renamed(source: Path, folder: Path) -> Path:
    """The model in `source`, under the names of the new family."""
    folder.mkdir()
    old, weights = families.FAMILIES[0], {}
    modules = {f"{getattr(old.layer, field)}.": f"{name}." for field, name in NEW.layer.modules().items()}
    for name, weight in load_file(source / "model.safetensors").items():
        name = name.replace(f"{old.prefix}.", "novel.").replace(f".{old.layers}.", ".blocks.")
        for before, after in modules.items():
            name = re.sub(rf"(?<=blocks\.\d\.){re.escape(before)}", after, name)
        weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_a_new_family_needs_nothing_but_its_value(new_family, tmp_path):
    plain = write_folder(tmp_path / "plain")
    folder = renamed(plain, tmp_path / "novel")
    found = pattern.inspect(folder)
    assert len(found["layers"]) == 6 * LAYERS + 1 and "blocks.0.attn.q.weight" in found["layers"]
    assert found["encoder"] == pattern.inspect(plain)["encoder"]
    manifest = pack(folder, tmp_path / "packed", precision="fp32")
    assert manifest.prefix == "novel."
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "unpacked"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    texts = ["a good film", ("the king", "a bad river")]
    for path in (folder, tmp_path / "packed"):
        ours, known = (Engine.from_pretrained(p, precision="fp32").predict(texts) for p in (path, plain))
        assert ours == known


def test_a_family_that_is_not_listed_is_refused(tmp_path):
    folder = renamed(write_folder(tmp_path / "plain"), tmp_path / "novel")
    with pytest.raises(InputError, match="model_type is 'novel'; wanted one of bert, distilbert, roberta"):
        pack(folder, tmp_path / "packed")


def test_the_positions_that_are_left():
    counted = [family.first_position(1) for family in families.FAMILIES]
    assert counted == [0, 0, 2, 2] and families.FAMILIES[-1].first_position(0) == 2


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("BertTokenizerFast", ("vocab.txt",)),
        ("DistilBertTokenizer", ("vocab.txt",)),
        ("RobertaTokenizer", ("vocab.json", "merges.txt")),
        ("MPNetTokenizer", ("vocab.txt",)),
        ("roberta", ("vocab.json", "merges.txt")),
        ("None", ("vocab.txt",)),
    ],
)
def test_files_of_a_slow_tokenizer(name, files):
    assert families.tokenizer_files(name) == files


def test_query_key_and_value_read_the_same_input():
    names = [f"{family.layers}.3.{family.layer.query}.weight" for family in families.FAMILIES]
    assert [families.attention_input(name) for name in names] == [
        "encoder.layer.3.attention", "transformer.layer.3.attention", "encoder.layer.3.attention",
        "encoder.layer.3.attention",
    ]  # fmt: skip
    assert families.attention_input("encoder.layer.3.output.dense.weight") is None


def test_layers_beyond_the_config_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "native", reference)
    folder = write_folder(tmp_path / "model", num_hidden_layers=1)
    message = r"got the tensor encoder\.layer\.1\.attention\.output\.LayerNorm\.bias, config.json wants 1 layers"
    with pytest.raises(InputError, match=message) as caught:
        Engine.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        pack(folder, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_layers_beyond_the_config_are_refused_in_training(tmp_path):
    from pruneofa.train.models import load_for_pretraining, load_for_task

    sizes = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(num_hidden_layers=3, **sizes)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for read in (
        lambda: load_for_task(str(tmp_path), "classification", num_labels=2),
        lambda: load_for_task(str(tmp_path), "qa"),
        lambda: load_for_pretraining(str(tmp_path), nsp=True),
    ):
        with pytest.raises(InputError, match=r"got the tensor encoder\.layer\.2\..*, config.json wants 2 layers"):
            read()


def test_a_span_head_of_a_model_with_three_classes_has_two_outputs(tmp_path):
    from transformers import BertForSequenceClassification

    from pruneofa.train.models import load_for_task

    sizes = {"vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, num_labels=3, **sizes))
    model.save_pretrained(tmp_path)
    loaded = load_for_task(str(tmp_path), "qa")
    assert loaded.qa_outputs.out_features == 2 and loaded.config.num_labels == 2


def test_another_number_of_buckets_is_refused(tmp_path):
    biased = next(family for family in families.FAMILIES if family.relative_bias)
    config = {"model_type": biased.model_type, biased.relative_bias.key: 64}
    with pytest.raises(InputError, match="relative_attention_num_buckets is 64 in config.json, wanted 32") as caught:
        read_architecture(config | {"hidden_size": 8, "num_attention_heads": 2}, tmp_path)
    assert "\n" not in str(caught.value)
