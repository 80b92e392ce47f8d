"""Folders of sentence-transformers: what the engine takes from them, and what it refuses by name. No torch here."""

import json

import numpy as np
import pytest

from pruneofa import Engine
from pruneofa.engine import engine, reference
from pruneofa.errors import InputError
from pruneofa.formats.pack import pack
from tests.tiny import POSITIONS, modules_json, write_folder


@pytest.fixture(autouse=True)
def _on_the_reference(monkeypatch):
    monkeypatch.setattr(engine, "native", reference)
    monkeypatch.delenv("PRUNEOFA_ISA", raising=False)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", modules_json(Dense="2_Dense"), "module 'Dense'"),
        (
            "modules.json",
            modules_json(Transformer="0_T", Pooling="1_Pooling"),
            "the path of Transformer is '0_T', want",
        ),
        ("modules.json", [{"path": "", "type": "mine.Pooling"}], "module 'mine.Pooling', wanted only Transformer"),
        ("modules.json", {"type": "Pooling"}, "JSON array"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "lasttoken"},
            "pooling is 'lasttoken', wanted one of cls, mean, max",
        ),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling is"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt is false"),
        ("1_Pooling/config.json", [], "wanted a JSON object, got list"),
        ("1_Pooling/config.json", None, "config.json: no such file"),
        ("1_Pooling/config.json", {"pooling_mode": "x" * 5000}, "pooling is 'x+..., wanted one of"),
        ("modules.json", [{"path": "", "type": "x" * 5000}], "module 'x+..., wanted only Transformer"),
        (
            "modules.json",
            modules_json(Pooling="\ud800"),
            "the path of Pooling is '.ud800', wanted a folder beside",
        ),
        (
            "modules.json",
            modules_json(Pooling="\0"),
            "the path of Pooling is '.x00', wanted a folder beside",
        ),
        (
            "modules.json",
            modules_json(Pooling="x" * 5000),
            "the path of Pooling is 'x+..., wanted a folder beside",
        ),
        (
            "modules.json",
            modules_json(Pooling="../1_Pooling"),
            "is '../1_Pooling', wanted a folder beside",
        ),
        ("config_sentence_transformers.json", {"truncate_dim": True}, "truncate_dim is True, wanted an integer"),
        ("tokenizer_config.json", {"model_input_names": 5}, "model_input_names is 5 in tokenizer_config.json, wanted"),
        (
            "sentence_bert_config.json",
            {"max_seq_length": float("inf")},
            r"not valid JSON \(Infinity is not a JSON number\)",
        ),
        ("sentence_bert_config.json", {"max_seq_length": float("nan")}, r"not valid JSON \(NaN is not a JSON number\)"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "\ud800"}, "default_prompt_name": "query"},
            r"the prompt has a lone surrogate U\+D800 at 0",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "qeury"},
            "default_prompt_name is 'qeury', wanted one of prompts, which has 'query', 'document'; correct the file",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {f"{index}{'x' * 500}": "" for index in range(50)}, "default_prompt_name": "query"},
            "default_prompt_name is 'query', wanted one of prompts, which has '0x+...",
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": ["query"]},
            r"default_prompt_name is \['query'\], wanted one of prompts, which has nothing",
        ),
    ],
)
def test_sentence_transformers_folders_the_engine_does_not_run(file, content, message, tmp_path):
    write_folder(tmp_path, "Model")
    (tmp_path / "1_Pooling").mkdir()
    modules = modules_json()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    if file != "1_Pooling/config.json":
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    if content is not None:
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        Engine.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 700


def test_a_sentence_model_is_held_to_the_length_it_was_made_for(tmp_path):
    write_folder(tmp_path, "Model")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    modules = modules_json()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False}))
    sentences = Engine.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="x has 9 tokens, the model takes at most 8"):
        sentences.predict("good " * 7)
    cut, whole = sentences.predict(["good " * 7, "good " * 6], truncate=True)
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    assert sentences.encode([[5] * POSITIONS]).shape == (1, POSITIONS, 32)  # of the encoder itself


def test_a_sentence_model_may_have_a_prompt_and_lower_case(tmp_path):
    plain = Engine.from_pretrained(write_folder(tmp_path, "Model")).predict("a good RIVER")
    modules = modules_json()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    prompts = {"prompts": {"query": "A GOOD ", "document": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    np.testing.assert_array_equal(Engine.from_pretrained(tmp_path).predict("RIVER"), plain)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": ["query"]}))
    with pytest.raises(
        InputError, match="config_sentence_transformers.json: prompts is ..query.., wanted a JSON object"
    ):
        Engine.from_pretrained(tmp_path)
    (tmp_path / "config_sentence_transformers.json").unlink()
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": "8"}))
    with pytest.raises(InputError, match="max_seq_length is '8', wanted a number"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", ["linear.Identity", "activation.Sigmoid"])
def test_a_cross_encoder_keeps_the_activation_of_its_own_file(labels, name, tmp_path):
    plain = write_folder(tmp_path / "plain", labels=labels, problem_type="regression")
    raw = scores_of(plain)
    other = {"sentence_transformers": {"activation_fn": f"torch.nn.modules.{OTHER[name]}"}}  # the file counts before it
    folder = write_folder(tmp_path / "ce", labels=labels, **other)
    settings = {"model_type": "CrossEncoder", "activation_fn": f"torch.nn.modules.{name}", "prompts": {}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    wanted = raw if name == "linear.Identity" else 1 / (1 + np.exp(-raw))
    assert scores_of(folder) == pytest.approx(wanted, abs=1e-5)
    pack(folder, tmp_path / "packed", precision="fp32")
    assert scores_of(tmp_path / "packed") == pytest.approx(wanted, abs=1e-5)
    settings["activation_fn"] = "torch.nn.modules.activation.Tanh"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="json: activation_fn is 'torch.nn.modules.activation.Tanh', wanted Identity"):
        Engine.from_pretrained(folder)


def test_a_cross_encoders_prompt_is_refused_because_it_would_not_be_applied(tmp_path):
    folder = write_folder(tmp_path / "ce", labels=1)
    settings = {"model_type": "CrossEncoder", "prompts": {"query": "good "}, "default_prompt_name": "query"}
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(settings))
    for read in (Engine.from_pretrained, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(InputError) as caught:
            read(folder)
        assert str(caught.value) == (
            f"{file}: default_prompt_name is 'query', wanted null: prompts of cross-encoders are not applied; "
            "put it before the first text of each pair, and set it to null"
        )
    for change in ({"default_prompt_name": None}, {"prompts": {"query": ""}}, {"model_type": "SentenceTransformer"}):
        file.write_text(json.dumps(settings | change))
        Engine.from_pretrained(folder)


OTHER = {"linear.Identity": "activation.Sigmoid", "activation.Sigmoid": "linear.Identity"}


def scores_of(folder):
    engine = Engine.from_pretrained(folder, precision="fp32")
    return np.array(list(engine.predict(("a good river", "the city"))["scores"].values()))


@pytest.mark.parametrize(
    ("stated", "limit"), [(16, 16), (16.0, 16), (10**30, POSITIONS), (1e30, POSITIONS), (None, POSITIONS)]
)
def test_any_folder_is_held_to_the_length_of_its_tokenizer(stated, limit, tmp_path):
    model = write_folder(tmp_path / "model")
    (model / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stated}))
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))  # nothing without modules.json
    pack(model, tmp_path / "packed")
    for folder in (model, tmp_path / "packed"):
        assert Engine.from_pretrained(folder).tokenizer.limit == limit
    with pytest.raises(InputError, match=f"x has {POSITIONS + 1} tokens, the model takes at most {limit}"):
        Engine.from_pretrained(model).predict("good " * (POSITIONS - 1))


def test_a_length_that_is_no_number_is_refused_by_the_engine_and_by_packing(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": "16"}))
    for read in (Engine.from_pretrained, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(InputError, match="tokenizer_config.json: model_max_length is '16', wanted a number"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "normalize", "message"),
    [
        (
            ["Transformer", "Normalize", "Pooling"],
            {},
            "modules.json: the modules are Transformer, Normalize, Pooling, wanted Transformer, Pooling and then at "
            "most Normalize; run this model with sentence-transformers",
        ),
        (["Transformer", "Normalize"], {}, "the modules are Transformer, Normalize, wanted"),
        (["Transformer", "Pooling", "Pooling"], {}, "the modules are Transformer, Pooling, Pooling, wanted"),
        (
            ["Transformer", "Pooling", "Normalize"],
            {"module_input_name": "token_embeddings"},
            "2_Normalize/config.json: module_input_name is 'token_embeddings', wanted 'sentence_embedding'; run",
        ),
        (["Transformer", "Pooling", "Normalize"], {"module_output_name": "unit"}, "module_output_name is 'unit', want"),
    ],
)
def test_only_the_vector_of_a_text_is_normalized(kinds, normalize, message, tmp_path):
    write_modules(tmp_path, kinds)
    for path in tmp_path.glob("*_Normalize"):
        (path / "config.json").write_text(json.dumps(normalize))
    for read in (Engine.from_pretrained, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_normalize_may_say_what_it_does_and_be_there_twice(tmp_path):
    write_modules(tmp_path, ["Transformer", "Pooling", "Normalize", "Normalize"])
    said = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    (tmp_path / "2_Normalize/config.json").write_text(json.dumps(said))
    assert np.linalg.norm(Engine.from_pretrained(tmp_path).predict("a good river")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["sentence_roberta_config.json", "sentence_xlm-roberta_config.json"])
def test_the_length_may_be_in_a_file_of_an_old_name(name, tmp_path):
    model = tmp_path / "model"
    write_modules(model, ["Transformer", "Pooling"])
    (model / "sentence_bert_config.json").write_text("{}")
    (model / name).write_text(json.dumps({"max_seq_length": 8}))
    assert Engine.from_pretrained(model).tokenizer.limit == 8
    pack(model, tmp_path / "packed")
    assert Engine.from_pretrained(tmp_path / "packed").tokenizer.limit == 8
    (model / name).write_text(json.dumps({"max_seq_length": -1}))
    with pytest.raises(InputError, match=f"{name}: max_seq_length is -1, wanted a number of at least 1"):
        Engine.from_pretrained(model)


NEW = {  # as version 6 writes it
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (NEW, None),
        ({"max_seq_length": 8, "do_lower_case": False, "model_args": {"add_pooling_layer": False}}, None),
        ({"max_seq_length": None, "tokenizer_args": {}, "unpad_inputs": False, "query_length": None}, None),
        (NEW | {"processing_kwargs": {"text": {"max_length": 6, "truncation": True}}}, "processing_kwargs is {'text'"),
        (NEW | {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}}, "modality"),
        (NEW | {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask', which is not supported; run this"),
        ({"tokenizer_args": {"model_max_length": 6}}, "tokenizer_args is {'model_max_length': 6}"),
        ({"query_length": 6}, "query_length is 6"),
    ],
)
def test_settings_of_the_transformer_that_change_results_are_followed_or_refused(settings, named, tmp_path):
    write_modules(tmp_path, ["Transformer", "Pooling"])
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    if named is None:
        Engine.from_pretrained(tmp_path)
        return
    for read in (Engine.from_pretrained, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(InputError, match=f"sentence_bert_config.json: {named}"):
            read(tmp_path)


def write_modules(folder, kinds):
    """A sentence-transformers folder with these modules, each with an empty config.json but the first."""
    write_folder(folder, "Model")
    entries = [
        {"path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    for entry in entries[1:]:
        (folder / entry["path"]).mkdir()
        (folder / entry["path"] / "config.json").write_text("{}")
