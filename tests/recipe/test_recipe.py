import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.train.schedule import rewound_lr

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LEAST = {"name": "r", "model": "m", "corpus": {"source": "t.txt"}, "prune": {"steps": 100}}


def make(*overrides):
    values = LEAST
    for override in overrides:
        values = recipe.merge(values, recipe.parse_override(override))
    return recipe.validate(recipe.Recipe, values)


def refused(*overrides):
    with pytest.raises(InputError) as caught:
        make(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_is_read_by_the_rules_of_1_2():
    assert recipe.parse_override("a=2:4") == {"a": "2:4"}
    assert recipe.parse_override("a=1e-4") == {"a": 1e-4}
    assert recipe.parse_override("a=012") == {"a": 12}
    assert recipe.parse_override("a=20231101.en") == {"a": "20231101.en"}
    for text in ("no", "2023-11-01", "1_000", "=", "0x1F"):
        assert recipe.parse_override(f"a={text}") == {"a": text}
    for text, value in (("5e-5", 5e-5), ("-1.5E+3", -1500.0), (".5", 0.5), ("-3", -3), ("null", None), ("true", True)):
        assert recipe.parse_override(f"a={text}") == {"a": value}
    loaded = make("prune={pattern: 2:4, final: 0.5, lr: 1e-4}")
    assert (loaded.prune.pattern, loaded.prune.lr) == ("2:4", 1e-4)


def test_files_merge_key_by_key_and_overrides_come_last(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("name: a\nmodel: m\ncorpus: {source: t, max_length: 64}\nprune: {steps: 100, final: 0.8}\n")
    second.write_text("name: b\ncorpus: {nsp: false}\nprune: {final: 0.85}\n")
    loaded = recipe.load([first, second], ["prune.lr=1e-3", "tasks.sst2.epochs=2", "seeds=[3]"])
    assert loaded.name == "b"
    assert (loaded.corpus.source, loaded.corpus.max_length, loaded.corpus.nsp) == ("t", 64, False)
    assert (loaded.prune.steps, loaded.prune.final, loaded.prune.lr) == (100, 0.85, 1e-3)
    assert loaded.tasks["sst2"].epochs == 2 and loaded.seeds == [3]


def test_a_task_may_be_only_named(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nmodel: m\nmodel_is_sparse: true\ntasks:\n  sst2:\n  qqp: {epochs: 2}\n")
    (tmp_path / "b.yaml").write_text("tasks:\n  qqp:\n")
    loaded = recipe.load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["tasks.qnli=null"])
    assert list(loaded.tasks) == ["sst2", "qqp", "qnli"]
    assert (loaded.tasks["sst2"], loaded.tasks["qqp"].epochs) == (recipe.Task(), 2)
    (tmp_path / "b.yaml").write_text("tasks:\n  mine:\n")
    with pytest.raises(InputError, match=r"task 'mine' is not one of .*; your own task needs data, text and label"):
        recipe.load([tmp_path / "a.yaml", tmp_path / "b.yaml"])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_tasks_can_be_taken_out_of_every_recipe(file):
    kept = recipe.load([file])
    found = recipe.load([file], ["tasks={}", "control=false"])
    assert found.tasks == {} and (found.prune, found.teacher) == (kept.prune, kept.teacher)
    assert recipe.load([file], ["prune={}"]).prune == kept.prune  # only tasks are taken out so


def test_an_empty_mapping_takes_all_tasks_out(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nmodel: m\nmodel_is_sparse: true\ntasks:\n  sst2:\n  qnli: {epochs: 1}\n")
    assert recipe.load([file], ["tasks={}"]).tasks == {}
    assert list(recipe.load([file], ["tasks={}", "tasks.qnli.epochs=2"]).tasks) == ["qnli"]


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert recipe.merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})


def test_what_is_left_out_follows_the_steps():
    prune = make("prune.steps=1000").prune
    assert (prune.begin, prune.end, prune.stop, prune.interval) == (0, 500, 800, 10)
    tiny = make("prune={steps: 3, warmup: 0}").prune
    assert (tiny.end, tiny.stop, tiny.interval) == (1, 2, 1)


def test_defaults_of_the_tasks_are_the_published_ones():
    loaded = make("tasks={sst2: {}, squad: {}}")
    sst2, squad = (loaded.tasks[name].resolved(name) for name in ("sst2", "squad"))
    assert (sst2.epochs, sst2.lr, sst2.batch, sst2.max_length, sst2.stride) == (9, 1e-4, 32, 128, None)
    assert (squad.epochs, squad.lr, squad.batch, squad.max_length, squad.stride) == (8, 1.5e-4, 12, 384, 128)
    assert (sst2.hard, sst2.kd, sst2.temperature) == (0, 1, 2)
    assert (sst2.qat_epochs, sst2.qat_lr, squad.qat_epochs, squad.qat_lr) == (3, 1e-5, 2, 1e-5)
    assert (sst2.dense_epochs, sst2.dense_lr) == (9, 1e-4)
    assert make("tasks.sst2={dense_lr: 1e-5}").tasks["sst2"].resolved("sst2").dense_lr == 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prunee.steps=1", "unknown key 'prunee'; did you mean 'prune'?"),
        ("seed_=1", "unknown key 'seed_'; did you mean 'seed'?"),
        ("prune.finall=0.9", "unknown key 'prune.finall'; did you mean 'final'?"),
        ("corpus.max_len=64", "unknown key 'corpus.max_len'; did you mean 'max_length'?"),
        ("tasks.sst2.epoch=1", "unknown key 'tasks.sst2.epoch'; did you mean 'epochs'?"),
        ("distill.temprature=1", "unknown key 'distill.temprature'; did you mean 'temperature'?"),
        ("control.lrs=[1]", "unknown key 'control.lrs'; did you mean 'lr'?"),
        ("distill.zzz=1", "known keys: hard, kd, temperature, hidden, hidden_norm, positions"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune={steps: 100, end: 100, stop: 100, rewind: none}", "end is 100 but must be below steps (100)"),
        ("prune.final=1", "prune.final is 1: "),
        ("prune.final=-0.1", "prune.final is -0.1: "),
        ("prune.final=90", "prune.final is 90"),
        ("prune.final=.nan", "prune.final is nan"),
        ("prune.initial=1.5", "prune.initial is 1.5"),
        ("prune.initial=0.95", r"prune: initial is 0.95 but must not exceed final (0.9)"),
        ("prune={end: 60, stop: 50}", "prune: stop is 50 but must be between end (60) and steps (100)"),
        ("prune={end: 60, stop: 200}", "prune: stop is 200 but must be between end (60) and steps (100)"),
        ("prune={begin: 60, end: 60}", "prune: begin is 60 but must be below end (60)"),
        ("prune.interval=0", "prune.interval is 0: input should be greater than 0"),
        ("prune.steps=0", "prune: steps is 0 but pruning is gradual; raise steps, or set prune.one_shot=true"),
        (
            "prune={begin: 0, end: 99, stop: 99}",
            "end - begin is 99 of 100 steps, which leaves none",
        ),
        ("prune={pattern: 2:4, final: 0.9}", "prune: final is 0.9 but pattern 2:4 gives 0.5; set prune.final to that"),
        ("prune={pattern: 4:4, final: 0}", "pattern 4:4 gives 0"),
        ("prune={pattern: 0:4, final: 0.9}", "pattern 0:4 gives 1"),
        ("prune.pattern=3x3", "prune.pattern is '3x3'"),
        ("prune.scope=layer", "prune.scope is 'layer'"),
        ("prune.rewind=saw", "prune.rewind is 'saw'"),
        ("prune.lr=fast", "prune.lr is 'fast'"),
        ("prune.lr=0", "prune.lr is 0"),
        ("corpus.validation=0", "corpus.validation is 0"),
        ("corpus.source=3", "recipe: corpus.source is 3: input should be a valid string"),
        ("corpus.max_length=4", "corpus.max_length is 4"),
        ("distill={hard: 0, kd: 0}", "distill: hard, kd and hidden are all 0, so there is no loss to train on"),
        ("tasks.sst2={hard: 0, kd: 0}", "tasks.sst2: hard and kd are both 0, so the task's head would not be trained"),
        ("tasks.sst2={hard: 0, kd: 0, hidden: 1}", "tasks.sst2: hard and kd are both 0"),
        ("tasks.sst.epochs=1", "task 'sst' is not one of sst2, mnli, qnli, qqp, squad (did you mean 'sst2'?)"),
        ("tasks.mine.data=x.csv", "task 'mine' is not one of"),
        ("corpus=null", "teacher and prune need a corpus; set corpus.source"),
        ("prune=null", "the recipe has no prune section; add one, or set model_is_sparse: true"),
        ("model_is_sparse=true", "model_is_sparse is true, so teacher and prune must be null"),
        ("seeds=[0, 0]", "seeds [0, 0] repeat a seed"),
        ("seeds=[]", "seeds is []"),
        ("seeds=[0, -1]", "seeds.1 is -1: input should be greater than or equal to 0"),
        ("seed=-1", "seed is -1"),
        ("seed=4294967296", "seed is 4294967296: input should be less than 4294967296"),
        ("tasks={../up: {data: d, text: t, label: l}}", "task name '../up': wanted letters, digits"),
        ("tasks={..: {data: d, text: t, label: l}}", "task name '..': wanted letters, digits"),
        ("control={lr: []}", "control.lr is []"),
        ("card.licence=mit", "unknown key 'card.licence'; did you mean 'license'?"),
        ("card.version=2", "card.version is 2: input should be a valid string"),
        ("control={tasks: [qqp]}", "control.tasks names 'qqp', not one of tasks; correct it, or set control=false"),
        ("name=a/b", "name is 'a/b'"),
        ("model=null", "model is None"),
        ("quantize={weight: tensor}", "unknown key 'quantize.weight'; did you mean 'weights'?"),
        ("quantize={activations: statik}", "quantize.activations is 'statik': input should be 'static' or 'dynamic'"),
        ("quantize={freeze: 0}", "quantize.freeze is 0"),
        ("quantize={percentile: 50}", "quantize.percentile is 50"),
        ("quantize=true", "quantize is True"),
        ("tasks.sst2.qat_epochs=0", "tasks.sst2.qat_epochs is 0"),
        ("precision=fp16", "precision is 'fp16'"),
    ],
)
def test_wrong_values_say_what_and_how_to_mend_it(override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.nsp=yes", "corpus.nsp is 'yes': input should be a valid boolean"),
        ("corpus.nsp=1", "corpus.nsp is 1: input should be a valid boolean"),
        ("corpus.max_length='64'", "corpus.max_length is '64': input should be a valid integer"),
        ("prune.steps=1e5", "prune.steps is 100000.0: input should be a valid integer"),
        ("prune.lr='1e-4'", "prune.lr is '1e-4': input should be a valid number"),
        ("prune.lr=true", "prune.lr is True: input should be a valid number"),
        ("tasks={mine: {data: d, text: t, label: 0}}", "tasks.mine.label is 0: input should be a valid string"),
        ("seeds=['0']", "seeds.0 is '0': input should be a valid integer"),
    ],
)
def test_values_are_not_coerced(override, message):
    assert message in refused(override)


def test_a_whole_number_may_stand_for_a_float():
    assert make("prune.lr=1", "prune.final=0").prune.lr == 1


def test_the_control_tries_the_prune_stages_rate_and_twice_that():
    assert make("control=true", "prune.lr=5e-4").control.lr == [5e-4, 1e-3]
    assert make("control={tasks: []}", "prune.lr=5e-4").control.lr == [5e-4, 1e-3]
    assert make("control={lr: [3e-5]}", "prune.lr=5e-4").control.lr == [3e-5]


def test_every_problem_is_on_the_one_line():
    message = refused("prune.final=2", "corpus.nspp=true", "precision=int8")
    assert all(part in message for part in ("prune.final", "corpus.nspp", "precision")) and message.count(";") >= 2


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match=r"^recipe: name is missing; model is missing$"):
        recipe.validate(recipe.Recipe, {"corpus": {"source": "t"}, "prune": {}})


@pytest.mark.parametrize("text", ["prune.final", "=3", "a..b=1", ".a=1"])
def test_an_override_that_is_none_is_explained(text):
    with pytest.raises(InputError, match=r"wanted key=value, such as prune\.final=0\.85"):
        recipe.parse_override(text)


def test_files_that_are_no_recipes(tmp_path):
    file = tmp_path / "r.yaml"
    with pytest.raises(InputError, match="no such recipe file"):
        recipe.load([file])
    for content, message in (
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- 1\n", "got list, wanted a mapping of keys"),
        (b"", "got NoneType, wanted a mapping of keys"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            recipe.load([file])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a folder; wanted a recipe file"):
        recipe.load([tmp_path])
    with pytest.raises(InputError, match="not valid YAML; put quotes around it"):
        recipe.parse_override("a=[1")


SCHEDULES = st.integers(10, 300).flatmap(
    lambda steps: st.tuples(
        st.just(steps),
        st.integers(0, steps // 2),
        st.integers(1, steps // 2),
        st.integers(1, 30),
        st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    )
)


@given(SCHEDULES)
def test_a_rate_far_above_the_peak_is_a_warning_with_the_number(schedule):
    steps, begin, length, interval, warmup = schedule
    end = begin + length
    rise = int(steps * warmup)
    if length >= steps - rise or end == steps:
        return
    times = {"begin": begin, "end": end, "interval": interval}
    highest = max(rewound_lr(t, total=steps, warmup=rise, **times) for t in range(steps))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe.Prune(steps=steps, stop=max(end, steps * 4 // 5), warmup=warmup, lr=1.0, **times)
    assert bool(caught) == (highest > 1.2)
    if caught:
        assert f"{highest:.2f} times lr" in str(caught[0].message)


def test_the_published_schedule_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe.Prune(steps=100_000)
        recipe.Prune(steps=100, end=50, warmup=0.3, rewind="none")


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 9),
        "seeds": st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
        "control": st.booleans(),
        "precision": st.sampled_from(["bf16", "fp32"]),
        "card": st.fixed_dictionaries({"version": st.sampled_from(["1", "2.10", "no"]), "authors": st.none()}),
        "data_root": st.none() | st.text("aé:#'\" 1.\\-[{\u4e2d", max_size=6),
        "distill": st.fixed_dictionaries({"hidden": st.floats(0, 10), "hard": st.floats(1e-9, 1)}),
        "teacher": st.none() | st.fixed_dictionaries({"lr": st.floats(1e-12, 1)}),
        "tasks": st.dictionaries(
            st.sampled_from(["sst2", "squad"]), st.fixed_dictionaries({"lr": st.none() | st.floats(1e-9, 1)})
        ),
    },
)


@settings(max_examples=50)
@given(OPTIONS, st.sampled_from([("2:4", 0.5), ("1:8", 0.875), ("4x1", 0.8), ("unstructured", 0.123456789)]))
def test_what_is_dumped_loads_as_the_same_recipe(tmp_path_factory, options, pattern):
    prune = {"steps": 1000, "pattern": pattern[0], "final": pattern[1]}
    first = recipe.validate(recipe.Recipe, {**LEAST, **options, "prune": prune})
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(recipe.dump(first), encoding="utf-8")
    assert recipe.load([file]) == first


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_every_number_is_finite(value):
    checked = 0
    for model in (recipe.Prune, recipe.Teacher, recipe.Corpus, recipe.Distill, recipe.Task, recipe.Quantize):
        for name, field in model.model_fields.items():
            if "float" in str(field.annotation):
                with pytest.raises(InputError, match=f"{name} is "):
                    recipe.validate(model, recipe.parse_override(f"{name}={value}"))
                checked += 1
    assert checked > 20


BOMB = "b0: &b0 [x, x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40))
TWICE = """
name: a
prune: {steps: 5, lr: 1, lr: 2}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "'name' is given twice; keep one of them, in line 2, column 1"),
        (TWICE, "'lr' is given twice"),
        ("seed: " + "9" * 5000, "a number of 5000 digits"),
        ("seed: -" + "9" * 5000, "a number of 5001 digits"),
        ("seed: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("seed: " + "{a: " * 5000 + "}" * 5000, "nested too deeply"),
        (BOMB, "more than 100000 values"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a " + "[" * 40 + "x" + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "nested too deeply"),
        ("[a, b]: c", "not valid YAML"),
        ("? {a: b}\n: c", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: !!binary x", "not valid YAML"),
        ("a: !!timestamp 2020-99-99", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_hostile_recipes_end_in_one_line(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        recipe.load([file])
    said = str(caught.value)
    assert message in said and "recipe.yaml" in said
    assert "\n" not in said and len(said) < 700


def test_large_and_endless_recipes_are_not_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    with open(file, "wb") as stream:
        stream.truncate(200 << 20)
    for path in (file, "/dev/zero"):
        with pytest.raises(InputError, match="larger than 1048576 bytes"):
            recipe.load([path])


def test_overrides_are_not_nested_endlessly():
    for override in (".".join("a" * 5000) + "=1", "seed=" + "9" * 5000, "seed=" + "[" * 5000, "a={b: 1, b: 2}"):
        assert len(refused(override)) < 700


def test_anchors_and_merges_are_read(tmp_path):
    read = recipe.parse_override("a={x: &x {b: 1}, y: {<<: *x, c: 2}}")
    assert read == {"a": {"x": {"b": 1}, "y": {"b": 1, "c": 2}}}
