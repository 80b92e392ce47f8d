import json

import pytest
import torch
from transformers import BertConfig, BertModel

from pruneofa.train.attention import NAME, use_bf16_attention


def encoder(dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = BertModel(config)
    for parameter in model.parameters():  # the initial weights are so small that attention is uniform
        if parameter.ndim == 2:
            parameter.data *= 8
    return model


def batch():
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def states(model, *, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(**batch()).last_hidden_state[batch()["attention_mask"].bool()]


def test_bf16_agrees_with_float32_as_well_as_pytorchs_own_attention_does():
    model = encoder().eval()
    exact = states(model, bf16=False)
    own = (states(model, bf16=True) - exact).abs().max()
    use_bf16_attention(model)
    assert (states(model, bf16=True) - exact).abs().max() < 2 * own


def test_float32_is_left_to_pytorch():
    model = encoder().eval()
    exact = states(model, bf16=False)
    use_bf16_attention(model)
    assert torch.equal(states(model, bf16=False), exact)


def test_padding_changes_nothing_and_gets_no_gradient():
    model = encoder()
    use_bf16_attention(model)
    short = {key: value[1:2, :5] for key, value in batch().items()}
    with torch.autocast("cpu", torch.bfloat16):
        alone = model(**short).last_hidden_state[0]
        together = model(**batch()).last_hidden_state[1, :5]
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=0)


def test_gradients_agree_with_float32():
    gradients = []
    for bf16 in (False, True):
        model = encoder()
        use_bf16_attention(model)
        seen = states(model, bf16=bf16)
        (seen * torch.randn(seen.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        gradients.append(model.encoder.layer[0].attention.self.query.weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_dropped_in_training_only(training):
    model = encoder(dropout=0.5).train(training)
    use_bf16_attention(model)
    same = torch.equal(states(model, bf16=True), states(model, bf16=True))
    assert same is not training


def test_a_saved_folder_does_not_name_it(tmp_path):
    model = encoder()
    use_bf16_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert BertModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
