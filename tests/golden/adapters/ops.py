"""The operators against the published cores."""

from __future__ import annotations

from bevperception.ops import dcnv3, ms_deform_attn
from tests.golden.case import Case, adapter


@adapter("msda", uses_ops=True)
def run_ms_deform_attn(case: Case) -> None:
    inputs = {name: case.input(name) for name in ("value", "sampling_locations", "attention_weights")}
    shapes = [(int(h), int(w)) for h, w in case.meta["shapes"]]
    outputs = {
        "out": ms_deform_attn(
            inputs["value"], shapes, inputs["sampling_locations"], inputs["attention_weights"]
        )
    }
    _check(case, outputs, inputs)


@adapter("dcnv3core", uses_ops=True)
def run_dcnv3(case: Case) -> None:
    inputs = {name: case.input(name) for name in ("input", "offset", "mask")}
    meta = case.meta
    out = dcnv3(
        inputs["input"],
        inputs["offset"],
        inputs["mask"],
        kernel_size=meta["kernel"],
        stride=meta["stride"],
        padding=meta["pad"],
        dilation=meta["dilation"],
        groups=meta["group"],
        offset_scale=meta["offset_scale"],
        remove_center=bool(meta["remove_center"]),
    )
    _check(case, {"out": out}, inputs)


def _check(case: Case, outputs: dict, inputs: dict) -> None:
    case.check("out.out", outputs["out"])
    if case.has("cot.out"):
        case.check_gradients(outputs, inputs)
