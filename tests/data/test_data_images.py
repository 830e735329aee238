"""Folders of captioned images: both layouts, and every fault told with its file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lorakit.data.images import load_captioned_images
from lorakit.errors import DataError


def picture(path: Path, colour="red", size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def metadata(folder: Path, *rows) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def found(folder, **options):
    dataset = load_captioned_images(str(folder), **options)
    return [(Path(one.path).relative_to(folder).as_posix(), one.text, one.line) for one in dataset.examples]


def faults(folder) -> str:
    with pytest.raises(DataError) as caught:
        load_captioned_images(str(folder))
    assert caught.value.source == str(folder)
    return str(caught.value)


def test_metadata_in_its_order_with_subfolders(tmp_path):
    for name in ("b.png", "deep/a.jpg", "never.png"):
        picture(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "deep/a.jpg", "text": " ein Ödland \n", "more": 1},
        {"file_name": "./b.png", "text": "b"},
    )
    assert found(tmp_path) == [("deep/a.jpg", "ein Ödland", 1), ("b.png", "b", 2)]


def test_csv_metadata(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"red, plain"\n')
    assert found(tmp_path) == [("a.png", "red, plain", 1)]


def test_a_caption_beside_each_image(tmp_path):
    for name, text in (("b.png", "second\n"), ("a.JPG", "\ufefffirst"), ("sub/c.webp", "third")):
        picture(tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    picture(tmp_path / ".hidden" / "x.png")
    (tmp_path / "notes.md").write_text("not ours")
    assert found(tmp_path) == [("a.JPG", "first", 1), ("b.png", "second", 2), ("sub/c.webp", "third", 3)]


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    for number in range(9):
        picture(tmp_path / f"{number}.png").with_suffix(".txt").write_text(str(number))
    drawn = found(tmp_path, limit=4, seed=3)
    assert len(drawn) == 4
    assert drawn == found(tmp_path, limit=4, seed=3) != found(tmp_path, limit=4, seed=4)


def test_every_fault_of_the_metadata_is_listed(tmp_path):
    picture(tmp_path / "in" / "good.png")
    picture(tmp_path / "outside.png")
    (tmp_path / "in" / "text.png").write_text("no image")
    cut = picture(tmp_path / "in" / "cut.png", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:50])
    metadata(
        tmp_path / "in",
        {"file_name": "good.png", "text": "fine"},
        {"file_name": "good.png", "text": "again"},
        {"file_name": "../outside.png", "text": "elsewhere"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "text.png", "text": "a text"},
        {"file_name": "cut.png", "text": "half"},
        {"file_name": "a\0b.png", "text": "NUL"},
        {"file_name": "x" * 5000 + ".png", "text": "long"},
        {"text": "nameless"},
        {"file_name": "good.png", "text": "  "},
        {"file_name": "good.png", "text": 7},
        "{torn",
        [1],
    )
    told = faults(tmp_path / "in")
    assert "12 faults" in told
    for part in (
        "line 2: good.png has a caption already, in line 1",
        "line 3: ../outside.png lies outside the folder",
        "line 4: there is no file gone.png",
        "text.png: cannot be read as an image",
        "cut.png: cannot be read as an image",
        "line 7: 'a\\x00b.png' is no file's name",
        "line 9: 'file_name' is missing",
        "line 10: 'text' is empty",
        "line 11: 'text' is no text",
        "line 12: it is not JSON",
        "line 13: expected a JSON object",
    ):
        assert part in told, part


def test_every_fault_of_captions_beside_images_is_listed(tmp_path):
    picture(tmp_path / "bare.png")
    picture(tmp_path / "blank.png").with_suffix(".txt").write_text(" \n")
    picture(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    picture(tmp_path / "twin.png").with_suffix(".txt").write_text("whose")
    picture(tmp_path / "twin.jpg")
    (tmp_path / "alone.txt").write_text("no image here")
    told = faults(tmp_path)
    assert "5 faults" in told
    for part in (
        "bare.png: no caption: expected bare.txt beside it",
        "blank.txt: the caption is empty",
        "latin.txt: cannot be read as UTF-8",
        "twin.png: shares its caption with twin.jpg",
        "alone.txt: a caption without an image",
    ):
        assert part in told, part


def test_a_folder_that_is_none_or_empty(tmp_path):
    assert "no such folder" in faults(tmp_path / "gone")
    assert "came a file" in faults(picture(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    assert "no images" in faults(tmp_path / "empty")
    metadata(tmp_path / "empty", "")
    assert "no images" in faults(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.csv").write_text("file_name,text\n")
    assert "Keep one" in faults(tmp_path / "empty")
