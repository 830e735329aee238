"""Folders of images, one subfolder a class (`imagefolder`) -> examples -> batches of pixels.

root/cats/a.png, root/dogs/b.jpg: the first folder below the root names the class, whatever lies deeper belongs to it. A root
may hold the splits instead: root/train/cats/a.png, root/val/cats/c.png.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.data.examples import Dataset, ImageExample, sample
from lorakit.data.faults import Faults
from lorakit.data.hub import SPLIT_NAMES
from lorakit.data.read import SUFFIXES
from lorakit.errors import DataError

IMAGE_FOLDER = "imagefolder"
IMAGE_CLASSIFICATION = "image-classification"
_LITTER = frozenset({"thumbs.db", "desktop.ini"})
"""What systems leave in folders of images, beside hidden files: passed over."""


def is_class_folder(source: str) -> bool:
    """Whether `source` is a folder whose subfolders hold images, and which holds no file of rows itself."""
    root = Path(source).expanduser()
    if not root.is_dir() or any(path.suffix.lower() in SUFFIXES for path in root.iterdir()):
        return False
    known = _suffixes()
    return any(path.suffix.lower() in known for folder in _folders(root) for path in _files(folder))


def load_class_folders(
    source: str,
    *,
    split: str = "train",
    label_names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The images of a folder with a subfolder a class; their headers are read, so that what is no image is told now.

    split: train, eval or test; chooses among the folders of a root that holds splits. label_names: the training set's,
    when this is not it; None takes the subfolders' names, sorted. limit, seed: keep a drawn sample of so many images.
    Raises DataError for a folder without classes or with a single one, an empty class, a class that `label_names` does not
    have, and files that are no images (up to five in one message).
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError("expected a folder with a subfolder of images for each class, came no folder", source=source)
    place = _split(root, split, source)
    classes = {folder.name: folder for folder in _folders(place)}
    names = _names(classes, label_names, str(place))
    faults, examples = Faults(str(place)), []
    for name, folder in classes.items():
        files = list(_files(folder))
        for path in files:
            try:
                _check(path, place)
            except DataError as error:
                faults.add(error)
            else:
                examples.append(ImageExample(str(path), names.index(name), len(examples) + 1))
        if not files:
            faults.add(DataError(f"the folder {name!r} holds no image. Fill it or remove it"))
    faults.close()
    return Dataset(tuple(sample(examples, limit, seed)), IMAGE_FOLDER, str(place), names)


def open_image(path: str | Path) -> Any:
    """The image of a file as PIL has it: upright (EXIF), three colours of 8 bits; of an animation the first picture.

    Raises DataError that names the file where it is damaged, no image, or of more than 8 bits a channel (PIL would cut
    its values off, not scale them).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"it has more than 8 bits a channel (PIL's mode {image.mode}). Convert it to 8 bits",
                    source=str(path),
                )
            upright: Any = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders of foreign bytes raise what they like
        raise _unreadable(error, str(path)) from error


def collate_images(examples: Sequence[ImageExample], processor: Any) -> dict[str, Tensor]:
    """One batch, as the model's own image processor resizes and normalises it.

    Returns pixel_values (batch, channels, height, width) and, where every image has one, labels (batch,) of class ids.
    Raises DataError for a damaged image, and where the processor gives images of unlike sizes.
    """
    images = [open_image(example.path) for example in examples]
    try:
        pixels: Any = processor(images=images, return_tensors="pt")["pixel_values"]
    except (ValueError, RuntimeError) as error:
        reason = f"the model's image processor cannot make one batch of these images: {error}"
        raise DataError(reason, source=examples[0].path) from error
    batch: dict[str, Tensor] = {"pixel_values": pixels}
    labels = [example.label for example in examples if example.label is not None]
    if len(labels) == len(examples):
        batch["labels"] = torch.tensor(labels)
    return batch


def _suffixes() -> frozenset[str]:
    """The endings of files that PIL can open."""
    from PIL import Image

    return frozenset(
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind != "PDF"
    )


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    """The files of a class, in an order that is the same everywhere; hidden ones and what systems leave are not its."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name.lower() not in _LITTER:
            yield path


def _split(root: Path, split: str, source: str) -> Path:
    """The folder of a split, or the root itself where its subfolders are no splits."""
    if split not in SPLIT_NAMES:
        raise DataError(f"expected one of {', '.join(SPLIT_NAMES)}, came {split!r}", source=source, field="split")
    known = {name for names in SPLIT_NAMES.values() for name in names}
    # A class may be called "train" (the vehicle): only a folder of folders is a split.
    splits = {folder.name: folder for folder in _folders(root) if folder.name in known and _folders(folder)}
    if not splits:
        return root
    found = next((splits[name] for name in SPLIT_NAMES[split] if name in splits), None)
    if found is None:
        wanted = " or ".join(SPLIT_NAMES[split])
        raise DataError(
            f"expected a subfolder {wanted}, came {', '.join(splits)}. Name the folder of the split itself",
            source=source,
        )
    return found


def _names(classes: dict[str, Path], known: Sequence[str] | None, source: str) -> list[str]:
    if not classes:
        raise DataError("expected a subfolder of images for each class, came no subfolder", source=source)
    if known is None:
        if len(classes) < 2:
            raise DataError(
                f"there is one class alone, {next(iter(classes))!r}; at least two are needed to tell apart. "
                "Name the folder above the classes",
                source=source,
            )
        return list(classes)
    if strange := [name for name in classes if name not in known]:
        raise DataError(
            f"expected subfolders called as the training set's classes ({', '.join(list(known)[:10])}"
            f"{', ...' if len(known) > 10 else ''}), came {', '.join(map(repr, strange[:5]))}",
            source=source,
        )
    return list(known)


def _check(path: Path, place: Path) -> None:
    """Raise DataError unless the file's header is an image's; its pixels are read when their batch is made."""
    from PIL import Image

    where = str(path.relative_to(place))
    if path.suffix.lower() not in _suffixes():
        raise DataError(f"{where} is no image that can be read (by its ending). Convert or remove it")
    try:
        with Image.open(path):
            pass
    except Exception as error:  # as in open_image
        raise _unreadable(error, where) from error


def _unreadable(error: Exception, source: str) -> DataError:
    reason = str(error).strip() or type(error).__name__
    return DataError(f"{source} cannot be read as an image: {reason}. Replace or remove it")
