"""`sample`: the same text for the same seed, from a checkpoint or from a weights file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_res.cli import main
from flash_attn_res.cli.sample import generate, load_model
from test_train import train_tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("sample"), "--steps", "3")


def sample(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["sample", *arguments]) == 0
    return capsys.readouterr().out


def test_seed_decides(run: Path, capsys: Capture) -> None:
    arguments = (str(run), "--prompt", "def ", "--length", "40")
    text = sample(capsys, *arguments, "--seed", "3")
    assert text.startswith("def ")
    assert text == sample(capsys, *arguments, "--seed", "3")
    assert text != sample(capsys, *arguments, "--seed", "4")


@pytest.mark.parametrize("variant", ["plain", "block", "full"])
def test_checkpoint_and_weights_agree(variant: str, run: Path, capsys: Capture) -> None:
    arguments = ("--length", "30", "--top-k", "20")
    text = sample(capsys, str(run), "--variant", variant, *arguments)
    assert text == sample(capsys, str(run / f"{variant}.safetensors"), *arguments)
    path = str(run / "checkpoint.safetensors")
    assert text == sample(capsys, path, "--variant", variant, *arguments)


def test_temperature_zero_takes_the_likeliest(run: Path) -> None:
    model = load_model(run)
    greedy = list(generate(model, b"x = ", length=30, temperature=0))
    assert greedy == list(generate(model, b"x = ", length=30, temperature=0, seed=9))
    assert greedy == list(generate(model, b"x = ", length=30, temperature=1.5, top_k=1))


def test_lengths_and_prompts(run: Path, capsys: Capture) -> None:
    model = load_model(run)
    # Beyond the sequence length, and a prompt that is longer than it.
    assert len(list(generate(model, b"", length=40))) == 40
    assert len(list(generate(model, b"abc" * 30, length=3))) == 3
    assert sample(capsys, str(run), "--prompt", "naïve ✓", "--length", "0") == "naïve ✓\n"


def test_reader_that_goes_away(run: Path) -> None:
    """`flash-attn-res sample ... | head -c 1` ends quietly."""
    command = [sys.executable, "-m", "flash_attn_res.cli", "sample", str(run), "--length", "3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=60)
    assert errors == b""
    assert process.returncode == 141
