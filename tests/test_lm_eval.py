"""lm-evaluation-harness through the cache, offline, on small local tasks with a tiny random model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kivicache import KIVICache, KIVIConfig
from kivicache.lm_eval import KIVICacheLM
from tests.tiny import tiny_llama, word_tokenizer

COARSE = "kivi:2:g8:r8:s4"
CONFIG = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=4)


def harness(kind=KIVICacheLM, **kwargs):
    return kind(pretrained=tiny_llama(), tokenizer=word_tokenizer(), device="cpu", max_length=120, **kwargs)


def words(count):
    return " ".join(f"w{i}" for i in torch.randint(3, 100, (count,)).tolist())


def asked(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


@pytest.fixture
def pairs():
    """(context, continuation): two choices of one context, others of several lengths, one too long for the model."""
    shared = words(60)
    return [(shared, " " + words(3)), (shared, " " + words(5))] + [(words(n), " " + words(4)) for n in (30, 50, 150)]


@torch.no_grad()
def through(cache, context, continuation, step):
    """The log probability of the continuation, fed in steps behind a prefill of all but the context's last token."""
    model = tiny_llama()
    model(torch.tensor([context[:-1]]), past_key_values=cache)
    fed = torch.tensor([[context[-1], *continuation[:-1]]])
    logits = torch.cat([model(piece, past_key_values=cache).logits[0] for piece in fed.split(step, dim=1)])
    return logits.log_softmax(-1)[range(len(continuation)), continuation].sum().item()


def test_in_full_precision_the_scores_are_those_of_the_harness(pairs):
    expected = harness(HFLM).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for cache in ("dynamic", "kivi:16"):
        found = harness(cache=cache).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("step", [1, 32])
def test_a_quantized_history_shows_in_the_scores(pairs, step):
    found = harness(cache=COARSE, step=step).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    tokenizer, exact = word_tokenizer(), []
    for (context, continuation), (score, _) in zip(pairs[:4], found, strict=False):
        ids = tokenizer(context).input_ids, tokenizer(continuation).input_ids
        assert score == pytest.approx(through(KIVICache(CONFIG), *ids, step), rel=1e-4)
        exact.append(through(DynamicCache(), *ids, step))
    assert [score for score, _ in found[:4]] != pytest.approx(exact, rel=1e-3)


def test_rolling_log_likelihood(pairs):
    texts = [(words(n),) for n in (20, 100, 200)]
    expected = harness(HFLM).loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    found = harness(nbits=16, step=7).loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)
    coarse = harness(cache=COARSE, step=7).loglikelihood_rolling(
        asked("loglikelihood_rolling", texts), disable_tqdm=True
    )
    assert all(abs(one - other) > 1e-3 for one, other in zip(coarse[1:], expected[1:], strict=True))


def test_generation_reads_from_the_cache():
    contexts = [words(70), words(50)]
    # Neither a stop string nor the end of the text can turn up: the harness would cut the answer there.
    options = {"until": ["w100"], "max_gen_toks": 20, "do_sample": False, "suppress_tokens": [0, 1, 2]}
    found = harness(cache=COARSE, batch_size=1).generate_until(
        asked("generate_until", [(context, dict(options)) for context in contexts]), disable_tqdm=True
    )
    tokenizer, model = word_tokenizer(), tiny_llama()
    for context, text in zip(contexts, found, strict=True):
        input_ids = tokenizer(context, return_tensors="pt").input_ids
        cache, kwargs = KIVICache(CONFIG), {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [0, 1, 2]}
        output = model.generate(input_ids, past_key_values=cache, **kwargs)
        assert text.split() == tokenizer.decode(output[0, input_ids.shape[1] :]).split()
        assert len(text.split()) == 20


@pytest.fixture
def local_task(tmp_path):
    rows = [{"text": words(60), "choices": [words(2), words(3)], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n"
    )
    return tmp_path


def test_a_local_task_and_what_its_results_say(local_task, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(local_task / "cache"))
    manager = TaskManager(include_path=str(local_task), include_defaults=False)
    results = {}
    for model in (harness(HFLM), harness(nbits=16)):
        results[type(model)] = lm_eval.simple_evaluate(
            model=model, tasks=["words"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
    assert results[HFLM]["results"]["words"]["acc,none"] == results[KIVICacheLM]["results"]["words"]["acc,none"]
    assert harness(nbits=2).get_model_info()["cache"]["nbits_key"] == 2


def command_line(local_task, model_args):
    tiny_llama().save_pretrained(local_task / "model")
    word_tokenizer().save_pretrained(local_task / "model")
    environment = {"HF_DATASETS_CACHE": str(local_task / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    call = f"--model kivicache --device cpu --tasks words --model_args pretrained={local_task / 'model'},{model_args}"
    return subprocess.run(
        [sys.executable, "-m", "kivicache.lm_eval", *call.split(), "--include_path", str(local_task)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_command_line_knows_the_model(local_task):
    done = command_line(local_task, "nbits=2,rotation=null")
    assert done.returncode == 0, done.stderr
    assert "|words" in done.stdout and "nbits" in done.stdout


def test_the_command_line_says_in_one_line_what_is_wrong(local_task):
    done = command_line(local_task, "nbits=3")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "kivicache.lm_eval: error: nbits: got 3; allowed: 2, 4, 8, 16"


@pytest.mark.parametrize("none", [None, "null", "None"])
def test_no_rotation_may_be_asked_for(none):
    assert harness(nbits=2, rotation=none).spec == harness(nbits=2).spec


def test_an_answer_that_is_longer_than_the_model_reads_is_refused():
    with pytest.raises(ValueError, match="max_length: got 120; allowed: 130, the longest answer"):
        harness()._loglikelihood_tokens([(None, [3], [3] * 130)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache": "kivi:2", "nbits": 4}, "cache: got 'kivi:2' beside nbits"),
        ({"nbits": 3}, "nbits: got 3; allowed: 2, 4, 8, 16"),
        ({"step": 0}, "step: got 0"),
        ({"cache": 5}, "cache: got '5'; allowed: dynamic, kivi"),
        ({"cache": "hf-quanto:8"}, "cache 'hf-quanto:8'"),
    ],
)
def test_wrong_arguments_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        harness(**given)
