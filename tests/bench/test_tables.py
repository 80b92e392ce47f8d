"""What is printed, drawn and said of a record."""

import json

import pytest

from pruneofa.bench import tables
from pruneofa.bench.models import Case
from pruneofa.bench.peers import PRUNEOFA
from pruneofa.errors import InputError
from tests.bench.records import limits, record, runner


def test_a_peer_that_is_off_is_marked_and_said():
    off = runner("openvino-int8", 6, verified=False, error=0.4)
    found = record(runner(PRUNEOFA, 2), off, left_out={"openvino": "cannot be limited to avx2"})
    assert "openvino-int8 (!)" in tables.aligned(tables.case_rows(found["rows"][0]))
    said = "\n".join(tables.remarks(found))
    assert "(!) openvino-int8: its output error is 0.4, tolerance 0.1; timed nevertheless" in said
    assert "left out: openvino: cannot be limited to avx2" in said and "3.00 times as fast as openvino-int8" in said


def test_a_busy_machine_and_missing_torch_are_said():
    found = record(runner(PRUNEOFA, 2, verified=None, error=None), machine={"load_average": [1.5, 1], "cpus": 2})
    said = "\n".join(tables.remarks(found))
    assert "outputs were not verified" in said and "measure again when idle" in said and "no peer" in said


def test_ceilings_are_said_and_so_is_a_machine_that_changed():
    said = tables.remarks(record(runner(PRUNEOFA, 2)))
    assert said[0].endswith(
        "0.5 x 10^12 operations/s of the dense model, 4 % of the machine's peak; no peer to compare with"
    )
    assert said[1:] == [
        "1x128: before and after, 2 threads reached: arithmetic 14, 14 x 10^12 operations/s; L2 100, 100 GB/s; "
        "memory 20, 20 GB/s"
    ]
    said = tables.remarks(record(runner(PRUNEOFA, 2), ceilings=limits(before=14, after=10)))
    assert said[0].count("4 % of") and said[2] == (
        "1x128: the machine changed while this row was measured (arithmetic of one thread 14 before, "
        "10 x 10^12 operations/s after): measure again"
    )
    assert (
        "memory of one thread 10 before, 20 GB/s after"
        in tables.remarks(record(runner(PRUNEOFA, 2), ceilings=limits(memory=10)))[2]
    )
    half = tables.remarks(record(runner(PRUNEOFA, 2), ceilings=limits(after=None)))
    assert len(half) == 2 and "1x128: before, 2 threads reached: arithmetic 14 x" in half[1]


def test_a_record_of_an_earlier_version_keeps_its_share():
    old = record(runner(PRUNEOFA, 2))
    del old["rows"][0]["ceilings"]
    old["rows"][0]["share_of_peak"] = 0.29
    assert tables.speed_table([old]).splitlines()[2].endswith("| 29 % |")
    assert ["29 %" in line for line in tables.remarks(old)] == [True]


def test_columns_are_aligned_and_never_folded():
    text = tables.aligned([{"a": "x" * 100, "b": 1}, {"a": "y", "b": 22}])
    assert [len(line) for line in text.splitlines()] == [104, 104, 104, 0]
    assert tables.aligned([]) == ""


def test_the_table_of_the_readme_comes_from_records(tmp_path):
    mixed = Case("32x8-128", (8, 128))
    found = [
        record(runner(PRUNEOFA, 2), runner("openvino-int8", 7), runner("deepsparse", 9)),
        record(runner(PRUNEOFA, 40), runner("onnxruntime-int8", 130), case=mixed, isa="avx2", capped=True),
    ]
    folder = tmp_path / "2026-11-30-zen5-engine"
    folder.mkdir()
    for index, one in enumerate(found):
        (folder / f"{index}.json").write_text(json.dumps(one))
    text = tables.speed_table(tables.read_records(sorted(folder.iterdir())))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    link = "[zen5](../benchmarks/records/2026-11-30-zen5-engine/README.md)"
    assert lines[2] == ["BERT-Base, 90 %, int8", "amx", link, "1 × 128 tokens", "2 ms", "openvino-int8, 7 ms",
                        "**3.50×**", "4.50×", "4 %"]  # fmt: skip
    assert lines[3][1:7] == ["avx2 (capped)", link, "2 × 8–128 tokens", "50 seq/s",
                             "onnxruntime-int8, 15.4 seq/s (one padded batch)", "**3.25×**"]  # fmt: skip
    (tmp_path / "0.json").write_text("{}")
    with pytest.raises(InputError, match="wanted a file that `pruneofa bench --json` or --record wrote"):
        tables.read_records([tmp_path / "0.json"])


@pytest.mark.parametrize(
    ("named", "title"),
    [
        ({"family": "bert", "architecture": None}, "BERT-Base"),
        ({"family": "mpnet", "architecture": None}, "MPNet-Base"),  # config.json without architectures
        ({"family": "roberta", "architecture": "RobertaModel"}, "12 layers of 768"),
        ({"architecture": "BertModel"}, "BERT-Base"),  # of a version that did not write the family
        ({"architecture": "MPNetForMaskedLM"}, "MPNet-Base"),
        ({"architecture": None}, "12 layers of 768"),
    ],
)
def test_a_model_is_named_by_its_family_and_its_size(named, title):
    found = record(runner(PRUNEOFA, 2))
    del found["models"][0]["family"]
    found["models"][0] |= named
    assert tables.speed_table([found]).splitlines()[2].startswith(f"| {title}, 90 %")


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_a_picture(tmp_path, suffix):
    pytest.importorskip("altair", reason="altair draws it, and is not installed")
    tables.picture(record(runner(PRUNEOFA, 2), runner("torch-int8", 8)), tmp_path / f"p{suffix}")
    assert "torch-int8" in (tmp_path / f"p{suffix}").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"wanted a name that ends in \.svg or \.html"):
        tables.check_picture(tmp_path / "p.gif")
