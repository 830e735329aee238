import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """One id a character: 0 pads, 1 ends. Whatever ids a random model writes, the text tells them apart."""
    letters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0xC0, 0xC0 + 160))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *letters])}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(params=["llama", "gpt2", "t5"])
def writer(request):
    """A tiny random model that writes, fp32, 96 positions (T5: no limit)."""
    return make_writer(request.param)


@pytest.fixture
def llama():
    return make_writer("llama")


@pytest.fixture
def t5():
    return make_writer("t5")


def make_writer(kind):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            initializer_range=0.3,
            **ids,
        )
        return LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3, **ids)
        ).eval()
    config = T5Config(
        vocab_size=258,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=2.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(params=["bert", "roberta"])
def classifier(request):
    return make_classifier(request.param)


@pytest.fixture
def regressor():
    return make_classifier("bert", num_labels=1, problem_type="regression")


def make_classifier(kind, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "type_vocab_size": 1 if kind == "roberta" else 2,
        "pad_token_id": 0,
        "num_labels": 3,
        "initializer_range": 0.3,
    } | changes
    if kind == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(**sizes)).eval()
    return BertForSequenceClassification(BertConfig(**sizes)).eval()
