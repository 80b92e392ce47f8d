"""A mistake of the user's costs one line and exit code 2, and leaves nothing behind."""

import errno
import json
import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForPreTraining, GPT2Config, GPT2LMHeadModel

from pruneofa.errors import InputError
from tests.cli.conftest import program, write_recipe
from tests.report.example_run import example_results
from tests.small import write_text
from tests.tiny import tiny_bert, tiny_distilbert, write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    write_recipe(root)
    return root


@pytest.fixture
def root(source, tmp_path, monkeypatch):
    """A copy of the small recipe's files, in the working directory."""
    shutil.copytree(source, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PRUNEOFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def complaint(root, refused):
    """The one line, after a check that nothing was written."""

    def line(*arguments, run=True):
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        where = ["run", "recipe.yaml", "--set", "model=model", "--set", "data_root=."] if run else []
        said = refused(*where, *arguments)
        assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        return said

    return line


def settings(*overrides):
    return [part for override in overrides for part in ("--set", override)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.final=1"], "prune.final is 1"),
        (["prune.final=-0.5"], "prune.final is -0.5"),
        (["prune.stop=4"], "stop is 4"),
        (["prune.interval=0"], "prune.interval is 0"),
        (["prune.end=10", "prune.stop=10"], "end is 10 but must be below steps (10)"),
        (["prune.end=9", "prune.stop=9", "prune.warmup=0.1"], "end - begin is 9 of 10 steps, which leaves none"),
        (["prune.pattern=2:4"], "final is 0.9 but pattern 2:4 gives 0.5; set prune.final to that"),
        (["tasks.mine.epoch=1"], "unknown key 'tasks.mine.epoch'; did you mean 'epochs'?"),
        (["distil.hard=1"], "unknown key 'distil'; did you mean 'distill'?"),
        (["prune.final"], "wanted key=value"),
        (["model=./nowhere"], "model ./nowhere: no such folder"),
        (["prune.micro_batch=3"], "batch is 8, which"),
        (["corpus.max_length=65"], "corpus.max_length is 65 but model has 64 positions"),
        (["prune.skip=['(']"], "skip: '(' is not a regular expression"),
        (["tasks.mine.teacher=./none"], "model ./none: no such folder"),
        (["corpus.source=none.txt"], "none.txt: no such file or folder"),
        (["tasks.mine.data=none.csv"], "none.csv: no such file"),
    ],
)
def test_a_setting_that_cannot_be(complaint, overrides, message):
    assert message in complaint(*settings(*overrides))


def test_a_recipe_that_is_not_there(complaint):
    assert "none.yaml: no such recipe file" in complaint("run", "none.yaml", run=False)
    assert "no-such-row: no such recipe; wanted a file, or one of bert-" in complaint("run", "no-such-row", run=False)


def test_the_program_says_the_same(root):
    said = program("run", root / "recipe.yaml", "--out", root / "out", "--set", "prune.final=1")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("pruneofa: error: recipe: prune.final is 1") and said.err.count("\n") == 1
    assert not (root / "out").exists()


def test_a_rate_above_the_peak_is_only_a_warning(root, call):
    changed = settings("prune={steps: 100, warmup: 0.2, end: 60, stop: 80}", "tasks.mine.epochs=0")
    said = call("run", "recipe.yaml", *changed)
    assert said.code == 2  # of the epochs, so that nothing runs
    changed = settings("prune={steps: 100, warmup: 0.2, end: 60, stop: 80}", "model=./none")
    warning, error = call("run", "recipe.yaml", *changed).err.splitlines()
    assert warning.startswith("pruneofa: warning: prune: rewinding raises the learning rate to 2.00 times lr")
    assert error.startswith("pruneofa: error: model ./none")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.pattern=1:4", "prune.final=0.75"], "shape 32x62 (out x in) does not divide into 1:4"),
        (["prune.pattern=4x1"], "shape 62x32 (out x in) does not divide into 4x1"),
    ],
)
def test_a_pattern_that_does_not_divide(root, complaint, overrides, message):
    write_model(root / "odd", tiny_bert(BertForPreTraining, intermediate_size=62))
    assert message in complaint(*settings("model=odd", *overrides))


def test_models_that_cannot_be_pruned(root, complaint):
    write_model(root / "empty", tiny_bert(BertForPreTraining, num_hidden_layers=0))
    assert "no Linear layer" in complaint(*settings("model=empty", "distill.hidden=0"))
    small = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=200, n_positions=32)
    write_model(root / "gpt2", GPT2LMHeadModel(small))
    assert "model_type is 'gpt2'" in complaint(*settings("model=gpt2"))
    write_model(root / "distil", tiny_distilbert())
    assert "set corpus.nsp=false" in complaint(*settings("model=distil"))
    for verb in (["inspect", "gpt2"], ["verify", "gpt2", "model"]):
        assert "no weight named encoder.layer.N" in complaint(*verb, run=False)
    assert "num_hidden_layers is 0 in config.json" in complaint("inspect", "empty", run=False)


def documents(path, *texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


def test_corpora_that_give_no_examples(root, complaint):
    documents(root / "blank.jsonl", "", "   ", "\n")
    assert "blank.jsonl: no text" in complaint(*settings("corpus.source=blank.jsonl"))
    documents(root / "one.jsonl", "the king is good. the queen is bad. " * 20)
    assert "1 article, but" in complaint(*settings("corpus.source=one.jsonl"))
    documents(root / "body.jsonl", "the king is good.", column="body")
    line = complaint(*settings("corpus.source=body.jsonl"))
    assert "no column 'text', it has body" in line and "corpus.column" in line
    pq.write_table(pa.table({"text": [1, 2]}), root / "numbers.parquet")
    assert "column 'text' is int64, wanted strings" in complaint(*settings("corpus.source=numbers.parquet"))
    (root / "latin.txt").write_bytes("le roi était là\n\nla reine\n".encode("latin-1"))
    assert "latin.txt" in (line := complaint(*settings("corpus.source=latin.txt"))) and "UTF-8" in line


def test_an_empty_shard_among_good_ones(root, complaint):
    shards = root / "shards"
    for number in range(2):
        write_text(shards / f"{number}.jsonl", documents=8, seed=number)
    (shards / "2.jsonl").write_bytes(b"")
    assert "2.jsonl: this file is empty; remove it" in complaint(*settings("corpus.source=shards"))
    (shards / "2.jsonl").unlink()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), shards / "2.parquet")
    assert "2.parquet: " in complaint(*settings("corpus.source=shards"))


ROWS = "sentence,verdict\n" + "the king is good,good\nthe queen is bad,bad\n" * 20


@pytest.mark.parametrize(
    ("train", "validation", "overrides", "message"),
    [
        (ROWS, ROWS, ["tasks.mine.label=verdit"], "no label column 'verdit' among"),
        (ROWS, ROWS, ["tasks.mine.text=sentense"], "no text column 'sentense' among"),
        (ROWS, ROWS + "a river,neutral\n", [], "label 'neutral' in validation row 41 is unknown; wanted one of"),
        (
            ROWS.replace(",bad", ",good"),
            ROWS.replace(",bad", ",good"),
            [],
            "all 40 training rows have the label 'good', wanted at least two",
        ),
        (ROWS + "a river,\n", ROWS, [], "label column 'verdict' is empty in row 41"),
        ("sentence,verdict\n", ROWS, [], "the file has no rows"),
        ("sentence,verdict\na,b,c\n", ROWS, [], "line 2 has 3 fields, the header 2"),
    ],
)
def test_task_files(root, complaint, train, validation, overrides, message):
    (root / "task.csv").write_text(train)
    (root / "validation.csv").write_text(validation)
    assert message in complaint(*settings(*overrides))


def test_task_files_of_transfer(root, complaint, call):
    (root / "task.csv").write_text(ROWS)
    start = ["transfer", "model", "out"]
    columns = ["--text", "sentence", "--label"]
    assert "no task: give --task" in complaint(*start, run=False)
    assert "--task mine: not one of sst2" in complaint(*start, "--task", "mine", run=False)
    assert "task name '../up'" in complaint(*start, "--task", "../up", run=False)
    data = ["--data", "task.csv", *columns, "verdict", "--validation", "task.csv", "--max-length", "32"]
    before = sorted(root.rglob("*"))
    said = call(*start, *data, "--teacher", "./none")
    notes = said.err.splitlines()
    assert said.code == 2 and len(notes) == 3 and sorted(root.rglob("*")) == before
    assert notes[0].startswith("locking the pattern of model: 0.00 %")
    assert notes[1].startswith("pruneofa: warning: model has no zeros to keep")
    assert "error: model ./none: no such folder" in notes[2]


def test_answers_that_do_not_stand_where_they_say(root, complaint):
    (root / "squad").mkdir()
    rows = {
        "id": ["a", "b", "c"],
        "question": ["who is good"] * 3,
        "context": ["the king is good"] * 3,
        "answers": [{"text": ["king"], "answer_start": [start]} for start in (4, 5, 9)],
    }
    for split in ("train", "validation"):
        pq.write_table(pa.table(rows), root / "squad" / f"{split}.parquet")
    line = complaint(*settings("tasks={squad: {data: squad, max_length: 48, stride: 8}}"))
    assert "2 of 3 answers are not found in their context at answer_start, first 'b' (row 2)" in line
    assert "set tasks.squad.skip_bad_answers=true" in line


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_half(folder):
    from safetensors.torch import load_file, save_file

    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if "layer.1." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def half_config(folder):
    file = folder / "config.json"
    file.write_text(file.read_text()[:100])


@pytest.mark.parametrize("damage", [truncated, without_weights, without_half, half_config])
def test_a_model_folder_that_is_half_written(root, complaint, damage):
    damage(root / "model")
    line = complaint()
    assert line.startswith("model model: ")
    if damage in (truncated, without_weights):
        assert "model" in complaint("inspect", "model", run=False)
        assert "model" in complaint("verify", "model", "model", run=False)


class Trap:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("verb", ["run", "inspect", "verify", "transfer", "evaluate"])
def test_a_pickle_with_code_in_it_is_not_run(root, complaint, verb):
    (root / "model" / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Trap()}, root / "model" / "pytorch_model.bin")
    task = ["--data", "task.csv", "--text", "sentence", "--label", "verdict", "--max-length", "32"]
    arguments = {
        "run": [],
        "inspect": ["inspect", "model"],
        "verify": ["verify", "model", "model"],
        "transfer": ["transfer", "model", "out", *task, "--teacher", "model"],
        "evaluate": ["evaluate", "model", *task],
    }[verb]
    hints = ("convert it with: python", "contains more than weights and could run code")
    assert any(hint in complaint(*arguments, run=verb == "run") for hint in hints)
    assert not (root / "sprung").exists()
    with open(root / "model" / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Trap()}, file)
    assert any(hint in complaint(*arguments, run=verb == "run") for hint in hints)
    assert not (root / "sprung").exists()


def test_results_that_are_none(root, complaint):
    assert "model/results.json: no such file; give the folder of a finished run, or its results.json" in complaint(
        "table", "model", run=False
    )
    (root / "results.json").write_text('{"recipe": ')
    assert "not valid JSON" in complaint("table", "results.json", run=False)
    (root / "results.json").write_text("{}")
    assert "recipe is missing; wanted a results.json that pruneofa wrote" in complaint(
        "table", "results.json", run=False
    )


def test_results_of_numbers_that_no_float_holds(root, complaint):
    results = example_results() | {"sizes": {"dense_fp32": 10**400}}
    (root / "results.json").write_text(json.dumps(results))
    line = complaint("table", root, run=False)
    assert "sizes.dense_fp32 is 1000" in line and line.endswith("wanted a number of at least 0")


NOBODY = "~nosuchuser/x"
TASK = ["--text", "sentence", "--label", "verdict", "--max-length", "32"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["transfer", "model", "out", "--data", NOBODY, *TASK],
        ["transfer", "model", "out", "--data", "task.csv", "--validation", NOBODY, *TASK],
        ["transfer", "model", "out", "--data", "task.csv", "--data-root", NOBODY, *TASK],
        ["prune", "model", "out", "--corpus.source", NOBODY],
        ["inspect", NOBODY],
        ["verify", "model", NOBODY],
        ["pack", NOBODY, "out"],
        ["export", NOBODY, "out", "--to", "onnx"],
        ["predict", "model", NOBODY, "--out", "out", "--text", "sentence"],
        ["evaluate", NOBODY, "--data", "task.csv", *TASK],
        ["quantize", NOBODY, "out", "--data", "task.csv", *TASK, "--ptq"],
    ],
)
def test_a_home_folder_that_is_not_there(root, call, arguments):
    said = call(*arguments)
    last = f"pruneofa: error: {NOBODY}: there is no home folder of that name; give the whole path\n"
    assert said.code == 2 and said.err.endswith(last), said.err
    assert "Traceback" not in said.err and not (root / "out").exists()


@pytest.mark.parametrize("kind", ["system", "library"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(root, refused, call, monkeypatch, kind):
    """The disk fills up while the sparse model is saved: teacher and checkpoints survive."""
    from safetensors import SafetensorError
    from transformers import BertForPreTraining

    save = BertForPreTraining.save_pretrained
    message = f"{os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"
    error = (
        OSError(errno.ENOSPC, message) if kind == "system" else SafetensorError(f"Error while serializing: {message}")
    )

    def full(model, folder, **options):
        if "sparse" in str(folder):
            save(model, folder, **options)
            raise error
        save(model, folder, **options)

    monkeypatch.setattr(BertForPreTraining, "save_pretrained", full)
    command = ["run", "recipe.yaml", "--out", "out", *settings("tasks={}", "teacher.steps=2", "prune.lr=1e-4")]
    said = call(*command)
    assert said.code == 3
    assert [line for line in said.err.splitlines() if line.startswith("pruneofa: ")] == [said.err.splitlines()[-1]]
    assert "pruneofa: error: disk full" in said.err and "Traceback" not in said.err
    assert not (root / "out" / "sparse").exists()
    assert [path.name for path in (root / "out").iterdir() if path.name.startswith(".s")] == []
    if kind == "library":
        return
    teacher = (root / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.chdir(root)
    said = call(*command)
    assert said.code == 0, said.err
    assert (root / "out" / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert (root / "out" / "sparse" / "model.safetensors").exists()


def full_disk_while(error):
    def raising(*_):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise error from None

    return raising


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        full_disk_while(InputError("cache: the disk is full after 5 tokens")),
        full_disk_while(RuntimeError("could not write")),
    ],
    ids=["quota", "corpus", "cause"],
)
def test_a_full_disk_has_one_exit_code_whoever_says_it(refused, monkeypatch, error):
    def fail(*_):
        raise error if isinstance(error, Exception) else error()

    monkeypatch.setattr("pruneofa.formats.tensors.local_folder", fail)
    assert "disk" in refused("inspect", "model", code=3)
