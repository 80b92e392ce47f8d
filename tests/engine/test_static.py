"""The engine with static activations against a simulation in plain torch: every family, head and path.

The arithmetic is the same, but floats are added in another order, and one that differs in its last bit may take the
next code. A row in which none did agrees to the rounding of floats: ROUNDING of the largest value. In rows of a few
tokens of these tiny models that is nearly every one; the others differ by a few codes: A_FEW.
"""

import dataclasses
import json
from types import MethodType

import numpy as np
import pytest
import torch
import transformers

from pruneofa import Engine
from pruneofa.errors import InputError
from pruneofa.families import base_name
from pruneofa.formats import scales as quantization
from pruneofa.formats.manifest import MANIFEST
from pruneofa.formats.pack import pack
from pruneofa.formats.unpack import unpack
from tests.quantized import quantize_folder
from tests.tiny import half_pruned, tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, tiny_tokenizer, write_model

FAMILIES = {"Bert": tiny_bert, "DistilBert": tiny_distilbert, "Roberta": tiny_roberta, "MPNet": tiny_mpnet}
TEXTS = [
    "the great film",
    "who was king of the city by the river and the sea?",
    "bad",
    "a terrible story, not new.",
    "it was the best music of all",
    "what is the capital of the world?",
    "the queen",
    "many people had no water",
]
ROUNDING, MOST_ROWS, A_FEW = 2e-5, 0.7, 0.05
ISAS = Engine.available_isas()


def simulate(model, scales):
    """Make the quantized linears of a transformers model compute with codes; every sum is exact in float64."""
    for name, module in model.named_modules():
        if (key := base_name(f"{name}.weight")) in scales.input_scale:
            each = torch.from_numpy(scales.weight_scale[key])
            step, zero = torch.tensor(scales.input_scale[key]), scales.input_zero_point[key]
            codes = torch.round(module.weight.detach() / each[:, None])
            assert torch.equal(codes * each[:, None], module.weight)

            def forward(self, x, codes=codes, each=each, step=step, zero=zero):
                q = torch.clamp(torch.round(x / step) + zero, 0, 255) - zero
                return (q.double() @ codes.double().T).float() * (step * each) + self.bias

            module.forward = MethodType(forward, module)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a family and head on the int8 grid, and its simulation, with lively weights of which half are zero."""
    models = {}

    def make(family, head, strategy="channel"):
        key = family, head, strategy
        if key not in models:
            kind = getattr(transformers, f"{family}{head}")
            folder = write_model(tmp_path_factory.mktemp("model"), half_pruned(FAMILIES[family](kind)))
            scales = quantize_folder(folder, strategy=strategy)
            models[key] = folder, simulate(kind.from_pretrained(folder).eval(), scales)
        return models[key]

    return make


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def torch_inputs(family, texts=TEXTS, pairs=None):
    inputs = tiny_tokenizer()(texts, pairs, padding=True, return_tensors="pt")
    if family != "Bert":
        inputs.pop("token_type_ids")
    return inputs


def check(found, wanted):
    """Rows (rows, numbers) of the engine and of the simulation."""
    size = max(np.abs(row).max() for row in wanted)
    far = np.array([np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)]) / size
    assert far.max() <= A_FEW, far
    assert np.mean(far <= ROUNDING) >= MOST_ROWS, far


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(family, strategy, isa, made):
    folder, model = made(family, "Model", strategy)
    inputs = torch_inputs(family)
    engine = Engine.from_pretrained(folder, isa=isa)
    found = engine.encode(*(inputs[key].numpy() for key in ("input_ids", "attention_mask")))
    mask = inputs["attention_mask"].bool().numpy()
    wanted = run(model, inputs).last_hidden_state.numpy()
    assert engine.activations == "static"
    check([row[m] for row, m in zip(found, mask, strict=True)], [row[m] for row, m in zip(wanted, mask, strict=True)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_classes_and_spans(family, isa, made):
    inputs = torch_inputs(family)
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = [ids[:length].numpy() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
    folder, model = made(family, "ForSequenceClassification")
    check(Engine.from_pretrained(folder, isa=isa).logits(rows), run(model, inputs).logits.numpy())
    folder, model = made(family, "ForQuestionAnswering")
    output = run(model, inputs)
    wanted = torch.stack([output.start_logits, output.end_logits], -1).numpy()
    found = Engine.from_pretrained(folder, isa=isa).logits(rows)
    check(found, [row[: len(ids)] for row, ids in zip(wanted, rows, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_token_classes_masked_words_and_embeddings(family, made):
    inputs = torch_inputs(family)
    lengths = inputs["attention_mask"].sum(1).tolist()
    folder, model = made(family, "ForTokenClassification")
    scores = run(model, inputs).logits.softmax(-1).numpy()
    found = [[token["score"] for token in text] for text in Engine.from_pretrained(folder).predict(TEXTS)]
    check([np.array(row) for row in found], [s[1 : n - 1].max(-1) for s, n in zip(scores, lengths, strict=True)])
    folder, model = made(family, "ForMaskedLM")
    masked = [f"{text} [MASK]" for text in TEXTS]
    inputs = torch_inputs(family, masked)
    at = (inputs["input_ids"] == tiny_tokenizer().mask_token_id).int().argmax(1)
    scores = run(model, inputs).logits[torch.arange(len(masked)), at].softmax(-1).max(-1).values.numpy()
    found = [text[0]["score"] for text in Engine.from_pretrained(folder).predict(masked)]
    check(np.array(found)[:, None], scores[:, None])
    folder, model = made(family, "Model")
    inputs = torch_inputs(family)
    mask = inputs["attention_mask"][..., None]
    wanted = (run(model, inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    check(Engine.from_pretrained(folder).predict(TEXTS), wanted.numpy())


@pytest.mark.parametrize("isa", ISAS)
def test_a_batch_gives_what_its_texts_give_alone(isa, made):
    """Bit by bit, on AMX too: its tiles do no attention beside static activations."""
    folder, _ = made("Bert", "Model")
    engine = Engine.from_pretrained(folder, isa=isa)
    together = engine.predict(TEXTS * 5)
    np.testing.assert_array_equal(together, np.stack([engine.predict(text) for text in TEXTS] * 5))


def test_the_packed_folder_and_the_one_unpacked_from_it_give_the_same(made, tmp_path):
    folder, _ = made("Bert", "ForSequenceClassification")
    pack(folder, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    wanted = Engine.from_pretrained(folder).predict(TEXTS)
    for path in (tmp_path / "packed", tmp_path / "again"):
        engine = Engine.from_pretrained(path)
        assert engine.activations == "static" and engine.predict(TEXTS) == wanted


def test_what_activations_an_engine_has(made, tmp_path):
    folder, _ = made("Bert", "ForSequenceClassification")
    assert Engine.from_pretrained(folder, precision="fp32").activations == "float"
    pack(folder, tmp_path / "fp32", precision="fp32")
    assert Engine.from_pretrained(tmp_path / "fp32", precision="int8").activations == "dynamic"


def test_the_pooler_has_static_scales_too(made, tmp_path):
    """Other scales for the pooler alone change the classes' logits."""
    folder, _ = made("Bert", "ForSequenceClassification")
    pack(folder, tmp_path / "packed")
    before = Engine.from_pretrained(tmp_path / "packed").logits([[2, 9, 3]])
    manifest = json.loads((tmp_path / "packed" / MANIFEST).read_text())
    manifest["activations"]["scales"]["pooler.dense.weight"] = [0.5, 7]
    (tmp_path / "packed" / MANIFEST).write_text(json.dumps(manifest))
    assert np.abs(Engine.from_pretrained(tmp_path / "packed").logits([[2, 9, 3]])[0] - before[0]).max() > 1e-3


def test_a_folder_with_dead_activations_is_refused_by_the_engine(made, tmp_path):
    folder, _ = made("Bert", "ForSequenceClassification")
    scales = quantization.read(folder)
    with pytest.raises(InputError, match="constant or never observed"):
        dataclasses.replace(scales, input_scale=dict.fromkeys(scales.input_scale, 0.0))
