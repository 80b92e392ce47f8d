"""The callbacks in the trainers of sentence-transformers, and around PEFT; skipped where those are not installed."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel, Trainer, TrainerCallback, TrainingArguments

from pruneofa.errors import CheckFailed
from pruneofa.train import LockCallback, PruningCallback
from pruneofa.train.lock import PatternLock
from pruneofa.train.masks import prunable, unwrapped_name
from pruneofa.train.sparse_linear import SparseLinear
from tests.tiny import tiny_bert, tiny_tokenizer

SCHEDULE = {"final": 0.9, "begin": 0, "end": 4, "stop": 5, "interval": 2}
SETTINGS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 6, "save_steps": 3,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
}  # fmt: skip
PAIRS = {
    "first": ["the great book", "a bad film", "the city was first", "two people"] * 4,
    "second": ["a good book", "a terrible film", "the capital", "many people"] * 4,
}


def sparse(model_class, **config):
    model = tiny_bert(model_class, **config)
    with torch.no_grad():
        for weight in prunable(model).values():
            weight[weight.abs() < weight.abs().flatten().quantile(0.9)] = 0.0
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def sentence_trainer(folder, callback):
    package = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses, modules

    path = saved(sparse(BertModel), folder / "model")
    words = modules.Transformer(path)
    model = package.SentenceTransformer(modules=[words, modules.Pooling(32)], device="cpu")
    args = package.SentenceTransformerTrainingArguments(str(folder / "out"), **SETTINGS)
    loss = losses.MultipleNegativesRankingLoss(model)
    data = Dataset.from_dict(PAIRS)
    return package.SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=loss, callbacks=[callback]
    )


def cross_encoder_trainer(folder, callback):
    package = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.cross_encoder import losses

    path = saved(sparse(BertForSequenceClassification, num_labels=1), folder / "model")
    model = package.CrossEncoder(path, device="cpu")
    args = package.CrossEncoderTrainingArguments(str(folder / "out"), **SETTINGS)
    data = Dataset.from_dict(PAIRS | {"label": [1.0, 0.0] * 8})
    loss = losses.BinaryCrossEntropyLoss(model)
    return package.CrossEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss, callbacks=[callback])


class CountSparse(TrainerCallback):
    """Counts the layers that skip zeros at the end of every step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(sum(isinstance(module, SparseLinear) for module in kwargs["model"].modules()))


TRAINERS = pytest.mark.parametrize("make", [sentence_trainer, cross_encoder_trainer])


def encoder_weights(tensors):
    return {unwrapped_name(name): weight.detach().clone() for name, weight in tensors.items()}


@TRAINERS
def test_lock_keeps_every_zero(tmp_path, make):
    trainer = make(tmp_path, LockCallback())
    trainer.add_callback(skipping := CountSparse())
    before = encoder_weights(prunable(trainer.model))
    trainer.train()
    assert skipping.counts == [len(before)] * 6
    after = encoder_weights(prunable(trainer.model))
    assert len(after) == 2 * 6 + 1
    stored = encoder_weights(load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors"))
    for name, start in before.items():
        assert (start == 0).float().mean() == pytest.approx(0.9, abs=0.01)
        for found in (after[name], stored[name]):
            assert torch.equal(found == 0, start == 0), name
    assert any(not torch.equal(after[name], start) for name, start in before.items())


@TRAINERS
def test_pruning_reaches_its_sparsity_and_resumes(tmp_path, make):
    trainer = make(tmp_path, PruningCallback(**SCHEDULE))
    trainer.train()
    wanted = encoder_weights(prunable(trainer.model))
    again = make(tmp_path, PruningCallback(**SCHEDULE))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, weight in encoder_weights(prunable(again.model)).items():
        assert (weight == 0).float().mean() == pytest.approx(0.9, abs=2e-3), name
        assert torch.equal(weight == 0, wanted[name] == 0), name


class Spoil(TrainerCallback):
    """Writes weights without zeros over those of every checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        from safetensors.torch import save_file

        file = f"{args.output_dir}/checkpoint-{state.global_step}/model.safetensors"
        save_file({name: torch.ones_like(weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})


@TRAINERS
def test_the_closing_check_looks_at_what_was_saved(tmp_path, make):
    trainer = make(tmp_path, LockCallback())
    trainer.add_callback(Spoil())
    with pytest.raises(CheckFailed, match=r"not zero in .*checkpoint-6/model\.safetensors"):
        trainer.train()


def test_adapters_keep_the_zeros_until_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    base = sparse(BertForSequenceClassification)
    before = encoder_weights(prunable(base))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "value"], lora_alpha=64))
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    callback = LockCallback()
    with pytest.warns(UserWarning, match="4 pruned weights have an adapter, .* merging"):
        trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    for name, weight in encoder_weights(prunable(model)).items():
        assert torch.equal(weight, before[name]), name
    merged = model.merge_and_unload()
    with pytest.raises(CheckFailed, match="query"):
        callback.lock.verify_in(prunable(merged), "the merged model")
    lock = callback.lock.on(merged)
    lock.verify_in(prunable(merged), "the merged model")
    assert isinstance(lock, PatternLock) and lock.sparsity()["encoder"] == pytest.approx(0.9, abs=0.01)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        ids = torch.randint(5, 100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": int(ids[0] > 50)}
