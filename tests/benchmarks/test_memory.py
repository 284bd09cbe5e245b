"""The memory benchmark: stages hold what the dry run predicts, recomputation takes the bytes that it promises."""

import argparse
from typing import Any

import pytest

from benchmarks import memory, peers
from deberta_dist.errors import ConfigError
from deberta_dist.kernels import portable


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return parser.parse_args(flags)


def test_prediction_and_measurement_agree(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = dict(portable.CHUNK_BYTES)
    found = memory.run(arguments("--layouts", "tiny-v2:2x3,tiny-v1:1x1", "--length", "48"))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found["stages"]:
        assert abs(row["kept_difference"]) < 0.02 and abs(row["peak_difference"]) < 0.02, row
        assert row["kept_bytes"] < row["peak_bytes"]
        rows[f"{row['layout']} {row['layers']}", row["recompute"]] = row
    stages = {stage for stage, _ in rows}
    assert len(stages) == 4 and "tiny-v1:1x1 0..3" in stages
    for stage in stages:
        none, selective, full = (rows[stage, mode]["kept_bytes"] for mode in memory.MODES)
        assert full < selective < none
    assert found["layer_saved_bytes"]["ours"] < found["layer_saved_bytes"][peers.HUGGING_FACE]
    assert chunks == portable.CHUNK_BYTES
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "v3-base", "v3-base:2", "v3-base:0x1", "v3-base:2x2,", "v3-base:2x2x2"])
def test_no_layout(text: str) -> None:
    with pytest.raises(ConfigError, match="is no layout; expected PRESET:TENSORxPIPELINE, such as v3-base:2x2"):
        memory.run(arguments("--layouts", text))
