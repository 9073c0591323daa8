#!/usr/bin/env python3
"""OpenVINO on the CPU, with a model that optimum-intel exports.

To install: the Python package optimum-intel with its extra "openvino". Weights: MODEL is the
directory that convert_weights.py made qemb's file from. The export keeps its BF16 numbers. With
--weights int8 they are rounded to 8 bits with one scale per row (qemb's int8: one for 64 numbers).
The exported model is kept in MODEL-openvino or MODEL-openvino-int8 and made if it is not there.
--hint is the precision of the arithmetic; bf16 needs a CPU that has it, elsewhere OpenVINO takes
f32."""

import sys

import numpy
import openvino
import peer


def export(model, to, int8):
    from optimum.intel import OVModelForFeatureExtraction, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(bits=8, sym=True) if int8 else None
    exported = OVModelForFeatureExtraction.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False, quantization_config=config)
    exported.save_pretrained(to)


def main():
    p = peer.arguments(__doc__)
    p.add_argument("--hint", choices=("f32", "bf16"), default="f32")
    p.add_argument("--weights", choices=("bf16", "int8"), default="bf16")
    o = p.parse_args()
    to = o.model.with_name(o.model.name + "-openvino" + "-int8" * (o.weights == "int8"))
    if not to.exists():
        export(o.model, to, o.weights == "int8")
    compiled = openvino.Core().compile_model(to / "openvino_model.xml", "CPU", {
        "INFERENCE_PRECISION_HINT": o.hint, "INFERENCE_NUM_THREADS": o.threads,
        "PERFORMANCE_HINT": "LATENCY", "EXECUTION_MODE_HINT": "PERFORMANCE"})
    took = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    print(f"run_openvino.py: computes in {took}", file=sys.stderr)

    def embed(ids, lengths):
        hidden = compiled({"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0]
        last = hidden[numpy.arange(len(ids)), lengths - 1]
        return last / numpy.linalg.norm(last, axis=-1, keepdims=True)

    return peer.run(o, embed)


if __name__ == "__main__":
    main()
