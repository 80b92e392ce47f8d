"""The recipe: all settings of a run, validated before any work starts. It needs `pip install pruneofa[train]`."""

import importlib.util

if importlib.util.find_spec("pydantic") is None:
    raise ImportError("recipes need pydantic: pip install 'pruneofa[train]'")

from pruneofa.recipe.fields import RESOURCES_ONLY, Section
from pruneofa.recipe.loading import dump, load, merge, parse_override, read_keys, validate
from pruneofa.recipe.model import GLUE, KNOWN_TASKS, Card, Control, Quantize, Recipe, Task, check_task_name
from pruneofa.recipe.pretraining import Corpus, Distill, Prune, Teacher
from pruneofa.recipe.yaml12 import to_yaml

__all__ = [
    "GLUE",
    "KNOWN_TASKS",
    "RESOURCES_ONLY",
    "Card",
    "Control",
    "Corpus",
    "Distill",
    "Prune",
    "Quantize",
    "Recipe",
    "Section",
    "Task",
    "Teacher",
    "check_task_name",
    "dump",
    "load",
    "merge",
    "parse_override",
    "read_keys",
    "to_yaml",
    "validate",
]
