"""Archives: what is in them comes out, whatever happens on the way, and nothing is written elsewhere."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.progress import Progress

from tests.data.packing import pack, pack_each, tar_of, tree, zip_of
from wsolkit.data.preparing import archives
from wsolkit.data.preparing.archives import Archive
from wsolkit.errors import ConfigError, DataError

QUIET = Progress(disable=True)


def archive(file: str, unpack: Mapping[str, str], *holds: str) -> Archive:
    return Archive(file, "https://example.org", None, None, None, unpack, holds, None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three folders of five files."""
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "images" / name / f"{number} x.JPEG").write_bytes(name.encode() * (1000 + number))
    return tmp_path / "images"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("suffix", ["tar", "tgz", "tar.gz", "zip"])
def test_folder_of_an_archive_goes_to_its_place(images: Path, root: Path, suffix: str) -> None:
    pack(root / f"x.{suffix}", images, "top/images")
    given = archive(f"x.{suffix}", {"top/images": "here/below"}, "here/below/c/*.JPEG")
    assert not given.finished(root)
    given.install("x", root, QUIET)
    assert given.finished(root)
    assert tree(root / "here" / "below") == tree(images)
    assert sorted(path.name for path in root.iterdir()) == [".wsolkit", "here", f"x.{suffix}"]
    assert not list((root / ".wsolkit").iterdir())


def test_several_folders_go_to_several_places(images: Path, root: Path) -> None:
    pack(root / "x.tar", images, "x")
    archive("x.tar", {"x/a": "one", "x/b": "two/b"}).install("x", root, QUIET)
    assert sorted(path.name for path in root.iterdir()) == [".wsolkit", "one", "two", "x.tar"]
    assert tree(root / "two" / "b") == tree(images / "b")


def test_tar_of_tars_becomes_folders(images: Path, root: Path) -> None:
    pack_each(root / "x.tar", images)
    archive("x.tar", {".": "train"}, "train/a/*").install("x", root, QUIET)
    assert tree(root / "train") == tree(images)


def test_what_is_there_stays_and_files_are_replaced(images: Path, root: Path) -> None:
    pack(root / "x.tar", images)
    (root / "a").mkdir()
    (root / "a" / "own.txt").write_text("own")
    (root / "a" / "1 x.JPEG").write_text("half")
    archive("x.tar", {".": "."}).install("x", root, QUIET)
    assert tree(root) == {**tree(images), "a/own.txt": b"own"}


def test_what_mac_os_adds_is_left_out(root: Path) -> None:
    zip_of(root / "x.zip", ("a.jpg", b"1"), ("__MACOSX/._a.jpg", b"2"), ("b/._c.jpg", b"3"))
    archive("x.zip", {".": "."}).install("x", root, QUIET)
    assert tree(root) == {"a.jpg": b"1"}


HOSTILE: list[tuple[str, bytes | tuple[bytes, str], str]] = [
    ("/tmp/evil", b"x", "'/tmp/evil' is an absolute path"),
    ("a/../../evil", b"x", "'a/../../evil' leads out of the folder"),
    ("..", b"x", "'..' leads out of the folder"),
    ("C:evil", b"x", "'C:evil' is an absolute path, or one of another system"),
    ("a\\..\\evil", b"x", "is an absolute path, or one of another system"),
    ("link", (tarfile.SYMTYPE, "/etc"), "'link' is a link to '/etc'"),
    ("link", (tarfile.SYMTYPE, "a"), "'link' is a link to 'a'"),
    ("link", (tarfile.LNKTYPE, "../../secret"), "'link' is a link to '../../secret'"),
    ("device", (tarfile.CHRTYPE, ""), "'device' is a device or another special file"),
    ("pipe", (tarfile.FIFOTYPE, ""), "'pipe' is a device or another special file"),
]


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE)
def test_members_that_lead_elsewhere_are_refused(
    name: str, content: bytes | tuple[bytes, str], message: str, root: Path
) -> None:
    tar_of(root / "x.tar", ("good", b"good"), (name, content), ("link/evil", b"through the link"))
    with pytest.raises(DataError) as caught:
        archive("x.tar", {".": "."}).install("x", root, QUIET)
    assert message in str(caught.value)
    assert "'x.tar' is not unpacked: its member" in str(caught.value)
    assert tree(root) == {}
    assert not (root.parent / "evil").exists()
    assert not any(path.is_symlink() for path in root.rglob("*"))


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "a/../../evil", "C:\\evil"])
def test_zip_members_that_lead_elsewhere_are_refused(name: str, root: Path) -> None:
    zip_of(root / "x.zip", (name, b"x"))
    with pytest.raises(DataError, match=r"'x.zip' is not unpacked: its member"):
        archive("x.zip", {".": "."}).install("x", root, QUIET)
    assert not (root.parent / "evil").exists()


def test_links_in_a_zip_are_refused(root: Path) -> None:
    zip_of(root / "x.zip", ("link", b"/etc"), link=True)
    with pytest.raises(DataError, match="its member 'link' is a link or a special file"):
        archive("x.zip", {".": "."}).install("x", root, QUIET)


def test_hostile_members_of_an_inner_tar_are_refused(images: Path, root: Path) -> None:
    tar_of(images / "a" / "0 x.JPEG", ("../../evil", b"x"))
    inner = (images / "a" / "0 x.JPEG").read_bytes()
    tar_of(root / "x.tar", ("n01.tar", inner))
    with pytest.raises(DataError, match=r"'x.tar/n01.tar' is not unpacked: its member '../../evil'"):
        archive("x.tar", {".": "train"}).install("x", root, QUIET)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    path.write_text("<html>please log in</html>")


@pytest.mark.parametrize("suffix", ["tar", "tgz", "zip"])
@pytest.mark.parametrize("damage", [cut, overwrite])
def test_damaged_archives_are_named(images: Path, root: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    path = pack(root / f"x.{suffix}", images)
    damage(path)
    with pytest.raises(DataError, match=r"x\.\w+' is (damaged, or no archive|not the archive that is published)"):
        archive(path.name, {".": "."}, "c/4 x.JPEG").install("x", root, QUIET)
    assert tree(root) == {}
    pack(path, images)  # a good one in its place
    archive(path.name, {".": "."}, "c/4 x.JPEG").install("x", root, QUIET)
    assert tree(root) == tree(images)


def test_flipped_byte_in_a_zip_is_noticed(images: Path, root: Path) -> None:
    flip(pack(root / "x.zip", images))
    with pytest.raises(DataError, match=r"x.zip' is damaged, or no archive \(.*CRC"):
        archive("x.zip", {".": "."}).install("x", root, QUIET)


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_size_and_checksum_are_compared(images: Path, root: Path, algorithm: str) -> None:
    path = pack(root / "x.tar", images)
    content = path.read_bytes()
    digest = hashlib.new(algorithm, content).hexdigest()
    good = replace(archive("x.tar", {".": "."}), size=len(content), checksum=f"{algorithm}:{digest}")
    flip(path)
    message = (
        f"x.tar' is damaged: its {algorithm} is .*, {digest} as published: .*dataset.archives.images.checksum=null"
    )
    with pytest.raises(DataError, match=message):
        good.install("images", root, QUIET)
    cut(path)
    with pytest.raises(DataError, match=f"bytes, {len(content):,} as published: .*dataset.archives.images.size=null"):
        good.install("images", root, QUIET)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"dataset.archives.images.checksum=crc:12: expected sha256:… or md5:…"):
        replace(good, checksum="crc:12").install("images", root, QUIET)
    good.install("images", root, QUIET)
    assert tree(root) == tree(images)


def test_archive_of_something_else_is_named(images: Path, root: Path) -> None:
    pack(root / "x.tar", images)
    message = r"is not the archive that is published, or is cut short: d/\*.JPEG is not in it \(looked in '.'"
    with pytest.raises(DataError, match=message):
        archive("x.tar", {".": "."}, "a/*.JPEG", "d/*.JPEG").install("x", root, QUIET)
    assert tree(root) == {}


def test_plain_file_is_used_where_it_lies(root: Path) -> None:
    (root / "list.mat").write_bytes(b"list")
    given = replace(archive("list.mat", {}, "list.mat"), size=5)
    with pytest.raises(DataError, match="has 4 bytes, 5 as published"):
        given.install("list", root, QUIET)
    replace(given, size=4).install("list", root, QUIET)
    assert (root / "list.mat").read_bytes() == b"list"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_full_disk_is_named_before_it_is_full(images: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root / "x.tar", images)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 10**9 - 100 * 2**20 - 5000, 100 * 2**20 + 5000))
    with pytest.raises(DataError, match=r"'x.tar' needs [\d,]+ bytes more on the disk of .*, and 5,000 are free: make"):
        archive("x.tar", {".": "."}).install("x", root, QUIET)
    pack(root / "x.tgz", images)  # smaller than what is in it
    with pytest.raises(DataError, match=r"'x.tgz' needs 10,000 bytes more"):
        (images / "a" / "0 x.JPEG").write_bytes(b"0" * 10_000)
        archive("x.tgz", {".": "."}).install("x", root, QUIET)
        pack(root / "x.tgz", images)
        archive("x.tgz", {".": "."}).install("x", root, QUIET)


def test_bomb_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_ALWAYS_ALLOWED", 2**20)
    zip_of(root / "x.zip", *((f"{number}.jpg", bytes(2**20)) for number in range(50)))
    with pytest.raises(DataError, match="'x.zip' unpacks to more than 200 times its size"):
        archive("x.zip", {".": "."}).install("x", root, QUIET)
    assert tree(root) == {}


UNPACK = """
import sys, time
from pathlib import Path
from rich.progress import Progress
from wsolkit.data.preparing import archives

def slowly(function):
    def wrapper(*arguments, **named):
        time.sleep(0.01)
        return function(*arguments, **named)
    return wrapper

archives._write = slowly(archives._write)
archives.shutil.move = slowly(archives.shutil.move)
folders = {".": "train"}
archives.Archive(sys.argv[2], "", None, None, None, folders, ["train/c/4 x.JPEG"], None).install(
    "x", Path(sys.argv[1]), Progress(disable=True)
)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_killed_again_and_again_the_tree_is_the_same_in_the_end(images: Path, root: Path, nested: bool) -> None:
    """kill -9 at ever later moments: while files are written, and while they are moved into place."""
    (root / "train" / "a").mkdir(parents=True)  # makes the move go file by file here
    (pack_each if nested else pack)(root / "x.tar", images)
    states = set()
    for step in range(1, 200):
        child = subprocess.Popen([sys.executable, "-c", UNPACK, str(root), "x.tar"])
        stage = root / ".wsolkit" / "x.tar.unpacking"
        while child.poll() is None and not stage.exists():
            time.sleep(0.005)  # Python starts
        time.sleep(0.02 * step)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        states.add((stage / "ready").exists())
        assert all(content == tree(images)[name] for name, content in tree(root / "train").items())  # no half file
    assert child.returncode == 0
    assert states == {False, True}  # killed while it wrote, and while it moved
    assert tree(root / "train") == tree(images)
    assert not (root / ".wsolkit" / "x.tar.unpacking").exists()


def test_inner_tars_that_are_unpacked_are_not_unpacked_again(
    images: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_each(root / "x.tar", images)
    written: list[str] = []
    write = archives._write

    def stop(member: archives._Member, path: Path, where: str, limit: archives._SpaceLimit) -> None:
        written.append(where)
        if where == "x.tar/c.tar/2 x.JPEG" and written.count(where) == 1:
            raise KeyboardInterrupt
        write(member, path, where, limit)

    monkeypatch.setattr(archives, "_write", stop)
    given = archive("x.tar", {".": "train"}, "train/a/*")
    with pytest.raises(KeyboardInterrupt):
        given.install("x", root, QUIET)
    given.install("x", root, QUIET)
    assert written.count("x.tar/a.tar/0 x.JPEG") == written.count("x.tar/b.tar/4 x.JPEG") == 1
    assert written.count("x.tar/c.tar/0 x.JPEG") == 2
    assert tree(root / "train") == tree(images)


def test_another_archive_under_the_same_name_begins_anew(
    images: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_each(root / "x.tar", images)
    monkeypatch.setattr(archives, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = archive("x.tar", {".": "train"})
    with monkeypatch.context() as patch:
        patch.setattr(archives.Archive, "_check_content", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            given.install("x", root, QUIET)
    monkeypatch.undo()
    (images / "a" / "0 x.JPEG").write_bytes(b"new")
    pack_each(root / "x.tar", images)
    given.install("x", root, QUIET)
    assert (root / "train" / "a" / "0 x.JPEG").read_bytes() == b"new"
