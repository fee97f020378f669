import copy
import pickle

import pytest
import torch

from kivicache.buffer import ALIGNMENT, GROWTH, TokenBuffer


def tokens(count, batch=2):
    return torch.randn(batch, 3, count, 5)


def test_keeps_order_over_append_pop_and_truncate():
    buffer, expected = TokenBuffer(tokens(1)), tokens(0)
    for step in range(200):
        new = tokens(step % 4)
        buffer.append(new)
        expected = torch.cat([expected, new], dim=2)
        if step % 7 == 3:
            assert torch.equal(buffer.pop(5), expected[:, :, :5])
            expected = expected[:, :, 5:]
        if step % 11 == 5:
            keep = max(len(buffer) - 3, 0)
            buffer.truncate(keep)
            expected = expected[:, :, :keep]
        assert len(buffer) == expected.shape[2]
        assert torch.equal(buffer.read(), expected)


def test_growth_wastes_at_most_its_share_and_seldom_moves():
    buffer, moves, address = TokenBuffer(tokens(1)), 0, None
    for _ in range(2000):
        buffer.append(tokens(1))
        moves += buffer.data.data_ptr() != address
        address = buffer.data.data_ptr()
        assert buffer.data.shape[2] <= len(buffer) * (1 + 1 / GROWTH) + ALIGNMENT
        assert buffer.data.shape[2] % ALIGNMENT == 0
    assert moves < 150  # not 2000: a step does not copy what is there


def test_a_sliding_window_seldom_moves_and_stays_small():
    buffer, moves, address = TokenBuffer(tokens(1)), 0, None
    buffer.append(tokens(128))
    for _ in range(400):
        buffer.append(tokens(1))
        buffer.pop(1)
        moves += buffer.data.data_ptr() != address
        address = buffer.data.data_ptr()
        assert buffer.data.shape[2] <= 128 + 128 // GROWTH + ALIGNMENT
    assert moves < 80


def test_what_was_read_keeps_its_content():
    buffer = TokenBuffer(tokens(1))
    buffer.append(tokens(40))
    read = buffer.read()
    before = read.clone()
    for _ in range(100):
        buffer.append(tokens(1))
        buffer.pop(1)
    assert torch.equal(read, before)


def test_memory_written_in_inference_mode_stays_writable_outside():
    with torch.inference_mode():
        buffer = TokenBuffer(tokens(1))
        buffer.append(tokens(3))
        buffer.map_batch(lambda data: data.index_select(0, torch.tensor([1, 1, 0])))
    buffer.append(tokens(1, batch=3))
    assert not buffer.data.is_inference() and len(buffer) == 4


def test_no_gradient_is_kept():
    buffer = TokenBuffer(tokens(1))
    buffer.append(tokens(3).requires_grad_())
    assert not buffer.read().requires_grad


def test_a_copy_is_independent():
    buffer = TokenBuffer(tokens(1))
    buffer.append(tokens(4))
    other = copy.deepcopy(buffer)
    before = buffer.read().clone()
    other.truncate(2)
    other.append(tokens(2))
    assert torch.equal(buffer.read(), before) and not torch.equal(other.read(), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_made_in_inference_mode_stays_writable_outside(duplicate):
    buffer = TokenBuffer(tokens(1))
    buffer.append(tokens(4))
    with torch.inference_mode():
        other = duplicate(buffer)
    other.append(tokens(1))
    assert torch.equal(other.read()[:, :, :4], buffer.read()) and not other.data.is_inference()
