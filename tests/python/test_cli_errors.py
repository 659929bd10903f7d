"""Every bad input of the commands: one clear line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_attn_res import __version__
from flash_attn_res.cli import main
from test_train import TINY, text_folder, train_tiny

Capture = pytest.CaptureFixture[str]


def error_of(capsys: Capture, *arguments: str) -> str:
    """Runs the command in this process and returns its one line of complaint."""
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("flash-attn-res: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dim", "30", "--heads", "4"], ["--dim 30", "--heads 4", "divisible"]),
        (["--dim", "12", "--heads", "4"], ["--dim / --heads = 3", "even"]),
        (["--steps", "-1"], ["--steps", "-1"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--layers", "0"], ["--layers", "0"]),
        (["--dim", "-8"], ["--dim", "-8"]),
        (["--heads", "0"], ["--heads", "0"]),
        (["--block-size", "0"], ["--block-size", "0"]),
        (["--seq-len", "0"], ["--seq-len", "0"]),
        (["--batch", "-3"], ["--batch", "-3"]),
        (["--val-every", "0"], ["--val-every", "0"]),
        (["--checkpoint-every", "-5"], ["--checkpoint-every", "-5"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--lr", "-0.1"], ["--lr", "-0.1"]),
        (["--lr", "much"], ["--lr", "much"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--threads", "-2"], ["--threads", "-2"]),
        (["--threads", "100000"], ["--threads", "at most", "not 100000"]),
        (["--variants", "plain,blocks"], ["--variants", "blocks", "plain, block, full"]),
        (["--variants", ""], ["--variants"]),
        (["--variants", "plain,plain"], ["--variants", "twice"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (["--name", "a/b"], ["--name", "a/b"]),
        (["--name", ""], ["--name"]),
        (["--layers", "300", "--variants", "full"], ["--layers 300", "601 sources"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--resume"], ["checkpoint.safetensors", "no such file"]),
        (["--colour", "red"], ["--colour"]),
        (["--text"], ["--text"]),
    ],
)
def test_train_option_errors(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    message = error_of(capsys, "train", "--quick", "--out", str(tmp_path), *arguments)
    for word in words:
        assert word in message


def test_no_command(capsys: Capture) -> None:
    assert "command" in error_of(capsys)
    assert "paint" in error_of(capsys, "paint")


def _missing(folder: Path) -> Path:
    return folder / "nothing.txt"


def _empty(folder: Path) -> Path:
    (folder / "empty.txt").touch()
    return folder / "empty.txt"


def _short(folder: Path) -> Path:
    (folder / "short.txt").write_text("too short")
    return folder / "short.txt"


def _empty_folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    return folder / "inner"


def _binary_folder(folder: Path) -> Path:
    (folder / "inner").mkdir()
    (folder / "inner" / "picture").write_bytes(b"\x89\0\1" * 100)
    return folder / "inner"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_missing, "does not exist"),
        (_empty, "is empty"),
        (_short, "too short"),
        (_empty_folder, "no text"),
        (_binary_folder, "no text"),
    ],
)
def test_text_errors(
    make: Callable[[Path], Path], word: str, tmp_path: Path, capsys: Capture
) -> None:
    path = make(tmp_path)
    message = error_of(
        capsys, "train", "--quick", "--out", str(tmp_path / "out"), "--text", str(path)
    )
    assert "--text" in message
    assert word in message


def test_unwritable_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    text = str(text_folder(tmp_path))
    message = error_of(
        capsys, "train", *TINY, "--text", text, "--out", str(tmp_path / "file" / "out")
    )
    assert "--out" in message
    assert str(tmp_path / "file" / "out") in message
    message = error_of(capsys, "train", *TINY, "--text", text, "--out", "/proc/runs")
    assert "/proc/runs" in message


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that is mounted so: permissions, which root ignores anyway, say nothing."""

    def refuse(*given: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["train", *TINY, "--out", "place"], "--out"),
        (["inspect", "nothing.py:make", "--out", "place"], "--out"),
        (["bench", "step", "--quick", "--device", "cpu", "--out", "place"], "--out"),
        (["accuracy", "--quick", "--out", "place/a.json"], "--out"),
        (["curves", "--out", "place/a.json"], "--out"),
        (["curves", "--out", "a.json", "--plot", "place/a.png"], "--plot"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_output_is_tried_before_the_work(
    command: list[str],
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("place").mkdir()
    if "--plot" in command:  # the first file is tried in another folder
        make = tempfile.NamedTemporaryFile

        def in_place(**options: Any) -> Any:
            if str(options["dir"]) == "place":
                raise OSError(28, "No space left on device")
            return make(**options)

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", in_place)
    else:
        read_only(monkeypatch)
    text = ["--text", str(text_folder(tmp_path))] if command[0] == "train" else []
    message = error_of(capsys, *command, *text)
    assert f"{flag}: cannot write to place" in message
    assert "Read-only file system" in message or "No space left" in message


def test_a_file_where_a_folder_is_and_the_other_way(tmp_path: Path, capsys: Capture) -> None:
    for command in (["accuracy", "--quick"], ["curves"]):
        assert "is a folder" in error_of(capsys, *command, "--out", str(tmp_path))
        missing = str(tmp_path / "none" / "a.json")
        assert "does not exist" in error_of(capsys, *command, "--out", missing)


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from flash_attn_res.cli import loop

    place = ("--out", str(tmp_path / "runs"), "--text", str(text_folder(tmp_path)))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ):

        def fail(*given: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(loop, "training_step", fail)
        assert main(["train", *TINY, *place, "--overwrite"]) == 1
        message = capsys.readouterr().err
        assert message.startswith(
            "flash-attn-res: error: out of memory with --batch 4 --seq-len 16"
        )
        assert message.count("\n") == 1


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"flash-attn-res {__version__}\n"


def test_help_of_bench_lists_what_the_suites_know(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for name in ("step --shape", "narrow", "oneshot_norm_bwd", "k3_site", "fla (Gluon)"):
        assert name in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished run; copy it before damaging it."""
    return train_tiny(tmp_path_factory.mktemp("finished"), "--variants", "plain", "--steps", "2")


def test_damaged_checkpoints(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "runs" / finished.name
    shutil.copytree(finished, run)
    path = run / "checkpoint.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    resume = ("train", "--resume", "--out", str(run.parent), "--name", run.name)
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        assert f"{path}: damaged" in error_of(capsys, *resume)
        assert f"{path}: damaged" in error_of(capsys, "sample", str(run))
    path.write_bytes((run / "plain.safetensors").read_bytes())
    assert "weights only" in error_of(capsys, *resume)


def test_foreign_safetensors(tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    assert str(path) in error_of(capsys, "sample", str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "3"], ["--layers 2", "not 3"]),
        (["--steps", "9"], ["--steps 2", "not 9"]),
        (["--lr", "0.5"], ["--lr", "not 0.5"]),
        (["--variants", "block"], ["--variants plain", "not block"]),
        (["--quick"], ["--layers 2", "not 3"]),
    ],
)
def test_checkpoint_of_other_options(
    arguments: list[str], words: list[str], finished: Path, capsys: Capture
) -> None:
    message = error_of(
        capsys,
        *("train", "--resume", "--out", str(finished.parent), "--name", finished.name),
        *arguments,
    )
    for word in words:
        assert word in message


def test_checkpoint_of_other_text(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for index in range(3):
        (other / f"{index}.txt").write_text("something else entirely, " * 100)
    place = ("--out", str(finished.parent), "--name", finished.name)
    message = error_of(capsys, "train", "--resume", *place, "--text", str(other))
    assert "--text" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "-1"], ["--length", "-1"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--top-k", "-1"], ["--top-k", "-1"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--threads", "-1"], ["--threads", "-1"]),
        (["--variant", "full"], ["--variant full", "plain"]),
        (["--device", "abacus"], ["--device", "abacus"]),
    ],
)
def test_sample_option_errors(
    arguments: list[str], words: list[str], finished: Path, capsys: Capture
) -> None:
    for path in (finished, finished / "plain.safetensors"):
        message = error_of(capsys, "sample", str(path), *arguments)
        for word in words:
            assert word in message


def test_sample_missing_file(tmp_path: Path, capsys: Capture) -> None:
    assert "nothing" in error_of(capsys, "sample", str(tmp_path / "nothing"))


def test_process_exit_code() -> None:
    """The installed entry point and `python -m` hand the exit code on."""
    result = subprocess.run(
        [sys.executable, "-m", "flash_attn_res.cli", "train", "--lr", "nan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Said at once and with the remedy, not after training."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    out = tmp_path / "out"
    for command in (
        ["train", *TINY, "--out", str(out)],
        ["inspect", "model.py:make", "--out", str(out)],
        ["curves", "--out", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")],
        ["report", "--results", str(tmp_path)],
    ):
        message = error_of(capsys, *command)
        assert "the package matplotlib is missing" in message
        assert "pip install matplotlib numpy rich safetensors" in message
    assert not out.exists()
