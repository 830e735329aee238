"""Data: rows of files and hub sets -> examples -> token ids with loss masks -> batches."""

from lorakit.data.batch import BatchOrder, collate
from lorakit.data.config import Columns, DataConfig
from lorakit.data.encode import IGNORE, Encoded, encode, encode_all, prompt_ids, prompt_text
from lorakit.data.examples import (
    ChatExample,
    Dataset,
    ImageExample,
    LabelExample,
    Message,
    PromptExample,
    QuestionExample,
    group_references,
    references_of,
    sample,
)
from lorakit.data.formats import FORMATS
from lorakit.data.image_classes import collate_images, load_class_folders
from lorakit.data.load import load_examples
from lorakit.data.read import read_rows
from lorakit.data.summary import DataSummary, describe
from lorakit.data.template import encode_chat
from lorakit.data.wikisql import LogicalForm, parse_sql
from lorakit.data.windows import Window, encode_question, encode_questions

__all__ = [
    "FORMATS",
    "IGNORE",
    "BatchOrder",
    "ChatExample",
    "Columns",
    "DataConfig",
    "DataSummary",
    "Dataset",
    "Encoded",
    "ImageExample",
    "LabelExample",
    "LogicalForm",
    "Message",
    "PromptExample",
    "QuestionExample",
    "Window",
    "collate",
    "collate_images",
    "describe",
    "encode",
    "encode_all",
    "encode_chat",
    "encode_question",
    "encode_questions",
    "group_references",
    "load_class_folders",
    "load_examples",
    "parse_sql",
    "prompt_ids",
    "prompt_text",
    "read_rows",
    "references_of",
    "sample",
]
