import pytest
import torch

from kivicache.packing import WORD_BITS, pack, unpack, words_per_token


@pytest.mark.parametrize("head_dim", [1, 7, 8, 20, 64, 80, 96, 100, 128, 256])
@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_pack_and_unpack_are_exact_inverses(nbits, head_dim):
    codes = torch.randint(0, 2**nbits, (2, 3, 5, head_dim), dtype=torch.uint8)
    words = pack(codes, nbits)
    assert words.dtype == torch.int16 and words.shape == (2, 3, 5, words_per_token(head_dim, nbits))
    assert torch.equal(unpack(words, nbits, head_dim), codes)


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_no_bit_is_wasted_where_head_dim_fills_the_words(nbits):
    words = pack(torch.zeros(1, 1, 1, 128, dtype=torch.uint8), nbits)
    assert words.nbytes * 8 == 128 * nbits


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_the_bit_picture(nbits, head_dim):
    """Field j of word w is channel j * words + w, read out of the integers one by one."""
    codes = torch.randint(0, 2**nbits, (head_dim,), dtype=torch.uint8)
    words = [word & 0xFFFF for word in pack(codes[None, None, None], nbits).flatten().tolist()]
    for j in range(WORD_BITS // nbits):
        for w, word in enumerate(words):
            channel = j * len(words) + w
            expected = codes[channel].item() if channel < head_dim else 0
            assert (word >> (j * nbits)) % 2**nbits == expected


def test_tokens_do_not_share_words():
    """A token packed alone has the same bytes as among others: this is what makes the store append-only."""
    codes = torch.randint(0, 4, (1, 2, 6, 20), dtype=torch.uint8)
    together = pack(codes, 2)
    for token in range(6):
        assert torch.equal(pack(codes[:, :, token : token + 1], 2), together[:, :, token : token + 1])
