"""Code in a stranger's folder never runs: every call that could run it says trust_remote_code=False."""

import ast
import builtins
import inspect
import json
from pathlib import Path

import pytest

from pruneofa.errors import InputError
from tests.tiny import write_folder

ROOT = Path(__file__).parents[1]
LOADERS = {"from_pretrained", "from_config", "pipeline", "SentenceTransformer", "CrossEncoder"}
WITHOUT_CODE = {"Engine", "cls", "ORTOptimizer"}  # have no such switch: ours runs no code, the other takes a model
DATASETS = {"load_dataset", "load_dataset_builder", "get_dataset_split_names"}  # datasets 4 removed switch and scripts


def calls():
    for file in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("results/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def says(node: ast.Call, switch: str, value: bool) -> bool:
    return any(
        keyword.arg == switch and isinstance(keyword.value, ast.Constant) and keyword.value.value is value
        for keyword in node.keywords
    )


def test_every_call_that_could_run_a_folders_code_forbids_it() -> None:
    loaders = [(place, name, node) for place, name, node in calls() if name.split(".")[-1] in LOADERS]
    loaders = [(place, name, node) for place, name, node in loaders if name.split(".")[0] not in WITHOUT_CODE]
    assert len(loaders) >= 4
    wrong = [f"{place} {name}" for place, name, node in loaders if not says(node, "trust_remote_code", False)]
    assert wrong == [], "\n".join(wrong)


def test_nothing_is_unpickled() -> None:
    wrong = []
    for place, name, node in calls():
        if name == "torch.load" and not says(node, "weights_only", True):
            wrong.append(f"{place} {name}")
        if name in ("np.load", "numpy.load") and says(node, "allow_pickle", True):
            wrong.append(f"{place} {name}")
        if name in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "torch.hub.load"):
            wrong.append(f"{place} {name}")
    assert wrong == [], "\n".join(wrong)


def test_the_data_sets_library_has_no_code_to_trust() -> None:
    datasets = pytest.importorskip("datasets")
    for name in sorted({name.split(".")[-1] for _, name, _ in calls()} & DATASETS):
        assert "trust_remote_code" not in inspect.signature(getattr(datasets, name)).parameters
    assert int(datasets.__version__.split(".")[0]) >= 4


@pytest.fixture
def answers_yes(monkeypatch):
    """A user who answers y to every question, and the list of the questions."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    return questions


def hostile(folder: Path, model_type: str) -> Path:
    """A folder whose config and tokenizer name Python files in it; each leaves the file `ran` when it is imported."""
    write_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = ("Config", "Model", "ModelForSequenceClassification", "ModelForPreTraining", "ModelForMaskedLM",
             "ModelForQuestionAnswering", "Tokenizer")  # fmt: skip
    auto_map = {f"Auto{kind}": "strange.Strange" for kind in kinds}
    auto_map["AutoTokenizer"] = ["strange.Strange", "strange.Strange"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
    settings = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": auto_map["AutoTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code = f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import BertConfig as Strange\n"
    (folder / "strange.py").write_text(code)
    return folder


@pytest.mark.parametrize("model_type", ["strange", "bert"])
def test_code_of_a_folder_does_not_run_and_nobody_is_asked(model_type, answers_yes, tmp_path):
    models = pytest.importorskip("pruneofa.train.models")
    from pruneofa.bench import peers

    folder = hostile(tmp_path / "model", model_type)
    attempts = (
        lambda: models.load_config(str(folder)),
        lambda: models.load_tokenizer(folder),
        lambda: models.load_for_task(str(folder), "classification"),
        lambda: models.load_for_pretraining(str(folder), nsp=False),
        lambda: peers.torch_model({"folder": str(folder), "threads": 1}),
    )
    refused = 0
    with pytest.importorskip("torch").enable_grad():  # the peer switches gradients off, for its own process
        for attempt in attempts:
            try:
                attempt()
            except (InputError, ValueError):
                refused += 1
    assert answers_yes == []
    assert not (folder / "ran").exists()
    assert model_type == "bert" or refused == len(attempts)
    if model_type == "strange":
        with pytest.raises(InputError, match="needs Python code of its own, which is never run; wanted"):
            models.load_config(str(folder))
