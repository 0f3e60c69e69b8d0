"""Weight files: what is read, and what is refused in one sentence."""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medsae_ray.encoders.checkpoints import read_checkpoint
from medsae_ray.errors import InputError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


class Bomb:
    """Unpickling one of these makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(". ") == 0
    assert path.name in message
    return message


def test_reads_torch_old_torch_safetensors_and_folders(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "new.bin")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "weights.safetensors", metadata={"phantoms": "3"})
    for folder, name in (("one", "pytorch_model.bin"), ("two", "model.safetensors")):
        (tmp_path / folder).mkdir()
        source = "new.bin" if name.endswith("bin") else "weights.safetensors"
        (tmp_path / folder / name).write_bytes((tmp_path / source).read_bytes())
    for name in ("new.bin", "old.bin", "weights.safetensors", "one", "two"):
        read = read_checkpoint(tmp_path / name)
        assert read.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(read.tensors[key], TENSORS[key]) for key in TENSORS)
    assert read_checkpoint(tmp_path / "weights.safetensors").metadata == {"phantoms": "3"}


def test_sha256_is_of_the_file(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    assert read_checkpoint(tmp_path / "x.bin").sha256 == hashlib.sha256(content).hexdigest()


def bomb_in_zip(bomb: Bomb, file: Path) -> None:
    torch.save({**TENSORS, "x": bomb}, file)


def bomb_in_old_format(bomb: Bomb, file: Path) -> None:
    torch.save({**TENSORS, "x": bomb}, file, _use_new_zipfile_serialization=False)


def bomb_alone(bomb: Bomb, file: Path) -> None:
    file.write_bytes(pickle.dumps(bomb, protocol=2))


@pytest.mark.parametrize("write", [bomb_in_zip, bomb_in_old_format, bomb_alone])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, write: Callable[[Bomb, Path], None]) -> None:
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "the code was run"
    write(Bomb(mark), file)
    assert "could run code" in refusal(file)
    assert not mark.exists()
    # The code in the file is live: a reader less careful runs it.
    if write is bomb_alone:
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists()


def truncated(file: Path) -> None:
    torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-200])


def truncated_old(file: Path) -> None:
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-8])


def zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pytorch_model.bin", b"")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (truncated, "not a readable checkpoint|damaged"),
        (truncated_old, "not a readable checkpoint|damaged"),
        (lambda file: file.write_bytes(b""), "not a readable checkpoint|damaged"),
        (lambda file: file.write_bytes(b"\n<!DOCTYPE html><html>404</html>"), "web page"),
        (lambda file: file.write_bytes(bytes(range(256)) * 40), "not a readable checkpoint|damaged"),
        (zipped, "unpack"),
        (lambda file: torch.save([1, 2], file), "list"),
        (lambda file: torch.save({"state_dict": TENSORS}, file), "'state_dict' is a dict"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, write: Callable[[Path], None], says: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    write(file)
    assert re.search(says, refusal(file))


def test_damaged_safetensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-4])
    assert "not a readable checkpoint" in refusal(file)


def test_missing_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    assert "do not exist" in refusal(tmp_path / "nothing.bin")
    assert "pytorch_model.bin or model.safetensors" in refusal(tmp_path)
