import pytest

from kivicache import KIVIConfig
from kivicache.policy import packed_lengths
from tests.reference import PaperKeysRule, PaperValuesRule, WindowRule

WINDOWS = {
    "defaults": KIVIConfig(),
    "no_sinks": KIVIConfig(sink_length=0),
    "sinks_4_group_64": KIVIConfig(sink_length=4, group_size=64),
    "no_residual": KIVIConfig(residual_length=0, sink_length=5),
    "residual_of_odd_length": KIVIConfig(residual_length=37, group_size=8),
    "per_token": KIVIConfig(group_size=-1, residual_length=16),
}


@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS)
def test_window_prompt_and_decode_follow_the_rule_token_by_token(config):
    config = config.layer(0)
    rule = WindowRule(config.residual_length, config.block_length)
    packed = 0
    for length in range(500):
        packed = rule.packed_after(length - config.sink_length, packed)  # decode: one token after the other
        assert packed == rule.packed_after(length - config.sink_length, 0)  # prefill: all at once
        assert packed_lengths(config, length) == (packed, packed)
        exact = length - packed
        assert exact >= min(length, config.sink_length + config.residual_length)  # never fewer than promised


@pytest.mark.parametrize(("group_size", "residual_length"), [(32, 128), (32, 32), (16, 48)])
def test_paper_prompt_and_decode_follow_algorithm_1(group_size, residual_length):
    config = KIVIConfig(policy="paper", sink_length=0, group_size=group_size, residual_length=residual_length).layer(0)
    keys, values = PaperKeysRule(residual_length), PaperValuesRule(residual_length)
    packed = (0, 0)
    for length in range(500):
        packed = keys.packed_after(length, packed[0]), values.packed_after(length, packed[1])
        assert packed_lengths(config, length) == packed
        # the prefill lines of Algorithm 1: keys[: l - l % R] and values[: l - R]
        assert packed == (length - length % residual_length, max(length - residual_length, 0))
