"""The bias of attention by distance, against transformers."""

import numpy as np
import pytest
import torch
from transformers import MPNetConfig
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from pruneofa.engine.load import bias_by_distance
from pruneofa.families.mpnet import MPNET


@pytest.mark.parametrize("length", [1, 2, 9, 600])
def test_buckets_are_those_of_transformers(length):
    encoder = MPNetEncoder(MPNetConfig(num_hidden_layers=0, num_attention_heads=3, hidden_size=6))
    with torch.no_grad():
        wanted = encoder.compute_position_bias(torch.zeros(1, length, 6))[0].numpy()
    found = bias_by_distance(encoder.relative_attention_bias.weight.detach().numpy(), MPNET.relative_bias, length)
    assert found.shape == (3, 2 * length - 1) and found.dtype == np.float32 and found.flags.c_contiguous
    tokens = np.arange(length)
    np.testing.assert_array_equal(found[:, length - 1 + tokens[:, None] - tokens], wanted)
