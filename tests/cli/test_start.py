"""What can be said without torch is said at once."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pruneofa.cli import main as cli

VERBS = [name for name, *_ in cli.VERBS]
TEACHES = {
    "run": ["recipe", "--set A.B=C", "--dry-run", "--redo", "--json", "later ones override"],
    "demo": ["--out", "(default: runs/demo)", "--json", "documentation of the installed Python"],
    "prune": [
        "--prune.final",
        "--corpus.source",
        "--teacher.steps",
        "--distill.hidden",
        "(default 0.9)",
        "--no-teacher",
    ],
    "transfer": ["--task", "--data", "--text", "--label", "--teacher", "default: 1e-4", "pattern locked", "example: "],
    "quantize": [
        "--task",
        "--ptq",
        "--teacher",
        "--activations",
        "--qat-lr",
        "zeros locked",
        "quantization.json",
        "default: 1e-5",
        "example: ",
    ],
    "evaluate": ["--task", "--data", "--json", "train extra, for the engine too"],
    "inspect": ["--json", "pattern hash"],
    "pack": ["--precision", "--compress", "--json", "zeros are the pattern", "every bit", "example: "],
    "unpack": ["--json", "bit-identical", "example: "],
    "verify": ["base", "derived", "exit 1"],
    "export": ["--to", "--precision", "--task", "compressed-tensors", "a zero is lost", "exit 1", "example: "],
    "bench": ["--random", "--mixed", "--isa", "--break-even", "--at-least", "outputs verified first", "example: "],
    "serve": [
        "[NAME=]MODEL",
        "this machine only",
        "text-embeddings-inference",
        "--max-batch-tokens",
        "PRUNEOFA_API_KEY",
        "example: ",
    ],
    "predict": [
        "--out",
        "--processes",
        "--skip-bad",
        "columns of results:",
        "the same command continues",
        "examples: ",
    ],
    "table": ["results.json", "--json"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(call, verb):
    said = call(verb, "--help")
    assert said.code == 0 and said.err == ""
    text = " ".join(said.out.split())
    assert [part for part in TEACHES[verb] if part not in text] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_more_than_its_name(verb):
    parser = argparse.ArgumentParser()
    next(describe for name, _, describe in cli.VERBS if name == verb)(parser)
    for action in parser._actions:
        name = action.dest.rpartition(".")[2].replace("_", " ")
        assert action.help and re.sub(r" \(default.*", "", action.help) != name, action.dest


def test_general_help_names_verbs_examples_and_exit_codes(call):
    said = call("--help")
    assert said.code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in said.out or f"\n    {verb} " in said.out, verb
    assert "examples:" in said.out and "exit codes: 0 done, 1 a check failed, 2 wrong input" in said.out
    assert "3 anything else (disk full, a package missing), 130 interrupted" in said.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prun"],
        ["run"],
        ["verify", "x"],
        ["inspect", "x", "--jsn"],
        ["transfer", "x", "y", "--seed", "-1"],
        ["transfer", "x", "y", "--task", "sst2", "--dense-lr", "1e-4"],
        ["transfer", "x", "y", "--task", "sst2", "--dense_epochs", "3"],
    ],
)
def test_a_wrong_call_is_one_line(refused, arguments):
    assert "--help" in refused(*arguments)


def test_a_misspelt_recipe_is_corrected_and_the_shipped_ones_named(refused, call):
    assert "minilm-90" in call("run", "--help").out
    said = refused("run", "bert-bse-90")
    assert said.startswith("bert-bse-90: no such recipe; wanted a file, or one of ") and "minilm-90" in said
    assert said.endswith("; did you mean bert-base-90?")


def test_a_misspelt_option_is_corrected_and_the_help_of_its_verb_named(refused):
    given = ["transfer", "x", "y", "--task", "sst2"]
    said = refused(*given, "--precison", "fp32")
    assert said == "unrecognized arguments: --precison fp32; did you mean --precision; see pruneofa transfer --help"
    assert "did you mean" not in refused(*given, "--zzz=1")


def fastest(*command: str) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_start_takes_less_than_a_third_of_a_second():
    # On a machine that is busy with other things every start takes longer, an empty one too.
    allowance = 0.3 * max(1.0, fastest("-c", "pass") / 0.05)
    assert fastest("-c", "import pruneofa") < allowance
    assert fastest("-m", "pruneofa", "--help") < allowance


def test_start_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "pydantic", "yaml", "safetensors", "huggingface_hub", "tqdm")
    program = "import sys, pruneofa, pruneofa.cli.main; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.modules['torch'] = None; from pruneofa.cli.main import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


def test_without_torch_a_folder_can_be_inspected_and_training_names_the_extra(tmp_path):
    said = without_torch("inspect", tmp_path)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith(f"pruneofa: error: {tmp_path}: no model.safetensors")
    said = without_torch("run", "demo", "--out", tmp_path / "out")
    assert (said.returncode, said.stdout) == (3, "")
    assert said.stderr == "pruneofa: error: training needs torch and transformers: pip install 'pruneofa[train]'\n"


def test_without_the_train_extra_the_verbs_that_train_name_it_and_the_others_work(tmp_path):
    """pydantic and PyYAML, which validate recipes, are not in the base install, nor is torch."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'pydantic', 'yaml', 'jinja2'])); "
        "from pruneofa.cli.main import main; sys.exit(main())"
    )
    for verb in ("run", "prune", "transfer", "quantize", "evaluate"):
        given = ["demo", "--dry-run"] if verb == "run" else ["--help"]
        said = subprocess.run([sys.executable, "-c", program, verb, *given], capture_output=True, text=True)
        assert (said.returncode, said.stdout) == (3, "")
        assert said.stderr == "pruneofa: error: recipes need pydantic: pip install 'pruneofa[train]'\n"
    golden = str(Path(__file__).parents[1] / "golden/v1-int8")
    unpacked = str(tmp_path / "out")
    for given in (
        ["inspect", golden, "--engine"],
        ["unpack", golden, unpacked],
        ["pack", unpacked, str(tmp_path / "again")],
        ["verify", unpacked, unpacked],
        ["predict", "--help"],
        ["bench", "--help"],
    ):
        said = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("transfer", [], "no task: give --task"),
        ("transfer", ["--task", "sst2", "--epochs", "ten"], "epochs is 'ten'"),
        ("transfer", ["--task", "sst2"], "no model.safetensors"),
        ("quantize", ["--task", "sst2", "--activations", "x"], "activations"),
        ("quantize", ["--task", "sst2"], "no model.safetensors"),
        ("evaluate", ["--task", "mine"], "so it needs --data, --text and --label"),
        ("export", ["--to", "onnx", "--task", "mine"], "so it needs --data, --text and --label"),
        ("prune", ["--corpus.source", "x", "--prune.final", "2"], "prune.final is 2"),
    ],
)
def test_a_wrong_call_is_refused_before_torch_is_imported(verb, given, message, tmp_path):
    out = [] if verb == "evaluate" else [tmp_path / "out"]
    said = without_torch(verb, tmp_path, *out, *given)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("pruneofa: error: ") and message in said.stderr


def test_a_package_that_is_missing_is_no_failed_check():
    program = "import sys; sys.modules['yaml'] = None; from pruneofa.cli.main import main; sys.exit(main())"
    said = subprocess.run([sys.executable, "-c", program, "run", "demo"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (3, "")
    assert "ModuleNotFoundError" in said.stderr


def test_the_version(call):
    from importlib.metadata import version

    assert call("--version").out.strip() == version("pruneofa")
