"""The pages by question: every command is one that the parser takes, and what can run on a tiny model is run."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from pruneofa.cli import main as cli
from tests.small import write_task, write_text
from tests.tiny import tiny_bert, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md")
    for path in sorted(ROOT.glob(pattern))
]
RUN = [
    "README.md",
    *(f"docs/{name}.md" for name in ("fine-tune", "prune", "quantize", "run", "predict", "export", "install")),
]
# What a page takes from the hub, here.
LOCAL = {
    "Intel/bert-base-uncased-sparse-90-unstructured-pruneofa": "sparse-model",
    "google-bert/bert-base-uncased": "dense-model",
}
# Only parsed: what takes long, or data of the hub or the reader. Other tests run these verbs.
NOT_RUN = re.compile(r"bench|export|demo|minilm-90|bert-|yaml$|--task|--help|--version|\b[A-Z]{4,}\b")
QUICK = {
    "transfer": "--epochs 1 --max-length 32 --precision fp32",
    "quantize": "--max-length 32 --precision fp32",
    "evaluate": "--max-length 32",
    "run": "--set tasks.mine.max_length=32 --set precision=fp32",
    "--one-shot": "--prune.calibration 32 --corpus.max-length 32 --precision fp32",
    "prune": "--teacher.steps 2 --teacher.batch 4 --prune.steps 4 --prune.batch 4 --prune.end 2 --prune.stop 3 "
    "--prune.interval 1 --corpus.max-length 32 --precision fp32",
}


def _blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order; names of the hub are local ones."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, local in LOCAL.items():
        text = text.replace(name, local)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _commands(text: str) -> list[list[str]]:
    """The arguments of each pruneofa in a block, whatever starts it: an environment, a path to it, torchrun -m."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "pruneofa" not in line:  # other lines of a block may be prose, with apostrophes
            continue
        words = shlex.split(line, comments=True)
        called = [at for at, word in enumerate(words) if re.fullmatch(r"(\S*/)?pruneofa", word)]
        before = words[: called[0]] if called else []
        if called and (not before or before[-1] == "-m" or all("=" in word for word in before)):
            found.append(words[called[0] + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_parser_takes(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in [command for language, text in _blocks(page) if language == "sh" for command in _commands(text)]:
        try:
            cli._parser(command)
        except SystemExit as end:
            assert end.code == 0, f"{page}: pruneofa {shlex.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_and_option_that_a_sentence_names_exists(page: str) -> None:
    """`pruneofa VERB ... --option` between backquotes is part of a command: the rest may be left out."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    verbs = {name: describe for name, _, describe in cli.VERBS}
    for command in re.findall(r"`(?:\w+=\S+ )*pruneofa ([^`]+)`", text):
        verb, *words = command.split()
        if verb in ("--help", "--version", "VERB"):
            continue
        assert verb in verbs, f"{page}: pruneofa {command}"
        verbs[verb](parser := argparse.ArgumentParser())
        options = {flag for action in parser._actions for flag in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= options, f"{page}: pruneofa {command}"


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles(page: str) -> None:
    for language, text in _blocks(page):
        if language == "python":
            compile(text, page, "exec")


def test_no_command_stands_in_a_block_that_is_not_tested() -> None:
    """The README's list of verbs, which has a test of its own, is the only plain block with commands."""
    plain = [(page, text) for page in PAGES for language, text in _blocks(page) if language in ("", "bash", "console")]
    assert [page for page, text in plain if _commands(text)] == ["README.md"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages say a reader has."""
    folder = tmp_path_factory.mktemp("given")
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    sparse, task = tiny_bert(), tiny_bert(BertForSequenceClassification, **labels)
    dense, teacher = tiny_bert(seed=1), tiny_bert(BertForSequenceClassification, seed=1, **labels)
    with torch.no_grad():
        for model in (sparse, task):
            for name, weight in model.named_parameters():
                if ".encoder." in name and weight.ndim == 2:
                    weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
    models = {"sparse-model": sparse, "task-model": task, "dense-model": dense, "dense-task-model": teacher}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for name, rows in (("reviews.csv", 64), ("test.csv", 20)):
        file = write_task(folder / name, rows=rows)
        file.write_text(file.read_text().replace("sentence,verdict", "review,stars"))
    write_text(folder / "text.jsonl")
    return folder


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_says_runs(page: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(given, tmp_path / "here"))
    blocks = _blocks(page)
    made = {command[2] for _, text in blocks for command in _commands(text) if command[0] == "transfer"}
    for folder in made & {"task-model"}:
        shutil.rmtree(folder)
    examples = [tiny_tokenizer()(text) | {"labels": i % 2} for i, text in enumerate(["a good film", "a bad one"] * 8)]
    names = {"task": examples, "tokenizer": tiny_tokenizer()}
    for language, text in blocks:
        if language == "yaml":
            Path("my-task.yaml").write_text(text)
        elif language == "python" and "PruningCallback" not in text:  # that one is test_readme's
            exec(compile(text, page, "exec"), names)
        elif language == "sh":
            for command in _commands(text):
                if not NOT_RUN.search(shlex.join(command)):
                    quick = "--one-shot" if "--one-shot" in command else command[0]
                    assert cli.main([*command, *QUICK.get(quick, "").split()]) == 0, shlex.join(command)
