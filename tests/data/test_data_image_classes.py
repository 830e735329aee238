"""Folders of images with a subfolder a class: what is read, in which order, and every way in which it is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from lorakit.data import ImageExample, collate_images, load_class_folders, load_examples
from lorakit.data.image_classes import open_image
from lorakit.errors import DataError


class Plain:
    """A processor that does nothing: what reaches the model is what was opened."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.stack([torch.from_numpy(numpy.array(image)) for image in images])}


@pytest.fixture
def put(tmp_path):
    """put("cats/a.png", mode="RGB", ..): writes a small image; put("cats/a.txt", b"..") any other file."""

    def write(name, content=None, mode="RGB", size=(5, 4), colour=None, **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        else:
            Image.new(mode, size, colour or 0).save(path, **options)
        return str(path)

    return write


def test_classes_are_the_sorted_folders_and_files_keep_their_order(put, tmp_path):
    for name in (
        "dogs/b.png",
        "dogs/a.JPG",
        "cats/deep/er/c.bmp",
        "cats/z.webp",
        ".hidden/x.png",
        "cats/.DS_Store.png",
    ):
        put(name)
    put("cats/Thumbs.db", b"litter")
    put("readme.md", b"beside the classes")
    data = load_examples(str(tmp_path))
    assert (data.format, data.label_names, data.regression) == ("imagefolder", ["cats", "dogs"], False)
    told = [(Path(one.path).relative_to(tmp_path).as_posix(), one.label, one.line) for one in data.examples]
    assert told == [("cats/deep/er/c.bmp", 0, 1), ("cats/z.webp", 0, 2), ("dogs/a.JPG", 1, 3), ("dogs/b.png", 1, 4)]
    assert load_examples(str(tmp_path), format="ImageFolder").examples == data.examples
    assert len(load_examples(str(tmp_path), limit=2, seed=3)) == 2


def test_a_root_may_hold_the_splits(put, tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "valid/b/3.png"):
        put(name)
    train = load_class_folders(str(tmp_path))
    assert [Path(one.path).name for one in train.examples] == ["1.png", "2.png"]
    valid = load_class_folders(str(tmp_path), split="eval", label_names=train.label_names)
    assert [(Path(one.path).name, one.label) for one in valid.examples] == [("3.png", 1)]  # the training set's number
    with pytest.raises(DataError, match="expected a subfolder test or testing, came train, valid"):
        load_class_folders(str(tmp_path), split="test")


def test_a_class_may_be_called_train(put, tmp_path):
    put("train/1.png")
    put("plane/2.png")
    assert load_class_folders(str(tmp_path), split="eval").label_names == ["plane", "train"]


def test_what_is_wrong_is_listed_with_the_file(put, tmp_path):
    put("cats/ok.png")
    put("cats/notes.txt", b"words")
    put("cats/empty.png", b"")
    put("dogs/text.jpg", b"this is no image at all")
    (tmp_path / "birds").mkdir()
    with pytest.raises(DataError) as raised:
        load_class_folders(str(tmp_path))
    said = str(raised.value)
    assert "4 bad rows" in said
    assert str(tmp_path) in said
    for part in (
        "cats/notes.txt is no image",
        "cats/empty.png cannot be read",
        "dogs/text.jpg cannot",
        "'birds' holds no",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("names", "known", "said"),
    [
        ([], None, "expected a subfolder of images for each class, came no subfolder"),
        (["cats/a.png"], None, "one class alone, 'cats'"),
        (["cats/a.png", "cows/a.png"], ["cats", "dogs"], r"training set's classes \(cats, dogs\), came 'cows'"),
    ],
)
def test_classes_that_do_not_do(names, known, said, put, tmp_path):
    for name in names:
        put(name)
    with pytest.raises(DataError, match=said):
        load_class_folders(str(tmp_path), label_names=known)


@pytest.mark.parametrize("source", ["nowhere", "google/some-set"])
def test_what_is_no_folder(source):
    with pytest.raises(DataError, match="came no folder"):
        load_examples(source, format="imagefolder")


def test_a_folder_with_rows_is_not_taken_for_images(put, tmp_path):
    put("pictures/a.png")
    put("pictures2/a.png")
    put("train.jsonl", b'{"prompt": "a", "completion": "b"}\n')
    assert load_examples(str(tmp_path)).format == "prompt-completion"


@pytest.mark.parametrize(("mode", "colour", "seen"), [("L", 7, (7, 7, 7)), ("1", 1, (255,) * 3), ("P", 0, (0, 0, 0))])
def test_every_mode_becomes_three_colours(mode, colour, seen, put):
    image = open_image(put("a.png", mode=mode, colour=colour))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == seen


def test_a_photograph_is_turned_upright(put):
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to see it"
    assert open_image(put("a.jpg", size=(5, 4), exif=turned)).size == (4, 5)


def test_more_than_eight_bits_are_refused_not_cut_off(put):
    with pytest.raises(DataError, match="more than 8 bits"):
        open_image(put("a.png", mode="I;16"))


def test_a_damaged_image_is_named_when_it_is_read(put, tmp_path):
    whole = Path(put("a.png", size=(64, 64), colour=(9, 9, 9))).read_bytes()
    cut = put("cut.png", whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.png"):
        collate_images([ImageExample(cut, 0, 1)], Plain())


def test_a_batch_holds_pixels_and_labels(put):
    red, blue = put("r.png", colour=(255, 0, 0)), put("b.png", colour=(0, 0, 255))
    batch = collate_images([ImageExample(red, 2, 1), ImageExample(blue, 0, 2)], Plain())
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["pixel_values"][:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert "labels" not in collate_images([ImageExample(red, None, 1)], Plain())
    with pytest.raises(DataError, match="cannot make one batch"):
        collate_images([ImageExample(red, 0, 1), ImageExample(put("w.png", size=(9, 9)), 0, 2)], Plain())
