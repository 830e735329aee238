"""Folders of images with captions (`imagefolder` of text-to-image) -> examples.

A folder with metadata.jsonl (or metadata.csv), rows {"file_name": "a.png", "text": "a red square"}, as `datasets` has it; or a
caption beside each image: a.png and a.txt. The images may lie in subfolders.
"""

from collections.abc import Sequence
from pathlib import Path

from lorakit.data.examples import CaptionedImage, Dataset, sample
from lorakit.data.image_classes import IMAGE_FOLDER
from lorakit.data.read import Row, read_rows
from lorakit.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
NAME, TEXT = "file_name", "text"
CAPTION = ".txt"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_captioned_images(source: str, *, limit: int | None = None, seed: int = 0) -> Dataset:
    """The images of a folder with their captions; each image's header is read, so that what is no image is told now.

    limit, seed: keep a drawn sample of so many images (all are checked all the same).
    Raises DataError that lists every fault with its file: an image without a caption, a caption without its image or without
    words, a row whose file is missing or outside the folder or named twice, and a file that is no image.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"expected a folder of images with {METADATA[0]} or a {CAPTION} file beside each, came "
            f"{'a file' if folder.exists() else 'nothing: there is no such folder'}",
            source=source,
        )
    faults: list[str] = []
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(metadata) > 1:
        raise DataError(f"there are both {' and '.join(METADATA)}. Keep one of them", source=source)
    pairs = _from_rows(folder, metadata[0], faults) if metadata else _from_texts(folder, faults)
    for path, _ in pairs:
        _check_image(folder, path, faults)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise DataError(
            f"{len(faults)} fault{'s' * (len(faults) > 1)} in the images and captions:{listed}", source=source
        )
    if not pairs:
        raise DataError(f"the folder has no images ({', '.join(IMAGES)}). Expected at least one", source=source)
    examples = [CaptionedImage(str(path), text, number) for number, (path, text) in enumerate(pairs, 1)]
    return Dataset(tuple(sample(examples, limit, seed)), IMAGE_FOLDER, source)


def _from_rows(folder: Path, metadata: Path, faults: list[str]) -> list[tuple[Path, str]]:
    """(file, caption) of each good row of the metadata, in its order."""

    def bad_row(error: DataError) -> None:
        faults.append(f"{metadata.name}, {error}")

    pairs: list[tuple[Path, str]] = []
    seen: dict[Path, int] = {}
    for line, row in read_rows(metadata, on_fault=bad_row):
        where = f"{metadata.name}, line {line}"
        name, text = (_text_of(row, key, where, faults) for key in (NAME, TEXT))
        if name is None or text is None:
            continue
        path, fault = _locate(folder, name)
        if fault:
            faults.append(f"{where}: {fault}")
        elif path in seen:
            faults.append(f"{where}: {name} has a caption already, in line {seen[path]}. Remove one")
        else:
            seen[path] = line
            pairs.append((path, text))
    return pairs


def _locate(folder: Path, name: str) -> tuple[Path, str | None]:
    """(file, fault) of a file's name in the metadata."""
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            return path, f"{name} lies outside the folder. Name files in it"
        return folder / path.relative_to(root), None if path.is_file() else f"there is no file {name}"
    except (OSError, ValueError) as error:  # too long a name, a NUL in it
        return folder, f"{name!r} is no file's name: {error}"


def _text_of(row: Row, key: str, where: str, faults: list[str]) -> str | None:
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if key not in row:
        faults.append(f"{where}: {key!r} is missing; the row has {', '.join(row) or 'nothing'}")
    else:
        faults.append(f"{where}: {key!r} is {'empty' if value in (None, '') or isinstance(value, str) else 'no text'}")
    return None


def _from_texts(folder: Path, faults: list[str]) -> list[tuple[Path, str]]:
    """(image, caption) of each image with a text of the same name beside it, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    images = [path for path in files if path.suffix.lower() in IMAGES]
    captions = {path for path in files if path.suffix.lower() == CAPTION}
    pairs: list[tuple[Path, str]] = []
    for path in images:
        caption = path.with_suffix(CAPTION)
        text = _read_caption(folder, caption, faults) if caption in captions else None
        if caption not in captions:
            faults.append(
                f"{path.relative_to(folder)}: no caption: expected {caption.name} beside it, or a {METADATA[0]}"
            )
        elif text is not None:
            pairs.append((path, text))
    named = {path.with_suffix(CAPTION) for path in images}
    faults += [f"{path.relative_to(folder)}: a caption without an image beside it" for path in sorted(captions - named)]
    _refuse_twins(folder, images, faults)
    return pairs


def _refuse_twins(folder: Path, images: Sequence[Path], faults: list[str]) -> None:
    """a.png and a.jpg would share a.txt: nobody can tell whose it is."""
    first: dict[Path, Path] = {}
    for path in images:
        other = first.setdefault(path.with_suffix(""), path)
        if other is not path:
            faults.append(f"{path.relative_to(folder)}: shares its caption with {other.name}. Rename one")


def _read_caption(folder: Path, path: Path, faults: list[str]) -> str | None:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{path.relative_to(folder)}: cannot be read as UTF-8 text: {error}")
        return None
    if not text:
        faults.append(f"{path.relative_to(folder)}: the caption is empty")
        return None
    return text


def _check_image(folder: Path, path: Path, faults: list[str]) -> None:
    """Note a file that is no image. A damaged body shows only when it is decoded (image_classes.open_image says so then)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # decoders of foreign bytes raise what they like
        reason = str(error).strip() or type(error).__name__
        faults.append(f"{path.relative_to(folder)}: cannot be read as an image: {reason}")


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
