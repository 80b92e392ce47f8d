"""What is not finite is refused: weights by name when a folder is loaded, and never a score that is NaN."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa.engine.engine import Engine
from pruneofa.errors import InputError
from pruneofa.formats.pack import pack
from tests.tiny import write_folder

HEADS = {
    "ForSequenceClassification": ("classifier.weight", "film"),
    "ForTokenClassification": ("classifier.weight", "film"),
    "ForQuestionAnswering": ("qa_outputs.weight", {"question": "who", "context": "a film"}),
    "ForMaskedLM": ("cls.predictions.transform.dense.weight", "a [MASK]"),
    "Model": ("bert.encoder.layer.1.output.LayerNorm.weight", "film"),
}


def change(folder, name, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", "classifier.bias",
                                  "bert.embeddings.word_embeddings.weight"])  # fmt: skip
def test_weights_that_are_not_finite_are_named(name, bad, precision, tmp_path):
    folder = write_folder(tmp_path / "model")
    change(folder, name, lambda tensor: tensor.reshape(-1).__setitem__(5 % tensor.size, bad))
    for attempt in (
        lambda: Engine.from_pretrained(folder, precision=precision),
        lambda: pack(folder, tmp_path / "packed", precision=precision),
    ):
        with pytest.raises(InputError, match=f"{name} has 1 NaN or infinite values; wanted finite numbers"):
            attempt()


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("head", list(HEADS))
def test_a_score_is_never_nan(head, precision, kernels, tmp_path):
    folder = write_folder(tmp_path, head)
    name, text = HEADS[head]
    assert np.isfinite(flat(Engine.from_pretrained(folder, precision=precision).predict(text))).all()
    # LayerNorm, in the head of a masked-LM, makes finite numbers of what it cannot square.
    for value in (3e38, 1e22) if head == "ForMaskedLM" else (3e38,):
        change(folder, name, lambda tensor, value=value: tensor.__setitem__(..., value))
        engine = Engine.from_pretrained(folder, precision=precision)
        with (
            np.errstate(all="ignore"),
            pytest.raises(InputError, match="its result is NaN or infinite, wanted numbers"),
        ):
            engine.predict(text)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "ForMaskedLM"])  # its scores are computed later
def test_a_served_score_is_never_nan(head, tmp_path):
    from pruneofa.serve.model import Model

    folder = write_folder(tmp_path, head)
    name, item = HEADS[head]
    change(folder, name, lambda tensor: tensor.__setitem__(..., 3e38))
    model = Model("m", Engine.from_pretrained(folder, precision="fp32"))
    sequences = model.tokenize([item], ["inputs"], truncate=True, side="right", prompt=None)
    with np.errstate(all="ignore"), pytest.raises(InputError, match="its result is NaN or infinite, wanted numbers"):
        model.compute(sequences, [False] * len(sequences))


def flat(found) -> list[float]:
    if isinstance(found, np.ndarray):
        return found.reshape(-1).tolist()
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [found] if isinstance(found, float) else [number for value in inner for number in flat(value)]


def test_the_scores_of_a_finite_model_are_json(tmp_path):
    found = Engine.from_pretrained(write_folder(tmp_path)).predict(["film", ("a", "b")])
    assert json.dumps(found, allow_nan=False)
