"""A small byte-level tokenizer, trained here, and writers of little files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[CLS]", "[SEP]"]
TEXTS = [
    "The Vaults pub near Café Adriatic has a 5 star rating. system user assistant model",
    "What is the capital of France? It is Paris, of course.\n\nThank you! Yes No maybe",
] * 20

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(post=.., **tokenizer arguments): a fresh tokenizer; `post` is a post-processing template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    trained = core.to_str()

    def make(post: str | None = None, pair: str | None = None, **arguments: Any) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_str(trained)
        if post is not None:
            ids = [(token, tokenizer.token_to_id(token)) for token in SPECIALS if token in post]
            tokenizer.post_processor = processors.TemplateProcessing(single=post, pair=pair, special_tokens=ids)
        given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | arguments
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            additional_special_tokens=SPECIALS[3:7],
            clean_up_tokenization_spaces=False,
            **given,
        )

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """jsonl(row, row, .., name="x.jsonl"): the path of a file with these rows."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content): the path of a file with this content."""

    def put(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) is not here")
    return folder
