"""Models for other runtimes: ONNX, OpenVINO, compressed-tensors. Needs the train extra."""

from pruneofa.errors import need_train_extra

need_train_extra()
