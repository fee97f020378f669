"""What a search minimizes, against the same done the long way."""

import json

import pytest
import torch
from transformers import DynamicCache

from kivicache import KIVICache, KIVIConfig
from kivicache.fidelity import kl_divergence, step_log_probs
from kivicache.objectives import CachedKL, TaskErrors
from kivicache.tasks import parse_task
from tests.tiny import VOCAB, tiny_llama, word_tokenizer

CONFIG = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=4, layers={1: {"nbits_key": 8}})


def test_cached_kl_is_the_kl_of_a_fresh_cache():
    model, tokens = tiny_llama(), torch.randint(2, VOCAB, (3, 80))
    loss = CachedKL(model, tokens, prefill=60, step=7)
    exact, seen = (
        step_log_probs(model, tokens, cache, 60, 7)
        for cache in (DynamicCache(), KIVICache(CONFIG, config=model.config))
    )
    expected = kl_divergence(exact, seen).mean().item()
    assert expected > 1e-4
    for _ in range(2):  # what is kept is not changed by its use
        assert loss(CONFIG) == pytest.approx(expected, rel=1e-3)
        assert loss(KIVIConfig(nbits=16)) == pytest.approx(0, abs=1e-6)


def test_cached_kl_forgets_packed_layers_before_they_become_too_many():
    model, tokens = tiny_llama(), torch.randint(2, VOCAB, (1, 50))
    loss = CachedKL(model, tokens, prefill=40, step=9)
    expected = loss(CONFIG)
    for sinks in range(70):
        loss.layer(0, KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=sinks).layer(0))
    assert len(loss._packed) <= 64
    assert loss(CONFIG) == expected


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i} #### {i}"} for i in range(3, 9)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_task_errors_are_the_part_that_is_not_exactly_matched(questions, monkeypatch):
    task = parse_task(f"gsm8k:data={questions},shots=2,max_new_tokens=2")
    seen = []

    def observe(task, subject, item, cache):
        seen.append(cache.layers[1].config.nbits_key)
        return {"5": "5", "6": "6", "7": "70", "8": "no number"}[item.facts["answers"][0]]

    monkeypatch.setattr(type(task), "observe", observe)
    assert TaskErrors(tiny_llama(), word_tokenizer(), task)(CONFIG) == 0.5
    assert seen == [8] * 4  # the four behind the two that are examples, through a cache of the config


def test_a_name_tells_tasks_of_other_questions_apart(questions):
    def name():
        return TaskErrors(tiny_llama(), word_tokenizer(), parse_task(f"gsm8k:data={questions},shots=2")).name

    before = name()
    assert name() == before
    questions.write_text(questions.read_text().replace("#### 8", "#### 9"))
    assert name() != before


def test_a_task_without_items_is_refused_at_once(questions):
    with pytest.raises(ValueError, match="task gsm8k: got no items"):
        TaskErrors(tiny_llama(), word_tokenizer(), parse_task(f"gsm8k:data={questions},shots=6"))


def test_a_task_without_right_answers_is_refused():
    with pytest.raises(ValueError, match="task: got 'fidelity'; allowed: a task with right answers"):
        TaskErrors(tiny_llama(), word_tokenizer(), parse_task("fidelity"))
