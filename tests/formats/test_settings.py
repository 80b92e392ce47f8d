import shlex

from pruneofa.formats.settings import without_tokenizer


def test_the_command_that_makes_a_tokenizer_takes_any_path(tmp_path):
    folder = tmp_path / "it's a $model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "vocab.txt").write_text("[UNK]\n")
    *_, program, path = shlex.split(without_tokenizer(folder).partition("write it with: ")[2])
    assert path == str(folder) and program.count("sys.argv[1]") == 2
    compile(program, "printed", "exec")
