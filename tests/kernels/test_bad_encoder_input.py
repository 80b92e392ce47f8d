"""What an encoder refuses: every wrong argument is an exception that names it, and never a crash."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pruneofa import _native
from tests.kernels.cases import LINEARS, Layer, batch, float_layer, int8_layer, model

ROOT = Path(__file__).parents[2]


INPUTS = ("ids", "positions", "types", "offsets")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [0, 50, 1, 2, 3]}, r"id 50 of token 1 is outside 0\.\.49"),
        ({"ids": [0, 1, 1, 2, -1]}, r"id -1 of token 4 is outside 0\.\.49"),
        ({"ids": [0, 1, 1, 2, 2**31 - 1]}, r"id 2147483647 of token 4"),
        ({"ids": [0, 1, 1, 2, -(2**31)]}, r"id -2147483648 of token 4"),
        ({"positions": [0, 1, 96, 0, 1]}, r"position 96 of token 2 is outside 0\.\.95"),
        ({"positions": [0, 1, -1, 0, 1]}, r"position -1 of token 2"),
        ({"types": [0, 1, 1, 2, 0]}, r"type 2 of token 3 is outside 0\.\.1"),
        ({"types": [-1, 1, 1, 1, 0]}, r"type -1 of token 0"),
        ({"positions": [0, 1, 2, 0]}, "positions and types: wanted one per id"),
        ({"types": [0] * 6}, "positions and types: wanted one per id"),
        ({"ids": [], "positions": [], "types": [], "offsets": [0, 0]}, "offsets must begin with 0 and end with"),
        ({"offsets": []}, "offsets: wanted the sequences' beginnings and the end"),
        ({"offsets": [0]}, "offsets: wanted the sequences' beginnings and the end"),
        ({"offsets": [0, 3]}, "offsets must begin with 0 and end with the number of tokens"),
        ({"offsets": [0, 3, 6]}, "offsets must begin with 0 and end with the number of tokens"),
        ({"offsets": [1, 3, 5]}, "offsets must begin with 0 and end with the number of tokens"),
        ({"offsets": [-1, 3, 5]}, "offsets must begin with 0 and end with the number of tokens"),
        ({"offsets": [0, 3, 3, 5]}, "offsets must increase"),
        ({"offsets": [0, 4, 3, 5]}, "offsets must increase"),
        ({"offsets": [0, 2**31 - 1, 5]}, "offsets must increase"),
        ({"offsets": [0, 6, 5]}, "offsets must increase"),
        ({"offsets": [0, -3, 5]}, "offsets must increase"),
    ],
    ids=str,
)
def test_an_encoder_refuses_what_lies_outside_its_tables_and_batch(isa, change, message):
    given = dict(zip(INPUTS, batch([3, 2]), strict=True))
    given |= {name: np.array(values, np.int32) for name, values in change.items()}
    encoder = model(depth=1).build(_native, isa, 2)
    with pytest.raises(ValueError, match=message):
        encoder.forward(**given)
    assert encoder.forward(*batch([3, 2])).shape == (5, 64)  # and still works


@pytest.mark.parametrize("name", INPUTS)
def test_an_encoder_takes_int32_as_it_is(name):
    given = dict(zip(INPUTS, batch([3, 2]), strict=True))
    encoder = model(depth=1).build(_native, "scalar")
    for wrong in (
        given[name].astype(np.int64),
        given[name].astype(np.uint32),
        given[name].astype(np.float32),
        np.repeat(given[name], 2)[::2],
        given[name][None],
        given[name].tolist(),
        None,
    ):
        with pytest.raises(TypeError):
            encoder.forward(**given | {name: wrong})


def encoder(name=None, replacement=None, **change):
    """An encoder with one argument, or with one part of its last layer, replaced."""
    source = model(depth=2)
    layers = [
        {name: part.build(_native, "scalar") if isinstance(part, Layer) else part for name, part in layer.items()}
        for layer in source.layers
    ]
    if name:
        layers[-1][name] = replacement
    arguments = {
        "hidden": 64, "heads": 4, "epsilon": 1e-12, "activation": "gelu", "threads": 1, "isa": "scalar",
        "embedding_norm": source.embedding_norm, "layers": layers, **source.tables,
    }  # fmt: skip
    return _native.Encoder(**arguments | change)


def test_the_untouched_encoder_is_taken():
    assert encoder().forward(*batch([2])).shape == (2, 64)


ONES = np.ones(64, np.float32)
INT8_ROWS = np.ones((5, 64), np.int8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads: wanted 1 to 4096"),
        ({"threads": -1}, ValueError, "threads: wanted 1 to 4096"),
        ({"threads": 5000}, ValueError, "threads: wanted 1 to 4096"),
        ({"threads": 1.5}, TypeError, "incompatible"),
        ({"hidden": 0}, ValueError, "hidden"),
        ({"hidden": -64}, ValueError, "hidden"),
        ({"hidden": 32}, ValueError, r"(word|position|token_type): wanted"),
        ({"heads": 0}, ValueError, "hidden must be a multiple of heads"),
        ({"heads": -4}, ValueError, "hidden must be a multiple of heads"),
        ({"heads": 5}, ValueError, "hidden must be a multiple of heads"),
        ({"heads": 128}, ValueError, "hidden must be a multiple of heads"),
        ({"activation": "swish"}, ValueError, "activation is 'swish', wanted gelu, gelu_new, .* or relu"),
        ({"activation": None}, TypeError, "incompatible"),
        ({"layers": []}, ValueError, "an encoder needs at least one layer"),
        ({"layers": [{}]}, KeyError, "query"),
        ({"layers": None}, TypeError, "incompatible"),
        ({"layers": [1]}, TypeError, "incompatible"),
        ({"word": (INT8_ROWS, None)}, ValueError, "word: wanted"),
        ({"word": (INT8_ROWS, np.ones(4, np.float32))}, ValueError, "word: wanted"),
        ({"word": (INT8_ROWS, np.ones(5))}, ValueError, "word: wanted"),
        ({"word": (INT8_ROWS, np.full(5, np.nan, np.float32))}, ValueError, "a scale is not a positive finite number"),
        ({"word": (INT8_ROWS[:, :63].copy(), np.ones(5, np.float32))}, ValueError, "word: wanted"),
        ({"word": (INT8_ROWS[:0], np.ones(0, np.float32))}, ValueError, "word: wanted"),
        ({"word": (np.ones((5, 64)), None)}, ValueError, "word: wanted"),
        ({"position": (np.ones((5, 64), np.float32), np.ones(5, np.float32))}, ValueError, "position: wanted"),
        ({"position": (np.ones((64, 5), np.float32).T, None)}, ValueError, "position: wanted"),
        ({"token_type": (np.ones(64, np.float32), None)}, ValueError, "token_type: wanted"),
        ({"embedding_norm": None}, TypeError, "incompatible"),
        ({"embedding_norm": (ONES[:63].copy(), ONES)}, ValueError, "norm has another width than hidden"),
    ],
    ids=str,
)
def test_an_encoder_refuses_arguments_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        encoder(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"word": 3},
        {"word": (INT8_ROWS,)},
        {"word": (1, 2, 3)},
        {"embedding_norm": (ONES,)},
        {"embedding_norm": (ONES, ONES.astype(np.float64))},
        {"embedding_norm": (np.ones(128, np.float32)[::2], ONES)},
        {"name": "query", "replacement": "a string"},
        {"name": "attention_norm", "replacement": None},
        {"name": "output_norm", "replacement": (ONES.astype(np.float16), ONES)},
    ],
    ids=str,
)
def test_an_encoder_names_a_part_of_the_wrong_kind(change):
    with pytest.raises((TypeError, ValueError), match=r"word|embedding_norm|query|attention_norm|output_norm"):
        encoder(**change)


def test_tables_that_an_encoder_cannot_do_without():
    with pytest.raises((TypeError, ValueError), match="word"):
        encoder(word=None)
    with pytest.raises((TypeError, ValueError), match="position"):
        encoder(position=None)


@pytest.mark.parametrize("name", ["query", "key", "value", "attention_output", "intermediate", "output"])
def test_an_encoder_refuses_layers_of_another_size_or_precision(name):
    random = np.random.default_rng(0)
    for wrong in (
        int8_layer(random, 64, 65, 0.5), int8_layer(random, 65, 64, 0.5), float_layer(random, 64, 64, 0.5),
        float_layer(random, 128, 64, 0.5),
    ):  # fmt: skip
        if name == "intermediate" and wrong.kept.shape == (65, 64):
            continue  # the output layer is what does not fit then
        with pytest.raises(ValueError, match="do not fit each other in size, precision, static input or isa"):
            encoder(name, wrong.build(_native, "scalar"))
    with pytest.raises(ValueError, match=f"wanted a Linear for '{name}'"):
        encoder(name, None)
    with pytest.raises(ValueError, match="norm has another width than hidden"):
        encoder("attention_norm", (ONES[:16].copy(), ONES[:16].copy()))


@pytest.mark.parametrize("name", LINEARS)
def test_an_encoder_has_static_inputs_everywhere_or_nowhere(name):
    parts = model(precision="static")
    last = parts.layers[-1]
    last[name] = replace(last[name], input=None)
    with pytest.raises(ValueError, match="do not fit each other"):
        parts.build(_native, "scalar")


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_query_key_and_value_read_the_same_input(name):
    parts = model(precision="static")
    last = parts.layers[-1]
    for other in ((last[name].input[0], 3), (0.5, last[name].input[1])):
        last[name] = replace(last[name], input=other)
        with pytest.raises(ValueError, match="query, key and value read the same input but have another static"):
            parts.build(_native, "scalar")


CROWDED = """
import resource
from pruneofa import _native
from tests.kernels.cases import batch, model

parts = model(depth=1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**28  # the stacks of a few dozen threads
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    parts.build(_native, "scalar", 2000)
except Exception as error:
    print("refused:", error)
print(parts.build(_native, "scalar", 2).forward(*batch([3])).shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space and reads /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="needs terabytes of address space itself")
def test_threads_that_cannot_be_started_are_an_error():
    done = subprocess.run([sys.executable, "-c", CROWDED], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout and "(3, 64)" in done.stdout
