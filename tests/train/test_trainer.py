import itertools
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pruneofa import progress
from pruneofa.data.corpus import build_corpus
from pruneofa.data.examples import collate
from pruneofa.errors import CheckFailed, InputError
from pruneofa.recipe import Corpus
from pruneofa.train import LockCallback, PruningCallback
from pruneofa.train.attention import use_bf16_attention
from pruneofa.train.checkpoints import last_checkpoint
from pruneofa.train.device import split_batch
from pruneofa.train.masks import prunable
from pruneofa.train.objective import PretrainingObjective
from tests.small import write_text
from tests.tiny import tiny_bert, tiny_mpnet, tiny_tokenizer
from tests.train.fits import SCHEDULE, fit, losses, objective, pruning, small_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small_text(tmp_path_factory.mktemp("text"))


class _CtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_does_not_say_done_and_the_next_attempt_says_where_it_resumes(text, tmp_path, monkeypatch, capsys):
    ticks = itertools.count(step=30)  # so that every step is worth a line
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    with pytest.raises(KeyboardInterrupt):
        fit(objective(), text, tmp_path, callbacks=[_CtrlC()])
    said = capsys.readouterr().err
    assert "test: 5/12" in said and "done" not in said
    fit(objective(), text, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("test: resumes at 5/12\n") and "test: done in" in said


def test_a_log_that_cannot_be_written_is_the_error_and_ctrl_c_is_left_as_it_was(text, tmp_path):
    class Full(list):
        def append(self, event):
            raise OSError(28, "No space left on device", "log.jsonl")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match=r"log\.jsonl"):
        fit(objective(), text, tmp_path / "work", events=Full())
    assert signal.getsignal(signal.SIGINT) is before


def test_accumulation_changes_neither_losses_nor_weights(text, tmp_path):
    whole, parts = [], []
    one, four = objective(), objective()
    fit(one, text, tmp_path / "one", steps=20, events=whole)
    fit(four, text, tmp_path / "four", steps=20, events=parts, micro_batch=2)
    assert len(losses(whole)) == 20
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)
    for a, b in zip(one.student.parameters(), four.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(text, tmp_path, capsys):
    whole, parts, rows = [], [], []
    enough, little = objective(), limited_to(2, objective(), rows)
    fit(enough, text, tmp_path / "enough", events=whole)
    fit(little, text, tmp_path / "little", events=parts)
    assert rows[:6] == [8, 4, 2, 2, 2, 2] and set(rows[6:]) == {2}
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert said == [
        "test: out of memory with 8 examples per forward pass; continuing with 4, "
        "the batch per optimizer step stays the same",
        "test: out of memory with 4 examples per forward pass; continuing with 2, "
        "the batch per optimizer step stays the same",
    ]
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)
    for a, b in zip(enough.student.parameters(), little.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def limited_to(rows, objective, seen):
    """The objective, without memory for the backward pass of more than `rows` rows; `seen` gets the rows of each."""
    forward = objective.forward

    def limited(batch, counts):
        seen.append(len(batch["input_ids"]))
        losses = forward(batch, counts)
        if seen[-1] > rows:
            losses["loss"].register_hook(_out_of_memory)
        return losses

    objective.forward = limited
    return objective


def test_a_resumed_training_does_not_run_out_of_memory_again(text, tmp_path, capsys):
    with pytest.raises(MemoryError):
        fit(limited_to(2, objective(), []), text, tmp_path, save_steps=3, callbacks=[StopAt(5)])
    seen = []
    with pytest.raises(MemoryError):
        fit(limited_to(2, objective(), seen), text, tmp_path, save_steps=3, callbacks=[StopAt(11)])
    assert set(seen) == {2}
    fit(limited_to(2, objective(), seen), text, tmp_path, save_steps=3)  # the second attempt kept it too
    assert set(seen) == {2}
    said = [line for line in capsys.readouterr().err.splitlines() if "resumes with" in line]
    assert said == ["test: resumes with 2 examples per forward pass, since memory ran out with more"] * 2


def test_a_larger_micro_batch_is_used_on_resume_if_memory_did_not_run_out(text, tmp_path):
    with pytest.raises(MemoryError):
        fit(objective(), text, tmp_path, save_steps=3, micro_batch=2, callbacks=[StopAt(5)])
    seen = []
    fit(limited_to(8, objective(), seen), text, tmp_path, save_steps=3, micro_batch=4)
    assert set(seen) == {4}


def _out_of_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_with_one_example_is_an_error(text, tmp_path, monkeypatch):
    model = objective()
    monkeypatch.setattr(model, "forward", _out_of_memory_at_once)
    with pytest.raises(InputError, match="test: out of memory with one example per forward pass; lower max_length"):
        fit(model, text, tmp_path)


def _out_of_memory_at_once(batch, counts):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_parts_of_the_loss_and_the_sparsity_are_logged(text, tmp_path):
    events = []
    fit(objective(), text, tmp_path, events=events, callbacks=[PruningCallback(**SCHEDULE)])
    log = [event for event in events if event["event"] == "log"]
    assert {"loss", "mlm", "nsp", "kd", "kd_nsp", "hidden", "lr", "sparsity", "grad_norm"} <= set(log[0])
    total = 0.5 * (log[0]["mlm"] + log[0]["nsp"] + log[0]["kd"] + log[0]["kd_nsp"] + log[0]["hidden"])
    assert log[0]["loss"] == pytest.approx(total, rel=1e-4)
    assert log[-1]["sparsity"] == pytest.approx(0.9, abs=2e-3)


def test_bf16_trains_on_the_losses_that_autocast_gives_and_leaves_float32_weights(text, tmp_path):
    events = []
    trained = objective()
    batch = collate([text.train(16, seed=3)[index] for index in range(8)], pad_token_id=0)
    use_bf16_attention(trained.student)
    use_bf16_attention(trained.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        expected = trained.train()(batch, trained.counts(batch))["loss"].item()
    fit(trained, text, tmp_path, steps=2, events=events, precision="bf16")
    assert losses(events)[0] == pytest.approx(expected, rel=1e-6)
    assert {parameter.dtype for parameter in trained.student.parameters()} == {torch.float32}


class StopAt(TrainerCallback):
    """Ends training abruptly, as a kill would: nothing is saved on the way out."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise MemoryError("killed")


@pytest.mark.parametrize(
    ("micro_batch", "score"),
    [(None, "magnitude"), (4, "magnitude"), (None, "fisher"), (None, "obs"), (None, "hessian")],
)
def test_resuming_gives_the_same_bits(text, tmp_path, micro_batch, score):
    options = {"save_steps": 3, "micro_batch": micro_batch}
    torch.manual_seed(0)
    straight = objective(dropout=0.1)
    first = fit(straight, text, tmp_path / "straight", callbacks=[pruning(straight, text, score)], **options)

    torch.manual_seed(0)
    with pytest.raises(MemoryError):
        broken = objective(dropout=0.1)
        fit(broken, text, tmp_path / "broken", callbacks=[pruning(broken, text, score), StopAt(5)], **options)
    assert last_checkpoint(tmp_path / "broken").name == "checkpoint-3"
    resumed = objective(dropout=0.1)
    second = fit(resumed, text, tmp_path / "broken", callbacks=[pruning(resumed, text, score)], **options)

    for (name, a), b in zip(straight.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert first["tokens"] == second["tokens"]


@pytest.mark.parametrize("score", ["magnitude", "fisher"])
def test_the_curvature_is_computed_for_the_score_that_needs_it_only(text, tmp_path, score):
    def needless(*_):
        pytest.fail("computed for nothing")

    callback = PruningCallback(**SCHEDULE, score=score, blocks=needless, fit=needless)
    fit(objective(), text, tmp_path, callbacks=[callback])


def test_a_streamed_corpus_resumes_with_the_examples_that_follow(tmp_path):
    spec = Corpus(source=str(write_text(tmp_path / "text.jsonl")), max_length=32, validation=0.2, streaming=True)
    text = build_corpus(spec, tiny_tokenizer())
    events, again = [], []
    fit(objective(), text, tmp_path / "work", steps=6, micro_batch=4, save_steps=3, events=events)
    (tmp_path / "work" / "checkpoint-6" / "complete").unlink()
    fit(objective(), text, tmp_path / "work", steps=6, micro_batch=4, save_steps=3, events=again)
    assert losses(again) == losses(events)[3:]


def test_a_loss_that_is_not_a_number_stops_the_run(text, tmp_path):
    model = objective()
    with torch.no_grad():
        model.student.base_model.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 1; lower lr"):
        fit(model, text, tmp_path)


def test_of_several_gpus_without_torchrun_one_is_used(text, tmp_path, monkeypatch, capsys):
    found = property(lambda args: args._n_gpu if args._n_gpu > 0 else 2)
    monkeypatch.setattr("pruneofa.train.trainer.TrainingArguments.n_gpu", found)
    fit(objective(), text, tmp_path)
    assert "training on one of 2 GPUs; torchrun --nproc-per-node 2 uses all" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch is 10, which 1 process"):
        split_batch(10, 4)
    assert split_batch(12, 4) == (4, 3)
    assert split_batch(3, 8) == (3, 1)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        ids = torch.randint(5, 100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": int(ids[0] > 50)}


def stock(model, folder, callback, **options):
    settings = {"max_steps": 10, "save_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1} | options
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, **settings
    )
    return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback])


def classifier(seed=0):
    from transformers import BertForSequenceClassification

    return tiny_bert(BertForSequenceClassification, seed=seed)


def test_pruning_in_a_stock_trainer_and_its_resume(tmp_path):
    straight, resumed = classifier(), classifier()
    stock(straight, tmp_path / "a", PruningCallback(**SCHEDULE)).train()
    with pytest.raises(MemoryError):
        trainer = stock(resumed, tmp_path / "b", PruningCallback(**SCHEDULE))
        trainer.add_callback(StopAt(6))
        trainer.train()
    again = classifier(seed=9)
    stock(again, tmp_path / "b", PruningCallback(**SCHEDULE)).train(resume_from_checkpoint=True)
    for (name, a), b in zip(prunable(straight).items(), prunable(again).values(), strict=True):
        assert torch.equal(a == 0, b == 0), name
        assert (a == 0).float().mean() == pytest.approx(0.9, abs=2e-3)


def test_the_second_moments_of_a_stock_trainer_choose_the_weights(tmp_path):
    model = classifier()
    stock(model, tmp_path, PruningCallback(**SCHEDULE, score="fisher")).train()
    for name, weight in prunable(model).items():
        assert (weight == 0).float().mean() == pytest.approx(0.9, abs=2e-3), name
    with pytest.raises(InputError, match="score fisher: SGD keeps no second moment of .*; choose such an optimizer"):
        stock(classifier(), tmp_path / "sgd", PruningCallback(**SCHEDULE, score="fisher"), optim="sgd").train()


def test_resuming_without_the_pruners_state_is_refused(tmp_path):
    stock(classifier(), tmp_path, PruningCallback(**SCHEDULE | {"end": 3, "stop": 3}), max_steps=4).train()
    (tmp_path / "checkpoint-4" / "pruner.safetensors").unlink()
    with pytest.raises(InputError, match="missing, but resuming pruning needs it"):
        stock(classifier(), tmp_path, PruningCallback(**SCHEDULE)).train(resume_from_checkpoint=True)


def test_lock_in_a_stock_trainer(tmp_path):
    model = classifier()
    with torch.no_grad():
        for weight in prunable(model).values():
            weight[weight.abs() < weight.abs().median()] = 0.0
    before = {name: weight == 0 for name, weight in prunable(model).items()}
    start = model.classifier.weight.clone()
    stock(model, tmp_path, LockCallback()).train()
    assert not torch.equal(start, model.classifier.weight)
    for name, weight in prunable(model).items():
        assert (weight[before[name]] == 0).all()
        assert not torch.signbit(weight[before[name]]).any()


def sparse_classifier(seed=0, share=0.5):
    model = classifier(seed)
    with torch.no_grad():
        for weight in prunable(model).values():
            weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0.0
    return model


def made_anew(folder, callback, make, **options):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=6, save_steps=3, **options
    )
    return Trainer(model_init=make, args=args, train_dataset=Rows(), callbacks=[callback])


def zeros(model):
    return {name: (weight == 0).detach().clone() for name, weight in prunable(model).items()}


def test_lock_holds_a_model_that_the_trainer_makes_anew(tmp_path):
    trainer = made_anew(tmp_path, LockCallback(), lambda: sparse_classifier(), learning_rate=1e-3)
    for _ in range(2):  # as a hyperparameter search does
        trainer.train()
        for name, pruned in zeros(sparse_classifier()).items():
            assert (trainer.model.get_parameter(name)[pruned] == 0).all(), name


def test_lock_keeps_the_first_pattern_when_a_checkpoint_is_loaded_over_a_model_made_anew(tmp_path):
    made_anew(tmp_path, LockCallback(), lambda: sparse_classifier()).train()
    (tmp_path / "checkpoint-6").rename(tmp_path / "later")
    wanted = zeros(sparse_classifier(share=0.7))
    trainer = made_anew(tmp_path, LockCallback(), lambda: sparse_classifier(share=0.7))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, pruned in wanted.items():
        assert (trainer.model.get_parameter(name)[pruned] == 0).all(), name


class Replace(TrainerCallback):
    """Puts dense parameters in the place of those that the model has, before the last step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps - 1:
            dense = model.bert.encoder.layer[0].output.dense
            dense.weight = torch.nn.Parameter(torch.ones_like(dense.weight))


@pytest.mark.parametrize("make", [LockCallback, lambda: PruningCallback(**SCHEDULE)], ids=["lock", "prune"])
def test_the_closing_check_looks_at_the_model_that_is_there(tmp_path, make):
    trainer = stock(sparse_classifier(), tmp_path, make())
    trainer.add_callback(Replace())
    with pytest.raises(CheckFailed, match=r"layer\.0\.output\.dense\.weight: \d+ .* the model that training ends with"):
        trainer.train()


class Spoil(TrainerCallback):
    """Saves another model than the one that was trained."""

    def on_save(self, args, state, control, **kwargs):
        classifier().save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}")


def test_the_closing_check_looks_at_what_was_saved(tmp_path):
    trainer = stock(sparse_classifier(), tmp_path, LockCallback())
    trainer.add_callback(Spoil())
    with pytest.raises(CheckFailed, match=r"not zero in .*checkpoint-10/model\.safetensors"):
        trainer.train()


def test_a_damaged_state_of_the_pruner_is_named_in_a_stock_trainer(tmp_path):
    stock(classifier(), tmp_path, PruningCallback(**SCHEDULE | {"end": 3, "stop": 3}), max_steps=4).train()
    file = tmp_path / "checkpoint-4" / "pruner.safetensors"
    file.write_bytes(file.read_bytes()[:-16])
    with pytest.raises(InputError, match=r"checkpoint-4/pruner\.safetensors: damaged"):
        stock(classifier(), tmp_path, PruningCallback(**SCHEDULE)).train(resume_from_checkpoint=True)


def test_activations_of_a_model_that_transformers_cannot_checkpoint(text, tmp_path):
    student = tiny_mpnet()
    losses = {"hard": 1.0, "kd": 0.0, "hidden": 0.0, "temperature": 2.0, "positions": "all"}
    with pytest.raises(
        InputError, match="checkpoint_activations is true, which transformers' MPNetForMaskedLM does not"
    ):
        fit(PretrainingObjective(student, None, **losses, nsp=False), text, tmp_path, checkpoint_activations=True)
