"""Whole runs of a tiny model: resuming, accumulation, averaging, stops."""

from __future__ import annotations

import csv
import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.checkpoints.weights import (
    AVERAGE_KEY,
    load_into,
    read_checkpoint,
    read_weights,
)
from bevperception.config import ExperimentConfig
from bevperception.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, SampleError
from bevperception.structures import Batch
from bevperception.training.announce import run_line
from bevperception.training.checkpointing import check_resumable, list_checkpoints
from bevperception.training.run import train
from tests.training.standin import TinyModel, TinyScenes, TinySource, no_evaluation, tiny_config


def run(
    out: Path, config: ExperimentConfig, source: Any = None, resume: str | None = None, dropout: float = 0.0
) -> dict[str, Any]:
    torch.manual_seed(config.training.seed)
    model = TinyModel(dropout=dropout)
    return train(config, model, source or TinySource(), no_evaluation, out, resume)


def logged(out: Path, name: str, version: int = 0) -> list[float]:
    with (out / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def logged_losses(out: Path, version: int = 0) -> list[float]:
    return logged(out, "train/loss", version)


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)
        elif isinstance(value, dict):
            assert_same(value, other[name], tolerance)


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, stop: int, accumulate: int) -> None:
    # 7 samples, so steps 2 and 5 lie within an epoch; drop-out on, so random draws count too.
    settings = {"steps": 8, "ema_decay": 0.9, "accumulate": accumulate, "checkpoint_every": stop}
    config = tiny_config(**settings)
    source = TinySource(history=1)
    run(tmp_path / "whole", config, source, dropout=0.3)
    first = tmp_path / "whole" / "checkpoints" / f"step-{stop:08d}.ckpt"
    run(tmp_path / "rest", config, source, str(first), dropout=0.3)
    last = "checkpoints/step-00000008.ckpt"
    whole, rest = (read_checkpoint(tmp_path / part / last) for part in ("whole", "rest"))
    for key in ("state_dict", AVERAGE_KEY):
        assert_same(whole[key], rest[key], tolerance=1e-6)
    assert_same(whole["optimizer_states"][0]["state"], rest["optimizer_states"][0]["state"], 1e-6)
    assert whole["lr_schedulers"] == rest["lr_schedulers"]
    assert whole["global_step"] == rest["global_step"] == 8
    assert logged_losses(tmp_path / "whole")[stop:] == pytest.approx(logged_losses(tmp_path / "rest"))


@pytest.mark.parametrize("streams", [False, True])
def test_a_run_lengthened_twice_equals_a_long_one(tmp_path: Path, streams: bool) -> None:
    """With a rate that is constant after the warm-up the schedule's length changes nothing at all."""
    settings = {"ema_decay": 0.9, "final_rate_factor": 1.0, "checkpoint_every": 2, "accumulate": 2}
    settings |= {"stream_length": 3, "stream_turns": 2} if streams else {}
    source = TinyScenes(scene_lengths=(4, 3)) if streams else TinySource(history=1)
    run(tmp_path / "whole", tiny_config(steps=12, **settings), source, dropout=0.3)
    for steps in (4, 8):
        run(tmp_path / "part", tiny_config(steps=steps, **settings), source, "auto", dropout=0.3)
        assert read_weights(tmp_path / "part").card.step == steps
    (tmp_path / "part" / "checkpoints" / "step-00000008.ckpt").unlink()  # as if cut off while it went on
    run(tmp_path / "part", tiny_config(steps=12, **settings), source, "auto", dropout=0.3)
    whole, part = (
        read_checkpoint(tmp_path / name / "checkpoints/step-00000012.ckpt") for name in ("whole", "part")
    )
    for key in ("state_dict", AVERAGE_KEY):
        assert_same(whole[key], part[key])
    assert_same(whole["optimizer_states"][0]["state"], part["optimizer_states"][0]["state"])
    assert whole["lr_schedulers"] == part["lr_schedulers"]
    assert whole["global_step"] == part["global_step"] == 12


@pytest.mark.parametrize(("first", "then"), [(4, 9), (9, 6)])
def test_from_a_change_of_steps_on_rates_are_those_of_a_run_of_so_many(
    tmp_path: Path, first: int, then: int
) -> None:
    """Also at the very first step, whose rate the checkpoint has from the schedule before."""
    for steps in (first, then):
        run(tmp_path / str(steps), tiny_config(steps=steps, checkpoint_every=4))
    for path in list_checkpoints(tmp_path / str(first) / "checkpoints")[1:]:
        path.unlink()  # as if it had been cut off after step 4
    run(tmp_path / str(first), tiny_config(steps=then, checkpoint_every=4), resume="auto")
    wanted = logged(tmp_path / str(then), "train/learning_rate")
    assert len(wanted) == then
    assert logged(tmp_path / str(first), "train/learning_rate", 1) == wanted[4:]


def test_fewer_steps_than_taken_are_refused(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(steps=4))
    with pytest.raises(ConfigError, match=r"with training\.steps 3: it has taken 4 already\n.*4 or more"):
        run(tmp_path, tiny_config(steps=3), resume="auto")
    assert run(tmp_path, tiny_config(steps=4), resume="auto") == {}


def test_the_first_step_and_the_run_are_announced_and_no_hint_of_lightning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(steps=4, log_every=50, batch_size=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, config)
        run(tmp_path, tiny_config(steps=6, log_every=50, batch_size=3), resume="auto")
    assert [str(warning.message) for warning in caught] == []
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0].startswith("7 samples; 0.00 M parameters that learn; on cpu in 32-true, 1 process")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/4", "4/4", "5/6", "6/6"]
    assert run_line(config, tmp_path) == (
        "training internimage_micro for 4 steps of 3 samples on train of data/nuscenes (v1.0-trainval); "
        f"results go to {tmp_path}"
    )


def test_half_precision_of_gpus_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.precision 16-mixed needs a GPU"):
        run(tmp_path, tiny_config(precision="16-mixed"))


def test_resume_auto_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    config = tiny_config(steps=6, checkpoint_every=2, ema_decay=0.5)
    run(tmp_path / "whole", config)
    run(tmp_path / "torn", config, resume="auto")  # nothing there: starts afresh
    newest = list_checkpoints(tmp_path / "torn" / "checkpoints")
    for path in newest[1:]:
        path.unlink()  # as if the run had ended after step 2
    run(tmp_path / "torn", config, resume="auto")
    whole, torn = (read_weights(tmp_path / part) for part in ("whole", "torn"))
    assert_same(whole.state, torn.state, 1e-6)
    assert whole.card.metrics == pytest.approx(torn.card.metrics)


def test_accumulating_two_batches_equals_one_of_twice_the_size(tmp_path: Path) -> None:
    run(tmp_path / "two", tiny_config(batch_size=1, accumulate=2))
    run(tmp_path / "one", tiny_config(batch_size=2, accumulate=1))
    one, two = (read_weights(tmp_path / part).state for part in ("one", "two"))
    assert_same(one, two, 1e-6)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(steps=60, learning_rate=3e-2))
    losses = logged_losses(tmp_path)
    assert sum(losses[-7:]) < 0.5 * sum(losses[:7])


def test_the_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    metrics = run(tmp_path, tiny_config(ema_decay=0.8, validate_every=4))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-00000006.ckpt")
    exported = read_weights(tmp_path)
    assert exported.card.averaged
    assert exported.card.step == 6
    assert_same(checkpoint[AVERAGE_KEY], exported.state)
    assert not torch.equal(exported.state["mix.weight"], checkpoint["state_dict"]["model.mix.weight"])
    model = TinyModel()
    load_into(model, exported)
    assert (
        metrics == exported.card.metrics == pytest.approx(no_evaluation(model, torch.device("cpu"), tmp_path))
    )
    assert_same(read_weights(tmp_path / "checkpoints" / "step-00000006.ckpt").state, exported.state)
    assert json.loads((tmp_path / "card.json").read_text())["metrics"] == metrics


def test_old_checkpoints_go(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(steps=7, checkpoint_every=2, keep_checkpoints=2))
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000006.ckpt", "step-00000007.ckpt"]


class Exploding(TinyModel):
    """Its loss is fine, its gradient is not."""

    def losses(self, outputs: Any, targets: Any, reduce_mean: Any) -> dict[str, Tensor]:
        zero = (outputs.segmentation_logits * 0.0).sum()
        return {"root": torch.sqrt(zero.abs()) + 1.0}


def test_a_non_finite_loss_stops_with_its_token_and_an_intact_checkpoint(tmp_path: Path) -> None:
    source = TinySource(poison=3)
    config = tiny_config(steps=20, batch_size=1, checkpoint_every=1, seed=1)
    with pytest.raises(NonFiniteLossError, match=r"loss \(square\) .* sample token-3\n") as caught:
        run(tmp_path, config, source)
    assert len(str(caught.value).splitlines()) <= 3
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    step = read_checkpoint(newest)["global_step"]
    assert f"at step {step + 1}," in str(caught.value)
    assert all(value.isfinite().all() for value in read_weights(newest).state.values())


def test_a_non_finite_gradient_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    model = Exploding()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"the gradient is NaN or infinite at step 1, sample token-"):
        train(tiny_config(), model, TinySource(), no_evaluation, tmp_path)
    assert_same(before, model.state_dict())


def test_bad_samples_are_replaced_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(steps=7)
    config.data.bad_samples = "skip"
    run(tmp_path, config, TinySource(bad=frozenset({2, 3})))
    assert json.loads((tmp_path / "skipped.json").read_text()) == {
        "token-2": "its image is missing",
        "token-3": "its image is missing",
    }
    assert "2 unreadable samples were skipped" in capsys.readouterr().out
    assert len(logged_losses(tmp_path)) == 7


def test_only_bad_samples_stop_the_run(tmp_path: Path) -> None:
    config = tiny_config()
    config.data.bad_samples = "skip"
    with pytest.raises(DataError, match="20 samples drawn in a row cannot be read"):
        run(tmp_path, config, TinySource(bad=frozenset(range(7))))


class Unreadable(TinySource):
    """Raises as the real data set does where bad samples stop the run."""

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        raise SampleError(f"sample token-{item[0]}: its image is truncated", f"token-{item[0]}")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_loader_process_keeps_its_type_and_message(tmp_path: Path, workers: int) -> None:
    config = tiny_config()
    config.data.workers = workers
    with pytest.raises(SampleError, match=r"^sample token-\d: its image is truncated$"):
        run(tmp_path, config, Unreadable())


class Interrupting(TinySource):
    """As if the user pressed the keys while the fourth sample was loaded."""

    def __getitem__(self, item: tuple[int, int]) -> Any:
        if item[1] == 4:
            raise KeyboardInterrupt
        return super().__getitem__(item)


def test_an_interrupt_reaches_the_caller_and_keeps_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_config(batch_size=1, checkpoint_every=1), Interrupting())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list_checkpoints(tmp_path / "checkpoints")
    run(tmp_path, tiny_config(batch_size=1, checkpoint_every=1), resume="auto")
    run(tmp_path / "whole", tiny_config(batch_size=1))
    assert_same(read_weights(tmp_path / "whole").state, read_weights(tmp_path).state, 1e-6)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    norms = {}
    for clip in (0.0, 1e-3):
        run(tmp_path / str(clip), tiny_config(steps=1, gradient_clip=clip))
        states = read_checkpoint(tmp_path / str(clip) / "checkpoints" / "step-00000001.ckpt")
        moments = [s["exp_avg"] for s in states["optimizer_states"][0]["state"].values()]
        norms[clip] = torch.cat([m.flatten() for m in moments]).norm().item() / 0.1  # 1 - beta1
    assert norms[0.0] > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(checkpoint_every=3))
    path = str(tmp_path / "checkpoints" / "step-00000003.ckpt")
    with pytest.raises(ConfigError, match=r"training\.learning_rate \(0\.01 there, 0\.1 now\)"):
        run(tmp_path / "other", tiny_config(learning_rate=0.1), resume=path)
    with pytest.raises(ConfigError, match=r"training\.batch_size x devices x nodes"):
        run(tmp_path / "other", tiny_config(batch_size=3), resume=path)
    run(tmp_path / "other", tiny_config(log_every=3, checkpoint_every=1), resume=path)


def test_resuming_elsewhere_needs_the_same_samples_a_step(tmp_path: Path) -> None:
    """Other machines may go on with a run; other accumulation may not, as losses weigh samples otherwise."""
    run(tmp_path, tiny_config(steps=1))
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    for other in ({"nodes": 2}, {"devices": 2}, {"nodes": 2, "devices": 3}, {"batch_size": 4}):
        with pytest.raises(ConfigError, match=r"training\.batch_size x devices x nodes"):
            check_resumable(path, tiny_config(**other), TinyModel())
    for accumulate, size in ((2, 2), (2, 1)):
        with pytest.raises(ConfigError, match=r"training\.accumulate \(1 there, 2 now\)"):
            check_resumable(path, tiny_config(accumulate=accumulate, batch_size=size), TinyModel())
    for other in ({"nodes": 2}, {"devices": 2}):
        assert check_resumable(path, tiny_config(batch_size=1, **other), TinyModel()) == 1


def test_a_run_does_not_mix_with_another_ones_checkpoints(tmp_path: Path) -> None:
    config = tiny_config(checkpoint_every=3)
    run(tmp_path, config)
    with pytest.raises(CheckpointError, match="go on with --resume auto, or choose another --out"):
        run(tmp_path, config)
    with pytest.raises(CheckpointError, match="other checkpoints than the one to resume from"):
        run(tmp_path, config, resume=str(tmp_path / "checkpoints" / "step-00000003.ckpt"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        run(tmp_path, config, resume=str(tmp_path / "nothing.ckpt"))
    assert run(tmp_path, config, resume="auto") == {}


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path, tiny_config(checkpoint_every=3))
    path = tmp_path / "checkpoints" / "step-00000006.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        run(tmp_path, tiny_config(), resume="auto")


def test_initial_weights_start_a_new_run(tmp_path: Path) -> None:
    run(tmp_path / "first", tiny_config())
    trained = read_weights(tmp_path / "first").state
    config = tiny_config(steps=1, learning_rate=1e-12, initial_weights=str(tmp_path / "first"))
    run(tmp_path / "second", config)
    assert_same(trained, read_weights(tmp_path / "second").state, 1e-6)


def test_mixed_precision_trains(tmp_path: Path) -> None:
    run(tmp_path / "half", tiny_config(precision="bf16-mixed"))
    run(tmp_path / "full", tiny_config())
    half, full = (logged_losses(tmp_path / part) for part in ("half", "full"))
    assert half != full
    assert half == pytest.approx(full, rel=0.1)
