"""Small archives in the form of the official ones, and hostile ones."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def pack(path: Path, folder: Path, inside: str = ".") -> Path:
    """Pack what is in a folder, under the name `inside`: tar, tgz or zip by the name of the archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, f"{inside}/{file.relative_to(folder)}")
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".tgz", ".gz") else "w") as tar:
        tar.add(folder, inside)
    return path


def pack_each(path: Path, folder: Path) -> Path:
    """A tar with a tar for each folder in a folder, as ILSVRC's training images come."""
    with tarfile.open(path, "w") as outer:
        for inner in sorted(folder.iterdir()):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as tar:
                for image in sorted(inner.iterdir()):
                    tar.add(image, image.name)
            info = tarfile.TarInfo(f"{inner.name}.tar")
            info.size = file.tell()
            file.seek(0)
            outer.addfile(info, file)
    return path


def tar_of(path: Path, *members: tuple[str, bytes | tuple[bytes, str]]) -> Path:
    """A tar of members: name and content, or the kind and target of a link or device."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, *members: tuple[str, bytes], link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFLNK if link else stat.S_IFREG) << 16
            archive.writestr(info, content)
    return path


def tree(root: Path) -> Mapping[str, bytes]:
    """Contents of all files below a folder, without hidden folders and archives."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.suffix not in (".tar", ".tgz", ".gz", ".zip")
    }
