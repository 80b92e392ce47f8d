import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruneofa.errors import InputError
from pruneofa.train.schedule import cubic_sparsity, cyclic_lr, linear_lr, rewound_lr

PUBLISHED = {"total": 100_000, "warmup": 1000, "begin": 0, "end": 50_000, "interval": 1000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(-5, 0), (0, 0), (1000, 0.058808), (10_000, 0.488), (25_000, 0.875), (50_000, 1), (99_999, 1)],
)
def test_cubic_base_of_the_published_recipe(step, expected):
    assert cubic_sparsity(step, begin=0, end=50_000, final=1) == pytest.approx(expected, abs=1e-12)


def test_cubic_is_steep_first():
    assert cubic_sparsity(25_000, begin=0, end=50_000, final=0.9) == pytest.approx(0.7875)


@given(st.floats(0, 0.999), st.floats(0, 0.999), st.integers(0, 50), st.integers(1, 100))
def test_cubic_starts_at_initial_ends_exactly_at_final_and_never_falls(a, b, begin, length):
    initial, final = sorted((a, b))
    values = [
        cubic_sparsity(t, begin=begin, end=begin + length, final=final, initial=initial)
        for t in range(begin + length + 3)
    ]
    assert values[: begin + 1] == [initial] * (begin + 1)
    assert values[-3:] == [final] * 3
    assert all(x <= y + 1e-12 for x, y in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0), (500, 0.5), (1000, 1.020408), (1999, 1.0000204), (2000, 1.020408),
        (49_999, 1.0000204), (50_000, 1.020408), (60_000, 0.816327), (100_000, 0), (100_001, 0),
    ],
)  # fmt: skip
def test_sawtooth_of_the_published_recipe(step, expected):
    assert rewound_lr(step, **PUBLISHED) == pytest.approx(expected, abs=5e-7)


def test_sawtooth_is_continuous_where_pruning_begins_and_ends():
    shape = {"total": 1000, "warmup": 10, "begin": 100, "end": 500, "interval": 100}
    slope = 1 / (1000 - 400 - 10)
    assert rewound_lr(99, **shape) - rewound_lr(100, **shape) == pytest.approx(slope)
    assert rewound_lr(500, **shape) - rewound_lr(501, **shape) == pytest.approx(slope)
    assert rewound_lr(499, **shape) < rewound_lr(500, **shape) == pytest.approx(500 / 590)


def test_cyclic_falls_to_the_floor_in_every_interval():
    shape = {"total": 200, "warmup": 0, "begin": 20, "end": 100, "interval": 20}
    assert [cyclic_lr(t, **shape) for t in (0, 20, 21, 41, 81)] == [1.0] * 5
    # The steps after which masks are selected: they are the coolest ones, and the rate is back at the peak after them.
    assert [cyclic_lr(t, **shape) for t in (40, 60, 80, 100)] == pytest.approx([1 - 0.99 * 19 / 20] * 4)
    assert cyclic_lr(101, **shape) == 0.99
    assert cyclic_lr(150, **shape) == 0.5
    assert cyclic_lr(200, **shape) == 0
    assert cyclic_lr(5, **(shape | {"warmup": 10})) == 0.5


def test_linear():
    assert [linear_lr(t, total=10, warmup=2) for t in (0, 1, 2, 6, 10, 11)] == [0, 0.5, 1, 0.5, 0, 0]
    assert linear_lr(0, total=4, warmup=0) == 1


@pytest.mark.parametrize("schedule", [rewound_lr, cyclic_lr])
def test_rewinding_rejects_what_leaves_no_decay(schedule):
    with pytest.raises(InputError, match="leave none of 100 steps for the decay"):
        schedule(0, total=100, warmup=10, begin=0, end=100, interval=10)
    with pytest.raises(InputError, match="interval is 0 but must be at least 1"):
        schedule(0, total=100, warmup=10, begin=0, end=50, interval=0)
    with pytest.raises(InputError, match=r"begin is 50 but must be below end \(50\)"):
        schedule(0, total=100, warmup=10, begin=50, end=50, interval=5)


def test_bad_schedules_are_named():
    with pytest.raises(InputError, match=r"begin is 5 but must be below end \(5\)"):
        cubic_sparsity(0, begin=5, end=5, final=0.5)
    with pytest.raises(InputError, match=r"warmup \(10\) leave none of 10 steps"):
        linear_lr(0, total=10, warmup=10)
