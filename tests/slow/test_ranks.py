"""Two processes train as one does: the same losses, and masks that are equal to the bit."""

import hashlib
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests.slow.children import HANGS

# A rank imports for minutes where others keep the processors busy, and the two wait for each other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * HANGS)]

STEPS, BATCH = 20, 8
SCHEDULE = {"final": 0.9, "begin": 2, "end": 12, "stop": 16, "interval": 2}


def train_and_report(root: Path) -> None:
    """What each rank does: 20 steps of pruning, then a file with its losses and the hash of its masks."""
    from pruneofa.data.corpus import build_corpus
    from pruneofa.data.examples import collate
    from pruneofa.recipe import Corpus
    from pruneofa.train import PruningCallback
    from pruneofa.train.objective import PretrainingObjective
    from pruneofa.train.schedule import rewound_lr
    from pruneofa.train.trainer import train
    from tests.tiny import tiny_bert, tiny_tokenizer

    spec = Corpus(source=str(root / "text.jsonl"), max_length=32, validation=0.2)
    text = build_corpus(spec, tiny_tokenizer(), cache_dir=root / "cache")
    make = partial(tiny_bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = {"hard": 0.5, "kd": 0.5, "hidden": 0.5, "temperature": 2, "positions": "all", "nsp": True}
    objective = PretrainingObjective(make(seed=0), make(seed=1), **losses)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    pruning = PruningCallback(**SCHEDULE)
    masks, events = hashlib.sha256(), []

    class Hash(type(pruning)):
        """The masks after every step go into the hash, not the last ones alone."""

        def on_step_end(self, *arguments, **options):
            super().on_step_end(*arguments, **options)
            for name, kept in sorted(self.pruner.masks.items()):
                masks.update(name.encode() + kept.cpu().numpy().tobytes())

    clock = train(
        objective,
        stage="ranks",
        work=root / f"work-{world}",
        dataset=text.train(STEPS * BATCH, seed=3),
        collate=partial(collate, pad_token_id=0),
        steps=STEPS,
        batch=BATCH,
        micro_batch=2,
        lr=1e-3,
        rate=partial(rewound_lr, total=STEPS, warmup=2, begin=2, end=12, interval=2),
        weight_decay=0.01,
        emit=events.append,
        precision="fp32",
        callbacks=[Hash(**SCHEDULE)],
    )
    logged = [event for event in events if event["event"] == "log"]
    report = {"masks": masks.hexdigest(), "tokens": clock["tokens"], "log": logged}
    (root / f"rank-{rank}-of-{world}.json").write_text(json.dumps(report))


def torchrun(*arguments: object) -> None:
    """Run a module on two ranks; their processes end with this function, whatever happens."""
    # Standalone: the launcher itself binds a free port, which no other process can take in between.
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, *map(str, arguments)]
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            code = process.wait(HANGS)
        finally:
            process.terminate()  # then it ends the ranks, which a kill would leave
            process.wait()
        said.seek(0)
        assert code == 0, said.read()


def test_two_ranks_train_as_one_process_does(tmp_path, monkeypatch):
    from tests.small import write_text

    write_text(tmp_path / "text.jsonl")
    torchrun("-m", "tests.slow.test_ranks", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_and_report(tmp_path)
    alone = json.loads((tmp_path / "rank-0-of-1.json").read_text())
    first, second = (json.loads((tmp_path / f"rank-{rank}-of-2.json").read_text()) for rank in (0, 1))
    assert first["masks"] == second["masks"]
    assert len(alone["log"]) == len(first["log"]) == STEPS
    for one, two in zip(alone["log"], first["log"], strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4), one["step"]
        for part in ("mlm", "nsp", "kd", "kd_nsp", "hidden"):
            assert math.isclose(one[part], two[part], rel_tol=1e-4, abs_tol=1e-6), (one["step"], part)
        assert math.isclose(one["sparsity"], two["sparsity"], abs_tol=1e-6)
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
    assert alone["tokens"] == first["tokens"] == second["tokens"]
    assert alone["log"][-1]["sparsity"] == pytest.approx(0.9, abs=2e-3)


def test_a_whole_run_on_two_ranks(tmp_path):
    from pruneofa import recipe
    from pruneofa.formats.files import read_json
    from pruneofa.formats.verify import verify
    from tests.small import small_recipe

    layer_wise = ("prune.score=hessian", "prune.one_shot=false")  # the ranks take the fits of the first
    small = small_recipe(tmp_path, "control={lr: [1e-3]}", "quantize={}", *layer_wise)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(small))
    out = tmp_path / "run"
    torchrun("-m", "pruneofa", "run", tmp_path / "recipe.yaml", "--out", out)
    results = read_json(out / "results.json")
    by_torch = {"dense", "transfer", "control", "ptq", "quantize"}
    by_engine = {f"{name}_engine" for name in by_torch - {"control"}}
    assert set(results["tasks"]["mine"]["accuracy"]) == by_torch | by_engine
    assert verify(out / "sparse", out / "tasks/mine/seed-0/transfer")["ok"]
    assert results["sparsity"] == pytest.approx(0.9, abs=2e-3)
    assert not (out / ".work").exists()
    torchrun("-m", "pruneofa", "run", tmp_path / "recipe.yaml", "--out", out)


if __name__ == "__main__":
    train_and_report(Path(sys.argv[1]))
