"""A small training that the tests of trainer and checkpoints share."""

from functools import partial

from pruneofa.data.corpus import build_corpus
from pruneofa.data.examples import collate
from pruneofa.recipe import Corpus
from pruneofa.train import PruningCallback
from pruneofa.train.curvature import fisher_blocks
from pruneofa.train.layerwise import prune_layerwise
from pruneofa.train.micro_batches import batches
from pruneofa.train.objective import PretrainingObjective
from pruneofa.train.schedule import linear_lr
from pruneofa.train.trainer import train
from tests.small import write_text
from tests.tiny import tiny_bert, tiny_tokenizer

SCHEDULE = {"final": 0.9, "begin": 0, "end": 6, "stop": 9, "interval": 2}


def small_text(folder):
    spec = Corpus(source=str(write_text(folder / "text.jsonl")), max_length=32, validation=0.2)
    return build_corpus(spec, tiny_tokenizer(), cache_dir=folder / "cache")


def objective(seed=0, dropout=0.0):
    make = partial(tiny_bert, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return PretrainingObjective(
        make(seed=seed), make(seed=1), hard=0.5, kd=0.5, hidden=0.5, temperature=2, positions="all", nsp=True
    )


def fit(objective, text, work, *, steps=12, events=None, callbacks=(), **options):
    settings = {"batch": 8, "lr": 1e-3, "precision": "fp32", "max_grad_norm": 1.0, "weight_decay": 0.01} | options
    return train(
        objective,
        stage="test",
        work=work,
        dataset=text.train(steps * settings["batch"], seed=3),
        collate=partial(collate, pad_token_id=0),
        steps=steps,
        rate=partial(linear_lr, total=steps, warmup=1),
        emit=(events if events is not None else []).append,
        callbacks=callbacks,
        **settings,
    )


def pruning(objective, text, score):
    def blocks(weights, t):
        given = batches(text.train(8, seed=t), partial(collate, pad_token_id=0), 2)
        return fisher_blocks(objective, weights, given, total=4, seed=t, block=50, pattern="unstructured", shared=True)

    def layer_fit(sparsity, t):
        given = [
            {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
            for batch in batches(text.train(8, seed=t), partial(collate, pad_token_id=0), 4)
        ]
        prune_layerwise(objective.student, objective.teacher, given, final=sparsity)
        objective.student.train()

    return PruningCallback(**SCHEDULE, score=score, blocks=blocks, fit=layer_fit)


def losses(events):
    return [event["loss"] for event in events if event["event"] == "log"]
