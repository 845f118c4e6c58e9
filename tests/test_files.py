import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from sae.errors import UserError
from sae.files import atomic_write, make_folder, read_json, sha256_file, write_json
from sae.tensor_files import load_tensors, save_tensors

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_holds_the_bytes_and_nothing_is_left_beside_it(tmp_path):
    atomic_write(tmp_path / "deep" / "a.bin", b"one")
    atomic_write(tmp_path / "deep" / "a.bin", lambda path: path.write_bytes(b"two"))
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"two"
    assert names(tmp_path / "deep") == ["a.bin"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    atomic_write(tmp_path / "a.bin", b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        atomic_write(tmp_path / "a.bin", fail)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_reader_at_any_moment_sees_the_old_file_or_the_new_one(tmp_path):
    seen = []
    atomic_write(tmp_path / "a.bin", b"old")

    def slow(path):
        path.write_bytes(b"ne")
        seen.append((tmp_path / "a.bin").read_bytes())
        path.write_bytes(b"new")

    atomic_write(tmp_path / "a.bin", slow)
    assert seen == [b"old"]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_files_get_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_an_error_that_names_the_file(tmp_path, code):
    def refuse(path):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"a\.bin") as caught:
        atomic_write(tmp_path / "a.bin", refuse)
    assert os.strerror(code) in str(caught.value)
    assert names(tmp_path) == []


def test_an_error_that_no_user_can_put_right_stays_what_it_is(tmp_path):
    def break_(path):
        raise OSError(errno.EIO, "I/O error")

    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "a.bin", break_)
    assert not isinstance(caught.value, UserError)


def test_a_file_where_a_folder_must_be_and_a_folder_where_a_file_must_be(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (lambda: make_folder(tmp_path / "file"), lambda: atomic_write(tmp_path / "file" / "a", b"")):
        with pytest.raises(UserError, match="file"):
            act()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="folder"):
        atomic_write(tmp_path / "folder", b"")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(
    not AS_ROOT or sys.platform != "linux", reason="mounting a small disk needs root on Linux"
)
@pytest.mark.parametrize("kind", ["bytes", "tensors"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        atomic_write(disk / "small", b"fits")
        with pytest.raises(UserError, match="No space left"):
            if kind == "bytes":
                atomic_write(disk / "large", bytes(2**20))
            else:
                save_tensors(disk / "large", {"a": torch.zeros(2**18)})
        assert names(disk) == ["small"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_json_comes_back_as_it_went_in(tmp_path):
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_torn_json_file_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_a_json_file_that_is_missing_or_is_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_tensors_come_back_bit_for_bit_with_their_dtypes(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "b": torch.randn(4).bfloat16(), "c": torch.arange(3)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"format": "x"})
    back = load_tensors(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_tensors_that_share_memory_are_saved_each_on_its_own(tmp_path):
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "t.safetensors", {"whole": whole, "same": whole, "part": whole[2:4]})
    back = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["same"], whole)
    assert torch.equal(back["part"], whole[2:4])


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_torn_tensor_file_is_named(tmp_path, cut):
    save_tensors(tmp_path / "whole", {"a": torch.zeros(100)})
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:cut])
    with pytest.raises(UserError, match="torn"):
        load_tensors(tmp_path / "torn")
    with pytest.raises(UserError, match="absent"):
        load_tensors(tmp_path / "absent")


def test_the_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
