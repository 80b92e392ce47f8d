"""Results and recipe of a run → the model card of the sparse pre-trained model."""

import datetime
import re
from importlib import resources
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.formats.files import read_json, write_text
from pruneofa.formats.sentence import read_sentence
from pruneofa.recipe import Card
from pruneofa.report.deployment import cost_tables
from pruneofa.report.render import portable, pruned_at_once, recipe_yaml, render
from pruneofa.report.schema import METRIC_NAMES, check_results
from pruneofa.report.table import seeds, write_table

# task -> (readable name, hub id, configuration)
HUB = {
    "squad": ("SQuAD v1.1", "rajpurkar/squad", "plain_text"),
    "mnli": ("GLUE MNLI", "nyu-mll/glue", "mnli"),
    "qqp": ("GLUE QQP", "nyu-mll/glue", "qqp"),
    "qnli": ("GLUE QNLI", "nyu-mll/glue", "qnli"),
    "sst2": ("GLUE SST-2", "nyu-mll/glue", "sst2"),
}


def write_card(
    folder: Path,
    *,
    results: dict[str, Any],
    recipe: dict[str, Any],
    inspection: dict[str, Any],
    versions: dict[str, Any],
    date: str | None = None,
) -> Path:
    """Write `folder`/README.md, a Hugging Face model card, and, if it shows it, the figure method.svg beside it.

    `recipe` is the resolved recipe as a plain mapping; its `card` section has license, authors, base model, version and
    language. `inspection` is the result of `pattern.inspect` for the folder. `date` is an ISO date, by default today.
    The card contains no paths of this machine. Raises InputError for invalid `results`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    check_results(results)
    stated = Card.model_validate(recipe.get("card") or {})
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    heads = config.get("architectures") or []
    fill_mask = not heads or any(head.endswith(("ForMaskedLM", "ForPreTraining")) for head in heads)
    losses = recipe.get("distill") or {}
    if recipe.get("prune") and not recipe.get("teacher") and not losses.get("hard") and not losses.get("kd"):
        fill_mask = False  # a head that no loss needs may have random weights
    embedder = read_sentence(folder) is not None
    evaluations = _evaluations(results, recipe)
    base_model = stated.base_model or (recipe["model"] if is_hub_id(recipe["model"]) else None)
    data = ModelCardData(
        language=stated.language,
        license=stated.license,
        library_name="transformers",
        pipeline_tag="fill-mask" if fill_mask and not embedder else "feature-extraction",
        tags=["sparse", "prune-once-for-all", "pruning", *([config["model_type"]] if "model_type" in config else [])],
        base_model=base_model,
        datasets=[source for source in _sources(recipe) if is_hub_id(source)] or None,
        metrics=list(dict.fromkeys(e.metric_type for e in evaluations)) or None,
        model_name=recipe["name"],
        eval_results=evaluations or None,
    )
    body = render(
        "card.md.j2",
        results=results,
        recipe=portable(recipe),
        recipe_yaml=recipe_yaml(recipe),
        inspection=inspection,
        versions=portable(versions),
        config=config,
        once=pruned_at_once(recipe),
        embedder=embedder,
        license=stated.license,
        authors=stated.authors or "Not stated by whoever ran the recipe",
        linked=bool(base_model and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model)),
        base_model=base_model,
        version=stated.version,
        date=date or datetime.datetime.now(datetime.UTC).date().isoformat(),
        sparsity=results["sparsity"],
        table=write_table([results]) if results["tasks"] else "",
        costs=cost_tables(results),
        architecture=architecture(config),
        sources=_sources(portable(recipe)),
        task_data={task: _local_copy(task, recipe) or HUB[task][1] for task in results["tasks"]},
        given_teachers=[task for task, spec in recipe["tasks"].items() if spec.get("teacher")],
        local_tasks=[task for task in results["tasks"] if _local_copy(task, recipe)],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    figure = resources.files("pruneofa.report").joinpath("templates/method.svg").read_text(encoding="utf-8")
    if "(method.svg)" in body:
        write_text(folder / "method.svg", figure)
    write_text(folder / "README.md", str(card))
    return folder / "README.md"


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name of a hub id and is not an existing path."""
    is_file = name.endswith((".parquet", ".jsonl", ".json", ".txt", ".csv", ".tsv", ".gz", ".zst"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not is_file and not Path(name).exists()


def _sources(recipe: dict[str, Any]) -> list[str]:
    source = (recipe.get("corpus") or {}).get("source") or []
    return [source] if isinstance(source, str) else list(source)


def _local_copy(task: str, recipe: dict[str, Any]) -> str:
    """A note on the data of `task` if they are not the public data set itself; otherwise empty."""
    data = ((recipe.get("tasks") or {}).get(task) or {}).get("data")
    if task in HUB and data in (None, HUB[task][1]):
        return ""
    names = [data] if isinstance(data, str) else data or [task]
    return ", ".join(str(portable(name)) for name in names)


def _evaluations(results: dict[str, Any], recipe: dict[str, Any]) -> list[Any]:
    """One EvalResult per task and metric, for the models transferred from the sparse model."""
    from huggingface_hub import EvalResult

    found = []
    for task, metrics in results["tasks"].items():
        copy = _local_copy(task, recipe)
        name, dataset, config = HUB.get(task, (task, task, None))
        for metric, variants in metrics.items():
            if "transfer" not in variants:
                continue
            matched = {"accuracy": "_matched", "accuracy_mm": "_mismatched"}.get(metric, "") if task == "mnli" else ""
            found.append(
                EvalResult(
                    task_type="question-answering" if task == "squad" else "text-classification",
                    dataset_type=task if copy else dataset,
                    dataset_name=f"{name} (from {copy})" if copy else name,
                    dataset_config=None if copy else config,
                    dataset_split=f"validation{matched}",
                    metric_type="accuracy" if metric == "accuracy_mm" else metric,
                    metric_value=round(variants["transfer"]["mean"], 2),
                    metric_name=f"{METRIC_NAMES[metric]} in percent after transfer with the pattern locked, "
                    f"{seeds({'tasks': {task: {metric: variants}}}, 'transfer')}",
                )
            )
    return found


def architecture(config: dict[str, Any]) -> str:
    """`6 layers, hidden 384, ...` from a config.json; empty for an unknown family."""
    family = families.find(config.get("model_type"))
    if family is None:
        return config.get("model_type", "")
    keys = family.keys
    fields = (
        ("{} layers", keys.layers),
        ("hidden size {}", keys.hidden),
        ("{} attention heads", keys.heads),
        ("feed-forward size {}", keys.inner),
        ("vocabulary of {}", "vocab_size"),
    )
    return ", ".join([family.model_type, *(text.format(config[key]) for text, key in fields if key in config)])
