"""Writing: whole or not at all."""

import errno
import os

import pytest

from lorakit.errors import OutputError
from lorakit.report import Report, write_report


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch, where):
    path = write_report(tmp_path / "report.html", Report("Old"))
    before = path.read_bytes()
    monkeypatch.setattr(os, where, full_disk)
    with pytest.raises(OutputError, match=r"no space left on the disk while writing .*report\.html"):
        write_report(path, Report("New"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_replaces_the_old_one_and_makes_folders(tmp_path):
    path = tmp_path / "runs" / "demo" / "report.html"
    assert write_report(str(path), Report("Old")) == path
    write_report(path, Report("New"))
    assert "New" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_file_where_a_folder_should_be_is_an_output_error(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "runs" / "report.html", Report("t"))


def test_a_folder_where_the_report_should_be_is_an_output_error(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_report(tmp_path / "report.html", Report("t"))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_without_the_right_to_write_is_an_output_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(OutputError, match="Permission denied"):
            write_report(tmp_path / "report.html", Report("t"))
    finally:
        tmp_path.chmod(0o700)


def test_a_report_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "other").write_text("x")
    path = write_report(tmp_path / "report.html", Report("t"))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
