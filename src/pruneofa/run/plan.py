"""The whole method: teacher, prune, for each task and seed dense, transfer, int8 and control, then results."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pruneofa.data import corpus, tasks
from pruneofa.engine.engine import choose_isa
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import pattern
from pruneofa.formats.architecture import read_architecture
from pruneofa.formats.files import fingerprint, new_folder, read_json, write_json, write_text
from pruneofa.recipe import Control, Quantize, Recipe, Task, dump, load
from pruneofa.run.by_engine import measure_by_engine
from pruneofa.run.lineage import lost_pattern
from pruneofa.run.results import collect, environment, versions, write_reports
from pruneofa.run.stages import (
    Emit,
    Outcome,
    Text,
    check_pretraining,
    check_task,
    check_vocabulary,
    fine_tune,
    prepare_teacher,
    prune_once,
    prune_student,
    quantize_aware,
    quantize_trained,
    read_text,
)
from pruneofa.train.models import load_config, load_tokenizer, model_fingerprint
from pruneofa.train.trainer import processes

FORMAT = 2  # part of every fingerprint: raise it when a stage's result changes for the same settings, or its record
LOSSES = {"hard", "kd", "hidden", "temperature"}  # of a task: used only where there is a teacher
UNUSED_BY_CONTROL = {"lr", "begin", "end", "stop", "interval", "initial", "rewind"}  # of prune: it prunes at once
WORK, LOCK = ".work", ".lock"


@dataclass(frozen=True)
class Stage:
    """One folder of a run: what it depends on, and how it is made."""

    name: str
    folder: Path
    settings: dict[str, Any]
    inputs: dict[str, str]
    build: Callable[[Path], Outcome]
    pattern: str | None = None  # model whose zeros the result must still have; int8 rounds after the lock has let go

    @property
    def fingerprint(self) -> str:
        """Changes when a setting or anything upstream changes."""
        return fingerprint({"format": FORMAT, "stage": self.name, "settings": self.settings, "inputs": self.inputs})

    @property
    def status(self) -> str:
        """done, changed (done with other settings) or run."""
        file = self.folder / "stage.json"
        if file.exists():
            return "done" if read_json(file).get("fingerprint") == self.fingerprint else "changed"
        return "run"

    @property
    def earlier(self) -> str | None:
        """The version that made the folder, where it did not record all settings yet."""
        file = self.folder / "stage.json"
        if not file.exists():
            return None
        record = read_json(file)
        if record.get("format", 1) >= FORMAT and "settings" in record:
            return None
        return record.get("versions", {}).get("pruneofa", "0.1")


class Run:
    """A recipe in its folder: the stages it consists of, and its log."""

    def __init__(self, recipe: Recipe, folder: Path, places: dict[str, Path] | None = None) -> None:
        self.recipe = recipe
        self.folder = folder
        self.places = {name: folder / name for name in ("teacher", "sparse", "control")} | (places or {})
        self.work = folder / WORK
        self._text: Text | None = None
        self._tasks: dict[str, tasks.Task] = {}

    def emit(self, event: dict[str, Any]) -> None:
        """Append an event to log.jsonl."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **event}) + "\n")

    def text(self) -> Text:
        """The tokenized corpus."""
        if self._text is None:
            assert self.recipe.corpus is not None
            recipe = self.recipe
            # No collective here: tokenizing takes longer than a barrier waits. build_corpus locks its cache itself.
            self._text = read_text(recipe.corpus, recipe.model, data_root=recipe.data_root, seed=recipe.seed)
        return self._text

    def task(self, name: str) -> tasks.Task:
        """The tokenized task."""
        if name not in self._tasks:
            recipe = self.recipe
            tokenizer = load_tokenizer(recipe.model)
            spec, longest = recipe.tasks[name].resolved(name), tasks.longest_input(load_config(recipe.model))
            self._tasks[name] = tasks.load_task(
                name, spec, tokenizer, data_root=recipe.data_root, max_positions=longest
            )
        return self._tasks[name]

    def stages(self) -> list[Stage]:
        """Every stage of the recipe in the order they run. Reads task data, so bad data fails here."""
        recipe = self.recipe
        upstream = {"model": model_fingerprint(recipe.model)}
        common = {"seed": recipe.seed, "precision": recipe.precision}
        stages = []
        source, sparse, dense = recipe.model, recipe.model, recipe.dense_model or recipe.model
        dense_print = model_fingerprint(dense) if recipe.dense_model else upstream["model"]
        if recipe.prune:
            upstream["corpus"] = self._corpus_fingerprint()
        if recipe.teacher:
            stages.append(self._teacher(recipe.model, dict(upstream), common))
            upstream = {"teacher": stages[-1].fingerprint, "corpus": upstream["corpus"]}
            source = str(stages[-1].folder)
        if recipe.prune:
            stages.append(self._prune(source, dict(upstream), common))
            sparse, sparse_print = str(stages[-1].folder), stages[-1].fingerprint
        else:
            sparse_print = upstream["model"]
        starts = {"transfer": (sparse, sparse_print)}
        if isinstance(recipe.control, Control):
            stages.append(self._control(source, dict(upstream), common))
            starts["control"] = (str(stages[-1].folder), stages[-1].fingerprint)
        for name in recipe.tasks:
            for seed in recipe.seeds:
                stages += self._task_stages(name, seed, (dense, dense_print), starts)
        return stages

    def check(self, stages: list[Stage], redo: bool, where: Path | None = None) -> None:
        """Find what unfinished stages cannot start from or work with, before anything is written.

        Raises InputError; also when finished stages would be replaced and `redo` is false. `where` as in
        `refuse_changes`.
        """
        refuse_changes(stages, self.work, redo, where or self.folder)
        pending = {stage.name for stage in stages if stage.status != "done"}
        recipe = self.recipe
        if recipe.corpus and recipe.corpus.streaming and processes().num_processes > 1:
            raise InputError("corpus.streaming is for one process; set corpus.streaming=false to train with several")
        if recipe.model_is_sparse:
            pattern.inspect(recipe.model)
        if recipe.dense_model is not None:
            check_vocabulary(recipe.model, recipe.dense_model)
        if recipe.corpus and pending & {"teacher", "prune", "control"}:
            check_pretraining(recipe.model, recipe.teacher, recipe.prune, recipe.distill, recipe.corpus)
            self.text()
        for name in recipe.tasks:
            if any(stage.startswith(f"tasks/{name}/") for stage in pending):
                check_task(recipe.model, recipe.tasks[name].resolved(name), self.task(name))

    def _corpus_fingerprint(self) -> str:
        recipe = self.recipe
        assert recipe.corpus is not None
        return corpus.source_fingerprint(recipe.corpus, data_root=recipe.data_root)

    def _pretraining(self, common: dict[str, Any]) -> dict[str, Any]:
        """What the stages on text have in common; where the text lies does not matter, what it says is an input."""
        assert self.recipe.corpus is not None
        return {"corpus": self.recipe.corpus.decisive(exclude={"source"}), **common}

    def _teacher(self, model: str, inputs: dict[str, str], common: dict[str, Any]) -> Stage:
        settings = self.recipe.teacher
        assert settings is not None

        def build(work: Path) -> Outcome:
            return prepare_teacher(model, settings, self.text(), work=work, emit=self.emit, **common)

        used = settings.decisive() | self._pretraining(common)
        return Stage("teacher", self.places["teacher"], used, inputs, build)

    def _prune(self, teacher: str, inputs: dict[str, str], common: dict[str, Any]) -> Stage:
        settings, distill = self.recipe.prune, self.recipe.distill
        assert settings is not None

        def build(work: Path) -> Outcome:
            return prune_student(teacher, settings, distill, self.text(), work=work, emit=self.emit, **common)

        used = settings.decisive() | {"distill": distill.decisive()} | self._pretraining(common)
        return Stage("prune", self.places["sparse"], used, inputs, build)

    def _control(self, teacher: str, inputs: dict[str, str], common: dict[str, Any]) -> Stage:
        settings, distill, control = self.recipe.prune, self.recipe.distill, self.recipe.control
        assert settings is not None and isinstance(control, Control)

        def build(work: Path) -> Outcome:
            text = self.text()
            return prune_once(teacher, settings, distill, control, text, work=work, emit=self.emit, **common)

        used = settings.decisive(exclude=UNUSED_BY_CONTROL) | control.decisive(exclude={"tasks"})
        used |= {"distill": distill.decisive()} | self._pretraining(common)
        return Stage("control", self.places["control"], used, inputs, build)

    def _task_stages(
        self, name: str, seed: int, dense: tuple[str, str], starts: dict[str, tuple[str, str]]
    ) -> list[Stage]:
        recipe = self.recipe
        spec = recipe.tasks[name].resolved(name)
        folder = self.folder / "tasks" / name / f"seed-{seed}"
        data = self.task(name).fingerprint
        common = {"seed": seed, "precision": recipe.precision}
        teacher_of = spec.teacher
        stages = []
        if spec.teacher is None and not (recipe.model_is_sparse and recipe.dense_model is None):
            alone = spec.model_copy(update={"epochs": spec.dense_epochs, "lr": spec.dense_lr})
            build = self._tune(name, alone, dense[0], None, f"{name}/seed-{seed}/dense", common)
            settings = spec.decisive(_training(name) | {"dense_epochs", "dense_lr"}) | common
            inputs = {"model": dense[1], "data": data}
            stages.append(Stage(f"tasks/{name}/seed-{seed}/teacher", folder / "teacher", settings, inputs, build))
            teacher_of, teacher_print = str(folder / "teacher"), stages[0].fingerprint
        elif spec.teacher is not None:
            teacher_print = model_fingerprint(spec.teacher)
            if seed == recipe.seeds[0]:  # one model, whatever the seed of the students
                build = self._measure(name, spec, spec.teacher)
                inputs = {"model": teacher_print, "data": data}
                settings = spec.decisive(_lengths(name))
                stages.append(Stage(f"tasks/{name}/seed-{seed}/teacher", folder / "teacher", settings, inputs, build))
        else:
            teacher_print = ""
        for variant, (start, start_print) in starts.items():
            control = recipe.control
            if variant == "control" and isinstance(control, Control) and name not in (control.tasks or recipe.tasks):
                continue
            build = self._tune(name, spec, start, teacher_of, f"{name}/seed-{seed}/{variant}", common, locked=True)
            losses = LOSSES if teacher_of else set()
            settings = spec.decisive(_training(name) | losses | {"epochs", "lr", "dropout"}) | common
            inputs = {"model": start_print, "teacher": teacher_print, "data": data}
            stages.append(Stage(f"tasks/{name}/seed-{seed}/{variant}", folder / variant, settings, inputs, build))
            if variant == "transfer" and recipe.quantize:
                made = (str(folder / variant), stages[-1].fingerprint)
                stages += self.int8_stages(name, spec, recipe.quantize, seed, made, (teacher_of, teacher_print), start)
        return stages

    def int8_stages(
        self,
        name: str,
        spec: Task,
        settings: Quantize,
        seed: int,
        start: tuple[str, str],
        teacher: tuple[str | None, str],
        sparse: str | None,
    ) -> list[Stage]:
        """Post-training quantization, if it is asked for, and quantization-aware training of one task model.

        `start` and `teacher` are a model and its fingerprint; `sparse` is the model whose pattern `start` must have.
        """
        folder = self.folder / "tasks" / name / f"seed-{seed}"
        common = {"seed": seed, "precision": self.recipe.precision}
        data = self.task(name).fingerprint

        def train(work: Path) -> Outcome:
            check_pattern(sparse, start[0])
            stage, task = f"{name}/seed-{seed}/quantize", self.task(name)
            return quantize_aware(
                start[0], teacher[0], spec, settings, task, stage=stage, work=work, emit=self.emit, **common
            )

        def calibrate(work: Path) -> Outcome:
            check_pattern(sparse, start[0])
            return quantize_trained(start[0], settings, self.task(name), seed=seed)

        numerics = {"weights", "activations", "embeddings"}
        static = settings.activations == "static"
        stages = []
        if settings.ptq:
            names = {"calibration", "observer"} | ({"percentile"} if settings.observer == "percentile" else set())
            used = settings.decisive(numerics | (names if static else set()))
            used |= spec.decisive(_lengths(name)) | {"seed": seed}
            inputs = {"model": start[1], "data": data}
            stages.append(Stage(f"tasks/{name}/seed-{seed}/ptq", folder / "ptq", used, inputs, calibrate, sparse))
        losses = LOSSES if teacher[0] else set()
        used = spec.decisive(_training(name) | losses | {"qat_epochs", "qat_lr", "qat_rows", "dropout"})
        used |= settings.decisive(numerics | ({"freeze"} if static else set())) | common
        inputs = {"model": start[1], "teacher": teacher[1], "data": data}
        return [
            *stages,
            Stage(f"tasks/{name}/seed-{seed}/quantize", folder / "quantize", used, inputs, train, sparse),
        ]

    def _tune(
        self,
        name: str,
        spec: Task,
        model: str,
        teacher: str | None,
        stage: str,
        common: dict[str, Any],
        *,
        locked: bool = False,
    ) -> Callable[[Path], Outcome]:
        def build(work: Path) -> Outcome:
            return fine_tune(
                model,
                teacher,
                spec,
                self.task(name),
                locked=locked,
                stage=stage,
                work=work,
                emit=self.emit,
                **common,
            )

        return build

    def _measure(self, name: str, spec: Task, model: str) -> Callable[[Path], Outcome]:
        from pruneofa.train.evaluate import evaluate

        def build(work: Path) -> Outcome:
            return Outcome(None, None, evaluate(model, name, spec, data_root=self.recipe.data_root))

        return build


def run(recipe: Recipe, folder: Path, *, redo: bool = False) -> dict[str, Any]:
    """Carry out what is missing of a recipe in `folder`, and write results, table, card and report.

    Returns the results (design.md, "A run's folder"). Raises InputError when the folder is another recipe's,
    or when finished stages no longer match and `redo` is false.
    """
    check_folder(recipe, folder)
    this = Run(recipe, folder)
    stages = this.stages()
    this.check(stages, redo)
    if recipe.quantize:
        check_engine(recipe)
    untaught = [name for name, task in recipe.tasks.items() if task.teacher is None]
    if recipe.model_is_sparse and recipe.dense_model is None and untaught and processes().is_main_process:
        sys.stderr.write(
            f"no teacher for {', '.join(untaught)}: learning from the labels alone; "
            "name tasks.X.teacher, or dense_model to have one made\n"
        )
    processes().wait_for_everyone()  # nobody may find the folder begun before having checked it
    main = processes().is_main_process
    results = {}
    with only_one(folder):
        refuse_changes(stages, this.work, redo, folder)  # again: another process may have finished meanwhile
        pending = [stage for stage in stages if stage.status != "done"]
        if main:
            write_text(folder / "recipe.yaml", dump(recipe))
            if pending:
                write_json(folder / "run.json", environment())
        for stage in pending:
            carry_out(stage, this.work, this.emit)
        if main:
            shutil.rmtree(this.work, ignore_errors=True)
            results = collect(recipe, folder, stages)
            write_reports(recipe, folder, results)
        processes().wait_for_everyone()
        # No collective after this: the engine takes longer than a barrier waits.
        if main and measure_by_engine(stages, this.task):
            results = collect(recipe, folder, stages)
            write_reports(recipe, folder, results)
    return results


def check_engine(recipe: Recipe) -> None:
    """Raises InputError, or ImportError, where the engine cannot run what the tasks' stages will make."""
    choose_isa(None)
    for model in filter(None, (recipe.model, recipe.dense_model)):
        # Its head does not matter: the tasks' stages give it another one.
        read_architecture(load_config(model).to_dict() | {"architectures": None}, model)


def check_pattern(sparse: str | None, model: str) -> None:
    """Raises CheckFailed naming layer and count when zeros of `sparse`, if known, are not zero in `model`."""
    if sparse is None:
        return
    if lost := lost_pattern(sparse, model):
        raise CheckFailed(lost)


def check_folder(recipe: Recipe, folder: Path) -> None:
    """Raises InputError when `folder` holds something else than a run of this recipe."""
    file = folder / "recipe.yaml"
    if file.exists():
        name = load([file]).name
        if name != recipe.name:
            raise InputError(
                f"{folder}: holds the run {name!r}, this recipe is {recipe.name!r}; choose another --out, or delete it"
            )
    elif folder.exists() and any(p.name not in (WORK, LOCK, "data") for p in folder.iterdir()):
        raise InputError(f"{folder}: not empty and not a run's folder; choose another --out")


def refuse_changes(stages: Iterable[Stage], work: Path, redo: bool, where: Path) -> None:
    """Raises InputError listing stages, finished or begun, whose settings or inputs changed, unless `redo`.

    Stages whose record lacks settings are refused as such: whether theirs changed cannot be told. `where` is
    what the message calls the place of the stages.
    """
    stages = list(stages)
    earlier = [(stage, version) for stage in stages if (version := stage.earlier) is not None]
    if earlier and not redo:
        names = ", ".join(stage.name for stage, _ in earlier)
        raise InputError(
            f"{where}: made by pruneofa {earlier[0][1]}, whose stages do not record all settings ({names}); "
            f"wanted stages of format {FORMAT}; run into another folder, or make them again with --redo"
        )
    changed = [stage.name for stage in stages if stage.status == "changed"]
    changed += [f"{stage.name} (unfinished)" for stage in stages if _begun_otherwise(stage, work)]
    if changed and not redo:
        raise InputError(
            f"settings or inputs of stages changed: {', '.join(changed)}; "
            "--redo makes them again (the old ones are kept until the new are complete), or choose another --out"
        )


def _begun_otherwise(stage: Stage, work: Path) -> bool:
    mark = work / stage.name / "fingerprint"
    return mark.exists() and mark.read_text() != stage.fingerprint


@contextlib.contextmanager
def only_one(folder: Path, *, name: Path | None = None, out: str = "--out") -> Iterator[None]:
    """Keep a second process out of the folder of a run, or of one stage's work.

    Raises InputError when one is at work there; it calls the folder `name`, and the argument to change `out`.
    """
    if not processes().is_main_process:
        yield
        return
    with _lock_file(folder) as file:
        if file is None:
            raise InputError(
                f"{name or folder}: another pruneofa is at work here; wait for it, or choose another {out}"
            )
        yield


@contextlib.contextmanager
def _lock_file(folder: Path) -> Iterator[TextIO | None]:
    """The locked file of the folder, which is made; None where another process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK, "w")  # noqa: SIM115 - closed below, once it is known to be there
        except FileNotFoundError:  # whoever worked here has just removed the folder
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_at(file, folder / LOCK):  # removed between opening and locking: it keeps nobody out
                continue
            yield file
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def carry_out(stage: Stage, work_root: Path, emit: Emit) -> None:
    """Make one stage: train in a working folder that survives a kill, then put the result in place at once."""
    work = work_root / stage.name
    state = processes()
    if state.is_main_process:
        mark = work / "fingerprint"
        if work.exists() and (not mark.exists() or mark.read_text() != stage.fingerprint):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_text(mark, stage.fingerprint)
    state.wait_for_everyone()
    outcome = stage.build(work)
    if state.is_main_process:
        with new_folder(stage.folder) as folder:
            outcome.save(folder)
            check_pattern(stage.pattern, str(folder))
            write_json(folder / "metrics.json", outcome.metrics)
            record = {
                "format": FORMAT,
                "stage": stage.name,
                "fingerprint": stage.fingerprint,
                "settings": stage.settings,
                "inputs": stage.inputs,
                "seconds": round(outcome.seconds, 1),
                "tokens": outcome.tokens,
                "versions": versions(),
            }
            write_json(folder / "stage.json", record)
        emit({"event": "done", "stage": stage.name, "seconds": record["seconds"], "metrics": outcome.metrics})
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()


def _lengths(name: str) -> set[str]:
    """Fields of a task that say how its rows become tokens; the rows themselves are an input."""
    return {"max_length", "stride"} if name == "squad" else {"max_length"}


def _training(name: str) -> set[str]:
    """Fields of a task that all its trainings use."""
    return _lengths(name) | {"batch", "warmup", "weight_decay", "max_grad_norm"}
