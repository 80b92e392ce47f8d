"""A record of a finished run that was edited or torn is named in one line, and nothing is published from it."""

import json

import pytest

from pruneofa.errors import InputError
from pruneofa.formats.files import write_json
from pruneofa.run.engine_metrics import read_engine
from pruneofa.run.inputs import Inputs
from pruneofa.run.plan import plan
from pruneofa.run.run import run
from pruneofa.run.stage import Evaluation

TRANSFER = "tasks/mine/seed-0/transfer"
HUGE = 10**400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"accuracy": "x"}', f"{TRANSFER}/metrics.json: accuracy is 'x', wanted a number from 0 to 100; restore"),
        ('{"accuracy": 1e9}', f"{TRANSFER}/metrics.json: accuracy is 1000000000.0, wanted a number from 0 to 100"),
        ("{}", f"{TRANSFER}/metrics.json: no metrics in it; restore"),
        (f'{{"accuracy": {HUGE}}}', f"{TRANSFER}/metrics.json: accuracy is 1000.*, wanted a number"),
        ('{"speed": 3}', "tasks.mine has 'speed'; known: exact_match"),
        ("[]", f"{TRANSFER}/metrics.json: wanted a JSON object"),
    ],
)
def test_metrics(done, copy, text, message):
    (copy / TRANSFER / "metrics.json").write_text(text)
    (copy / "results.json").unlink()
    with pytest.raises(InputError, match=message):
        run(done[0], copy)
    assert not (copy / "results.json").exists()


def test_metric_rows(done, copy):
    (copy / TRANSFER / "metric_rows.npz").write_bytes(b"")
    with pytest.raises(InputError, match=f"{TRANSFER}/metric_rows.npz: damaged"):
        run(done[0], copy)


@pytest.mark.parametrize("line", ["{}", '{"event": "done"}', '{"time": "soon"}', '{"event": ["done"], "time": {}}'])
def test_a_line_of_the_log_that_tells_nothing_is_passed_over(done, copy, line):
    before = (copy / "sparse" / "README.md").read_text()
    with (copy / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    run(done[0], copy)
    assert (copy / "sparse" / "README.md").read_text() == before


@pytest.mark.parametrize("time", [None, "soon", 1e300, HUGE, [1], -1e15])
def test_a_time_that_is_none(done, copy, time):
    with (copy / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "done", "stage": "prune", "time": time}) + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl: the stage prune is done at time .*, wanted seconds since 1970"):
        run(done[0], copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "engine.json: metrics is None, which no stage writes; restore the file, or delete it to measure again"),
        ({"metrics": {"accuracy": None}, "longest": 8}, "engine.json: accuracy is None, wanted a number"),
        ({"metrics": {}, "longest": 8, "sizes": 5}, "engine.json: sizes is 5, which no stage writes"),
    ],
)
def test_what_the_engine_measured(done, copy, fields, message):
    steps = plan(done[0], Inputs(done[0]), copy)
    evaluation = next(step for step in steps if isinstance(step, Evaluation) and step.id.variant == "transfer")
    write_json(evaluation.folder / "engine.json", {"evaluation": evaluation.fingerprint, **fields})
    with pytest.raises(InputError, match=message):
        read_engine(evaluation)
