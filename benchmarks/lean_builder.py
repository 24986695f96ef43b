"""onnxruntime-genai's model builder, converting one weight at a time.

    python benchmarks/lean_builder.py -m none -i CHECKPOINT -o FOLDER -p int4 -e cpu -c CACHE

Before it quantises, the builder (0.18) writes the whole model into one float32 message: 15 GB for Phi-3-mini
beside the 8 GB of the checkpoint. Here that message holds a reference in place of each weight, and the weight
is converted when the quantiser (onnxruntime 1.32) asks for it. Graph and weights come out the same to the
byte.
"""

import os
import runpy
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

_to_proto, _from_proto, _to_array = ir.to_proto, ir.from_proto, numpy_helper.to_array
_weights: dict[str, ir.TensorProtocol] = {}


def to_proto(thing):
    """A message of the model that refers to its weights by name instead of holding them."""
    if not isinstance(thing, ir.Model):
        return _to_proto(thing)
    for name, value in thing.graph.initializers.items():
        weight = value.const_value
        _weights[name] = weight
        value.const_value = ir.ExternalTensor(name, 0, 0, weight.dtype, shape=weight.shape, name=name)
    return _to_proto(thing)


def from_proto(message):
    """A weight, or a model with the weights that are still references put back."""
    if isinstance(message, TensorProto) and _is_reference(message):
        return ir.tensor(_array(message), name=message.name)
    thing = _from_proto(message)
    if isinstance(thing, ir.Model):
        for name, value in thing.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _weights[name]
    return thing


def to_array(message, *arguments, **options):
    """The same for the quantisers that read numpy (rtn, k_quant)."""
    if _is_reference(message):
        return _array(message)
    return _to_array(message, *arguments, **options)


def _array(message: TensorProto) -> np.ndarray:
    # The quantiser in C++ reads rows in order, whatever the array says of its strides.
    return np.ascontiguousarray(_weights[message.name].numpy())


def _is_reference(message: TensorProto) -> bool:
    return message.data_location == TensorProto.EXTERNAL and message.name in _weights


def main(*arguments: object) -> None:
    """Run the builder in this process, once: it keeps every weight until the process ends."""
    ir.to_proto, ir.from_proto, numpy_helper.to_array = to_proto, from_proto, to_array
    sys.argv = ["builder", *map(str, arguments)]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
