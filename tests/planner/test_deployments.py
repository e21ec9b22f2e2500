from __future__ import annotations

import msgspec
import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.deployments import predict, setting
from soloist.planner.runtime import Runtime
from soloist.planner.tables import DeploymentRow

ROW = DeploymentRow(
    role="extra", system="sglang", model="DeepSeek-V3", gpu="H100", gpus=32, layout="ep32 dp32", precision="fp8",
    phase="decode", batch_per_gpu=64, context=4096, metric="output throughput", value=1.0, unit="tok/s/GPU",
)  # fmt: skip
PUBLISHED = Calibration.published()
RUNTIME = Runtime.named("sglang", PUBLISHED)


def changed(**fields: object) -> DeploymentRow:
    return msgspec.structs.replace(ROW, **fields)


@pytest.mark.parametrize(
    ("text", "gpus", "layout", "slots"),
    [
        ("ep32 dp32", 32, "ep32", 0), ("ep144 dp144 (2 routed + 1 shared a GPU)", 144, "ep144", 2),
        ("tp8", 8, "tp8", 0),
        ("tp8", 16, "dp2tp8", 0), ("tp2+ep", 2, "attn2ep2", 0), ("tp8 ep8", 8, "attn8ep8", 0), ("pp2", 2, "pp2", 0),
        ("TP8 EP8 dp8", 8, "ep8", 0), ("tp8pp2", 16, "tp8pp2", 0),
    ],
)  # fmt: skip
def test_layouts_as_tables_write_them(text: str, gpus: int, layout: str, slots: int) -> None:
    found = setting(changed(layout=text, gpus=gpus)).deployment
    assert (str(found.layout), found.slots) == (layout, slots)


def test_units_agree() -> None:
    each, node, whole = (
        predict(changed(unit=unit), PUBLISHED, RUNTIME) for unit in ("tok/s/GPU", "tok/s/node", "tok/s")
    )
    assert whole == pytest.approx(32 * each)
    assert node == pytest.approx(8 * each)
    tpot = predict(changed(metric="tpot", unit="ms"), PUBLISHED, RUNTIME)
    assert 64 / tpot * 1e3 == pytest.approx(each)


def test_a_missing_batch_is_that_of_a_typical_tpot() -> None:
    rate = predict(changed(batch_per_gpu=None), PUBLISHED, RUNTIME)
    assert 500 < rate < 4000


def test_served_load_pays_for_arriving_prompts() -> None:
    steady = predict(changed(metric="tpot", unit="ms", context=1536), PUBLISHED, RUNTIME)
    fields = {"metric": "tpot", "unit": "ms", "context": None, "input_tokens": 1024, "output_tokens": 1024}
    assert predict(changed(**fields), PUBLISHED, RUNTIME) > steady


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"metric": "joules"}, "joules"), ({"unit": "tok/h"}, "tok/h"), ({"model": "Nonesuch"}, "nonesuch"),
        ({"gpu": "Z80"}, "Z80"), ({"layout": "all of it"}, "all of it"), ({"precision": "int3"}, "int3"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_named(fields: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        predict(changed(**fields), PUBLISHED, RUNTIME)
