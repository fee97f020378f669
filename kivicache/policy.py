"""Which tokens are quantized: a pure function of how many there are."""

from __future__ import annotations

from kivicache.config import LayerConfig


def packed_lengths(config: LayerConfig, length: int) -> tuple[int, int]:
    """How many tokens of keys and of values are packed once a layer has seen ``length`` tokens.

    They are the tokens right behind the ``sink_length`` first ones; everything newer is the residual.

    "window": whole blocks, as many as leave ``residual_length`` newer tokens; the same for keys and values.

    "paper" is Algorithm 1 of KIVI (arXiv 2402.02750, appendix A), whose prefill and decode rules come to the same two
    counts: keys are packed ``residual_length`` at a time, so 0 to ``residual_length - 1`` of them are left over, and
    all values but the newest ``residual_length`` are packed.
    """
    length = max(length - config.sink_length, 0)
    window = max(length - config.residual_length, 0)
    if config.policy == "paper":
        return length - length % config.residual_length, window
    packed = window - window % config.block_length
    return packed, packed
