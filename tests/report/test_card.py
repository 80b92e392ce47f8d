import json
import re
from copy import deepcopy

import pytest
import yaml
from huggingface_hub import ModelCard

from pruneofa import recipe as recipes
from pruneofa.errors import InputError
from pruneofa.recipe.yaml12 import parse
from pruneofa.report.card import write_card
from pruneofa.report.render import portable
from pruneofa.report.schema import check_results, read_results
from pruneofa.report.table import retention, write_table
from tests.report.example_run import HOME, entry, example_inspection, example_recipe, example_results
from tests.tiny import modules_json, tiny_bert, tiny_tokenizer

REFERENCE_SECTIONS = [
    "# Model Details",
    "| Model Detail | Description |",
    "| Model Authors |",
    "| Date |",
    "| Version |",
    "| Type |",
    "| Architecture |",
    "| Paper or Other Resources |",
    "| License |",
    "| Size |",
    "| Questions or Comments |",
    "| Intended Use | Description |",
    "| Primary intended uses |",
    "| Primary intended users |",
    "| Out-of-scope uses |",
    "# How to use",
    "# Metrics (Model Performance)",
    "| Training and Evaluation Data | Description |",
    "| Datasets |",
    "| Motivation |",
    "| Preprocessing |",
    "| Ethical Considerations | Description |",
    "| Data |",
    "| Human life |",
    "| Mitigations |",
    "| Risks and harms |",
    "| Use cases |",
    "# Caveats and Recommendations",
    "# BibTeX entry and citation info",
]


def table(results, **options):
    """The table's cells: {row label: {column: text}}."""
    lines = [line for line in write_table(results, **options).splitlines() if line.startswith("|")]
    header, _, *rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def card_of(folder, **options):
    values = {"results": example_results(), "recipe": example_recipe(), "inspection": example_inspection()}
    values |= {"versions": example_results()["versions"], "date": "2026-01-31"} | options
    return write_card(folder, **values).read_text(encoding="utf-8")


def test_table_has_the_published_columns_and_one_for_an_own_task():
    row = table([example_results()])["minilm-90: Prune Once for All (1–2 seeds)"]
    assert row == {
        "Model": "minilm-90: Prune Once for All (1–2 seeds)",
        "Sparsity": "0.9",
        "Model size": "5.57 MB",
        "SQuADv1.1 (EM/F1)": "65.50±0.50/76.05±0.05",
        "MNLI-m (Acc)": "71.10±0.10",
        "MNLI-mm (Acc)": "72.10±0.10",
        "QQP (Acc/F1)": "82.10±0.10/77.10±0.10",
        "QNLI (Acc)": "-",
        "SST-2 (Acc)": "87.20±0.20",
        "area (Acc)": "78.00",
    }


def test_rows_are_baselines_dense_transfer_control_and_retention():
    rows = table([example_results()])
    assert list(rows) == [
        "minilm-90: bag of words (1 seed)",
        "minilm-90: dense (1–2 seeds)",
        "minilm-90: Prune Once for All (1–2 seeds)",
        "minilm-90: control: pruned once, same tokens (1 seed)",
        "minilm-90: retention (%)",
    ]
    assert rows["minilm-90: dense (1–2 seeds)"]["Sparsity"] == "0"
    assert rows["minilm-90: dense (1–2 seeds)"]["Model size"] == "42.5 MB"
    assert rows["minilm-90: bag of words (1 seed)"]["Model size"] == "-"
    assert rows["minilm-90: control: pruned once, same tokens (1 seed)"]["SST-2 (Acc)"] == "84.00"
    assert rows["minilm-90: control: pruned once, same tokens (1 seed)"]["MNLI-m (Acc)"] == "-"
    kept = rows["minilm-90: retention (%)"]
    assert kept["SST-2 (Acc)"] == "97.1"  # 87.2 / 89.8
    assert kept["SQuADv1.1 (EM/F1)"] == "93.2/94.9"
    assert kept["QNLI (Acc)"] == "-"


def test_one_seed_has_no_spread_and_empty_columns_can_be_dropped():
    results = example_results()
    results["tasks"] = {"sst2": {"accuracy": {"transfer": entry(87.25)}}}
    results["recipe"], results["sparsity"], results["sizes"] = {"name": "mini"}, 0.85, {}
    rows = table([results], drop_empty=True)
    columns = {"Sparsity": "0.85", "Model size": "-", "SST-2 (Acc)": "87.25"}
    assert rows["mini: Prune Once for All (1 seed)"] == {"Model": "mini: Prune Once for All (1 seed)"} | columns
    assert rows["mini: retention (%)"]["SST-2 (Acc)"] == "-"
    assert retention(results, "sst2", "accuracy") is None


def test_several_runs_share_the_columns_and_keep_their_rows():
    other = example_results()
    other["recipe"] = {"name": "bert-90"}
    other["tasks"] = {"qnli": {"accuracy": {"transfer_engine": entry(89.0)}}}
    rows = table([example_results(), other])
    assert rows["bert-90: Prune Once for All, by the engine (1 seed)"]["QNLI (Acc)"] == "89.00"
    assert rows["bert-90: Prune Once for All, by the engine (1 seed)"]["area (Acc)"] == "-"
    assert rows["minilm-90: Prune Once for All (1–2 seeds)"]["area (Acc)"] == "78.00"


def test_a_task_name_cannot_break_the_table():
    results = example_results()
    results["tasks"] = {"a|b": {"accuracy": {"transfer": entry(50.0)}, "f1": {"transfer": entry(40.0)}}}
    assert "| a\\|b (Acc/F1) |" in write_table([results])


def change(path, value):
    results = example_results()
    *parents, last = path
    inner = results
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return results


SST2 = ("tasks", "sst2", "accuracy")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], r"^x: the whole file is \[\], wanted a mapping"),
        (change(["tasks"], None), r"^x: tasks is missing"),
        (change(["recipe"], {}), r"^x: recipe.name is None"),
        (change(["recipe"], "mini"), r"^x: recipe is 'mini', wanted a mapping"),
        (change(["sparsity"], {"encoder": 0.9}), r"^x: sparsity is {'encoder': 0.9}, wanted a number"),
        (change(["sparsity"], 90), r"^x: sparsity is 90, wanted a number from 0 to 1"),
        (change(["stages"], {"prune": {"seconds": 1}}), r"^x: stages.prune.tokens is None"),
        (change(["tasks", "sst2"], {"acuracy": {}}), r"^x: tasks.sst2 has 'acuracy'; did you mean 'accuracy'\?"),
        (change(SST2, {"tranfer": entry(1.0)}), r"^x: tasks.sst2.accuracy has 'tranfer'; did you mean 'transfer'\?"),
        (change((*SST2, "dense", "mean"), "high"), r"accuracy.dense.mean is 'high', wanted a number from 0 to 100"),
        (change((*SST2, "dense", "mean"), float("nan")), r"accuracy.dense.mean is nan, wanted"),
        (change((*SST2, "dense", "mean"), 95.0), r"dense.mean is 95.0 but its runs give 89.8000; the file was edited"),
        (change((*SST2, "dense", "runs"), []), r"accuracy.dense.runs is \[\], wanted a list"),
        (change((*SST2, "dense", "runs"), [{"seed": 0, "value": 89.8}] * 2), r"seeds \[0, 0\], wanted each once"),
        (change(["sizes"], {"dense_fp32": -1}), r"^x: sizes.dense_fp32 is -1, wanted a number of at least 0"),
    ],
)
def test_results_that_break_the_schema_name_file_and_key(results, message):
    with pytest.raises(InputError, match=message):
        check_results(results, "x")


def test_results_are_read_from_a_file_or_a_run_folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(example_results()))
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == example_results()
    (tmp_path / "results.json").write_text(json.dumps(change(["stages"], None)))
    with pytest.raises(InputError, match=r"results.json: stages is missing"):
        read_results(tmp_path / "results.json")
    with pytest.raises(InputError, match="results 2 of 2: versions is missing"):
        write_table([example_results(), change(["versions"], None)])


def test_card_has_every_section_of_the_published_card(tmp_path):
    text = card_of(tmp_path)
    places = [text.find(section) for section in REFERENCE_SECTIONS]
    assert -1 not in places, REFERENCE_SECTIONS[places.index(-1)]
    assert places == sorted(places)
    assert "@article{zafrir2021prune," in text
    assert "](method.svg)" in text
    assert (tmp_path / "method.svg").read_text().startswith("<svg")


def test_card_metadata_survives_the_way_through_yaml(tmp_path):
    stated = {"license": "mit", "base_model": "sentence-transformers/all-MiniLM-L6-v2", "authors": "A | B"}
    text = card_of(tmp_path, recipe=example_recipe(card=stated | {"version": "2.10", "language": ["de", "en"]}))
    assert "| Model Authors | A \\| B |" in text and "| Version | 2.10 |" in text and "| License | mit;" in text
    card = ModelCard.load(tmp_path / "README.md")
    block = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert block["language"] == ["de", "en"]
    assert block["license"] == "mit"
    assert block["library_name"] == "transformers"
    assert block["pipeline_tag"] == "fill-mask"
    assert block["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert {"sparse", "prune-once-for-all"} <= set(block["tags"])
    assert block["metrics"] == ["exact_match", "f1", "accuracy"]
    assert "datasets" not in block  # the corpus was local files
    assert card.data.to_dict() == block
    results = {
        (r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type): r.metric_value
        for r in card.data.eval_results
    }
    assert results == {
        ("rajpurkar/squad", "plain_text", "validation", "exact_match"): 65.5,
        ("rajpurkar/squad", "plain_text", "validation", "f1"): 76.05,
        ("mnli", None, "validation_matched", "accuracy"): 71.1,  # read from a folder of the user's
        ("mnli", None, "validation_mismatched", "accuracy"): 72.1,
        ("nyu-mll/glue", "qqp", "validation", "accuracy"): 82.1,
        ("nyu-mll/glue", "qqp", "validation", "f1"): 77.1,
        ("sst2", None, "validation", "accuracy"): 87.2,
        ("area", None, "validation", "accuracy"): 78.0,
    }
    assert card.data.model_name == "minilm-90"


def test_hub_ids_are_named_in_the_metadata(tmp_path):
    corpus = {"source": "wikimedia/wikipedia", "config": "20231101.en"}
    recipe = example_recipe(model="google-bert/bert-base-uncased", corpus=corpus, data_root=None)
    data = ModelCard(card_of(tmp_path, recipe=recipe)).data
    assert data.base_model == "google-bert/bert-base-uncased"
    assert data.datasets == ["wikimedia/wikipedia"]


def test_card_shows_no_path_of_this_machine(tmp_path):
    text = card_of(tmp_path, versions={"pruneofa": "0.1.0", "venv": f"{HOME}/.venv"})
    assert not re.search(r"/home|/root|\.\./|~/|file:", text)
    assert "`MiniLM-L6` (a local folder)" in text
    assert "`wiki`, `texts`, column `text`" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/a/b/model", "model"),
        ("/a/b/model/", "model"),
        ("~/model", "model"),
        ("../shared/wiki", "wiki"),
        ("C:\\data\\wiki", "wiki"),
        ("~someone/wiki/", "wiki"),
        ("~", "."),
        ("..", "."),
        ("../..", "."),
        ("/", "."),
        ("data/../../someone/wiki", "wiki"),
        ("\\\\server\\wiki", "wiki"),
        (r"\.layer\.0\.", r"\.layer\.0\."),
        ("~ 5 people", "~ 5 people"),
        ("a..b", "a..b"),
        ("file:///a/b", "b"),
        ("wikimedia/wikipedia", "wikimedia/wikipedia"),
        ("data/wiki", "data/wiki"),
        ("2:4", "2:4"),
        ([{"k": "/a/b"}], [{"k": "b"}]),
        (0.9, 0.9),
    ],
)
def test_portable_keeps_the_last_part_of_a_path(value, shown):
    assert portable(value) == shown


def test_card_shows_layers_hash_recipe_and_preprocessing(tmp_path):
    text = card_of(tmp_path)
    assert "| encoder.layer.5.output.dense.weight | 384 x 1536 | 58,982 | 0.9000 |" in text
    assert "ab" * 32 in text and "cd" * 32 in text
    assert "95% for training, 5% for validation" in text
    assert "at most 128 tokens; shorter sequences at a probability of 0.1" in text
    assert "these take 42.5 MB as stored in fp32, 5.57 MB as non-zeros with a bit mask (2.39 MB in int8;" in text
    assert "6,100,000 tokens" in text
    assert "pruneofa 0.1.0, torch 2.13.0, python 3.11.9" in text
    block = parse(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    again = recipes.validate(recipes.Recipe, block).model_dump()
    assert again == portable(example_recipe())


def test_card_of_a_run_without_tasks_or_pruning(tmp_path):
    results = example_results() | {"tasks": {}, "stages": {}, "latency": None, "sizes": None}
    recipe = example_recipe(
        model_is_sparse=True, teacher=None, prune=None, corpus=None, control=False, tasks={}, seeds=[0]
    )
    text = card_of(tmp_path, results=results, recipe=recipe, inspection=example_inspection() | {"pooler": None})
    assert "No task was measured in this run." in text
    assert "the sparse model was taken as it was" in text
    assert "model-index" not in text
    assert "| pooler |" not in text


def test_snippet_of_the_card_runs_with_transformers_alone(tmp_path, capsys):
    tiny_bert().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert "bert, 2 layers, hidden size 32, 4 attention heads" in text
    assert ModelCard(text).data.pipeline_tag == "fill-mask"
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code.replace('"minilm-90"', repr(str(tmp_path))), {})
    assert "sparsity 0.0" in capsys.readouterr().out


def test_the_method_follows_the_recipe(tmp_path):
    def method(**changes):
        return card_of(tmp_path, recipe=example_recipe(**changes)).split("student pruning (")[1].split(")")[0]

    start = "gradual magnitude pruning with distillation from the dense teacher"
    for rewind, said in (("sawtooth", ", with learning-rate"), ("cyclic", ", with cyclic learning-rate"), ("none", "")):
        expected = f"{start}{said} rewinding" if said else start
        assert method(prune={"steps": 2000, "rewind": rewind}) == expected
    alone = method(prune={"steps": 2000, "rewind": "none"}, distill={"hard": 1, "kd": 0})
    assert alone == "gradual magnitude pruning"
    assert "the last checkpoint of each run is reported" in card_of(tmp_path)


ALONE = {"teacher": None, "control": False, "distill": {"hard": 0, "kd": 0, "hidden": 1}}


@pytest.mark.parametrize(
    ("prune", "method", "how"),
    [
        ({"score": "hessian", "steps": 0}, "layer-wise second-order pruning", "without training before or after"),
        (
            {"score": "obs", "one_shot": True, "steps": 20},
            "second-order pruning in blocks",
            "before 20 steps of training",
        ),
        ({"one_shot": True, "steps": 0, "scope": "global"}, "magnitude pruning", "without training before or after"),
    ],
)
def test_what_a_card_says_of_pruning_at_once(tmp_path, prune, method, how):
    text = card_of(tmp_path, recipe=example_recipe(prune=prune | {"final": 0.8}, **ALONE))
    taught = " with distillation from the dense teacher" if prune["steps"] else ""
    assert f". One step: student pruning (one-shot {method}{taught}). For a task" in text
    of = "all layers together" if "scope" in prune else "every layer"
    assert f"80% of the weights of {of} were pruned at once (masks `unstructured`), {how}" in text
    assert not re.search("cubic|gradual|anew every [0-9]|of 0;|method.svg", text)
    assert not (tmp_path / "method.svg").exists()


def test_a_head_that_nothing_trained_fills_no_mask(tmp_path):
    def tag(**changes):
        recipe = example_recipe(prune={"one_shot": True, "steps": 0}, **ALONE | changes)
        return ModelCard(card_of(tmp_path, recipe=recipe)).data.pipeline_tag

    assert tag() == "feature-extraction"
    assert tag(distill={"hard": 0, "kd": 0.5}) == tag(teacher={"steps": 9}) == "fill-mask"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    modules = modules_json()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert tag(teacher={"steps": 9}) == "feature-extraction"
    assert "the quality of its vectors was not measured" in (tmp_path / "README.md").read_text()


def test_a_recipe_of_before_there_was_a_card_section(tmp_path):
    recipe = example_recipe()
    del recipe["card"]
    assert "| Model Authors | Not stated by whoever ran the recipe |" in card_of(tmp_path, recipe=recipe)


def test_results_are_not_changed(tmp_path):
    results, recipe, inspection = example_results(), example_recipe(), example_inspection()
    before = deepcopy((results, recipe, inspection))
    card_of(tmp_path, results=results, recipe=recipe, inspection=inspection)
    assert (results, recipe, inspection) == before
