"""Answers: batched = alone, only the completion, in order, nothing of the model changed."""

import pytest
import torch

import lorakit as lk
from lorakit.data import ChatExample, Message
from lorakit.errors import DataError, UsageError
from lorakit.generate import GenerateConfig, generate
from lorakit.generate.shared import shared_beginning

PROMPTS = ["a", "SELECT name FROM t", "hello there", "x" * 40, "ab", "été ñ"]


def greedy_by_hand(model, tokenizer, prompt, steps):
    """The plain loop: the whole text through the model at each step, no cache, no padding."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = []
    decoder = torch.tensor([[0]])
    for _ in range(steps):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(input_ids=ids, decoder_input_ids=decoder).logits
            else:
                logits = model(input_ids=ids, use_cache=False).logits
        token = logits[0, -1].argmax().view(1, 1)
        if token.item() == 1:
            break
        written.append(token.item())
        ids, decoder = (
            (ids, torch.cat([decoder, token], 1))
            if model.config.is_encoder_decoder
            else (
                torch.cat([ids, token], 1),
                decoder,
            )
        )
    return tokenizer.decode(written, skip_special_tokens=True)


def test_batched_greedy_is_the_plain_loop_of_each_row(writer, tokenizer):
    config = GenerateConfig(max_new_tokens=10, batch_size=4)
    answers = generate(writer, tokenizer, PROMPTS, config)
    assert answers == [greedy_by_hand(writer, tokenizer, prompt, 10) for prompt in PROMPTS]
    assert len(set(answers)) > 1  # else the order would not be tested


def test_rows_end_at_eos_each_for_itself(llama, tokenizer):
    with torch.no_grad():
        llama.lm_head.weight[1] = llama.lm_head.weight[2:].mean(0) + 0.05  # eos is now and then the likeliest
        llama.lm_head.weight[1] *= 3
    answers = generate(llama, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=30, batch_size=6))
    assert answers == [greedy_by_hand(llama, tokenizer, prompt, 30) for prompt in PROMPTS]
    assert min(map(len, answers)) < max(map(len, answers))


def test_model_is_given_back_as_it_was(writer, tokenizer):
    writer.train()
    first = next(writer.children())
    first.eval()
    settings, before = writer.generation_config, writer.generation_config.to_dict()
    modes = [module.training for module in writer.modules()]
    state = torch.get_rng_state()
    generate(writer, tokenizer, ["a"], GenerateConfig(max_new_tokens=3, do_sample=True))
    assert [module.training for module in writer.modules()] == modes
    assert writer.generation_config is settings
    assert settings.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_model_is_given_back_after_a_failure(llama, tokenizer):
    llama.train()
    settings = llama.generation_config

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(llama, tokenizer, ["a"], GenerateConfig(max_new_tokens=2), progress=stop)
    assert llama.training
    assert llama.generation_config is settings


def test_dropout_does_not_act(llama, tokenizer):
    llama.train()
    llama.config.attention_dropout = 0.9
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.9
    config = GenerateConfig(max_new_tokens=8)
    assert generate(llama, tokenizer, ["abc"], config) == [greedy_by_hand(llama.eval(), tokenizer, "abc", 8)]


def test_the_models_own_sampling_defaults_do_not_act(llama, tokenizer):
    config = GenerateConfig(max_new_tokens=12)
    plain = generate(llama, tokenizer, PROMPTS, config)
    llama.generation_config.update(do_sample=True, temperature=9.0, top_k=200, repetition_penalty=5.0, num_beams=3)
    assert generate(llama, tokenizer, PROMPTS, config) == plain


def test_sampling_follows_the_seed(llama, tokenizer):
    config = GenerateConfig(max_new_tokens=12, do_sample=True, temperature=2.0, seed=5)
    first = generate(llama, tokenizer, PROMPTS, config)
    assert generate(llama, tokenizer, PROMPTS, config) == first
    other = GenerateConfig(max_new_tokens=12, do_sample=True, temperature=2.0, seed=6)
    assert generate(llama, tokenizer, PROMPTS, other) != first


def test_top_k_of_one_is_greedy_and_top_k_of_zero_is_not_fifty(llama, tokenizer):
    greedy = generate(llama, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=8))
    sampled = GenerateConfig(max_new_tokens=8, do_sample=True, top_k=1)
    assert generate(llama, tokenizer, PROMPTS, sampled) == greedy
    with torch.no_grad():
        llama.lm_head.weight.zero_()  # all tokens alike: with top_k=50 only 50 of the 258 could come
    drawn = GenerateConfig(max_new_tokens=60, do_sample=True, batch_size=8)
    letters = set("".join(generate(llama, tokenizer, ["a"] * 8, drawn)))
    assert len(letters) > 60


def test_batched_beams_are_each_rows_own_beams(writer, tokenizer):
    beams = generate(writer, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=6, num_beams=6, batch_size=3))
    alone = [
        generate(writer, tokenizer, [prompt], GenerateConfig(max_new_tokens=6, num_beams=6))[0] for prompt in PROMPTS
    ]
    assert beams == alone
    assert beams != generate(writer, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=6))


def test_no_repeat_ngram_size(llama, tokenizer):
    config = GenerateConfig(max_new_tokens=40, no_repeat_ngram_size=1)
    (answer,) = generate(llama, tokenizer, ["abc"], config)
    ids = tokenizer("abc" + answer)["input_ids"]
    assert len(set(ids)) == len(ids)


def test_stop_cuts_before_the_text_and_ignores_the_prompt(llama, tokenizer):
    whole = generate(llama, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=20))
    longest = max(range(len(whole)), key=lambda row: len(whole[row]))
    stop = whole[longest][4:6]
    prompts = [stop + prompt for prompt in PROMPTS]
    free = generate(llama, tokenizer, prompts, GenerateConfig(max_new_tokens=20))
    cut = generate(llama, tokenizer, prompts, GenerateConfig(max_new_tokens=20, stop=(stop, "\n\n\n")))
    assert cut == [text.split(stop)[0] for text in free]
    again = generate(llama, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=20, stop=(stop,)))
    assert again[longest] == whole[longest].split(stop)[0] != whole[longest]


def test_stop_ends_the_work_early(llama, tokenizer, monkeypatch):
    steps = []
    forward = type(llama).forward
    monkeypatch.setattr(type(llama), "forward", lambda self, *a, **k: steps.append(1) or forward(self, *a, **k))
    (whole,) = generate(llama, tokenizer, ["abc"], GenerateConfig(max_new_tokens=30))
    full, stop = len(steps), whole[:1]
    steps.clear()
    assert generate(llama, tokenizer, ["abc"], GenerateConfig(max_new_tokens=30, stop=(stop,))) == [""]
    assert len(steps) < full


def test_a_chat_goes_through_the_template(llama, tokenizer):
    chat = [{"role": "user", "content": "hi"}]
    config = GenerateConfig(max_new_tokens=8)
    text = generate(llama, tokenizer, ["<user>hi</s><a>"], config)
    assert generate(llama, tokenizer, [chat], config) == text
    example = ChatExample((Message("user", "hi"), Message("assistant", "secret")), line=1)
    assert generate(llama, tokenizer, [example], config) == text


def test_a_chat_whose_last_turn_is_the_users_is_rendered_whole(llama, tokenizer):
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    config = GenerateConfig(max_new_tokens=8)
    expected = generate(llama, tokenizer, ["<user>a</s><assistant>b</s><user>c</s><a>"], config)
    assert generate(llama, tokenizer, [chat], config) == expected


def test_progress_counts_prompts(llama, tokenizer):
    seen = []
    generate(
        llama, tokenizer, PROMPTS, GenerateConfig(max_new_tokens=1, batch_size=4), progress=lambda *at: seen.append(at)
    )
    assert seen == [(4, 6), (6, 6)]


def test_no_prompts_no_answers(llama, tokenizer):
    assert generate(llama, tokenizer, [], GenerateConfig()) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 2 is empty"),
        ([], "prompt 2 is empty"),
        ([{"role": "user"}], "'role' and 'content'"),
        (["hello"], "'role' and 'content'"),
        ("y" * 90, r"prompt 2 of 2 has 90 tokens.*96 positions"),
    ],
)
def test_a_bad_prompt_is_named(llama, tokenizer, prompt, message):
    with pytest.raises(DataError, match=message):
        generate(llama, tokenizer, ["fine", prompt], GenerateConfig(max_new_tokens=7))


def test_room_is_exact(llama, tokenizer):
    assert len(generate(llama, tokenizer, ["y" * 90], GenerateConfig(max_new_tokens=6))) == 1


def test_a_chat_without_a_template_is_an_error(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        generate(llama, tokenizer, [[{"role": "user", "content": "hi"}]], GenerateConfig())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"top_k": -1, "do_sample": True},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": float("nan"), "do_sample": True},
        {"top_p": 0.0, "do_sample": True},
        {"top_p": 1.1, "do_sample": True},
        {"temperature": 0.7},
        {"top_k": 5},
        {"length_penalty": 2.0},
        {"stop": "word"},
        {"stop": ("",)},
    ],
)
def test_settings_that_are_wrong_or_idle_are_errors(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        GenerateConfig(**changes)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_shared_beginning_goes_through_once_and_changes_no_answer(writer, tokenizer, adapted):
    if writer.config.is_encoder_decoder:
        pytest.skip("an encoder reads each prompt as a whole")
    if adapted:
        lk.attach(writer, lk.LoRA(r=2), name="a", seed=0)
        with torch.no_grad():
            for parameter in lk.parameters(writer, "a"):
                parameter.normal_(std=0.3)
    start = "CREATE TABLE album (id, title); -- the same for all "
    prompts = [start + prompt for prompt in ("a", "SELECT name", "x" * 12, "", "ab")]
    seen = []
    handle = writer.get_input_embeddings().register_forward_hook(lambda _m, args, _y: seen.append(tuple(args[0].shape)))
    answers = generate(writer, tokenizer, prompts, GenerateConfig(max_new_tokens=10, batch_size=2))
    handle.remove()
    assert answers == [greedy_by_hand(writer, tokenizer, prompt, 10) for prompt in prompts]
    assert seen[0][0] == 1
    assert seen[0][1] >= 32
    assert max(length for rows, length in seen[1:]) < seen[0][1]


def test_a_short_beginning_is_not_shared(llama, tokenizer):
    assert shared_beginning(llama, [[5, 6, 7], [5, 6, 8]], torch.device("cpu")) is None
    rows = [[5] * 40 + [6], [5] * 40 + [7, 8]]
    found = shared_beginning(llama, rows, torch.device("cpu"))
    assert found is not None
    assert len(found.ids) == 40
    assert len(shared_beginning(llama, [rows[0], rows[0]], torch.device("cpu")).ids) == 40  # a token is left to read
    lk.attach(llama, lk.LoRA(r=2), name="a")
    with lk.route(llama, ["a", None]):
        assert shared_beginning(llama, rows, torch.device("cpu")) is None
