"""A text gets the same bits in any batch, order and number of threads, from every head."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import Engine
from pruneofa.engine import engine as engine_module
from pruneofa.engine.heads import Embedding
from pruneofa.errors import InputError
from tests.tiny import WORDS, half_pruned, tiny_bert, tiny_distilbert, tiny_mpnet, tiny_roberta, write_model

HEADS = {
    "bert": (tiny_bert, "BertForSequenceClassification"),
    "roberta": (tiny_roberta, "RobertaForSequenceClassification"),
    "mpnet": (tiny_mpnet, "MPNetForSequenceClassification"),
    "tokens": (tiny_distilbert, "DistilBertForTokenClassification"),
    "masks": (tiny_bert, "BertForMaskedLM"),
    "embedding": (tiny_bert, "BertModel"),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """(engine of one thread, of three, of three in one lane) of a head, loaded when first asked for."""
    loaded = {}

    def load(head):
        if head not in loaded:
            family, name = HEADS[head]
            folder = write_model(tmp_path_factory.mktemp(head), half_pruned(family(getattr(transformers, name))))
            ways = ((1, None), (3, None), (3, 1))
            loaded[head] = [Engine.from_pretrained(folder, threads=threads, lanes=lanes) for threads, lanes in ways]
        return loaded[head]

    with pytest.MonkeyPatch.context() as patch:  # for so small a model no second thread would pay
        patch.setattr(engine_module, "usable_threads", lambda quota: 3)
        patch.setattr(engine_module, "meeting_cost", lambda *_: 0.0)
        yield load


@settings(max_examples=15)
@given(
    head=st.sampled_from(list(HEADS)),
    texts=st.lists(st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=24), min_size=2, max_size=9),
    batch_size=st.integers(1, 9),
    data=st.data(),
)
def test_any_batch_order_and_threads_give_the_same_bits(engines, head, texts, batch_size, data):
    one, *others = engines(head)
    assert [engine.plan([9]).width for engine in others] == [3, 3]
    lines = [" ".join([*words, "[MASK]"] if head == "masks" else words) for words in texts]
    order = data.draw(st.permutations(range(len(lines))))
    wanted = [one.predict(line) for line in lines]
    for several in others:
        found = several.predict([lines[index] for index in order], batch_size=batch_size)
        for index, result in zip(order, found, strict=True):
            if head == "embedding":
                np.testing.assert_array_equal(result, wanted[index])
            else:
                assert result == wanted[index]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_last_norm_too_large_for_float32_is_an_error_and_never_a_nan(tmp_path, precision):
    model = tiny_bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        model.bert.encoder.layer[-1].output.LayerNorm.weight.mul_(3e38)
    engine = Engine.from_pretrained(write_model(tmp_path, model), precision=precision)
    with pytest.raises(InputError, match="NaN or infinite, wanted numbers: the model's weights are too large"):
        engine.predict("the great film")
    with pytest.raises(InputError, match="sequence 1 of the batch: its result is NaN or infinite"):
        engine.predict(["the", "the great film of the king"])


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize(("norm", "layer"), [("embeddings", 0), ("encoder.layer.0.output", 1)])
def test_a_norm_too_large_for_the_layer_after_it_is_refused_when_loaded(tmp_path, precision, norm, layer):
    model = tiny_bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        model.bert.get_submodule(f"{norm}.LayerNorm").weight.mul_(3e38)
    folder = write_model(tmp_path, model)
    with pytest.raises(InputError, match=rf"encoder\.layer\.{layer}: its query can reach .*too large"):
        Engine.from_pretrained(folder, precision=precision)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("attention.self.query", "query"), ("attention.self.key", "key"), ("attention.self.value", "value"),
        ("attention.output.dense", "attention_output"), ("intermediate.dense", "intermediate"),
        ("output.dense", "output"), ("attention.output.LayerNorm", "intermediate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weights_that_can_overflow_inside_are_refused_when_loaded(tmp_path, precision, module, said, parameter):
    """In int8 an overflow inside, such as infinite scores, would end as a finite answer that is wrong."""
    model = tiny_bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        getattr(model.bert.encoder.layer[1].get_submodule(module), parameter).add_(1e20)
    folder = write_model(tmp_path, model)
    with pytest.raises(
        InputError, match=rf"encoder\.layer\.1: its {said} can reach \d.*wanted at most 1e\+15.*too large"
    ):
        Engine.from_pretrained(folder, precision=precision)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_positions_that_overflow_are_refused_though_a_short_text_does_not_reach_them(tmp_path, precision):
    """In int8 a token of NaN has finite codes: the first token, which is classified, would be finite and wrong."""
    model = tiny_bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        rows = model.bert.embeddings.position_embeddings.weight[4:]
        rows[:, 0::2], rows[:, 1::2] = 2.5e38, -2.5e38
    with pytest.raises(InputError, match=r"embeddings: its embeddings can reach 2\.5e\+38, wanted at most 1e\+15"):
        Engine.from_pretrained(write_model(tmp_path, model), precision=precision)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("table", ["word", "position", "token_type"])
def test_embeddings_whose_squares_overflow_are_refused_when_loaded(tmp_path, precision, table):
    """LayerNorm divides by an infinite deviation: every such token would be the same finite vector."""
    model = tiny_bert(transformers.BertForSequenceClassification)
    with torch.no_grad():
        model.bert.embeddings.get_submodule(f"{table}_embeddings").weight.mul_(1e22)
    with pytest.raises(InputError, match="embeddings: its embeddings can reach .*too large"):
        Engine.from_pretrained(write_model(tmp_path, model), precision=precision)


def test_a_vector_whose_square_overflows_is_normalized():
    head = Embedding("mean", normalize=True, dimensions=None)
    vector = head.reduce(np.full((3, 4), 1e30, np.float32), None)
    np.testing.assert_allclose(vector, 0.5, rtol=1e-6)
    assert vector.dtype == np.float32
