"""examples/cpp/decoder: a program in C++ that runs what was trained in PyTorch.

Its logits are PyTorch's, to the rounding of float32 sums or of bfloat16 values, and its text is
that of `flash-attn-res sample --temperature 0`.
"""

from __future__ import annotations

import fcntl
import json
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flash_attn_res.cli import main
from flash_attn_res.cli.data import BOUNDARY
from flash_attn_res.cli.sample import load_model
from test_train import train_tiny

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def decoder() -> Path:
    """The program, built by the project's own build: nothing to do where that is up to date."""
    build = ROOT / "build" / "cpu"
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "decoder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes want the same
        for command in (
            ["cmake", "--preset", "cpu", "--log-level=WARNING"],
            ["cmake", "--build", "--preset", "cpu", "--target", "decoder"],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build / "examples" / "cpp" / "decoder" / "decoder"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("decoder"), "--steps", "30", "--layers", "3")


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(
        tmp_path_factory.mktemp("half"), "--steps", "30", "--layers", "3", "--dtype", "bfloat16"
    )


def call(decoder: Path, *arguments: object) -> bytes:
    done = subprocess.run([decoder, *map(str, arguments)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def logits_of(decoder: Path, file: Path, prompt: bytes) -> Tensor:
    lines = call(decoder, file, "--logits", "--prompt", prompt.decode()).decode().splitlines()
    return torch.tensor([[float(word) for word in line.split()] for line in lines])


@pytest.mark.parametrize("prompt", [b"", b"def ", b"def f3_7(x):\n    ret"])
@pytest.mark.parametrize("variant", ["plain", "block", "full"])
def test_logits(variant: str, prompt: bytes, decoder: Path, run: Path) -> None:
    file = run / f"{variant}.safetensors"
    model = load_model(file)
    tokens = torch.tensor([list((BOUNDARY + prompt)[-model.config.seq_len :])])
    with torch.no_grad():
        want = model(tokens)[0]
        exact = model.double()
        exact.compute_dtype = torch.float64
        # Its rotary angles stay float32 angles, as everywhere.
        error = (want - exact(tokens)[0]).abs().max().item()
    got = logits_of(decoder, file, prompt)
    assert got.shape == want.shape
    # Both are float32 computations that sum in different orders.
    assert (got - want).abs().max().item() <= 4 * error + 1e-5 * want.abs().max().item()


@pytest.mark.parametrize("variant", ["plain", "block", "full"])
def test_logits_in_bfloat16(variant: str, decoder: Path, half_run: Path) -> None:
    file = half_run / f"{variant}.safetensors"
    model = load_model(file)
    assert model.config.dtype == "bfloat16"
    prompt = b"def f3_7("
    tokens = torch.tensor([list(BOUNDARY + prompt)])
    with torch.no_grad():
        half = model(tokens)[0].float()
        model.compute_dtype = torch.float32
        exact = model(tokens)[0]
    got = logits_of(decoder, file, prompt)
    error = (half - exact).norm().item()
    assert 0 < (got - exact).norm().item() <= 1.5 * error
    assert (got == got.bfloat16().float()).all()


@pytest.mark.parametrize("prompt", ["", "def f1", "naïve ✓ " * 9])
@pytest.mark.parametrize("variant", ["plain", "block", "full"])
def test_text(variant: str, prompt: str, decoder: Path, run: Path, capsys: Capture) -> None:
    """Longer than the window of the cache, from a checkpoint and from a weights file."""
    options = ("--prompt", prompt, "--length", "120")
    capsys.readouterr()
    sample = ["sample", str(run), "--variant", variant, "--temperature", "0", *options]
    assert main(sample) == 0
    want = capsys.readouterr().out
    for file in (
        (run / f"{variant}.safetensors",),
        (run / "checkpoint.safetensors", "--variant", variant),
    ):
        assert call(decoder, *file, *options).decode(errors="replace") == want


def header_of(data: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def test_hostile_files(decoder: Path, run: Path, tmp_path: Path) -> None:
    good = (run / "block.safetensors").read_bytes()
    header, tensors = header_of(good)

    def changed(name: str, **values: object) -> bytes:
        return with_header({**header, name: {**header[name], **values}}, tensors)

    def without(name: str) -> bytes:
        return with_header({k: v for k, v in header.items() if k != name}, tensors)

    def configured(**values: object) -> bytes:
        state = json.loads(str(header["__metadata__"]["state"]))
        state["model"].update(values)
        return changed("__metadata__", state=json.dumps(state))

    span = header["embedding"]["data_offsets"]
    cases = {
        "empty": (b"", "too short"),
        "long header": (struct.pack("<Q", 1 << 62) + good[8:], "truncated, or no safetensors"),
        "cut in the header": (good[:100], "truncated, or no safetensors"),
        "cut": (good[:-1000], "truncated"),
        "no json": (struct.pack("<Q", 4) + b"{{{{", "damaged"),
        "a list": (with_header([1], b""), "damaged"),
        "no metadata": (without("__metadata__"), "damaged"),
        "offsets outside": (changed("embedding", data_offsets=[0, 1 << 60]), "lies outside"),
        "offsets reversed": (changed("embedding", data_offsets=[span[1], span[0]]), "outside"),
        "negative offsets": (changed("embedding", data_offsets=[-8, 0]), "outside"),
        "huge shape": (changed("embedding", shape=[1 << 62, 1 << 62]), "a tensor of shape"),
        "negative shape": (changed("embedding", shape=[-1, -1]), "a tensor of shape"),
        "other dtype": (changed("embedding", dtype="F64"), "no float32 tensor"),
        "missing": (without("head.weight"), "has no tensor head.weight"),
        "other width": (configured(dim=64), "has shape"),
        "no heads": (configured(heads=0), "its configuration has heads 0"),
        "odd heads": (configured(heads=7), "does not split"),
        "words": (configured(layers="many"), "damaged"),
        "other variant": (configured(variant="deep"), "its variant is deep"),
    }
    for name, (content, words) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        done = subprocess.run([decoder, file, "--length", "1"], capture_output=True, text=True)
        assert done.returncode == 1, (name, done)
        assert done.stdout == "", name
        assert str(file) in done.stderr, (name, done.stderr)
        assert words in done.stderr, (name, done.stderr)


def test_options(decoder: Path, run: Path) -> None:
    file = run / "block.safetensors"
    for arguments, words in (
        ((), "usage: decoder FILE"),
        ((file, file), "unexpected argument"),
        ((file, "--length"), "--length needs a value"),
        ((file, "--length", "-3"), "--length must be a number of at least 0, not '-3'"),
        ((file, "--speed", "3"), "unknown option --speed"),
        ((file, "--device", "tpu"), "--device must be cpu or cuda, not tpu"),
        ((file, "--variant", "plain"), "holds the variant block, not plain"),
        ((run / "nothing",), "cannot be read"),
        ((run / "checkpoint.safetensors", "--variant", "deep"), "holds no variant deep"),
    ):
        done = subprocess.run([decoder, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert words in done.stderr, (arguments, done.stderr)
