"""The packaged models themselves."""

import pytest
import torch

from lorakit import models

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def smollm():
    return models.load("smollm2-135m-instruct")


def test_smollm_answers_a_question(smollm):
    tokenizer = smollm.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = smollm.model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


def test_smollms_tokenizer(smollm):
    tokenizer = smollm.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.bos_token) == ("<|im_end|>", 2, "<|im_start|>")
    for text in ("SELECT name FROM t WHERE age >= 1234;", "  two  blanks\n\n\ttab", "é ü 日本 😀"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_token_id not in ids
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]


def test_counts_are_as_listed(smollm):
    listed = {info.name: info.parameters for info in models.list_models()}
    minilm = models.load("minilm-l6", task="feature-extraction")
    assert sum(parameter.numel() for parameter in smollm.model.parameters()) == listed["smollm2-135m-instruct"]
    assert sum(parameter.numel() for parameter in minilm.model.parameters()) == listed["minilm-l6"]


def test_minilm_knows_which_sentences_are_alike():
    loaded = models.load("minilm-l6", task="feature-extraction")
    texts = ["A man is eating food.", "Somebody has a meal.", "The stock market fell."]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = loaded.model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.4 > 0.2 > alike[0, 2]
