"""The best stretch of a context, against every pair of places tried one by one."""

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from lorakit.data import QuestionExample, encode_question
from lorakit.errors import UsageError
from lorakit.generate import answer_questions

CONTEXT = "the red cat sat by the blue dog under one sun and two moons, and ate"


@pytest.fixture
def pairs(tokenizer):
    """The tests' tokenizer with BERT's frame of pairs."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="</s>",
        cls_token="</s>",
        sep_token="</s>",
    )
    frame = {"single": "</s> $A </s>", "pair": "</s> $A </s> $B </s>", "special_tokens": [("</s>", 1)]}
    made.backend_tokenizer.post_processor = TemplateProcessing(**frame)
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=96, initializer_range=0.5)
    return BertForQuestionAnswering(config).eval()


def brute(model, tokenizer, example, longest, **windows):
    best, none = (float("-inf"), ""), float("inf")
    for window in encode_question(example, tokenizer, **windows):
        with torch.no_grad():
            output = model(torch.tensor([window.row.input_ids]), token_type_ids=None)
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        none = min(none, starts[window.empty] + ends[window.empty])
        for first, left in enumerate(window.offsets):
            for last, right in enumerate(window.offsets):
                if left and right and first <= last < first + longest:
                    best = max(best, (starts[first] + ends[last], example.context[left[0] : right[1]].strip()))
    return *best, none


@pytest.mark.parametrize("longest", [1, 5, 30])
@pytest.mark.parametrize("windows", [{"max_length": 40, "stride": 10}, {"max_length": 96}])
def test_the_best_stretch_of_all_windows(model, pairs, longest, windows):
    asked = [QuestionExample(text, CONTEXT[cut:], None, text, 1) for cut, text in enumerate(("who?", "where?", "y"))]
    found = answer_questions(model, pairs, asked, longest_answer=longest, batch_size=3, **windows)
    for example, answer in zip(asked, found, strict=True):
        score, text, none = brute(model, pairs, example, longest, **windows)
        assert answer.score == pytest.approx(score, abs=1e-4)
        assert answer.none_score == pytest.approx(none, abs=1e-4)
        assert answer.text == text
        assert example.context[answer.start : answer.start + len(text)] == text


def test_no_answer_is_given_by_the_threshold(model, pairs):
    asked = [QuestionExample("who?", CONTEXT, (), "a", 1)]
    (plain,) = answer_questions(model, pairs, asked)
    gap = plain.none_score - plain.score
    assert answer_questions(model, pairs, asked, allow_none=True, none_threshold=gap + 0.01)[0].text == plain.text != ""
    none = answer_questions(model, pairs, asked, allow_none=True, none_threshold=gap - 0.01)[0]
    assert (none.text, none.start) == ("", None)
    with pytest.raises(UsageError, match="at least 1"):
        answer_questions(model, pairs, asked, longest_answer=0)
