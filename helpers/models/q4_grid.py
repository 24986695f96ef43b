"""onnxruntime-genai's model builder, whose int4 has an offset for each block, yet no zero points.

    python -m helpers.models.q4_grid -m none -i CHECKPOINT -o FOLDER -p int4 -e cpu -c CACHE

As in llama.cpp's Q4_1, 32 weights in a row share a step d and an offset c: w = d·(q − 8) + c, q in 0…15. The
least and the greatest weight are on that grid, so weights that come from a Q4_1 file are not rounded twice.
ONNX Runtime's symmetric kernel knows no c. But the product of the offsets with an input x is that of one
number for each block with the sum of x over the block:

    Σ w·x = Σ d·(q − 8)·x + Σ_blocks c·(sum of x over the block)

So the sums are appended to x and the offsets to the rows of the weights, and the same kernel computes both.
An offset is written twice, in four bits and then what these leave in four more, each time beside a sum.
"""

from __future__ import annotations

import runpy

import numpy as np
import onnx_ir as ir
import onnxruntime_genai.models  # noqa: F401 (makes the builder's own packages importable)

BLOCK = 32


def grid(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put weights [N, K] on the grid: q [N, K / 32, 32] in 0…15, steps d and offsets c [N, K / 32].

    What lies on such a grid already and uses both ends of it comes back exactly.
    """
    blocks = weights.reshape(len(weights), -1, BLOCK)
    least = blocks.min(axis=-1, keepdims=True)
    step = (blocks.max(axis=-1, keepdims=True) - least) / np.float32(15)
    q = np.rint((blocks - least) / np.where(step > 0, step, 1)).astype(np.uint8)
    return q, step[..., 0], (least + 8 * step)[..., 0]


def digits(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write offsets [N, blocks of 32] twice in four bits, the second time what the first left.

    The error is at most 1/196 of the greatest offset of the block. Returns q [N, 2 · blocks, 32] and the
    steps [N, 2 · blocks].
    """
    rest = offsets.reshape(len(offsets), -1, BLOCK)
    q, steps = [], []
    for _ in range(2):
        step = np.abs(rest).max(axis=-1, keepdims=True) / np.float32(7)
        rounded = np.rint(rest / np.where(step > 0, step, 1))
        rest = rest - step * rounded
        q.append((rounded + 8).astype(np.uint8))
        steps.append(step[..., 0])
    return np.concatenate(q, axis=1), np.concatenate(steps, axis=1)


def quantise(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows [N, K] in four bits and, behind each, its offsets: q [N, blocks, 32], steps [N, blocks]."""
    q, steps, offsets = grid(weights)
    offset_q, offset_steps = digits(np.pad(offsets, ((0, 0), (0, -offsets.shape[1] % BLOCK))))
    return np.concatenate([q, offset_q], axis=1), np.concatenate([steps, offset_steps], axis=1)


def summing(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of ones and zeros, exact in four bits, that give the sums of `columns` inputs, block by block.

    The sums are filled up with zeros to whole blocks and come twice, as the offsets do.
    """
    blocks = columns // BLOCK
    ones = np.kron(np.eye(blocks, dtype=np.uint8), np.ones(BLOCK, dtype=np.uint8))
    q = 8 + np.tile(np.pad(ones, ((0, -blocks % BLOCK), (0, 0))), (2, 1))
    return q.reshape(len(q), blocks, BLOCK), np.ones((len(q), blocks), dtype=np.float32)


def rewrite(graph: ir.Graph, keep: set[str], accuracy_level: int) -> None:
    """Replace the products with constant float32 weights by ones in four bits, but for those in `keep`."""
    for node in list(graph):
        if node.op_type != "MatMul" or node.name in keep:
            continue
        tensor = node.inputs[1].const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            continue
        if tensor.shape[0] % BLOCK == 0:
            _replace(graph, node, np.ascontiguousarray(tensor.numpy().T), accuracy_level)


def _replace(graph: ir.Graph, node: ir.Node, weights: np.ndarray, accuracy_level: int) -> None:
    x, old = node.inputs
    label = node.name.strip("/").replace("/", ".")
    settings = {"bits": 4, "block_size": BLOCK, "accuracy_level": accuracy_level}

    def product(name: str, value: ir.Value, constants: str, q: np.ndarray, steps: np.ndarray) -> ir.Node:
        packed = _constant(graph, f"{constants}_Q4", q[..., 0::2] | q[..., 1::2] << 4)
        return ir.node(
            "MatMulNBits",
            [value, packed, _constant(graph, f"{constants}_scale", steps)],
            {**settings, "K": q.shape[1] * BLOCK, "N": len(q)},
            domain="com.microsoft",
            name=name,
            outputs=[ir.Value(name=f"{name}/output_0", type=x.type)],
        )

    columns = weights.shape[1]
    sums = product(f"{node.name}/BlockSums", x, f"block_sums.{columns}", *summing(columns))
    joined = ir.node(
        "Concat",
        [x, sums.outputs[0]],
        {"axis": -1},
        name=f"{node.name}/Concat",
        outputs=[ir.Value(name=f"{node.name}/Concat/output_0", type=x.type)],
    )
    result = product(f"{node.name}_Q4", joined.outputs[0], f"{label}.weight", *quantise(weights))
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [sums, joined, result], node.outputs, result.outputs
    )
    if not old.uses():
        del graph.initializers[old.name]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The constant called `name`: products with equally many inputs share the one that sums."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def main() -> None:
    """Run the builder in this process, with `rewrite` before its own quantisation.

    Its options cannot say this grid, and this is the one place where it holds the whole graph with float
    weights. Whatever it finds to quantise afterwards (the last layer, which the embedding shares) is its own.
    """
    from builders import base

    builders_own = base.Model.to_nbits

    def to_nbits(model: base.Model) -> ir.Model:
        keep = {*model.quant_attrs["nodes_to_exclude"], *model.int4_customized_weight_config}
        rewrite(model.model.graph, keep, model.quant_attrs["accuracy_level"])
        return builders_own(model)

    base.Model.to_nbits = to_nbits
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
