"""The tasks: what they ask, what they hear, how they judge; against plain loops and the benchmarks' own metrics."""

import importlib.util
import json
import math
import sys
from difflib import SequenceMatcher
from types import ModuleType

import pytest
import torch
from transformers import DynamicCache

from kivicache import KIVICache, KIVIConfig
from kivicache.tasks import Item, Subject, parse_task
from kivicache.tasks.fidelity import Fidelity, Greedy
from kivicache.tasks.gsm8k import GSM8K, final_number
from kivicache.tasks.longbench import DATASETS, METRICS, LongBench
from kivicache.tasks.retrieval import KINDS, Passkey, Ruler
from tests.tiny import VOCAB, tiny_llama, word_tokenizer

COARSE = KIVIConfig(nbits=2, group_size=8, residual_length=8, sink_length=4)


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny_llama(), word_tokenizer())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(3, VOCAB, (400,)).tolist()))
    return str(path)


class Letters:
    """A tokenizer of characters, so that prompts can be read back. ``template`` wraps a chat."""

    chat_template = None

    def __call__(self, text, **kwargs):
        return type("Encoded", (), {"input_ids": [ord(char) for char in text]})

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<user>{messages[0]['content']}<assistant>"


def read(token_ids):
    return "".join(map(chr, token_ids))


@torch.no_grad()
def greedy(model, token_ids, prefill, cache, count):
    model(torch.tensor([token_ids[:prefill]]), past_key_values=cache)
    fed, tokens = token_ids[prefill:], []
    for _ in range(count):
        tokens.append(int(model(torch.tensor([fed]), past_key_values=cache).logits[0, -1].argmax()))
        fed = tokens[-1:]
    return tokens


def test_fidelity_is_what_torch_computes_from_the_logits(subject, text):
    task = Fidelity(data=text, sequences=2, prefill=60, steps=20, step=4)
    items, scores, logits = task.items(subject), [], []
    for item in items:
        exact = task.observe(subject, item, DynamicCache())
        scores.append(task.score(item, task.observe(subject, item, KIVICache(COARSE)), exact))
        tokens, cache = torch.tensor([item.token_ids]), KIVICache(COARSE)
        with torch.no_grad():
            subject.model(tokens[:, :60], past_key_values=cache)
            pieces = [subject.model(tokens[:, i : i + 4], past_key_values=cache).logits[0] for i in range(60, 80, 4)]
            logits.append((torch.cat(pieces), subject.model(tokens).logits[0, 60:80], tokens[0, 61:]))
    seen, exact, targets = (torch.cat(parts) for parts in zip(*logits, strict=True))
    found = task.summarize(scores)
    assert found["perplexity"] == pytest.approx(
        torch.nn.functional.cross_entropy(seen, targets).exp().item(), rel=1e-3
    )
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (exact, seen)))
    assert found["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-3) and found["kl_mean"] > 0.01
    assert found["kl_median"] == pytest.approx(kl.quantile(0.5).item(), rel=1e-3)
    assert found["kl_p99"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx((seen.argmax(-1) == exact.argmax(-1)).float().mean().item())


def test_full_precision_differs_from_itself_by_nothing(subject, text):
    task = Fidelity(data=text, sequences=1, prefill=60, steps=20, step=7)
    (item,) = task.items(subject)
    exact = task.observe(subject, item, DynamicCache())
    found = task.summarize([task.score(item, task.observe(subject, item, KIVICache(KIVIConfig(nbits=16))), exact)])
    assert (found["kl_mean"], found["kl_p99"], found["top1_agreement"]) == (0, 0, 1)


def test_greedy_agreement_is_that_of_plain_loops(subject, text):
    task = Greedy(data=text, prompts=2, prefill=60, tokens=24)
    for item in task.items(subject):
        exact = task.observe(subject, item, DynamicCache())
        seen = task.observe(subject, item, KIVICache(COARSE))
        assert exact == greedy(subject.model, item.token_ids, 60, DynamicCache(), 24)
        assert seen == greedy(subject.model, item.token_ids, 60, KIVICache(COARSE), 24)
        found = task.score(item, seen, exact)
        assert exact[: found["alike_before"]] == seen[: found["alike_before"]]
        assert found["alike_before"] == 24 or exact[found["alike_before"]] != seen[found["alike_before"]]
        assert found["equal_tokens"] == (torch.tensor(exact) == torch.tensor(seen)).float().mean()
    assert task.score(item, exact, exact) == {"alike_before": 24, "equal_tokens": 1}


@pytest.mark.parametrize("template", [None, "yes"])
def test_a_passkey_lies_where_its_place_says(template):
    tokenizer = Letters()
    tokenizer.chat_template = template
    subject = Subject(None, tokenizer)
    items = Passkey(lengths=(3000, 5000), depths=3, samples=2).items(subject)
    assert len(items) == 12 and len({item.facts["answers"][0] for item in items}) == 12
    assert items == Passkey(lengths=(3000, 5000), depths=3, samples=2).items(subject)
    for item in items:
        text, key = read(item.token_ids), item.facts["answers"][0]
        assert 0.95 * item.place["length"] < len(text) <= item.place["length"]
        assert text.count(key) == 2
        assert text.index(key) / text.rindex("What is") == pytest.approx(item.place["depth"], abs=0.1)
        assert read(item.token_ids[item.prefill :]).startswith("What is the pass key?")
        assert text.startswith("<user>") == (template is not None)
        assert text.endswith("<assistant>The pass key is" if template else "What is the pass key?The pass key is")


@pytest.mark.parametrize("kind", KINDS)
def test_ruler_hides_what_it_asks_for(kind):
    for item in Ruler(kind=kind, lengths=(4000,), depths=2).items(Subject(None, Letters())):
        context, asked = read(item.token_ids[: item.prefill]), read(item.token_ids[item.prefill :])
        answers = item.facts["answers"]
        assert len(answers) == {"single": 1, "multikey": 1}.get(kind, 4)
        assert all(answer in context and answer not in asked for answer in answers)
        assert context.count("magic number") - 1 == {"single": 1, "tracking": -1}.get(kind, 4)
        found = Ruler(kind=kind).score(item, f"They are {answers[0]}.", None)["accuracy"]
        assert found == 1 / len(answers)


def test_a_chain_of_variables_is_read_in_its_order():
    for item in Ruler(kind="tracking", lengths=(4000,), samples=4).items(Subject(None, Letters())):
        context = read(item.token_ids)
        places = [context.index(f"VAR {name} = ") for name in item.facts["answers"]]
        assert places == sorted(places)


def test_an_answer_is_what_the_model_says_through_the_cache(subject):
    task = Passkey()
    item = Item("0", torch.randint(3, VOCAB, (70,)).tolist(), 60, {"answers": ["w5"], "max_new_tokens": 12})
    expected = greedy(subject.model, item.token_ids, 60, KIVICache(COARSE), 12)
    assert task.observe(subject, item, KIVICache(COARSE)) == subject.tokenizer.decode(
        expected, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", "7"),
        ("#### -1,234.50 dollars", "-1234.5"),
        ("It costs $3, then 12.", "12"),
        ("The answer is 1,000.00", "1000"),
        ("100", "100"),
        ("no idea", None),
    ],
)
def test_final_number(answer, number):
    assert final_number(answer) == number


def test_gsm8k_shows_worked_examples_and_asks_the_rest(tmp_path):
    rows = [
        {"question": f"What is {i}+1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(5)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = GSM8K(data=str(path), shots=2, limit=2)
    items = task.items(Subject(None, Letters()))
    assert [item.facts["answers"] for item in items] == [["3"], ["4"]]
    shown, asked = read(items[1].token_ids[: items[1].prefill]), read(items[1].token_ids[items[1].prefill :])
    assert shown == "".join(f"Question: What is {i}+1?\nAnswer: It is {i + 1}.\n#### {i + 1}\n\n" for i in range(2))
    assert asked == "Question: What is 3+1?\nAnswer:"
    assert [task.score(items[1], seen, None)["exact_match"] for seen in ("#### 4", "It is 4", "5", "")] == [1, 1, 0, 0]
    path.write_text('{"question": "?", "answer": "none"}')
    with pytest.raises(ValueError, match="row 0 answers 'none'; allowed: a number"):
        task.items(Subject(None, Letters()))
    path.write_text('{"question": "?"}')
    with pytest.raises(ValueError, match=r"row 0 has \['question'\]; allowed: question and answer"):
        task.items(Subject(None, Letters()))


@pytest.fixture
def published(monkeypatch):
    """LongBench's metrics as lm_eval carries them, with stand-ins for two libraries that matter little here."""
    fuzz = ModuleType("fuzz")
    fuzz.ratio = lambda one, other: round(100 * SequenceMatcher(None, one, other).ratio())  # as without its C part
    for name, parts in (("jieba", {}), ("fuzzywuzzy", {"fuzz": fuzz})):
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("rouge") is None:
        pytest.skip("needs lm_eval and rouge")
    return importlib.import_module("lm_eval.tasks.longbench.metrics")


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("qa_f1", "qa_f1_score"),
        ("rouge_l", "rouge_score"),
        ("classification", "classification_score"),
        ("retrieval", "retrieval_score"),
        ("count", "count_score"),
        ("code_similarity", "code_sim_score"),
    ],
)
def test_longbench_metrics_are_the_published_ones(metric, name, published):
    answers = ["the Cat sat", "Paragraph 12", "12", "Sport", "x = foo(1)", "A dog. It ran home."]
    predictions = [
        *answers,
        "A cat, sat!",
        "12 or 13",
        "It is Sport or Weather",
        "Sports news",
        "# why\nx = fo(1)\n",
        "",
        "12",
        "dog ran",
    ]
    classes = ["Sport", "Sports news", "Weather", "the Cat sat"]
    scores = set()
    for answer in answers[1:2] if metric == "retrieval" else answers:
        for prediction in predictions:
            expected = getattr(published, name)(prediction, answer, all_classes=classes)
            assert METRICS[metric](prediction, answer, classes) == pytest.approx(expected), (prediction, answer)
            scores.add(expected)
    assert len(scores) > 2


def test_code_similarity_looks_at_the_line_that_longbench_looks_at():
    assert METRICS["code_similarity"]("\n\n# why\nreturn x\nreturn y", "return x", []) == 1
    assert METRICS["code_similarity"]("# why\n\nreturn x", "return x", []) == 0


def test_longbench_reads_its_own_format(tmp_path):
    rows = [{"context": "c" * 900, "input": "Who?", "answers": ["Ann", "Bob"], "all_classes": None, "_id": "x"}]
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(json.dumps(rows[0]))
    task = LongBench(dataset="hotpotqa", data=str(path), limit=5)
    (item,) = task.items(Subject(None, Letters()))
    expected = DATASETS["hotpotqa"]["prompt"].format(context="c" * 900, input="Who?")
    assert read(item.token_ids) == expected
    assert read(item.token_ids[item.prefill :]) == expected.split("c" * 900)[1]
    assert task.score(item, "It was Bob.", None) == {"qa_f1": 0.5}
    (cut,) = LongBench(dataset="hotpotqa", data=str(path), max_length=600).items(Subject(None, Letters()))
    assert read(cut.token_ids) == expected[:300] + expected[-300:]
    assert cut.prefill == len(cut.token_ids) - (len(item.token_ids) - item.prefill)
    path.write_text(json.dumps(rows[0] | {"context": "c" * 9, "input": "Who?" * 300}))
    (short,) = LongBench(dataset="repobench-p", data=str(path), max_length=600).items(Subject(None, Letters()))
    assert read(short.token_ids[: short.prefill]).endswith("c" * 9)
    path.write_text(json.dumps(rows[0] | {"answers": []}))
    with pytest.raises(ValueError, match=r"row 0: got answers \[\]; allowed: context, input and answers"):
        task.items(Subject(None, Letters()))


def test_every_longbench_dataset_has_a_metric_and_a_whole_prompt():
    assert len(DATASETS) == 16
    for dataset in DATASETS.values():
        assert dataset["metric"] in METRICS and dataset["prompt"].count("{context}") == 1


def test_tasks_by_name():
    assert parse_task("fidelity") == Fidelity()
    assert parse_task("passkey:lengths=[512,4096],depths=3") == Passkey(lengths=(512, 4096), depths=3)
    assert parse_task("ruler:kind=multikey").label == "ruler-multikey"
    assert math.isclose(Fidelity().summarize([{"nll": [2.0], "kl": [0.0], "same_top": [1]}])["perplexity"], math.e**2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed", "task: got 'speed'; allowed: fidelity, greedy"),
        ("fidelity:size=2", "task fidelity: got 'size'; allowed: data=..., sequences="),
        ("fidelity:steps", "task fidelity: got 'steps'"),
        ("fidelity:steps=0", "task fidelity: steps: got 0; allowed: a whole number from 1"),
        ("fidelity:steps=[1,2]", r"steps: got \(1, 2\); allowed: a whole number from 1"),
        ("fidelity:steps=2,steps=4", "task fidelity: steps: given twice; allowed: once"),
        ("fidelity:data={", "task fidelity: data: got '{'; allowed: a YAML value"),
        ("passkey:lengths=[1000,x]", "lengths: got .*allowed: a list of whole numbers from 100"),
        ("passkey:lengths=1024", "lengths: got 1024; allowed: a list of whole numbers from 100"),
        ("passkey:lengths=[]", r"lengths: got \(\); allowed: a list of whole numbers"),
        ("longbench:dataset={a}", "dataset: got {'a': None}; allowed: narrativeqa"),
        ("ruler:kind=maze", "kind: got 'maze'; allowed: single, multikey"),
        ("longbench:dataset=trivia", "dataset: got 'trivia'; allowed: narrativeqa"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_task(text)
