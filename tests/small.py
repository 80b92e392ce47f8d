"""A whole small run on files made in a folder: text, a task, a tiny model and the recipe that joins them."""

import json
import random
from pathlib import Path

from pruneofa import recipe
from tests.tiny import write_model

SUBJECTS = ["the king", "the queen", "a river", "the city", "that book", "this game", "the team", "the people"]
GOOD = ["is good", "has great music", "was the first", "is the best"]
BAD = ["is bad", "has terrible music", "was the worst", "is a terrible story"]


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of several sentences, one per line of JSON."""
    draw = random.Random(seed)
    lines = []
    for number in range(documents):
        words = [f"{draw.choice(SUBJECTS)} {draw.choice(GOOD + BAD)}." for _ in range(draw.randint(6, 14))]
        lines.append(json.dumps({"text": f"{number}. " + " ".join(words).capitalize()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_task(path: Path, rows: int = 96, seed: int = 0) -> Path:
    """Sentences with the label good or bad, as CSV."""
    draw = random.Random(seed)
    lines = ["sentence,verdict"]
    for _ in range(rows):
        good = draw.random() < 0.5
        lines.append(f"{draw.choice(SUBJECTS)} {draw.choice(GOOD if good else BAD)},{'good' if good else 'bad'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def small_settings(root: Path) -> list[str]:
    """Overrides of a recipe that runs every stage in a few seconds; its data are written below `root`."""
    write_model(root / "model")
    write_text(root / "text.jsonl")
    write_task(root / "task.csv")
    write_task(root / "validation.csv", rows=40, seed=1)
    return [
        "name=small",
        f"model={root / 'model'}",
        f"data_root={root}",
        "corpus={source: text.jsonl, max_length: 32, validation: 0.2}",
        "teacher={steps: 4, batch: 8, lr: 1e-3, save_steps: 2}",
        "prune={steps: 10, batch: 8, lr: 1e-3, end: 5, stop: 8, interval: 1, save_steps: 2}",
        "distill={hidden: 1}",
        "tasks.mine={data: task.csv, validation: validation.csv, text: sentence, label: verdict, epochs: 2, "
        "batch: 16, lr: 1e-3, max_length: 32}",
        "seeds=[0]",
        "precision=fp32",
    ]


def small_recipe(root: Path, *overrides: str) -> recipe.Recipe:
    """`small_settings` as a recipe, with further overrides."""
    return recipe.load([], [*small_settings(root), *overrides])
