from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError


def broken() -> Iterator[bytes]:
    yield b"new"
    raise KeyboardInterrupt


def test_writes_one_piece_or_several(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(str(path), [b"tw", b"o"])
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError) as caught:
        atomic_write(path, b"new")
    assert str(caught.value) == (
        f"cannot write {path} (No space left on device); "
        "choose a folder that exists, may be written to and has room"
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interruption_while_the_data_is_made_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, broken())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        atomic_write(tmp_path / "missing" / "file", b"new")
    assert not os.listdir(tmp_path)


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    for path in (os.devnull, str(tmp_path)):
        with pytest.raises(InputError) as caught:
            atomic_write(path, b"new")
        assert str(caught.value) == (
            f"cannot write {path}: it is not a regular file; choose another name"
        )


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
