"""What several benchmarks share: a description of the machine, and the shape of MiniLM."""

import os
import platform

import numpy as np
import torch
import transformers

from pruneofa.engine.hardware import processor

# The model of recipes/minilm-90.yaml, in the names of BertConfig.
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def machine() -> dict[str, str | float]:
    """Processor, threads, load and versions, for the head of a record."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
