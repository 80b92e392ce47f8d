"""What the engine may take of a machine."""

import pytest

from pruneofa import Engine
from pruneofa.bench import records
from pruneofa.bench.models import Settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tokens", [128, 384])
def test_bert_base_takes_little_memory_above_its_imports(tokens):
    settings = Settings(random="bert-base", seq=(tokens,), peers=(), repeats=1, threads=2)
    [row] = records.run(settings)["rows"]
    [engine] = row["runners"]
    # Lists of AVX2 take 4 bytes for each kept weight, 34 MB in all; tiles of AMX half of that.
    limit = 70e6 if Engine.available_isas()[-1] == "amx" else 80e6
    assert engine["peak"] - engine["baseline"] <= limit
