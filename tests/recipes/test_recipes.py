"""Every shipped recipe loads; the published ones run from text to table at the size of the machine they run on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from pruneofa import recipe
from pruneofa.cli import main as cli
from pruneofa.cli.show import recipe_file
from pruneofa.formats import pattern
from pruneofa.formats.verify import verify
from tests.small import BAD, GOOD, SUBJECTS, write_text
from tests.tiny import tiny_bert, tiny_distilbert, write_model

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# name -> sparsity, pattern, hidden size, layers
PUBLISHED = {
    "bert-base-80": (0.8, "4x1", 768, 12),
    "bert-base-85": (0.85, "unstructured", 768, 12),
    "bert-base-90": (0.9, "unstructured", 768, 12),
    "bert-large-90": (0.9, "unstructured", 1024, 24),
    "distilbert-85": (0.85, "unstructured", 768, 6),
    "distilbert-90": (0.9, "unstructured", 768, 6),
}
FEW_STEPS = [
    "corpus.source=text.jsonl",
    "corpus.config=null",
    "corpus.max_length=32",
    "corpus.validation=0.2",
    *("teacher.steps=2", "teacher.batch=2", "teacher.micro_batch=2"),
    *("prune.steps=4", "prune.end=2", "prune.stop=3", "prune.interval=1"),
    *("prune.batch=2", "prune.micro_batch=2"),
]
GIB = 2**30


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_loads_and_is_named_like_its_file(path: Path) -> None:
    loaded = recipe.load([path])
    assert loaded.name == path.stem
    assert loaded.corpus is not None and loaded.prune is not None
    assert recipe.validate(recipe.Recipe, loaded.model_dump()) == loaded


def test_a_recipe_is_found_by_its_name() -> None:
    assert recipe_file("demo") == RECIPES / "demo.yaml"


@pytest.mark.parametrize(
    ("one", "two"), [("bert-base-85", "bert-base-90"), ("bert-base-90-obert", "bert-base-97-obert")]
)
def test_recipes_of_two_sparsities_differ_in_nothing_else(one: str, two: str) -> None:
    values = [recipe.load([RECIPES / f"{name}.yaml"]).model_dump() for name in (one, two)]
    assert [loaded.pop("name") for loaded in values] == [one, two]
    finals = [loaded["prune"].pop("final") for loaded in values]
    assert finals == [int(name.split("-")[2]) / 100 for name in (one, two)]
    assert values[0] == values[1]
    texts = [(RECIPES / f"{name}.yaml").read_text().splitlines() for name in (one, two)]
    changed = [line for line, other in zip(*texts, strict=True) if line != other and line[0] != "#"]
    assert [line.split(":")[0].strip() for line in changed] == ["name", "final"]  # and in no comment beside a number


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name: str) -> None:
    loaded = recipe.load([RECIPES / f"{name}.yaml"])
    sparsity, shape, *_ = PUBLISHED[name]
    prune, teacher, corpus = loaded.prune, loaded.teacher, loaded.corpus
    assert prune is not None and teacher is not None and corpus is not None
    assert (prune.final, prune.pattern, prune.scope, prune.rewind) == (sparsity, shape, "uniform", "sawtooth")
    assert (prune.begin, prune.end, prune.stop, prune.interval) == (0, 50_000, 80_000, 1_000)
    for stage in (teacher, prune):
        assert (stage.steps, stage.batch, stage.lr, stage.warmup, stage.weight_decay) == (
            100_000,
            256,
            5e-5,
            0.01,
            0.01,
        )
        assert stage.batch % stage.micro_batch == 0
    assert loaded.distill == recipe.Distill(hard=0.5, kd=0.5, temperature=2, hidden=0, positions="all")
    assert (corpus.source, corpus.config) == ("wikimedia/wikipedia", "20231101.en")
    assert (corpus.max_length, corpus.nsp) == (512, not name.startswith("distilbert"))
    assert loaded.seeds == [0, 1]
    # int8 embeddings are ours: the packed file holds them so
    assert loaded.quantize == recipe.Quantize(weights="tensor", activations="static", embeddings=True, freeze=1)
    assert set(loaded.tasks) == ({"squad"} if name == "bert-base-80" else {"sst2", "mnli", "qnli", "qqp", "squad"})
    for task, spec in loaded.tasks.items():
        defaults = recipe.Task().resolved(task)
        for key in (
            "epochs",
            "lr",
            "batch",
            "max_length",
            "stride",
            "hard",
            "kd",
            "temperature",
            "qat_epochs",
            "qat_lr",
        ):
            assert getattr(spec.resolved(task), key) == getattr(defaults, key), (task, key)


@pytest.mark.parametrize(("name", "final"), [("bert-base-90-obert", 0.9), ("bert-base-97-obert", 0.97)])
def test_the_numbers_of_obert(name: str, final: float) -> None:
    loaded = recipe.load([RECIPES / f"{name}.yaml"])
    prune = loaded.prune
    assert prune is not None
    assert (prune.score, prune.gradients, prune.block, prune.scope) == ("obs", 1024, 50, "global")
    assert (prune.initial, prune.final, prune.rewind, prune.lr) == (0.7, final, "cyclic", 5e-4)
    assert prune.steps == 12 * prune.interval and prune.end == 9 * prune.interval
    assert loaded.distill == recipe.Distill(hard=0, kd=1, temperature=5.5, hidden=0, positions="all")
    for name, spec in loaded.tasks.items():
        task = spec.resolved(name)
        assert (task.epochs, task.lr, task.hard, task.kd, task.temperature) == (8, 1.5e-4, 0, 1, 5.5)


def test_the_demo_prunes_with_few_tokens_and_goes_all_the_way_to_int8() -> None:
    demo = recipe.load([RECIPES / "demo.yaml"])
    assert demo.prune is not None and demo.prune.score == "hessian" and demo.prune.final == 0.8
    assert demo.quantize is not None and list(demo.tasks) == ["topics"]


def test_minilm_asks_for_the_five_tasks_and_the_control() -> None:
    loaded = recipe.load([RECIPES / "minilm-90.yaml"])
    assert set(loaded.tasks) == set(recipe.KNOWN_TASKS)
    assert isinstance(loaded.control, recipe.Control) and set(loaded.control.tasks or []) == {"sst2", "qnli", "mnli"}
    assert {name: (task.epochs, task.data) for name, task in loaded.tasks.items()} == {
        **{name: (3, name) for name in ("mnli", "qnli", "qqp")},
        "sst2": (2, "sst2"),
        "squad": (1, "squad"),
    }
    squad = loaded.tasks["squad"]
    assert (squad.max_length, squad.stride) == (256, 64)


def _write_tasks(root: Path) -> None:
    """A few rows of each public task, with its columns and split names."""
    pairs = [(f"{s} {g}", f"{s} {b}") for s in SUBJECTS[:4] for g, b in zip(GOOD, BAD, strict=True)]
    contexts = [f"{first}. {second}." for first, second in pairs]
    tables: dict[str, dict[str, list[Any]]] = {
        "sst2": {"sentence": [a for a, _ in pairs], "label": [i % 2 for i in range(len(pairs))]},
        "mnli": {
            "premise": [a for a, _ in pairs],
            "hypothesis": [b for _, b in pairs],
            "label": [i % 3 for i in range(len(pairs))],
        },
        "qnli": {
            "question": [a for a, _ in pairs],
            "sentence": [b for _, b in pairs],
            "label": [i % 2 for i in range(len(pairs))],
        },
        "qqp": {
            "question1": [a for a, _ in pairs],
            "question2": [b for _, b in pairs],
            "label": [i % 2 for i in range(len(pairs))],
        },
        "squad": {
            "id": [str(i) for i in range(len(pairs))],
            "title": ["a"] * len(pairs),
            "context": contexts,
            "question": ["which city is good?"] * len(pairs),
            "answers": [
                {"text": [context.split()[1]], "answer_start": [context.index(" ") + 1]} for context in contexts
            ],
        },
    }
    splits = {"mnli": ("train", "validation_matched", "validation_mismatched")}
    for task, columns in tables.items():
        (root / task).mkdir(parents=True)
        for split in splits.get(task, ("train", "validation")):
            pq.write_table(pa.table(columns), root / task / f"{split}.parquet")


def _with_tasks(name: str, tasks: tuple[str, ...], folder: Path) -> Path:
    """A published recipe with some of its tasks, in `folder`."""
    whole = recipe.load([RECIPES / f"{name}.yaml"])
    kept = {task: spec for task, spec in whole.tasks.items() if task in tasks}
    file = folder / f"{name}.yaml"
    file.write_text(recipe.dump(whole.model_copy(update={"tasks": kept})))
    return file


def _overrides(file: Path, root: Path) -> list[str]:
    """Point a published recipe at `root`, and make it a few steps long."""
    write_text(root / "text.jsonl", documents=20)
    _write_tasks(root)
    settings = [f"model={root / 'model'}", f"data_root={root}", "seeds=[0]", "precision=fp32", *FEW_STEPS]
    for task in recipe.load([file]).tasks:
        short = {"data": task, "epochs": 1, "dense_epochs": 1, "batch": 8, "max_length": 32, "train_rows": 16,
                 "qat_epochs": 1} | ({"stride": 8, "max_length": 48} if task == "squad" else {})  # fmt: skip
        settings += [f"tasks.{task}.{key}={value}" for key, value in short.items()]
    return settings


def _command(file: Path, root: Path) -> list[str]:
    settings = [word for setting in _overrides(file, root) for word in ("--set", setting)]
    return ["run", str(file), "--out", str(root / "run"), *settings]


def _check(file: Path, run: Path) -> None:
    sparsity, shape, *_ = PUBLISHED[file.stem]
    results = json.loads((run / "results.json").read_text())
    assert set(results["tasks"]) == set(recipe.load([file]).tasks)
    assert results["recipe"]["prune"]["pattern"] == shape
    found = pattern.inspect(run / "sparse")
    assert found["encoder"] == pytest.approx(sparsity, abs=0.002)
    if shape == "4x1":
        for layer, weight in pattern.read_weights(run / "sparse"):
            if layer in found["layers"]:
                kept = (weight != 0).reshape(weight.shape[0] // 4, 4, weight.shape[1])
                assert (kept.all(1) | ~kept.any(1)).all(), layer
    for task, metrics in results["tasks"].items():
        for variant in ("transfer", "ptq", "quantize"):
            assert verify(run / "sparse", run / "tasks" / task / "seed-0" / variant)["ok"]
        assert all({"dense", "transfer", "ptq", "quantize"} <= set(variants) for variants in metrics.values())
    assert (run / "table.md").exists() and (run / "report.html").exists() and (run / "sparse" / "README.md").exists()


@pytest.mark.usefixtures("peers_without_torch")
@pytest.mark.parametrize("name", ["bert-base-90", "distilbert-90"])
def test_it_runs_from_text_to_table_at_tiny_size(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", tiny_distilbert() if "distil" in name else tiny_bert())
    # Every task's data once: what else a task does differs by its kind only.
    tasks = ("sst2", "qnli") if name == "distilbert-90" else ("mnli", "qqp", "squad")
    file = _with_tasks(name, tasks, tmp_path)
    assert cli.main(_command(file, tmp_path)) == 0
    _check(file, tmp_path / "run")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone after the test: pytest would keep gigabytes of models of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def _full_size(name: str) -> Any:
    _, _, hidden, layers = PUBLISHED[name]
    if name.startswith("distilbert"):
        return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig())
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64}
    return transformers.BertForPreTraining(transformers.BertConfig(**sizes, intermediate_size=4 * hidden))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_runs_at_full_size(name: str, scratch: Path) -> None:
    """The architecture of the row, weights at random, in a process of its own whose peak memory is checked.

    One task of either kind: the others differ in their data only, and run at tiny size.
    """
    transformers.set_seed(0)
    write_model(scratch / "model", _full_size(name))
    file = _with_tasks(name, ("sst2", "squad"), scratch)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *_command(file, scratch)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    peak = int(run.stderr.rpartition("peak ")[2])
    print(f"{name}: peak {peak / GIB:.1f} GiB")  # noqa: T201 - kept in the record of the slow tests
    assert peak < 16 * GIB
    _check(file, scratch / "run")


PEAK = """
import resource, sys
from pruneofa.cli.main import main
code = main(sys.argv[1:])
unit = 1 if sys.platform == "darwin" else 1024
sys.stderr.write(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}")
sys.exit(code)
"""
