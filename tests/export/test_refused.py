"""What cannot be exported is refused in one line, and leaves nothing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pruneofa import recipe
from pruneofa.errors import InputError
from pruneofa.export import export as module
from pruneofa.export import openvino as export_openvino
from pruneofa.export.export import export
from pruneofa.families import POOLER_WEIGHT
from pruneofa.formats import scales as quantization
from pruneofa.formats.pack import pack
from tests.export.folders import QUERY, save
from tests.tiny import tiny_tokenizer


def change(folder, name, edit):
    """Change a tensor of a folder through `edit(array)`, in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        for writer in module.FORMATS.values():
            monkeypatch.setattr(writer, "MODULES", ())

    def refused(self, folder, message, to="onnx", **options):
        with pytest.raises(InputError, match=message) as caught:
            export(folder, folder.parent / "out", to=to, **options)
        assert "\n" not in str(caught.value)
        assert not (folder.parent / "out").exists()

    def test_packed(self, tmp_path):
        pack(save(tmp_path / "model", int8=False), tmp_path / "packed")
        self.refused(tmp_path / "packed", r"is packed, .*; make one with: pruneofa unpack .*packed OUT")

    def test_without_a_tokenizer_or_with_tokens_that_have_no_embedding(self, tmp_path):
        folder = save(tmp_path / "model", int8=False)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["unheardof"])
        tokenizer.save_pretrained(folder)
        self.refused(folder, "wanted a word embedding for every id: tokens were added")
        (folder / "tokenizer.json").unlink()
        self.refused(folder, "no tokenizer in it: got neither tokenizer.json nor vocab.txt")

    def test_not_quantized(self, tmp_path):
        folder = save(tmp_path / "model", int8=False)
        self.refused(folder, "no quantization.json .* make them with `pruneofa quantize", precision="int8")
        self.refused(folder, "no quantization.json", to="compressed-tensors")
        self.refused(folder, "compressed-tensors stores int8", to="compressed-tensors", precision="fp32")

    @pytest.mark.parametrize("precision", ["int8", "fp32"])
    @pytest.mark.parametrize("name", [QUERY, POOLER_WEIGHT])
    def test_a_zero_revived_by_hand(self, tmp_path, name, precision):
        folder = save(tmp_path / "model")
        scale = quantization.read(folder).weight_scale[name]

        def revive(weight):
            row, column = np.argwhere(weight == 0)[0]
            weight[row, column] = scale[row]

        change(folder, f"bert.{name}", revive)
        self.refused(folder, "pattern lock was broken", precision=precision)

    def test_a_weight_off_the_grid(self, tmp_path):
        folder = save(tmp_path / "model")
        change(folder, f"bert.{QUERY}", lambda weight: np.multiply(weight, 1.01, out=weight))
        self.refused(folder, rf"{QUERY} is not on the int8 grid")

    def test_another_head(self, tmp_path):
        folder = save(tmp_path / "model", head="ForMaskedLM")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
        self.refused(folder, "weights of BertForSequenceClassification are missing, such as")

    def test_no_metrics_of_this_head(self, tmp_path):
        folder = save(tmp_path / "model", "DistilBert", "ForTokenClassification")
        spec = recipe.Task(data="x.csv", text="a", label="b")
        self.refused(folder, "DistilBertForTokenClassification has no metrics on --task mine", name="mine", spec=spec)
        self.refused(folder, "has no metrics on --task squad", name="squad", spec=recipe.Task())

    def test_a_folder_that_holds_something(self, tmp_path):
        folder = save(tmp_path / "model")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            export(folder, tmp_path / "full", to="onnx")

    def test_a_scale_that_is_dead(self, tmp_path):
        folder = save(tmp_path / "model")
        change_scales = load_file(folder / "quantization.safetensors")
        for name in change_scales:
            if name.endswith("output.dense.input_scale"):
                change_scales[name][:] = 0
        save_file(change_scales, folder / "quantization.safetensors")
        self.refused(folder, "encoder.layer.0.*constant or never observed")

    def test_unknown_format(self, tmp_path):
        self.refused(save(tmp_path / "model"), "to is 'tflite'; wanted one of onnx, openvino", to="tflite")


def test_a_missing_library(tmp_path, monkeypatch):
    monkeypatch.setattr(export_openvino, "MODULES", ("openvino", "not_there"))
    with pytest.raises(ImportError, match=r"needs openvino, not-there: pip install 'pruneofa\[openvino\]'"):
        export(tmp_path, tmp_path / "out", to="openvino")
