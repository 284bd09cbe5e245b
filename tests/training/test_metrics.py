"""What a run tells: on disk and on screen."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from deberta_dist.planning.dry_run import format_seconds
from deberta_dist.training.metrics import MetricsLog, NetworkMetrics, StepMetrics
from deberta_dist.training.trainer import EvaluationResult


def one_step(step: int, **changes: Any) -> StepMetrics:
    values = {"step": step, "loss": 7.5, "grad_norm": 1.25, "lr": 1e-4, "tokens_per_second": 12345.6, "mfu": 0.4321,
              "consumed_samples": 8 * step, "data_seconds": 0.25}  # fmt: skip
    return StepMetrics(**(values | changes))


def open_log(directory: Path, **changes: Any) -> MetricsLog:
    return MetricsLog(directory, **({"is_writer": True, "max_steps": 100, "print_every": 10} | changes))


def test_every_step_is_on_disk_and_some_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    for step in range(1, 101):
        log.step(one_step(step))
    # Written line by line: what happened is there before the end.
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    log.close()
    assert [line["step"] for line in written] == list(range(1, 101))
    assert written[1] == {"step": 2, "loss": 7.5, "grad_norm": 1.25, "lr": 1e-4, "tokens_per_second": 12345.6,
                          "mfu": 0.4321, "consumed_samples": 16, "data_seconds": 0.25, "skipped": False}  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step +(\d+)/100 \| ", line)[1]) for line in lines] == [1, *range(10, 101, 10)]
    assert "loss  7.5000 | lr 1.00e-04 | grad norm    1.250 |    12,346 tokens/s | mfu 43.2% | left " in lines[1]
    assert "left" not in lines[0] and "tokens/s" in lines[0], "one step tells nothing of the others"
    assert lines[-1].endswith("left 00:00")


def test_unknown_utilisation_is_null_and_not_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log.step(one_step(1, mfu=None))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] is None
    assert "mfu" not in capsys.readouterr().out


def test_padding_is_told_where_there_is_some(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log.step(one_step(1), padding=0.125, sequence_length=64)
    log.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (written["padding"], written["sequence_length"]) == (0.125, 64)
    assert "12,346 tokens/s (and 12.5% padding) | mfu" in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 7, 10, 100])
def test_a_skipped_step_is_always_told(tmp_path: Path, capsys: pytest.CaptureFixture, step: int) -> None:
    log = open_log(tmp_path)
    log.step(one_step(step, skipped=True, grad_norm=None))
    log.close()
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written["skipped"] is True and written["grad_norm"] is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step {step}: skipped on every rank") and "weights unchanged" in line


def test_a_step_that_one_network_took_and_the_other_did_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    other = NetworkMetrics(loss=2.0, grad_norm=0.5, lr=1e-3)
    log.step(one_step(1), networks={"generator": NetworkMetrics(loss=2.0, grad_norm=None, lr=1e-3)})
    log.step(one_step(2, skipped=True, grad_norm=None), networks={"generator": other})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert "grad norm    1.250 | generator: loss  2.0000 | lr 1.00e-03 | grad norm  skipped | " in lines[0]
    assert lines[1].endswith("(loss 7.5000); weights unchanged, but those of generator")


def test_evaluation_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    one, other = EvaluationResult(2.5, 0.125, 12345), EvaluationResult(0.5, 0.75, 99, counted="tokens")
    log.evaluation(step=20, networks={"": one})
    log.evaluation(step=30, networks={"generator": one, "": other})
    log.close()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 20, "valid_loss": 2.5, "valid_accuracy": 0.125, "valid_targets": 12345}
    assert second == {
        "step": 30, "valid_loss": 0.5, "valid_accuracy": 0.75, "valid_targets": 99,
        "generator.valid_loss": 2.5, "generator.valid_accuracy": 0.125, "generator.valid_targets": 12345}  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "step 20: held-out loss 2.5000, accuracy 12.50% over 12,345 masked tokens",
        "step 30: held-out loss of generator 2.5000, accuracy 12.50% over 12,345 masked tokens; "
        "loss 0.5000, accuracy 75.00% over 99 tokens",
    ]


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path, is_writer=False)
    log.step(one_step(1))
    log.step(one_step(2, skipped=True, grad_norm=None))
    log.evaluation(step=2, networks={"": EvaluationResult(1.0, 0.5, 3)})
    log.say("anything")
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.6, "01:00"), (184, "03:04"), (7384, "02:03:04"), (93784, "1d 02:03:04"), (86400, "1d 00:00:00"),
     (86460, "1d 00:01:00")],
)  # fmt: skip
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_full_disk_costs_lines_and_no_half_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = open_log(tmp_path)
    log.step(one_step(1))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        log.step(one_step(2))
        log.step(one_step(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.step(one_step(4))
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    shown = capsys.readouterr().out
    assert shown.count("cannot be written") == 1 and shown.count("is written again") == 1


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 1}\n{"st', '{"st', "", '{"step": 1}\n'):
        path.write_text(torn)
        log = open_log(tmp_path)
        log.starts_over()
        log.step(one_step(2))
        log.close()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[-1]["step"] == 2
        assert ({"resumed_from_step": 0} in lines) == ('{"step": 1}' in torn)
