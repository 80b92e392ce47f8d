"""The verb `quantize`."""

import argparse
from pathlib import Path

from pruneofa.cli.options import (
    LABELS_ONLY,
    add_fields,
    add_training,
    learn_from_labels,
    precision_of,
    read_fields,
    read_task,
    refuse_unused,
)
from pruneofa.cli.show import print_metrics, say_pattern
from pruneofa.progress import notice


def describe(verb: argparse.ArgumentParser) -> None:
    """Quantize a task model to int8: by quantization-aware training with its zeros locked, or without training (--ptq).

    OUT is an ordinary Hugging Face folder. Its weights are on the int8 grid, and its scales are in quantization.json
    and quantization.safetensors. `pruneofa pack OUT PACKED` stores these codes and scales, and the engine uses them
    unchanged. The same command resumes an interrupted run.
    """
    from pruneofa import recipe

    verb.usage = (
        "pruneofa quantize FOLDER OUT (--task T | --data FILE --text A [B] --label L) [--teacher DIR | --ptq] [options]"
    )
    verb.epilog = (
        "example: pruneofa quantize runs/minilm-90/tasks/sst2/seed-0/transfer out --task sst2 --data sst2 "
        "--teacher runs/minilm-90/tasks/sst2/seed-0/teacher"
    )
    verb.add_argument("folder", help="folder or hub id of a task model; its zeros stay zero")
    verb.add_argument("out", type=Path, help="folder of the int8 model")
    verb.add_argument("--task", metavar="T", help="sst2, mnli, qnli, qqp or squad; or a name for your own --data")
    ptq = "post-training quantization: no training; static ranges come from --calibration examples; takes seconds"
    verb.add_argument("--ptq", action="store_true", help=ptq)
    add_fields(verb, recipe.Quantize, "", without=("ptq",), title="int8")
    # The omitted fields set how a run trains the models that are inputs here.
    add_fields(
        verb,
        recipe.Task,
        "",
        without=("dense_epochs", "dense_lr", "epochs", "lr", "check_epochs", "skip_zeros"),
    )
    add_training(verb)

    def call(options: argparse.Namespace) -> int:
        name, spec = read_task(options)
        refuse_unused(options)
        if spec.teacher is None and not options.ptq:
            spec = learn_from_labels(options, spec)
        values = read_fields(options, recipe.Quantize, "") | {"ptq": options.ptq}
        settings = recipe.validate(recipe.Quantize, values, "quantize")
        say_pattern(options.folder)
        if spec.teacher is None and not options.ptq:
            notice(LABELS_ONLY)
        from pruneofa.formats.files import read_json
        from pruneofa.run import single  # torch, which takes seconds: what is wrong without it is said before
        from pruneofa.run.stage import EVALUATION

        training = {"seed": options.seed, "precision": precision_of(options)}
        root, redo = options.data_root, options.redo
        metrics = single.quantize(
            options.folder, options.out, name, spec, settings, data_root=root, redo=redo, **training
        )
        rows = read_json(options.out / EVALUATION).get("rows")
        print_metrics({"out": str(options.out), **metrics}, options.json, rows)
        return 0

    verb.set_defaults(call=call)
