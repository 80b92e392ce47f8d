import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
)

from pruneofa.cli import main as cli
from pruneofa.formats import pattern
from pruneofa.formats.verify import verify
from pruneofa.train.models import load_tokenizer
from tests.tiny import tiny_bert, tiny_tokenizer, write_model

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "run make readme-table"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def _texts(count: int) -> list[dict[str, list[int]]]:
    tokenizer = tiny_tokenizer()
    return [
        {key: tokenizer(f"the {word} of the city was good")[key] for key in ("input_ids", "attention_mask")}
        for word in ("king", "queen", "water", "house") * (count // 4)
    ]


def test_the_python_example_prunes_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("dense"), tiny_bert(seed=1))
    text = _texts(16)
    given = {
        "dense": "dense",
        "text": text,
        "task": [{**row, "labels": i % 2} for i, row in enumerate(text)],
        "collator": DataCollatorForLanguageModeling(tiny_tokenizer()),
        "steps": 10,
    }
    example = _example("PruningCallback")
    assert len([line for line in example.splitlines() if line]) == 11
    exec(compile(example, "README.md", "exec"), given)

    assert pattern.inspect("sparse")["encoder"] == pytest.approx(0.9, abs=0.001)
    AutoModelForMaskedLM.from_pretrained("sparse")
    assert load_tokenizer("sparse").get_vocab() == tiny_tokenizer().get_vocab()
    given["model"].save_pretrained("task-model")
    AutoModelForSequenceClassification.from_pretrained("task-model")
    assert verify("sparse", "task-model")["ok"]


def test_the_engine_runs_what_pack_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_bert(BertForSequenceClassification).save_pretrained("task-model")
    tiny_tokenizer().save_pretrained("task-model")
    [command] = re.findall(r"^pruneofa (pack task-model .*)$", README, re.MULTILINE)
    assert cli.main(command.split()[:3]) == 0
    given: dict[str, Any] = {}
    exec(compile(_example("Engine"), "README.md", "exec"), given)
    assert given["engine"].predict("a good film")["label"] in ("LABEL_0", "LABEL_1")


def _example(word: str) -> str:
    [example] = [e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in e]
    return example


def test_the_readme_lists_exactly_the_verbs() -> None:
    block = README.partition("## The verbs")[2]
    listed = re.findall(r"^pruneofa (\w+)", block.split("```")[1], re.MULTILINE)
    assert sorted(listed) == sorted(name for name, *_ in cli.VERBS)


def test_the_readme_lists_exactly_the_recipes() -> None:
    block = README.partition("## Recipes")[2].partition("##")[0]
    named = set(re.findall(r"`((?:bert|distilbert|minilm|mpnet)-[\w-]+)`", block)) | {"demo"}
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_the_list_of_decisions_has_every_page() -> None:
    folder = ROOT / "docs/decisions"
    listed = re.findall(r"^- \[\d{4}\]\((.*)\): \S", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_make_commands_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in re.findall(r"^make (.*?)(?: +#.*)?$", block, re.MULTILINE):
                assert {word for word in line.split() if "=" not in word} <= targets, line


def between(page: str, block: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition(f"<!-- {block}:begin -->\n")[2].partition(f"<!-- {block}:end -->")[0]


def test_the_table_of_results_is_what_the_committed_results_say() -> None:
    from pruneofa.formats.files import read_json
    from pruneofa.report.table import write_table

    found = sorted(ROOT.glob("results/*/results.json"), key=str)  # as make sorts them
    files = [file for file in found if file.parent.name != "demo"]
    assert between("docs/results.md", "results") == write_table([read_json(file) for file in files]), AGAIN


def test_the_table_of_the_demo_is_what_its_committed_results_say() -> None:
    command = [sys.executable, ROOT / "results/demo_table.py", ROOT / "results/demo/results.json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("|") > 20
    assert between("README.md", "demo") == printed, AGAIN


def test_the_speed_table_is_what_the_committed_records_say() -> None:
    from pruneofa.bench.tables import read_records, speed_table

    files = sorted(ROOT.glob("benchmarks/records/*-engine/bench_*.json"))
    assert between("docs/results.md", "speed") == speed_table(read_records(files)), AGAIN
