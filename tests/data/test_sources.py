"""What text sources yield, and what is wrong with them, before any of it is tokenized."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pruneofa.data import articles, sources
from pruneofa.errors import InputError
from tests.data.task_files import not_utf8

ARTICLES = ["First article.\nIts second line.", "Zweiter Artikel: äöü.", "Third."]
TEXT = "\n\n".join(ARTICLES) + "\n"


def read(path, column="text"):
    reader = sources.find(str(path), None, None, streaming=False)[0]
    reader.fingerprint(column)
    return [text for text, _ in reader.articles(column)]


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_txt_articles_are_separated_by_blank_lines(tmp_path, name):
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    pack = packers.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(TEXT.encode()))
    assert read(tmp_path / name) == ARTICLES


def test_several_zst_frames_are_one_file(tmp_path):
    half = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(half(TEXT[:20].encode()) + half(TEXT[20:].encode()))
    assert read(tmp_path / "a.txt.zst") == ARTICLES


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_txt_without_blank_lines_has_one_article_per_line(tmp_path, ending):
    (tmp_path / "a.txt").write_bytes(("\ufeffone.\ntwo.\nthree.\n\n".replace("\n", ending)).encode())
    assert read(tmp_path / "a.txt") == ["one.", "two.", "three."]


def test_jsonl_and_parquet_take_any_column_and_skip_nulls(tmp_path):
    rows = [{"body": "one", "id": 1}, {"body": None, "id": 2}, {"body": " two ", "id": 3}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_parquet(tmp_path / "a.parquet", id=[1, 2, 3], body=["one", None, " two "])
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, "body") == ["one", "", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_an_article_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(articles, "LONGEST", 1000)
    for length in (1000, 1001):
        text = "x" * length
        whole = {"a.txt": text, "a.jsonl": json.dumps({"body": text}), "a.csv": f"body\n{text}\n"}[name]
        (tmp_path / name).write_text(whole)
        if length == 1000:
            assert read(tmp_path / name, "body") == [text]
            continue
        with pytest.raises(InputError, match=rf"{name}: an article of 1,001 characters, wanted at most 1,000; divide"):
            read(tmp_path / name, "body")


def test_the_rows_of_a_task_are_text_too(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'body,label\r\n"one, and\r\n ""two""",1\r\n three ,0\r\n')
    (tmp_path / "a.tsv").write_text('label\tbody\n1\tan "inch\n0\ttwo\n')
    assert read(tmp_path / "a.csv", "body") == ['one, and\r\n "two"', "three"]
    assert read(tmp_path / "a.tsv", "body") == ['an "inch', "two"]
    assert len(set(sources.Files((tmp_path / "a.csv", tmp_path / "a.tsv")).fingerprint("body"))) == 2


def test_a_folder_is_read_in_the_order_of_names_and_progress_adds_up_to_its_size(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.jsonl", "notes.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n" if name == "c.jsonl" else name)
    reader = sources.find(str(tmp_path), None, None, streaming=False)[0]
    articles = list(reader.articles("text"))
    assert [text for text, _ in articles] == ["a/1.txt", "b/2.txt", "c.jsonl"]
    assert sum(consumed for _, consumed in articles) == reader.size


def test_relative_paths_start_at_the_data_root(tmp_path):
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "a.txt").write_text("x")
    (files,) = sources.find("wiki", None, tmp_path, streaming=False)
    assert files.paths == (tmp_path / "wiki" / "a.txt",)


def test_the_fingerprint_is_of_the_text_not_of_its_name_or_compression(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "c.txt").write_text(TEXT + "more")
    prints = [sources.Files((tmp_path / n,)).fingerprint("text") for n in ("a.txt", "b.txt.gz", "c.txt")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff\xfe bad", r"a\.txt: not UTF-8 at byte 5 \(0xff\); convert"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3\xa4 ok \xe9", rf"not UTF-8 at byte {(1 << 20) + 5} \(0xe9\)"),
        ("a.txt", b"cut off \xc3", r"not UTF-8 at byte 8 \(0xc3\)"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl: not UTF-8 at byte 10"),
        ("a.txt", b"", r"a\.txt: this file is empty"),
        ("a.txt", b" \n \n", r"a\.txt: no text in this file"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl: no text in this file"),
        ("a.jsonl", b'{"text": 3}\n', r"column 'text' holds int, wanted strings"),
        ("a.jsonl", b'{"txt": "a", "id": 1}\n', r"no column 'text', it has txt, id; did you mean 'txt'\?"),
        ("a.jsonl", b'{"text": "a \\ud800"}\n', r"a\.jsonl line 1: column 'text' has half of a surrogate pair, which"),
        ("a.txt", b"text\n\n\0\1", r"a\.txt: NUL at byte 6, which no text has; convert the file"),
        ("a.jsonl", b"[1]\n", r"line 1 is a JSON list, wanted an object; write one object per line"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', r"line 2 is not JSON"),
        ("a.txt.gz", b"not gzip", r"damaged or not gz data"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], r"damaged or not gz data"),
        ("a.txt.zst", b"not zstandard", r"damaged or not zst data"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable parquet file"),
        ("a.docx", b"a,b", r"a\.docx: unsupported kind of file; wanted \.parquet, \.jsonl, \.txt, \.csv or \.tsv"),
        ("a.csv", b"label,txt\n1,a\n", r"a\.csv: no column 'text', it has label, txt; did you mean 'txt'\?"),
        ("a.csv", b"label,text\n1,a\n2,b,c\n", r"a\.csv: line 3 has 3 fields, the header 2"),
        ("a.csv", b'label,text\n1,"a', r"a\.csv: line 2: unexpected end of data; write the file again"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_stream_finds_the_byte_that_is_not_utf8_without_a_first_pass(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" * 9 + b"bad \xff")
    with pytest.raises(InputError, match=r"not UTF-8 at byte 58"):
        list(sources.Files((tmp_path / "a.txt",)).articles("text"))


def test_parquet_takes_every_type_of_string(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        write_parquet(tmp_path / "a.parquet", body=pa.array(["one", None, "two", "one"], kind))
        assert read(tmp_path / "a.parquet", "body") == ["one", "", "two", "one"], kind


def test_damage_in_the_pages_of_parquet_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=[f"an article {n}" for n in range(500)])
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 200 + path.read_bytes()[204:])
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file \(.*\); write it again") as error:
        read(path)
    assert "\n" not in str(error.value)
    write_parquet(path, text=not_utf8())
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file \('utf-8' codec can't decode"):
        read(path)


def test_another_delimiter_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\none, two;1\n")
    with pytest.raises(
        InputError, match=r"a\.csv: no column 'text': the delimiter looks like ';', wanted ',' in \.csv"
    ):
        read(tmp_path / "a.csv")


def test_bad_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", id=[1], text=["a"])
    with pytest.raises(InputError, match=r"no column 'texts', it has id, text; did you mean 'text'\? set corpus"):
        read(tmp_path / "a.parquet", "texts")
    with pytest.raises(InputError, match=r"column 'id' is int64, wanted strings"):
        read(tmp_path / "a.parquet", "id")
    write_parquet(tmp_path / "b.parquet", text=pa.array([], pa.string()))
    with pytest.raises(InputError, match=r"b\.parquet: this file has no rows"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "no/where/here", "wiki.parquet", "a.txt.gz", "~/nowhere"])
def test_a_path_that_cannot_be_a_hub_id_is_missing(tmp_path, name):
    with pytest.raises(InputError, match=r"no such file or folder; check corpus\.source"):
        sources.find(name, None, tmp_path, streaming=False)


def test_a_folder_without_text_files(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(InputError, match=r"this folder has no \.parquet, \.jsonl, \.txt, \.csv or \.tsv"):
        sources.find(str(tmp_path), None, None, streaming=False)


def test_a_hub_id_is_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repo"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00001.parquet", id=[1, 2, 3], text=["a", None, "c"])
    for streaming in (False, True):
        hub = sources.Hub(str(folder), None, streaming)
        assert list(hub.articles("text")) == [("a", 1), ("", 1), ("c", 1)]
        with pytest.raises(InputError, match=r"no column 'body', it has id, text"):
            list(hub.articles("body"))
    hub = sources.Hub(str(folder), None)
    assert hub.fingerprint("text") == sources.Hub(str(folder), None).fingerprint("text")


def test_a_typo_in_a_path_is_no_hub_data_set(tmp_path):
    (tmp_path / "wiki").mkdir()
    for typo in ("wiki/trian", "./wikki", "a/b/c"):
        with pytest.raises(InputError, match="no such file or folder; check corpus.source"):
            sources.find(typo, None, tmp_path, streaming=False)
    with pytest.raises(InputError, match="^data_root .*none: no such folder"):
        sources.find("wiki", None, tmp_path / "none", streaming=False)


def test_a_hub_id_that_cannot_be_had_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (hub,) = sources.find("nobody/nothing", "20231101.en", None, streaming=False)
    assert hub == sources.Hub("nobody/nothing", "20231101.en", False)
    with pytest.raises(InputError, match=r"corpus source 'nobody/nothing': no such local file or folder, and") as error:
        hub.fingerprint("text")
    assert "\n" not in str(error.value)
