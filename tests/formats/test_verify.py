"""Every zero of one model is zero in another, packed or not."""

import pytest
from transformers import BertForQuestionAnswering

from pruneofa.errors import InputError
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats.pack import pack
from pruneofa.formats.verify import verify
from tests.pruned import change, make_sparse
from tests.tiny import tiny_bert, write_model

QUERY = "encoder.layer.0.attention.self.query.weight"


def test_it_passes_what_the_lock_kept(base, derived):
    report = verify(base, derived)
    assert report["ok"] and not report["revived"] and not report["missing"] and not report["missing_pooler"]
    assert report["layers"] == 13
    assert report["checked"] == 2 * (4 * 921 + 2 * 1843) + 921
    assert report["extra_zeros"] == report["negative_zeros"] == 0


def test_it_catches_one_revived_weight_and_names_the_layer(base, derived):
    def revive(tensors):
        weight = tensors["bert.encoder.layer.1.output.dense.weight"]
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[17]] = 1e-42  # a denormal is not zero

    change(derived, revive)
    report = verify(base, derived)
    assert not report["ok"]
    assert report["revived"] == [{"layer": "encoder.layer.1.output.dense.weight", "count": 1}]
    assert report["extra_zeros"] == 0


def test_it_catches_not_a_number_and_the_pooler(base, derived):
    def revive(tensors):
        weight = tensors["bert.pooler.dense.weight"]
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[:2]] = float("nan")

        tensors[f"bert.{QUERY}"].view(-1)[(tensors[f"bert.{QUERY}"].view(-1) != 0).nonzero()[0]] = float("inf")

    change(derived, revive)
    found = verify(base, derived)
    assert found["not_finite"] == [{"layer": QUERY, "count": 1}, {"layer": POOLER_WEIGHT, "count": 2}]
    assert not found["ok"] and not found["revived"] and found["extra_zeros"] == 0


def test_it_counts_extra_and_negative_zeros_and_passes(base, derived):
    def edit(tensors):
        flat = tensors[f"bert.{QUERY}"].view(-1)
        flat[(flat == 0).nonzero()[:5]] = -0.0
        flat[(flat != 0).nonzero()[:3]] = 0.0

    change(derived, edit)
    report = verify(base, derived)
    assert report["ok"] and report["extra_zeros"] == 3 and report["negative_zeros"] == 5


def test_it_lists_a_missing_pooler_and_fails_a_missing_layer(tmp_path, base):
    BertForQuestionAnswering.from_pretrained(base).save_pretrained(tmp_path / "qa")
    report = verify(base, tmp_path / "qa")
    assert report["ok"] and report["missing_pooler"]
    change(tmp_path / "qa", lambda tensors: tensors.pop(f"bert.{QUERY}"))
    report = verify(base, tmp_path / "qa")
    assert not report["ok"] and report["missing"] == [QUERY]


def test_it_refuses_another_architecture(tmp_path, base):
    tiny_bert(intermediate_size=128).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight: shape 128x32 in .*wide, but 64x32"):
        verify(base, tmp_path / "wide")


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_packed_model_is_compared_as_it_is_stored(tmp_path, precision):
    base = write_model(tmp_path / "base", make_sparse(tiny_bert()))
    pack(base, tmp_path / "packed", precision=precision)
    found, plain = verify(base, tmp_path / "packed"), verify(base, base)
    assert found["ok"] and found["checked"] == plain["checked"] > 0 and found["layers"] == plain["layers"]
    assert found["extra_zeros"] == 0 or precision == "int8"
    back = verify(tmp_path / "packed", base)  # what int8 rounds to zero is kept by the pattern
    assert back["ok"] and back["checked"] == plain["checked"]

    def revive(tensors):
        weight = tensors[f"bert.{QUERY}"].view(-1)
        weight[(weight == 0).nonzero()[:3]] = 0.5

    change(base, revive)
    pack(base, tmp_path / "revived", precision=precision)
    found = verify(tmp_path / "packed", tmp_path / "revived")
    assert not found["ok"] and found["revived"][0] == {"layer": QUERY, "count": 3}
