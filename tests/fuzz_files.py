"""Mutate every kind of file that is read from a folder:  python -m tests.fuzz_files TARGET --seconds 600 --seed 1

Each target writes an intact folder once, then damages one file again and again and reads it the way a verb does.
What comes out is a result, InputError or CheckFailed, in one printable line, within SECONDS of processor time and the
memory that the file's size justifies. Everything else is Broken, with the number that repeats it.
`tests/fuzz_packed.py` does the same for packed folders, guided by coverage.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pruneofa import recipe
from pruneofa.engine.engine import Engine
from pruneofa.errors import CheckFailed, InputError
from pruneofa.formats import scales
from pruneofa.formats.convert import convert
from pruneofa.formats.files import read_json
from pruneofa.formats.pack import pack
from pruneofa.formats.packed import read
from pruneofa.formats.sentence import read_sentence
from pruneofa.formats.tensors import weight_files, weights_folder
from pruneofa.formats.unpack import unpack
from tests.broken import WRONG, paths, replaced
from tests.golden import GOLDEN
from tests.tiny import write_folder

SECONDS = 5.0
BYTES, BYTES_EACH = 16 << 20, 64  # memory in all, and per byte of the file
MORE = [*WRONG, "\x1b[2J[/red]", "../../etc/passwd", "a" * 5000, -(2**63), 1e308, [{}] * 50, {"": None}]
SPLICES = (b"\0", b"\xff", b"{", b"[" * 2000, b"9" * 5000, b"\n", b'"', b"\xed\xa0\x80", b"1e999", b"NaN", b"&a *a")


class Broken(Exception):
    """A file was read, or refused, in a way that it must not be."""


@dataclass(frozen=True)
class Target:
    """A file by its path in the folder that `write` makes, and `use`, which reads the folder as a verb does."""

    file: str
    write: Callable[[Path], object]
    use: Callable[[Path], object]


def _predict(folder: Path) -> object:
    return Engine.from_pretrained(folder, threads=1).predict(["a good film", ("the", "game ")], truncate=True)


def _sentence_folder(folder: Path) -> None:
    write_folder(folder, "Model")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
               {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}]  # fmt: skip
    (folder / "1_Pooling").mkdir()
    contents = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": True},
        "config_sentence_transformers.json": {
            "prompts": {"q": "good: "},
            "default_prompt_name": "q",
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))


def _sharded(folder: Path) -> None:
    write_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(("classifier.weight", "classifier.bias"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _packed(folder: Path) -> None:
    write_folder(folder / "source")
    pack(folder / "source", folder / "packed")


def _quantized(folder: Path) -> None:
    shutil.copytree(GOLDEN / "v1-int8-static", folder / "packed")
    unpack(folder / "packed", folder / "model")


def _binary(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    write_folder(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _read_binary(folder: Path) -> object:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PRUNEOFA_CACHE"] = cache
        return convert(weights_folder(folder))


RECIPE = """\
name: r
model: &m some/model
corpus: {source: [t.txt], validation: 0.05, nsp: true}
prune: {steps: 100, lr: 1e-4, final: 0.5, pattern: "2:4", skip: [a.b]}
tasks:
  sst2: {epochs: 3, lr: 1.0e-4}
  own: {data: x.csv, text: [a, b], label: c, teacher: *m}
quantize: {freeze: 0.8}
seeds: [0, 1, 2]
"""


def _stage(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    record = {"format": 3, "stage": "sparse", "task": "sst2", "seed": 0, "variant": "transfer", "fingerprint": "a" * 64,
              "settings": {"a": {"b": 1}}, "inputs": {"model": "b"}, "seconds": 1.0, "tokens": 5,
              "versions": {"pruneofa": "0.1"}}  # fmt: skip
    (folder / "stage.json").write_text(json.dumps(record))


def _read_stage(folder: Path) -> object:
    from pruneofa.run.lineage import stage_of

    return stage_of(folder)


def _log(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    events = [{"event": "start", "stage": "prune", "step": 0}]
    events += [{"event": "log", "stage": "prune", "step": step, "loss": 1.5, "lr": 1e-4, "kd": 0.1, "sparsity": 0.5,
                "peak_lr": None} for step in range(20)]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def _read_log(folder: Path) -> object:
    from pruneofa.report.charts import log_rows
    from pruneofa.run.events import read_events

    return log_rows(read_events(folder / "log.jsonl"))


TARGETS = {
    "config": Target("config.json", write_folder, _predict),
    "tokenizer": Target("tokenizer.json", write_folder, _predict),
    "tokenizer-config": Target("tokenizer_config.json", write_folder, _predict),
    "modules": Target("modules.json", _sentence_folder, _predict),
    "pooling": Target("1_Pooling/config.json", _sentence_folder, _predict),
    "prompts": Target("config_sentence_transformers.json", _sentence_folder, _predict),
    "texts": Target("sentence_bert_config.json", _sentence_folder, read_sentence),
    "manifest": Target("packed/manifest.json", _packed, lambda folder: read(folder / "packed")),
    "quantization": Target("model/quantization.json", _quantized, lambda folder: scales.read(folder / "model")),
    "scales": Target("model/quantization.safetensors", _quantized, lambda folder: convert(folder / "model")),
    "index": Target("model.safetensors.index.json", _sharded, weight_files),
    "safetensors": Target("model.safetensors", write_folder, convert),
    "bin": Target("pytorch_model.bin", _binary, _read_binary),
    "recipe": Target(
        "recipe.yaml", lambda folder: (folder / "recipe.yaml").write_text(RECIPE),
        lambda folder: recipe.dump(recipe.load([folder / "recipe.yaml"])),
    ),
    "stage": Target("stage.json", _stage, _read_stage),
    "evaluation": Target("stage.json", _stage, lambda folder: read_json(folder / "stage.json")),
    "log": Target("log.jsonl", _log, _read_log),
}  # fmt: skip


def mutate(intact: bytes, random: Random) -> bytes:
    """A field of a JSON document replaced, or bytes changed, cut, repeated or spliced in."""
    kind = random.randrange(8)
    if b"\n{" in intact and kind < 4:  # a document per line
        lines = intact.splitlines(keepends=True)
        chosen = random.randrange(len(lines))
        return b"".join([*lines[:chosen], mutate(lines[chosen], random) + b"\n", *lines[chosen + 1 :]])
    start = intact.find(b"{") if intact[8:9] == b"{" else 0  # the header of a safetensors file
    length = int.from_bytes(intact[:8], "little") if start == 8 else len(intact)
    if kind < 4:
        try:
            document = json.loads(intact[start : start + length])
        except ValueError:
            kind = 4
        else:
            for _ in range(random.choice((1, 1, 2))):
                document = replaced(document, random.choice(list(paths(document))), random.choice(MORE))
            head = json.dumps(document).encode()
            return (len(head).to_bytes(8, "little") if start == 8 else b"") + head + intact[start + length :]
    place = random.randrange(len(intact) + 1)
    other = random.randrange(len(intact) + 1)
    first, last = min(place, other), max(place, other)
    if kind == 4:
        return intact[:place]
    if kind == 5:
        return intact[:place] + random.choice(SPLICES) + intact[place:]
    if kind == 6:
        return intact[:last] + intact[first:]
    changed = bytearray(intact)
    for _ in range(random.choice((1, 3, 20))):
        spot = random.randrange(min(len(changed), 4096) if random.random() < 0.5 else len(changed))
        changed[spot] = random.choice((0, 255, 1 << random.randrange(8), random.randrange(256)))
    return bytes(changed)


def attempt(target: Target, folder: Path, content: bytes) -> str:
    """How reading `content` in place of the file ends. Raises Broken, or what is neither InputError nor CheckFailed."""
    (folder / target.file).write_bytes(content)
    begin = time.process_time()
    tracemalloc.start()
    try:
        target.use(folder)
        ending = "read"
    except (InputError, CheckFailed) as error:
        text = str(error).replace(str(folder), "")
        if len(text) > 1000 or not text.isprintable():
            raise Broken(f"a message of {len(text)} characters: {ascii(text)[:300]}") from error
        ending = "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if (taken := time.process_time() - begin) > SECONDS:
        raise Broken(f"{taken:.1f} s; allowed {SECONDS}")
    if peak > (allowed := BYTES + BYTES_EACH * len(content)):
        raise Broken(f"{peak} bytes of memory; allowed {allowed}")
    return ending


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> tuple[Counter[str], dict[str, str]]:
    """Mutations of one target for a while: how many ended how, and one example of each wrong ending."""
    target = TARGETS[name]
    target.write(folder)
    intact = (folder / target.file).read_bytes()
    endings: Counter[str] = Counter()
    found: dict[str, str] = {}
    number = seed << 32
    target.use(folder)  # what is imported and cached is not counted
    if attempt(target, folder, intact) != "read":
        found["intact"] = "the intact file is refused"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number += 1
        try:
            endings[attempt(target, folder, mutate(intact, Random(number)))] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            endings["wrong"] += 1
            trace, place = error.__traceback__, ""
            while trace is not None:
                code = trace.tb_frame.f_code
                place = f"{Path(code.co_filename).name}:{trace.tb_lineno}" if "pruneofa" in code.co_filename else place
                trace = trace.tb_next
            found.setdefault(f"{type(error).__name__} {place}", f"number {number}: {ascii(error)[:300]}")
    return endings, found


def main() -> int:
    """Fuzz one target, or all, and print a JSON record of each; exit code 1 if one ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", help=f"of {', '.join(TARGETS)} (default all)")
    parser.add_argument("--seconds", type=float, default=600, help="for each target (default 600)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default 1)")
    options = parser.parse_args()
    wrong = 0
    for name in options.target or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            begin, processor = time.monotonic(), time.process_time()
            endings, found = fuzz(name, options.seconds, options.seed, Path(folder))
            seconds, processor = time.monotonic() - begin, time.process_time() - processor
        record = {"target": name, "seed": options.seed, "seconds": round(seconds), "of_processor": round(processor),
                  "files": endings.total(), "per_second": round(endings.total() / seconds, 1), "endings": endings,
                  "found": found}  # fmt: skip
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
        wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
