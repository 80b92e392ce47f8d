"""Results → the published table and the model card of the sparse pre-trained model."""

import datetime
import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from pruneofa import families
from pruneofa.errors import InputError, short
from pruneofa.formats.files import read_json, write_text
from pruneofa.recipe import Card, to_yaml

METRICS = ("exact_match", "f1", "accuracy", "accuracy_mm")
# In the order of the table's rows. `*_engine` of each is allowed too.
VARIANTS = {
    "majority": "majority class",
    "bag_of_words": "bag of words",
    "dense": "dense",
    "transfer": "Prune Once for All",
    "control": "control: pruned once, same tokens",
    "ptq": "Prune Once for All + int8 after training",
    "quantize": "Prune Once for All + int8 in training",
}
NO_ENCODER = ("majority", "bag_of_words")
INT8 = {"ptq", "quantize", "ptq_engine", "quantize_engine"}
# The published table's columns: title, task, metrics.
COLUMNS = (
    ("SQuADv1.1 (EM/F1)", "squad", ("exact_match", "f1")),
    ("MNLI-m (Acc)", "mnli", ("accuracy",)),
    ("MNLI-mm (Acc)", "mnli", ("accuracy_mm",)),
    ("QQP (Acc/F1)", "qqp", ("accuracy", "f1")),
    ("QNLI (Acc)", "qnli", ("accuracy",)),
    ("SST-2 (Acc)", "sst2", ("accuracy",)),
)
# task -> (readable name, hub id, configuration)
HUB = {
    "squad": ("SQuAD v1.1", "rajpurkar/squad", "plain_text"),
    "mnli": ("GLUE MNLI", "nyu-mll/glue", "mnli"),
    "qqp": ("GLUE QQP", "nyu-mll/glue", "qqp"),
    "qnli": ("GLUE QNLI", "nyu-mll/glue", "qnli"),
    "sst2": ("GLUE SST-2", "nyu-mll/glue", "sst2"),
}
# A path that begins with /, ~ or ~name, a drive, a share, . or .., or goes up in the middle. A regular expression
# that begins with a backslash, as in prune.skip, is none.
_OF_A_MACHINE = re.compile(r"^((file:)?/|~\w*([/\\]|$)|[A-Za-z]:[/\\]|\\\\|\.\.?([/\\]|$))|[/\\]\.\.([/\\]|$)")
METRIC_NAMES = {"exact_match": "Exact match", "f1": "F1", "accuracy": "Accuracy", "accuracy_mm": "Accuracy"}
NOTES = (
    "Percent on the validation data, mean over the seeds ± half their range (one seed: no ±), of the last "
    "checkpoint of each run. Retention is Prune Once for All / dense. Sparsity and size are those of the encoder's "
    "linear weights, without embeddings and heads: size is all of them in fp32 for dense rows, non-zeros plus one "
    "bit per weight for sparse rows (an ordinary folder on disk still stores the zeros)."
)
INT8_NOTES = (
    "int8 rows: by torch the arithmetic of int8 is simulated, by the engine it is done; size is as packed in int8, "
    "scales counted."
)


# ---------------------------------------------------------------------------------------------- results.json


def read_results(path: Path | str) -> dict[str, Any]:
    """A validated results.json; `path` may be the run's folder. Raises InputError naming the file and key."""
    path = Path(path)
    return check_results(read_json(path / "results.json" if path.is_dir() else path), str(path))


def check_results(value: Any, source: str = "results") -> dict[str, Any]:
    """Return `value` if it has the schema of results.json. Raises InputError naming `source` and the key."""
    top = _mapping(value, source, "the whole file")
    for key in ("recipe", "sparsity", "versions", "stages", "tasks"):
        if key not in top:
            raise InputError(f"{source}: {key} is missing; is this a results.json of pruneofa?")
    name = _mapping(top["recipe"], source, "recipe").get("name")
    if not isinstance(name, str):
        raise InputError(f"{source}: recipe.name is {name!r}, wanted text")
    _number(top["sparsity"], source, "sparsity", 1)
    for stage, costs in _mapping(top["stages"], source, "stages").items():
        for key in ("tokens", "seconds"):
            _number(_mapping(costs, source, f"stages.{stage}").get(key), source, f"stages.{stage}.{key}")
    _check_costs(top, source)
    for task, metrics in _mapping(top["tasks"], source, "tasks").items():
        for metric, variants in _mapping(metrics, source, f"tasks.{task}").items():
            _one_of(metric, METRICS, source, f"tasks.{task}")
            for variant, value in _mapping(variants, source, f"tasks.{task}.{metric}").items():
                _one_of(variant.removesuffix("_engine"), VARIANTS, source, f"tasks.{task}.{metric}")
                _check_runs(value, source, f"tasks.{task}.{metric}.{variant}")
    return top


def _check_costs(top: dict[str, Any], source: str) -> None:
    for name, size in _mapping(top.get("sizes") or {}, source, "sizes").items():
        _number(size, source, f"sizes.{name}")
    for variant, times in _mapping(top.get("latency") or {}, source, "latency").items():
        if variant != "setting":
            _one_of(variant.removesuffix("_engine"), VARIANTS, source, "latency")
            for key in ("median_ms", "p10_ms", "p90_ms"):
                _number(_mapping(times, source, f"latency.{variant}").get(key), source, f"latency.{variant}.{key}")


def _check_runs(value: Any, source: str, key: str) -> None:
    mean = _number(_mapping(value, source, key).get("mean"), source, f"{key}.mean", 100)
    runs = value.get("runs")
    if not isinstance(runs, list) or not runs:
        raise InputError(f"{source}: {key}.runs is {runs!r}, wanted a list with a seed and a value per run")
    values = [
        _number(_mapping(run, source, f"{key}.runs").get("value"), source, f"{key}.runs.value", 100) for run in runs
    ]
    seeds = [run.get("seed") for run in runs]
    if any(seed in seeds[:i] for i, seed in enumerate(seeds)):
        raise InputError(f"{source}: {key}.runs has seeds {seeds}, wanted each once")
    if abs(mean - sum(values) / len(values)) > 0.01:
        raise InputError(
            f"{source}: {key}.mean is {mean} but its runs give {sum(values) / len(values):.4f}; "
            "it was edited, run the recipe again"
        )


def _mapping(value: Any, source: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{source}: {key} is {short(value)}, wanted a mapping")
    return value


def _number(value: Any, source: str, key: str, largest: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        limit = "a number of at least 0" if largest == math.inf else f"a number from 0 to {largest:g}"
        raise InputError(f"{source}: {key} is {short(value)}, wanted {limit}")
    return float(value)


def _one_of(name: str, known: Iterable[str], source: str, key: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"{source}: {key} has {name!r}; {hint}")


# ------------------------------------------------------------------------------------------------- the table


def write_table(results: Sequence[dict[str, Any]], *, drop_empty: bool = False) -> str:
    """The published table as Markdown, a group of rows per run.

    `drop_empty` leaves out columns without a number, for a terminal. Raises InputError for results that do
    not follow the schema.
    """
    header, rows = table_rows(results, drop_empty=drop_empty)
    right = ["---", *["--:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(map(cell, line)) + " |" for line in [header, right, *rows]]
    return "\n".join(lines) + f"\n\n{notes(results)}\n"


def notes(results: Sequence[dict[str, Any]]) -> str:
    """What a reader of the table has to know; of int8 only where it has such rows."""
    return f"{NOTES} {INT8_NOTES}" if any(set(_variants(result)) & INT8 for result in results) else NOTES


def table_rows(results: Sequence[dict[str, Any]], *, drop_empty: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of `write_table` as plain text, one row per run and variant, then the retention."""
    for index, result in enumerate(results):
        check_results(result, "results" if len(results) == 1 else f"results {index + 1} of {len(results)}")
    known = {task for _, task, _ in COLUMNS}
    own = dict.fromkeys(task for result in results for task in result["tasks"] if task not in known)
    columns = [*COLUMNS, *(_own_column(task, results) for task in own)]
    if drop_empty:
        columns = [c for c in columns if any(set(c[2]) & set(r["tasks"].get(c[1], {})) for r in results)]
    rows = []
    for result in results:
        for variant in _variants(result):
            numbers = [_score(result, task, metrics, variant) for _, task, metrics in columns]
            name = f"{result['recipe']['name']}: {variant_name(variant)} ({_seeds(result, variant)})"
            rows.append([name, _sparsity(result, variant), _size(result, variant), *numbers])
        for variant in ("quantize", "transfer"):
            kept = [_retention(result, task, metrics, variant) for _, task, metrics in columns]
            of = " of int8 in training" if variant == "quantize" else ""
            if not of or set(kept) != {"-"}:
                rows.append([f"{result['recipe']['name']}: retention{of} (%)", "-", "-", *kept])
    return ["Model", "Sparsity", "Model size", *(title for title, _, _ in columns)], rows


def _own_column(task: str, results: Sequence[dict[str, Any]]) -> tuple[str, str, tuple[str, ...]]:
    measured = {metric for result in results for metric in result["tasks"].get(task, {})}
    metrics = tuple(m for m in ("accuracy", "f1", "exact_match") if m in measured) or ("accuracy",)
    short = {"accuracy": "Acc", "f1": "F1", "exact_match": "EM"}
    return f"{task} ({'/'.join(short[m] for m in metrics)})", task, metrics


def _variants(result: dict[str, Any]) -> list[str]:
    """The variants measured in this run, in the order of VARIANTS, each followed by its engine twin."""
    measured = {v for metrics in result["tasks"].values() for variants in metrics.values() for v in variants}
    return [v for base in VARIANTS for v in (base, f"{base}_engine") if v in measured]


def variant_name(variant: str) -> str:
    """What the table calls a variant."""
    engine = ", by the engine" if variant.endswith("_engine") else ""
    return VARIANTS[variant.removesuffix("_engine")] + engine


def _runs(result: dict[str, Any], task: str, metric: str, variant: str) -> list[float]:
    entry = result["tasks"].get(task, {}).get(metric, {}).get(variant)
    return [run["value"] for run in entry["runs"]] if entry else []


def _score(result: dict[str, Any], task: str, metrics: Sequence[str], variant: str) -> str:
    scores = []
    for values in (_runs(result, task, metric, variant) for metric in metrics):
        if not values:
            scores.append("-")
            continue
        spread = f"±{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        scores.append(f"{sum(values) / len(values):.2f}{spread}")
    return "-" if set(scores) == {"-"} else "/".join(scores)


def retention(result: dict[str, Any], task: str, metric: str, variant: str = "transfer") -> float | None:
    """`variant` / dense in percent, or None where one of the two was not measured."""
    kept, dense = _runs(result, task, metric, variant), _runs(result, task, metric, "dense")
    if not kept or not sum(dense):
        return None
    return 100 * (sum(kept) / len(kept)) / (sum(dense) / len(dense))


def _retention(result: dict[str, Any], task: str, metrics: Sequence[str], variant: str) -> str:
    ratios = [retention(result, task, metric, variant) for metric in metrics]
    return "-" if ratios.count(None) == len(ratios) else "/".join("-" if r is None else f"{r:.1f}" for r in ratios)


def _seeds(result: dict[str, Any], variant: str) -> str:
    counts = {
        len(variants[variant]["runs"])
        for metrics in result["tasks"].values()
        for variants in metrics.values()
        if variant in variants
    }
    few, many = min(counts), max(counts)
    return f"{few}–{many} seeds" if few != many else f"{many} seed{'s' if many > 1 else ''}"


def _sparsity(result: dict[str, Any], variant: str) -> str:
    base = variant.removesuffix("_engine")
    if base in NO_ENCODER:
        return "-"
    return "0" if base == "dense" else f"{result['sparsity']:.3g}"


def _size(result: dict[str, Any], variant: str) -> str:
    base, sizes = variant.removesuffix("_engine"), result.get("sizes") or {}
    fp32 = {"dense": "dense_fp32", "transfer": "nonzeros_bitmask_fp32", "control": "nonzeros_bitmask_fp32"}
    size = sizes.get(fp32[base]) if base in fp32 else sizes.get("packed_int8", sizes.get("nonzeros_bitmask_int8"))
    return "-" if size is None or base in NO_ENCODER else megabytes(size)


def megabytes(size: float) -> str:
    """Bytes as MB with three significant digits."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e6:.0f} MB"


def cell(value: Any) -> str:
    """`value` as text that cannot break a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------- the model card


def write_card(
    folder: Path,
    *,
    results: dict[str, Any],
    recipe: dict[str, Any],
    inspection: dict[str, Any],
    versions: dict[str, Any],
    date: str | None = None,
) -> Path:
    """Write `folder`/README.md, a Hugging Face model card, and the figure method.svg beside it.

    `recipe` is the resolved recipe as a plain mapping, `inspection` what `pattern.inspect` says of the folder.
    Its `card` section holds license, authors, base model, version and language; `date` is ISO, today by default.
    Nothing in the card shows where on this machine anything lies. Raises InputError for bad `results`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from pruneofa.report.deployment import cost_tables

    check_results(results)
    stated = Card.model_validate(recipe.get("card") or {})
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    heads = config.get("architectures") or []
    fill_mask = not heads or any(head.endswith(("ForMaskedLM", "ForPreTraining")) for head in heads)
    evaluations = _evaluations(results, recipe)
    data = ModelCardData(
        language=stated.language,
        license=stated.license,
        library_name="transformers",
        pipeline_tag="fill-mask" if fill_mask else "feature-extraction",
        tags=["sparse", "prune-once-for-all", "pruning", *([config["model_type"]] if "model_type" in config else [])],
        base_model=stated.base_model or (recipe["model"] if is_hub_id(recipe["model"]) else None),
        datasets=[source for source in _sources(recipe) if is_hub_id(source)] or None,
        metrics=list(dict.fromkeys(e.metric_type for e in evaluations)) or None,
        model_name=recipe["name"],
        eval_results=evaluations or None,
    )
    body = render(
        "card.md.j2",
        autoescape=False,
        results=results,
        recipe=portable(recipe),
        recipe_yaml=recipe_yaml(recipe),
        inspection=inspection,
        versions=portable(versions),
        config=config,
        fill_mask=fill_mask,
        license=stated.license,
        authors=stated.authors or "Not stated by whoever ran the recipe",
        base_model=data.base_model,
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
    write_text(folder / "method.svg", figure)
    write_text(folder / "README.md", str(card))
    return folder / "README.md"


def render(template: str, *, autoescape: bool, **values: Any) -> str:
    """Fill a template of ours; a name that is missing is an error, not an empty string."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pruneofa.report"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": cell, "megabytes": megabytes}
    return environment.get_template(template).render(**values)


def portable(value: Any) -> Any:
    """`value` with every path in it that is absolute, upward or in a home folder cut down to its last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and _OF_A_MACHINE.search(value):
        last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return last if re.search(r"\w", last) and not last.startswith("~") else "."
    return value


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """The recipe as YAML that loads again: no paths of this machine, no keys that are at their empty default."""

    def stated(value: Any) -> Any:
        return {k: stated(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    return to_yaml(stated(portable(recipe))).strip()


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as owner/name of the hub and is no path here."""
    is_file = name.endswith((".parquet", ".jsonl", ".json", ".txt", ".csv", ".tsv", ".gz", ".zst"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not is_file and not Path(name).exists()


def _sources(recipe: dict[str, Any]) -> list[str]:
    source = (recipe.get("corpus") or {}).get("source") or []
    return [source] if isinstance(source, str) else list(source)


def _local_copy(task: str, recipe: dict[str, Any]) -> str:
    """Where the numbers of `task` come from if not from the public data set itself; empty if they do."""
    data = ((recipe.get("tasks") or {}).get(task) or {}).get("data")
    if task in HUB and data in (None, HUB[task][1]):
        return ""
    names = [data] if isinstance(data, str) else data or [task]
    return ", ".join(str(portable(name)) for name in names)


def _evaluations(results: dict[str, Any], recipe: dict[str, Any]) -> list[Any]:
    """One EvalResult per task and metric, of the models transferred from the sparse model."""
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
                    f"{_seeds({'tasks': {task: {metric: variants}}}, 'transfer')}",
                )
            )
    return found


def architecture(config: dict[str, Any]) -> str:
    """`6 layers, hidden 384, ...` from a config.json; empty when unknown."""
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
