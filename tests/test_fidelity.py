"""Fidelity through a cache, against one forward pass."""

import pytest
import torch
from transformers import DynamicCache

from kivicache.fidelity import kl_divergence, spread_sequences, step_log_probs, text_pieces
from tests.tiny import VOCAB, bos_tokenizer, tiny_llama, word_tokenizer


@pytest.mark.parametrize("step", [1, 5, 100])
def test_steps_through_an_exact_cache_are_the_one_shot_forward(step):
    model, tokens = tiny_llama(), torch.randint(2, VOCAB, (2, 40))
    with torch.no_grad():
        expected = model(tokens).logits[:, 25:-1].log_softmax(-1)
    assert torch.allclose(step_log_probs(model, tokens, DynamicCache(), 25, step), expected, atol=1e-4)


def test_kl_divergence_is_that_of_torch():
    exact, other = torch.randn(2, 3, 11).log_softmax(-1), torch.randn(2, 3, 11).log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, exact, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(exact, other), expected, atol=1e-6)
    assert (kl_divergence(exact, exact) == 0).all()


def test_sequences_never_overlap_and_reach_the_end():
    pieces = spread_sequences(torch.arange(103), 4, 25)
    assert pieces.shape == (4, 25) and pieces[0, 0] == 0 and pieces[-1, -1] == 102
    assert len(pieces.unique()) == pieces.numel()
    with pytest.raises(ValueError, match="got 99 tokens; allowed: at least 100"):
        spread_sequences(torch.arange(99), 4, 25)


def test_a_piece_of_text_begins_as_the_tokenizer_begins_a_text():
    text = " ".join(f"w{i}" for i in range(3, 99))
    assert text_pieces(word_tokenizer(), text, 2, 48).tolist() == [list(range(3, 51)), list(range(51, 99))]
    assert text_pieces(bos_tokenizer(), text, 2, 49).tolist() == [[1, *range(3, 51)], [1, *range(51, 99)]]
