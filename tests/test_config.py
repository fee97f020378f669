import dataclasses

import pytest
import torch
import yaml

from kivicache import KIVICache, KIVIConfig
from kivicache.config import LayerConfig


def test_defaults():
    config = KIVIConfig()
    assert (config.nbits_key, config.nbits_value, config.group_size) == (4, 2, 32)
    assert (config.axis_key, config.axis_value) == ("channel", "token")
    assert (config.residual_length, config.sink_length, config.rotation) == (128, 32, None)
    assert (config.backend, config.layers, config.heads) == ("native", {}, {})


@pytest.mark.parametrize("nbits", [2, 4, 8, 16])
def test_nbits_sets_keys_and_values(nbits):
    config = KIVIConfig(nbits=nbits)
    assert (config.nbits_key, config.nbits_value) == (nbits, nbits)
    assert config == KIVIConfig(nbits_key=nbits, nbits_value=nbits)


def test_paper_is_the_paper():
    config = KIVIConfig.paper(2)
    assert (config.nbits_key, config.nbits_value, config.group_size, config.residual_length) == (2, 2, 32, 128)
    assert (config.sink_length, config.policy, config.rotation) == (0, "paper", None)


@pytest.mark.parametrize("name", ["2.5bit", "3bit", "3.5bit", "4bit", "5bit"])
def test_a_preset_costs_the_bits_of_its_name(name):
    config = KIVIConfig.preset(name)
    cache = KIVICache(config)
    for layer_idx in range(2):
        cache.update(*torch.randn(2, 1, 2, 777, 128), layer_idx)
    assert cache.memory().packed_bits_per_value == float(name.removesuffix("bit"))
    assert (config.backend, config.policy, config.layers) == ("native", "window", {})


@pytest.mark.parametrize("name", ["1bit", "3", 3, None, ["3bit"]])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ValueError, match=r"preset: got .*; allowed: '2.5bit', '3bit', '3.5bit', '4bit', '5bit'"):
        KIVIConfig.preset(name)


def test_is_frozen_and_replaceable():
    config = KIVIConfig(nbits=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.nbits_key = 4
    assert dataclasses.replace(config, nbits_key=8).nbits_key == 8
    assert dataclasses.replace(config, nbits_key=8).nbits_value == 2


def test_kvtuner_axes_are_read_as_words():
    config = KIVIConfig(axis_key=1, axis_value=0, layers={3: {"axis_key": 0}})
    assert (config.axis_key, config.axis_value, config.layer(3).axis_key) == ("channel", "token", "token")


def test_one_group_per_token_turns_both_axes():
    config = KIVIConfig(group_size=-1)
    assert (config.axis_key, config.axis_value) == ("token", "token")


def test_layers_and_heads_resolve():
    config = KIVIConfig(
        nbits=2,
        layers={0: {"nbits": 8, "sink_length": 4}, 5: {"nbits_value": 4, "rotation": "hadamard"}},
        heads={0: {1: 4, 2: {"nbits_key": 16}}, 7: {0: {"nbits": 8}}},
    )
    assert config.layer(1) == LayerConfig(nbits_key=2, nbits_value=2)
    assert config.layer(0) == LayerConfig(nbits_key=8, nbits_value=8, sink_length=4, heads={1: (4, 4), 2: (16, 8)})
    assert config.layer(5) == LayerConfig(nbits_key=2, nbits_value=4, rotation="hadamard")
    assert config.layer(7).heads == {0: (8, 8)}


ROUND_TRIPS = {
    "defaults": KIVIConfig(),
    "paper": KIVIConfig.paper(4),
    "per_token": KIVIConfig(nbits=8, group_size=-1),
    "everything": KIVIConfig(
        nbits_key=8,
        nbits_value=16,
        group_size=64,
        axis_key="token",
        axis_value="channel",
        residual_length=0,
        sink_length=0,
        rotation="hadamard",
        backend="hqq",
        layers={2: {"nbits": 4, "backend": "native"}, 0: {"policy": "paper", "axis_value": "token", "group_size": 16,
                                                          "residual_length": 48}},
        heads={1: {0: 2, 3: {"nbits_value": 8}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_dict_and_yaml_round_trips_are_exact(config, tmp_path):
    assert KIVIConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "kivi.yaml"
    assert path.write_text(config.to_yaml()) and KIVIConfig.from_yaml(path) == config
    config.to_yaml(path)
    assert KIVIConfig.from_yaml(str(path)) == config
    assert KIVICache(path).kivi_config == KIVICache(config.to_dict()).kivi_config == config


def test_kvtuner_presets_load_unchanged(tmp_path):
    per_layer = {0: {"nbits_key": 8, "nbits_value": 4}, 1: {"nbits_key": 4, "nbits_value": 2}}
    path = tmp_path / "Meta-Llama-3.1-8B-Instruct_kivi_KVTuner4_0.yaml"
    path.write_text(yaml.safe_dump(per_layer))
    config = KIVIConfig.from_yaml(path)
    assert (config.layer(0).nbits_key, config.layer(0).nbits_value) == (8, 4)
    assert (config.layer(1).nbits_key, config.layer(1).nbits_value) == (4, 2)

    path.write_text(yaml.safe_dump({0: {0: per_layer[0], 1: per_layer[1]}, 1: {0: per_layer[1], 1: per_layer[0]}}))
    config = KIVIConfig.from_yaml(path)
    assert config.layer(0).heads == {0: (8, 4), 1: (4, 2)}
    assert config.layer(1).heads == {0: (4, 2), 1: (8, 4)}


REFUSED = {  # what is wrong: (settings, words of the message)
    "unknown_key": ({"nbitz": 2}, ["nbitz", "unknown", "nbits_key"]),
    "unknown_key_in_layer": ({"layers": {3: {"bits": 2}}}, ["layers[3].bits", "unknown", "nbits_key"]),
    "unknown_key_in_head": ({"heads": {3: {1: {"group_size": 2}}}}, ["heads[3][1].group_size", "unknown"]),
    "layers_in_layers": ({"layers": {3: {"layers": {}}}}, ["layers[3].layers", "unknown"]),
    "bits_3": ({"nbits": 3}, ["nbits", "3", "2, 4, 8, 16"]),
    "bits_as_text": ({"nbits_key": "4"}, ["nbits_key", "'4'", "2, 4, 8, 16"]),
    "bits_as_float": ({"nbits_value": 4.0}, ["nbits_value", "4.0", "2, 4, 8, 16"]),
    "bits_as_bool": ({"nbits_value": True}, ["nbits_value", "True", "2, 4, 8, 16"]),
    "bits_as_list": ({"nbits_value": [2]}, ["nbits_value", "[2]", "2, 4, 8, 16"]),
    "bits_twice": ({"nbits": 2, "nbits_key": 4}, ["nbits", "nbits_key=4", "either"]),
    "bits_in_layer": ({"layers": {1: {"nbits_key": 5}}}, ["layers[1].nbits_key", "5", "2, 4, 8, 16"]),
    "bits_in_head": ({"heads": {1: {0: 5}}}, ["heads[1][0].nbits", "5", "2, 4, 8, 16"]),
    "group_size_0": ({"group_size": 0}, ["group_size", "0", "-1"]),
    "group_size_float": ({"group_size": 32.0}, ["group_size", "32.0"]),
    "residual_negative": ({"residual_length": -1}, ["residual_length", "-1", "0 or more"]),
    "sinks_text": ({"sink_length": "many"}, ["sink_length", "'many'"]),
    "sinks_bool": ({"sink_length": True}, ["sink_length", "True"]),
    "axis": ({"axis_key": "row"}, ["axis_key", "'row'", "'channel'"]),
    "axis_2": ({"axis_key": 2}, ["axis_key", "2", "'channel'"]),
    "axis_bool": ({"axis_value": False}, ["axis_value", "False"]),
    "rotation": ({"rotation": "random"}, ["rotation", "'random'", "'hadamard'"]),
    "backend": ({"backend": "cuda"}, ["backend", "'cuda'", "'hqq'"]),
    "policy": ({"policy": "none"}, ["policy", "'none'", "'paper'"]),
    "layers_list": ({"layers": [{"nbits": 2}]}, ["layers", "mapping"]),
    "layer_bits_alone": ({"layers": {0: 8}}, ["layers[0]", "8", "mapping"]),
    "layer_negative": ({"layers": {-1: {"nbits": 2}}}, ["layers", "-1", "from 0"]),
    "layer_name": ({"layers": {"first": {"nbits": 2}}}, ["layers", "'first'", "from 0"]),
    "head_name": ({"heads": {0: {"first": 2}}}, ["heads[0]", "'first'", "from 0"]),
    "paper_residual": ({"policy": "paper", "residual_length": 100}, ["residual_length", "100", "32"]),
    "paper_residual_0": ({"policy": "paper", "residual_length": 0}, ["residual_length", "0", "positive"]),
    "paper_values": ({"policy": "paper", "axis_value": "channel"}, ["axis_value", "channel", "token"]),
    "paper_layer": ({"layers": {2: {"policy": "paper", "residual_length": 33}}}, ["layers[2].residual_length", "33"]),
    "not_a_mapping": ([2, 4], ["mapping", "[2, 4]"]),
    "kvtuner_text": ({0: "int4"}, ["layers[0]", "'int4'"]),
    "kvtuner_bits": ({0: {"nbits_key": 3, "nbits_value": 2}}, ["layers[0].nbits_key", "3"]),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_by_name(settings, words, tmp_path):
    with pytest.raises(ValueError) as from_dict:
        KIVIConfig.from_dict(settings)
    for word in words:
        assert word in str(from_dict.value)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"bad\.yaml") as from_yaml:
        KIVIConfig.from_yaml(path)
    assert str(from_dict.value) in str(from_yaml.value)


def test_merge_keys_are_followed(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "layers:\n  0: &a {nbits_key: 8, nbits_value: 4}\n  1: &b {<<: *a, nbits_value: 2}\n  2: {<<: *b}\n"
    )
    config = KIVIConfig.from_yaml(path)
    assert [(layer.nbits_key, layer.nbits_value) for layer in map(config.layer, range(3))] == [(8, 4), (8, 2), (8, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nbits_key: 4\nnbits_key: 8\n", "nbits_key: given twice"),
        ("layers:\n  0: {nbits: 2}\n  0: {nbits: 4}\n", "0: given twice"),
        ("layers: {0: {nbits: 2}, '0': {nbits: 4}}\n", "layers: got index '0' twice"),
        ("heads: {0: {1: 8, '1': 2}}\n", "heads.0.: got index '1' twice"),
    ],
)
def test_a_key_given_twice_is_refused(text, message, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        KIVIConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "nbits: [", "!!python/object/apply:os.getcwd []"])
def test_refuses_yaml_that_is_no_mapping(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        KIVICache(path)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        KIVICache("nowhere.yaml")


def test_the_cache_refuses_what_is_no_config():
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match=r"LlamaConfig.*config="):
        KIVICache(LlamaConfig())
    with pytest.raises(ValueError, match=r"cfg.*int"):
        KIVICache(4)


def test_a_preset_s_name_is_no_file():
    with pytest.raises(ValueError, match=r"allowed: KIVIConfig.preset\('3bit'\)"):
        KIVICache("3bit")


def test_the_paper_s_bits_are_checked():
    with pytest.raises(ValueError, match="nbits: got None"):
        KIVIConfig.paper(None)


@pytest.mark.parametrize("word", [None, "none", "None"])
def test_no_rotation_by_any_name(word):
    assert (
        KIVIConfig(rotation=word) == KIVIConfig()
        and KIVIConfig(layers={3: {"rotation": word}}).layer(3).rotation is None
    )
