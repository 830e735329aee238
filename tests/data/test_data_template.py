"""Chats: what carries loss is the assistant's turns and the tokens that end them, whatever the template."""

from itertools import groupby

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data import IGNORE, ChatExample, Dataset, Message, encode, encode_all, encode_chat, prompt_ids, prompt_text
from lorakit.data.tokens import continuing_ids
from lorakit.errors import DataError

# SmolLM2-Instruct's template: ChatML with a system prompt of its own where the chat has none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's: no generation prompt, the system's turn inside the user's first, contents stripped, roles must alternate.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Gemma's: the assistant is called model, no system role, contents trimmed, the end of a turn is not the end token.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Plain words; a generation prompt that ends in a blank, which belongs to the answer's first token.
PLAIN = (
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED = SMOLLM2.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}",
)
# Marks the contents alone, without the token that ends the turn.
MARKED_SHORT = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %}<|im_end|>",
)
# Like reasoning models: what is rendered of a turn depends on whether it is the last.
REWRITING = "{% for m in messages %}{{ m.role ~ ('!' if loop.last else '?') ~ m.content ~ '</s>' }}{% endfor %}"


def chat(*contents: str, system: str | None = None) -> ChatExample:
    roles = ["user", "assistant"] * len(contents)
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    return ChatExample((*([Message("system", system)] if system else []), *turns), 7)


TWO_TURNS = chat("What is the capital?", " Paris, é.\n", "Sure?", "Yes  ")


def loss_texts(tokenizer, ids, loss):
    """The decoded runs of tokens that carry loss."""
    runs = groupby(zip(ids, loss, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([number for number, _ in run]) for counts, run in runs if counts]


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (SMOLLM2, "<|im_end|>", [" Paris, é.\n<|im_end|>", "Yes  <|im_end|>"]),
        (LLAMA2, "</s>", [" Paris, é. </s>", " Yes </s>"]),
        (GEMMA, "</s>", ["Paris, é.<end_of_turn>", "Yes<end_of_turn>"]),
        (PLAIN, "</s>", [" Paris, é.\n\n", "Yes  \n</s>"]),
        (MARKED, "<|im_end|>", [" Paris, é.\n<|im_end|>", "Yes  <|im_end|>"]),
        (MARKED_SHORT, "<|im_end|>", [" Paris, é.\n<|im_end|>", "Yes  <|im_end|>"]),
        (MARKED_SHORT, "</s>", [" Paris, é.\n", "Yes  <|im_end|>"]),
    ],
)
def test_loss_is_on_the_assistants_turns_and_their_ends(make_tokenizer, template, eos, expected):
    tokenizer = make_tokenizer(eos_token=eos, chat_template=template)
    ids, loss = encode_chat(TWO_TURNS, tokenizer)
    assert loss_texts(tokenizer, ids, loss) == expected
    turns = [{"role": turn.role, "content": turn.content} for turn in TWO_TURNS.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(ids).removesuffix("</s>" if template == PLAIN else "") == whole.rstrip("\n") + (
        "\n" if template == PLAIN else ""
    )


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA2, GEMMA, PLAIN, MARKED])
@pytest.mark.parametrize("answer", ["Paris", " Paris", "\nParis", "1", "ééé", "Yes\n\nNo"])
def test_generation_is_given_what_stood_before_the_answer(make_tokenizer, template, answer):
    tokenizer = make_tokenizer(chat_template=template)
    example = chat("What is the capital?", answer)
    ids, loss = encode_chat(example, tokenizer)
    given = prompt_ids(example, tokenizer)
    assert ids[: len(given)] == given
    assert loss == [False] * len(given) + [True] * (len(ids) - len(given))


@pytest.mark.parametrize(
    "contents", [("a", "b"), ("Hi", "Hello, ", " so", "  é\n"), ("a", "b", "c", "d", "e", "f", "g")]
)
def test_rendering_finds_what_markers_mark(make_tokenizer, contents):
    example = chat(*contents, system="Be brief.")
    marked = encode_chat(example, make_tokenizer(chat_template=MARKED))
    assert encode_chat(example, make_tokenizer(chat_template=SMOLLM2)) == marked


def test_marked_stretches_that_end_in_a_blank_mark_nothing_behind_them(make_tokenizer):
    """transformers' own mask runs on to the end of the chat here, over the user's turn."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ids, loss = encode_chat(chat("Sure?", "Yes  ", "What?", "No"), tokenizer)
    assert loss_texts(tokenizer, ids, loss) == ["Yes  ", "No</s>"]


def test_a_system_turn_inside_the_users(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=LLAMA2)
    ids, loss = encode_chat(chat("Hi", "Yes", system="Be brief."), tokenizer)
    assert loss_texts(tokenizer, ids, loss) == [" Yes </s>"]
    assert "<<SYS>>\nBe brief." in tokenizer.decode(ids)


def test_turns_behind_the_last_answer_are_left_out(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=SMOLLM2)
    assert encode_chat(chat("a", "b", "and?"), tokenizer) == encode_chat(chat("a", "b"), tokenizer)
    assert prompt_text(chat("a", "b", "c", "d"), tokenizer).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_text(chat("a"), tokenizer).endswith("a<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (REWRITING, TWO_TURNS, "rewrites earlier turns"),
        (GEMMA, chat("a", "b", system="c"), "refuses the turns .*System role not supported"),
        (
            LLAMA2,
            ChatExample((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), 7),
            "must alternate",
        ),
        (SMOLLM2, chat("a"), "expected a chat with an assistant's turn"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", TWO_TURNS, "mark nothing"),
        ("{% broken", TWO_TURNS, "refuses the turns"),
    ],
)
def test_what_a_template_cannot_do_is_an_error_with_the_line(make_tokenizer, template, example, message):
    with pytest.raises(DataError, match=message) as caught:
        encode_chat(example, make_tokenizer(chat_template=template))
    assert caught.value.line == 7


def test_no_template_is_said_once(make_tokenizer):
    with pytest.raises(DataError, match="x: the tokenizer has no chat template"):
        encode_all(Dataset((TWO_TURNS,) * 9, "messages", "x"), make_tokenizer(), task="causal-lm", max_length=None)


def test_a_long_chat(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=SMOLLM2)
    ids, loss = encode_chat(TWO_TURNS, tokenizer)
    with pytest.raises(DataError, match=rf"line 7, field 'messages': the row has {len(ids)} tokens, the most is 9"):
        encode(TWO_TURNS, tokenizer, task="causal-lm", max_length=9)
    with pytest.raises(DataError, match="nothing is left to learn"):
        encode(TWO_TURNS, tokenizer, task="causal-lm", max_length=9, truncate=True)
    first = loss.index(True)
    cut = encode(TWO_TURNS, tokenizer, task="causal-lm", max_length=first + 1, truncate=True)
    assert (cut.input_ids, cut.labels) == (ids[: first + 1], [IGNORE] * first + [ids[first]])


def test_continuations_of_a_tokenizer_that_marks_the_start_with_a_blank():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator(["the cat yes no", "answer: yes"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    whole = tokenizer("answer:yes", add_special_tokens=False)["input_ids"]
    head = tokenizer("answer:", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(head + continuing_ids(tokenizer, "yes")) == tokenizer.decode(whole) == "answer:yes"
    assert tokenizer.decode(head + continuing_ids(tokenizer, " yes")) == "answer: yes"
