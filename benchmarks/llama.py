"""llama.cpp as a peer: greedy decoding of one prompt or of several side by side, through its C interface.

llama-cpp-python's own class decodes one sequence; what it makes of the interface is used here as it is.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llama_cpp._internals import LlamaBatch

CONTEXT = 4096


class Llama:
    """A GGUF file, with room for `rows` sequences."""

    def __init__(self, path: Path, threads: int, rows: int = 16) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = rows
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.batch = LlamaBatch(n_tokens=CONTEXT, embd=0, n_seq_max=rows)

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[list[int]]:
        """The likeliest next token of every row, `count` times; a row that has ended goes on regardless."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.batch.reset()
        for row, ids in enumerate(prompts):
            self.batch.add_sequence(ids, row, False)
        ends = np.cumsum([len(ids) for ids in prompts]) - 1
        for step in range(count):
            self._decode()
            chosen = [int(self._logits(end).argmax()) for end in ends]
            yield chosen
            self.batch.reset()
            for row, token in enumerate(chosen):
                self.batch.add_sequence([token], row, False)
                self.batch.batch.pos[row] = len(prompts[row]) + step
            ends = range(len(prompts))

    def ends(self, token: int) -> bool:
        """Whether an answer is over with this token."""
        return llama_cpp.llama_vocab_is_eog(self.vocabulary, token)

    def _decode(self) -> None:
        failed = llama_cpp.llama_decode(self.context, self.batch.batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")

    def _logits(self, position: int) -> np.ndarray:
        logits = llama_cpp.llama_get_logits_ith(self.context, int(position))
        return np.ctypeslib.as_array(logits, (self.words,))


def requantise(path: Path, to: Path) -> Path:
    """Write the file's weights as Q8_0 with llama.cpp's own function."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    failed = llama_cpp.llama_model_quantize(str(path).encode(), str(to).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")
    return to


def bytes_read(path: Path) -> int:
    """Bytes of the matrices that one decoded token multiplies; a separate embedding is read by row."""
    matrices = {
        tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2
    }
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return int(sum(matrices.values()))


@llama_cpp.llama_log_callback
def _silent(level, text, data) -> None:
    """llama.cpp tells of every tensor."""
