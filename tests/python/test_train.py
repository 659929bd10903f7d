"""Training: falling loss, the zero-query identity, resume to the bit, Ctrl-C, what a run leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from flash_attn_res.cli import analysis, checkpoint, data, figures, loop, main, measure
from flash_attn_res.cli.bench import plots
from flash_attn_res.cli.model import (
    DTYPES,
    KeyValueCache,
    LanguageModel,
    ModelConfig,
    Probe,
    loss_of,
)
from flash_attn_res.cli.options import VARIANTS
from flash_attn_res.cli.train import Run

TINY = (
    *("--layers", "2", "--dim", "16", "--heads", "2", "--block-size", "2", "--seq-len", "16"),
    *("--batch", "4", "--steps", "6", "--val-every", "2", "--checkpoint-every", "2"),
    *("--threads", "1", "--device", "cpu"),
)


def text_folder(folder: Path) -> Path:
    """Twelve small files of different content; made anew unless it is there."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for index in range(12):
            words = [
                f"def f{index}_{line}(x):\n    return x + {line * index}" for line in range(40)
            ]
            (text / f"{index}.py").write_text("\n".join(words))
    return text


def train_tiny(folder: Path, *arguments: str, memory: bool = False, pictures: bool = False) -> Path:
    """Trains in this process and returns the folder of the run.

    Measuring memory takes a process for each variant, and pictures take seconds: on request only.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not memory:
            patch.setattr(measure, "measure", lambda *_, **__: None)
        if not pictures:
            patch.setattr(figures, "draw_all", lambda *_, **__: [])
        code = main(
            [
                *("train", *TINY, "--text", str(text_folder(folder))),
                *("--out", str(folder / "runs"), "--name", "tiny", *arguments),
            ]
        )
    assert code == 0
    return folder / "runs" / "tiny"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(variant: str, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "variant": variant,
        "layers": 3,
        "dim": 32,
        "heads": 2,
        "block_size": 4,
        "seq_len": 32,
    }
    return ModelConfig(**(values | changes))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all three variants."""
    return train_tiny(tmp_path_factory.mktemp("run"), memory=True, pictures=True)


# Models


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_falls(variant: str) -> None:
    model = LanguageModel(config_of(variant))
    optimizer = loop.make_optimizer(model)
    text = data.standard_library_files()[0].path.read_bytes() * 4
    bytes_ = torch.frombuffer(bytearray(text[:4096]), dtype=torch.uint8)
    losses = []
    for step in range(50):
        inputs, targets = data.training_batch(bytes_, seed=0, step=step, batch=8, seq_len=32)
        lr = loop.learning_rate(step, peak=1e-2, steps=50, warmup=5)
        losses.append(loop.training_step(model, optimizer, inputs, targets, lr))
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 2
    if variant != "plain":
        assert model.residual.queries.abs().max() > 0


@pytest.mark.parametrize("variant", ["block", "full"])
def test_zero_queries_equal_the_plain_model(variant: str) -> None:
    tokens = random_tokens(4, 33)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain, other = LanguageModel(config_of("plain")), LanguageModel(config_of(variant))
    common = plain.state_dict()
    for name, tensor in other.state_dict().items():
        assert name.startswith("residual.") or torch.equal(tensor, common[name])
    expected, loss = (loss_of(model(inputs), targets) for model in (plain, other))
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(other(inputs), plain(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_model_equals_the_whole_sequence(variant: str, dtype: str) -> None:
    model = LanguageModel(config_of(variant, dtype=dtype))
    if variant != "plain":
        torch.nn.init.normal_(model.residual.queries, std=0.3)
    tokens = random_tokens(1, 20)
    cache = KeyValueCache(window=32)
    with torch.no_grad():
        whole = model(tokens).float()
        parts = [model(tokens[:, :7], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(7, 20)]
    tolerance = 1e-4 if dtype == "float32" else 0.15
    torch.testing.assert_close(
        torch.cat(parts, 1).float(), whole, rtol=tolerance, atol=tolerance * whole.abs().max()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_causal(variant: str) -> None:
    model = LanguageModel(config_of(variant))
    tokens = random_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 15] += 1
    with torch.no_grad():
        difference = (model(tokens) - model(changed % 256)).abs().amax(-1)[0]
    assert torch.all(difference[:15] == 0)
    assert torch.all(difference[15:] > 0)


def test_weight_decay_spares_all_but_matrices() -> None:
    model = LanguageModel(config_of("block"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, spared = loop.make_optimizer(model).param_groups
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert {names[id(w)] for w in spared["params"]} >= {
        "embedding",
        "final_norm",
        "residual.queries",
        "residual.key_weight",
    }
    assert len(decayed["params"]) == 4 * 3 + 1
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_learning_rate() -> None:
    rates = [loop.learning_rate(step, peak=2.0, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert loop.learning_rate(0, peak=1.0, steps=1, warmup=1) == 1.0


# Analysis


def test_depth_profile() -> None:
    tokens = random_tokens(2, 33)
    batches = [(tokens[:, :-1], tokens[:, 1:])]
    for variant in VARIANTS:
        model = LanguageModel(config_of(variant))
        profile = analysis.depth_profile(model, batches)
        assert len(profile.outputs) == len(profile.carried) == len(profile.gradients) == 6
        assert all(value > 0 for value in profile.outputs + profile.carried + profile.gradients)
        block_size = {"plain": 0, "block": 4, "full": 1}[variant]
        if not block_size:
            assert profile.attention == []
            continue
        # Zero queries: uniform over embedding, finished blocks and, within a block, its sum.
        for site, row in enumerate(profile.attention):
            count = 1 + -(-site // block_size)
            assert row == pytest.approx([1 / count] * count, abs=1e-5)
        if variant == "full":
            assert profile.carried == pytest.approx(profile.outputs)


def test_depth_profile_sums_within_blocks() -> None:
    tokens = random_tokens(2, 33)
    model = LanguageModel(config_of("block"))
    probe = Probe()
    model(tokens[:, :-1], probe=probe)
    profile = analysis.depth_profile(model, [(tokens[:, :-1], tokens[:, 1:])])
    first, second = sum(probe.outputs[:4]), sum(probe.outputs[4:6])
    for value, total in ((profile.carried[3], first), (profile.carried[5], second)):
        assert value == pytest.approx(total.square().mean(-1).sqrt().mean().item(), rel=1e-5)


# Text


def test_split_is_deterministic_and_by_file(tmp_path: Path) -> None:
    folder = text_folder(tmp_path)
    corpus = data.load_corpus([str(folder)], 16)
    again = data.load_corpus([str(folder)], 16)
    moved = data.load_corpus([str(folder.rename(tmp_path / "elsewhere"))], 16)
    assert corpus.digest == again.digest == moved.digest
    assert corpus.validation_files
    assert not set(corpus.validation_files) & set(corpus.train_files)
    assert len(corpus.validation_files) + len(corpus.train_files) == 12
    share = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.02 < share < 0.12


def test_single_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 251)) * 4)
    corpus = data.load_corpus([str(path)], 16)
    whole = b"\0" + path.read_bytes()
    assert bytes(corpus.train.tolist() + corpus.validation.tolist()) == whole
    assert corpus.validation_files == ()
    assert len(corpus.validation) == len(whole) // 10


def test_default_text_is_the_standard_library() -> None:
    corpus = data.load_corpus([], 128)
    assert corpus.digest == data.load_corpus([], 128).digest
    assert 2**20 < len(corpus.train) < data.DEFAULT_TEXT_LIMIT
    assert len(corpus.validation) > 2**16
    assert not any("site-packages" in name for name in corpus.train_files)


def test_batches_depend_on_seed_and_step_alone() -> None:
    text = torch.arange(200, dtype=torch.uint8)

    def batch(seed: int, step: int) -> torch.Tensor:
        inputs, targets = data.training_batch(text, seed=seed, step=step, batch=3, seq_len=8)
        assert inputs.shape == targets.shape == (3, 8)
        assert torch.equal(inputs + 1, targets)
        return inputs

    assert torch.equal(batch(0, 5), batch(0, 5))
    assert not torch.equal(batch(0, 5), batch(0, 6))
    assert not torch.equal(batch(0, 5), batch(1, 5))
    # The shortest text that is admitted has one window.
    inputs, _ = data.training_batch(text[:9], seed=0, step=0, batch=2, seq_len=8)
    assert torch.equal(inputs[0], text[:8].long())


def test_validation_windows_do_not_overlap() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    batches = data.validation_batches(text, windows=5, batch=2, seq_len=8)
    assert [len(inputs) for inputs, _ in batches] == [2, 2, 1]
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert torch.all(starts.diff() >= 8)


# Runs


def test_run_leaves_everything(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoint.safetensors",
        "summary.json",
        "loss.png",
        "depth_attention.png",
        "magnitude.png",
        "plain.safetensors",
        "block.safetensors",
        "full.safetensors",
    }


def test_summary(run: Path) -> None:
    def refuse(value: str) -> None:
        raise AssertionError(f"{value} is no JSON")

    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary["options"]["steps"] == 6
    assert summary["text"]["trained_bytes"] == 6 * 4 * 16
    assert summary["machine"]["torch"] == torch.__version__
    assert list(summary["variants"]) == list(VARIANTS)
    counts = {name: entry["parameters"] for name, entry in summary["variants"].items()}
    # A query and a key weight for each of 4 sublayers and the output.
    assert counts["block"] == counts["full"] == counts["plain"] + 2 * 5 * 16
    for name, entry in summary["variants"].items():
        assert len(entry["train_loss"]) == len(entry["step_seconds"]) == 6
        assert [step for step, _ in entry["validation"]] == [0, 2, 4, 6]
        assert entry["validation_loss"] == entry["validation"][-1][1]
        assert entry["validation_bits_per_byte"] == pytest.approx(
            entry["validation_loss"] / math.log(2)
        )
        assert entry["timing"]["step_ms"] > 0
        assert entry["timing"]["ratio_to_plain"] > 0
        assert 0 < entry["memory"]["baseline_bytes"] < entry["memory"]["peak_bytes"]
        attention = entry["depth"]["attention"]
        assert len(attention) == (0 if name == "plain" else 5)
        for row in attention:
            assert sum(row) == pytest.approx(1, abs=1e-4)
    start = [entry["validation"][0][1] for entry in summary["variants"].values()]
    assert start == pytest.approx([start[0]] * 3, rel=1e-5)


def test_figures_are_pictures(run: Path) -> None:
    for name in ("loss.png", "depth_attention.png", "magnitude.png"):
        pixels = imread(run / name)[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert pixels.std() > 0.05
        colors = (pixels * 255).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        assert len(np.unique(colors)) > 100


@pytest.mark.parametrize("variants", ["plain", "full", "block,plain"])
def test_figures_of_some_variants(variants: str, tmp_path: Path) -> None:
    folder = train_tiny(tmp_path, "--variants", variants, "--steps", "1", pictures=True)
    assert (folder / "loss.png").exists()
    assert (folder / "magnitude.png").exists()
    assert (folder / "depth_attention.png").exists() == (variants != "plain")


def test_report_draws_the_depths_of_the_demo(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (picture,) = plots.demo_pictures(summary | {"file": "demo.json"})
    path = tmp_path / f"{picture.name}.png"
    picture.save(path)
    assert picture.name == "depth_attention"
    assert picture.is_at(path)
    summary["variants"]["block"]["timing"]["step_ms"] += 1  # which it does not show
    (same,) = plots.demo_pictures(summary)
    assert same.is_at(path)
    summary["variants"]["block"]["depth"]["attention"][1][0] += 0.1
    (other,) = plots.demo_pictures(summary)
    assert not other.is_at(path)
    del summary["variants"]["block"]["depth"]
    with pytest.raises(KeyError, match="depth"):
        plots.demo_pictures(summary)


def test_a_run_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    folder = train_tiny(tmp_path, "--steps", "2")
    (folder / "depth_attention.png").touch()
    (folder / "notes.txt").touch()
    train_tiny(tmp_path, "--steps", "2", "--variants", "plain")
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint.safetensors", "plain.safetensors", "summary.json", "notes.txt"}


def test_text_above_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot leads the names of what is hidden, not of what the user named."""
    text = text_folder(tmp_path)
    (text / ".hidden").mkdir()
    (text / ".hidden" / "file").write_text("not this")
    (tmp_path / ".here").mkdir()
    monkeypatch.chdir(tmp_path / ".here")
    for name in ("../text", str(text.parent / ".here" / ".." / "text")):
        assert len(data.named_files([name])) == 12


def test_weights_files_hold_the_checkpoints_models(run: Path) -> None:
    _, everything, state = checkpoint.read(run / "checkpoint.safetensors")
    assert state["step"] == 6
    for variant in VARIANTS:
        kind, tensors, own = checkpoint.read(run / f"{variant}.safetensors")
        assert kind == checkpoint.WEIGHTS
        model = LanguageModel(ModelConfig.from_dict(own["model"]))
        model.load_state_dict(tensors)
        stored = checkpoint.select(everything, f"{variant}/model/")
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensors[name]) for name in stored)


def test_resume_is_bit_for_bit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run stopped after each of its first rounds equals the run that was not stopped."""
    train_round = Run.train_round

    def interrupted_round(self: Run) -> Any:
        result = train_round(self)
        signal.raise_signal(signal.SIGINT)
        return result

    folder = tmp_path / "runs" / "tiny"
    text = str(run.parents[1] / "text")
    arguments = ["train", "--out", str(folder.parent), "--name", "tiny"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_round", interrupted_round)
        assert main([*arguments, *TINY, "--text", text]) == 130
        output = capsys.readouterr().out
        assert "Stopped after step 1 of 6" in output
        assert "--resume" in output
        assert main([*arguments, "--resume", "--threads", "1"]) == 130
    # An unfinished run is not thrown away by accident.
    assert main([*arguments, *TINY, "--text", text]) == 2
    assert "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr(measure, "measure", lambda *_, **__: None)
    monkeypatch.setattr(figures, "draw_all", lambda *_, **__: [])
    assert main([*arguments, "--resume", "--threads", "1"]) == 0
    # What could not be measured is null.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["variants"]["full"]["memory"] is None

    _, expected, expected_state = checkpoint.read(run / "checkpoint.safetensors")
    _, tensors, state = checkpoint.read(folder / "checkpoint.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    for variant in VARIANTS:
        for curve in ("train_loss", "validation"):
            assert state["curves"][variant][curve] == expected_state["curves"][variant][curve]


def test_ctrl_c_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    text = text_folder(tmp_path)
    place = ("--out", str(tmp_path / "runs"), "--name", "long")
    command = [sys.executable, "-m", "flash_attn_res.cli", "train"]
    process = subprocess.Popen(
        [*command, *TINY, *place, "--steps", "100000", "--text", str(text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        path = tmp_path / "runs" / "long" / "checkpoint.safetensors"
        deadline = time.monotonic() + 40
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors == ""
    assert f"flash-attn-res train --name long --out {tmp_path / 'runs'} --resume" in output
    kind, _, state = checkpoint.read(path)
    assert kind == checkpoint.CHECKPOINT
    assert f"Stopped after step {state['step']} of 100000" in output
    assert list(path.parent.glob(".*")) == []
    assert main(["sample", str(path), "--length", "5"]) == 0


def test_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "training_step", lambda *_, **__: math.nan)
    place = ("--out", str(tmp_path / "runs"), "--text", str(text_folder(tmp_path)))
    assert main(["train", *TINY, *place]) == 1
    assert "--lr" in capsys.readouterr().err


def test_bfloat16_run(tmp_path: Path) -> None:
    folder = train_tiny(tmp_path, "--dtype", "bfloat16", "--steps", "2")
    summary = json.loads((folder / "summary.json").read_text())
    for entry in summary["variants"].values():
        assert math.isfinite(entry["validation_loss"])
    _, tensors, _ = checkpoint.read(folder / "block.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(Exception, match="No space left on device"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
