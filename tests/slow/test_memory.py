"""What the engine may take of a machine."""

import pytest

from pruneofa.bench import measure
from pruneofa.bench.models import Settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tokens", [128, 384])
def test_bert_base_takes_at_most_70_mb_above_its_imports(tokens):
    settings = Settings(random="bert-base", seq=(tokens,), peers=(), repeats=1, threads=2)
    [row] = measure.run(settings)["rows"]
    [engine] = row["runners"]
    assert engine["peak"] - engine["baseline"] <= 70e6
