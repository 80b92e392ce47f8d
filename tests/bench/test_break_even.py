"""From which sparsity on a layer is faster than the dense peer's."""

import numpy as np
import pytest

from pruneofa.bench import measure, models, tables
from pruneofa.bench.break_even import SPARSITIES, pays_from
from pruneofa.bench.models import Settings
from pruneofa.bench.peers import PEERS
from pruneofa.bench.workers import Worker, WorkerError
from tests.bench.records import needs_kernels


def test_where_it_pays():
    times = {f"{s:g}": 100 * (1 - s) for s in SPARSITIES}
    assert pays_from(times, 25.0) == 0.8
    assert pays_from(times, 1.0) is None and pays_from(times, 1000.0) == 0 and pays_from(times, None) is None
    assert pays_from(times | {"0.95": 30.0}, 25.0) is None  # what pays at 0.9 alone does not pay from there


@needs_kernels
def test_break_even_measures_every_shape(folder, tmp_path):
    """Also by a peer that was too slow with whole models."""
    from pruneofa.bench import break_even

    bench = measure.Bench(Settings(path=str(folder), threads=1, repeats=1, peers=()))
    bench.left_out[break_even.DENSE] = "1x4: took longer"
    rows = list(break_even.break_even(bench, next(models.read_models(bench.settings, tmp_path)), [4]))
    assert [row["shape"] for row in rows] == [[32, 32], [32, 64], [64, 32]]
    assert all(len(row["ours_us"]) == len(SPARSITIES) and min(row["ours_us"].values()) > 0 for row in rows)
    if not PEERS[break_even.DENSE].missing():
        assert all(row["dense_us"] > 0 for row in rows)
    assert tables.break_even_rows(rows)[0]["layer"] == "32x32"


def test_break_even_goes_on_without_a_dense_peer_that_fails(folder, tmp_path, monkeypatch):
    from pruneofa.bench import break_even

    ask = Worker.ask

    def fail(self, command, **options):
        if self.peer == break_even.DENSE:
            raise WorkerError("no such engine")
        return ask(self, command, **options)

    monkeypatch.setattr(Worker, "ask", fail)
    monkeypatch.setattr(type(PEERS[break_even.DENSE]), "missing", lambda self: None)
    bench = measure.Bench(Settings(path=str(folder), threads=1, repeats=1, peers=()))
    model = next(models.read_models(bench.settings, tmp_path))
    rows = list(break_even.break_even(bench, model, [4]))
    assert len(rows) == 3 and all(row["dense_us"] is None for row in rows)
    assert bench.left_out == {break_even.ONE_LAYER: "break-even: no such engine"}


@needs_kernels
def test_a_dense_peer_with_wrong_products_is_not_compared_with(folder, tmp_path, monkeypatch):
    from pruneofa.bench import break_even

    if PEERS[break_even.DENSE].missing():
        pytest.skip("the peer is not installed")
    ask = Worker.ask

    def saturate(self, command, **options):
        answer = ask(self, command, **options)
        if command == "save" and self.peer == break_even.DENSE:
            np.save(options["path"], np.load(options["path"]).clip(-0.01, 0.01))
        return answer

    monkeypatch.setattr(Worker, "ask", saturate)
    bench = measure.Bench(Settings(path=str(folder), threads=1, repeats=1, peers=()))
    rows = list(break_even.break_even(bench, next(models.read_models(bench.settings, tmp_path)), [4]))
    assert all(row["dense_us"] is None and row["pays_from"] is None for row in rows)
    assert "wanted at most 0.05; it was not timed" in bench.left_out[break_even.ONE_LAYER]


def break_even_row(pays: float | None, dense: float | None = 25.0) -> dict:
    times = {f"{s:g}": 100 * (1 - s) for s in SPARSITIES}
    return {"shape": [8, 8], "tokens": 4, "ours_us": times, "dense_us": dense, "dense": "torch-int8", "pays_from": pays}


def test_it_is_said_plainly_where_it_pays_and_where_not():
    say = tables.break_even_remark
    assert say([break_even_row(0.8), break_even_row(0.7)]).endswith("faster than dense int8 from sparsity 0.8")
    assert "no sparsity up to 0.95 is faster" in say([break_even_row(None)])
    assert "1 of 2 layers are faster than dense int8, from sparsity 0.7" in say(
        [break_even_row(0.7), break_even_row(None)]
    )
    assert "no dense peer to compare with" in say([break_even_row(None, None)])
    rows = tables.break_even_rows([break_even_row(None), break_even_row(None, None), break_even_row(0.8)])
    assert [row["break-even"] for row in rows] == ["none of these", "unknown: no dense peer", "0.8"]
