"""The inputs of a recipe: models, text and task data, each read once."""

from collections.abc import Sequence

from pruneofa.data import corpus, tasks
from pruneofa.progress import notice
from pruneofa.recipe import Recipe, Task
from pruneofa.run.pretraining import Text, read_text
from pruneofa.run.stage import LazyData, Model
from pruneofa.train.device import processes
from pruneofa.train.models import load_config, load_tokenizer, model_fingerprint


def teacher_path(spec: Task, seed: int) -> str | None:
    """Path of the dense model that a task names as its teacher with this seed, or None if it names none."""
    return spec.teacher and spec.teacher.replace("{seed}", str(seed))


def dense_paths(recipe: Recipe, name: str) -> list[str]:
    """The models that the dense models of a task are, or are fine-tuned from, where the recipe names any."""
    named = [teacher_path(recipe.tasks[name], seed) or recipe.dense_model for seed in recipe.seeds]
    return [path for path in dict.fromkeys(named) if path]


class Inputs:
    """The models, the text and the tasks that a recipe names."""

    def __init__(self, recipe: Recipe, labels: Sequence[str] | None = None) -> None:
        """`labels` are the classes of the recipe's model, where it is a task model whose classes are kept."""
        self.recipe = recipe
        self._labels = labels
        self._models: dict[str, Model] = {}
        self._source: LazyData | None = None
        self._text: Text | None = None
        self._tasks: dict[str, tasks.Task] = {}

    def model(self, path: str) -> Model:
        """A model that exists already."""
        if path not in self._models:
            self._models[path] = Model(path, model_fingerprint(path))
        return self._models[path]

    def teacher(self, spec: Task, seed: int) -> Model | None:
        """The dense model that a task names as its teacher with this seed, if it names one."""
        path = teacher_path(spec, seed)
        return self.model(path) if path else None

    def text(self) -> LazyData:
        """The corpus, tokenized when it is read."""
        if self._source is None:
            recipe = self.recipe
            assert recipe.corpus is not None
            source = corpus.source_fingerprint(recipe.corpus, data_root=recipe.data_root)
            self._source = LazyData(source, self._read_text)
        return self._source

    def _read_text(self) -> Text:
        if self._text is None:
            recipe = self.recipe
            assert recipe.corpus is not None
            # No collective here: tokenizing takes longer than a barrier's timeout. build_corpus locks its cache itself.
            self._text = read_text(recipe.corpus, recipe.model, data_root=recipe.data_root, seed=recipe.seed)
        return self._text

    def task(self, name: str) -> tasks.Task:
        """The tokenized task."""
        if name not in self._tasks:
            recipe = self.recipe
            # All models of a task get the same features, and each takes what it knows. One text is all of type 0.
            pairs = len(tasks.text_columns(name, recipe.tasks[name])) > 1
            others = dense_paths(recipe, name) if pairs else []
            types = any("token_type_ids" in load_tokenizer(path).model_input_names for path in others)
            tokenizer = load_tokenizer(recipe.model, types=types or None)
            spec, longest = recipe.tasks[name].resolved(name), tasks.longest_input(load_config(recipe.model))
            self._tasks[name] = tasks.load_task(
                name, spec, tokenizer, data_root=recipe.data_root, labels=self._labels, max_positions=longest
            )
            if processes().is_main_process:
                for note in self._tasks[name].notes():
                    notice(note)
        return self._tasks[name]

    def training_rows(self, name: str) -> LazyData:
        """The task, for training."""
        task = self.task(name)
        return LazyData(task.train_fingerprint, lambda: task)

    def validation_rows(self, name: str) -> LazyData:
        """The task, for evaluation."""
        task = self.task(name)
        return LazyData(task.evaluation_fingerprint, lambda: task)
