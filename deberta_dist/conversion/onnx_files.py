"""ONNX export by torch's own exporter, compared with the model before it is published.

Batch and length are the caller's. The whole model is in memory here, unlike for the targets that are numbers alone.
"""

import contextlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deberta_dist.conversion.output import OutputDirectory
from deberta_dist.errors import ConfigError, DebertaDistError
from deberta_dist.models.config import DebertaConfig
from deberta_dist.models.heads import DebertaForMultipleChoice

PROGRAM_NAME = "model.onnx"
DATA_NAME = PROGRAM_NAME + ".data"
OPSET = 20
"""The first with GELU as an operator of its own; onnxruntime 1.17 and TensorRT 10 read it."""
MAX_INLINE_BYTES = 3 * 2**29
"""Weights of more bytes lie in a file of their own: a program is one protobuf message, which ends at 2 GiB."""
OUTPUT_NAMES = ("logits", "start_logits", "end_logits", "last_hidden_state")
"""What a program returns of its model's output, as far as that has it."""
# Of the largest number, where that is above 1. In half precision the two round at other places.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}
_PACKAGES = ("onnx", "onnxscript")


def require_exporter() -> None:
    """Refuses what cannot be had, before any work.

    Raises:
        ConfigError: the packages that torch's exporter needs are not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--to onnx needs {' and '.join(missing)}: pip install 'deberta_dist[onnx]'")


def require_dtype(dtype: torch.dtype) -> None:
    """Refuses a number format of weights that runtimes do not compute with.

    Raises:
        ConfigError: it is such a one.
    """
    if dtype not in _TOLERANCES:
        raise ConfigError(
            f"--to onnx: the weights are {str(dtype).removeprefix('torch.')}, which onnxruntime does not compute with on a "
            "CPU: give --dtype float32 or float16"
        )


@dataclass(frozen=True)
class Program:
    """A model that has been exported.

    Attributes:
        model: What it was made of.
        exported: torch's `ONNXProgram`, still in memory.
        inputs: Names of the inputs, in the order of the call.
        outputs: Names of the outputs, in their order.
        lengths: Two that it was not exported with, tokens.
        num_bytes: Bytes of its weights; above `max_inline_bytes` they get a file of their own.
    """

    model: "_Called"
    exported: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lengths: tuple[int, int]
    num_bytes: int


def export(model: nn.Module, *, config: DebertaConfig) -> Program:
    """Exports a model in evaluation mode, with whatever batch and length.

    Args:
        model: With any head; see ``OUTPUT_NAMES``.
        config: Sizes of the model, for the example that is traced.
    """
    limit = config.max_position_embeddings
    called = _Called(model, config)
    axes = ("batch", "choices", "length") if isinstance(model, DebertaForMultipleChoice) else ("batch", "length")
    examples = called.examples((2,) * (len(axes) - 1), length=max(2, min(16, limit // 2)))
    outputs = called.find_outputs(examples)
    dims = {number: torch.export.Dim(axis) for number, axis in enumerate(axes)}
    with _silent(), torch.no_grad():
        exported = torch.onnx.export(
            called,
            (),
            kwargs=examples,
            dynamic_shapes=dict.fromkeys(examples, dims),
            input_names=list(examples),
            output_names=list(outputs),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.linear.default: _linear},
            dynamo=True,
            verbose=False,
        )
    _strip(exported.model)
    return Program(
        model=called,
        exported=exported,
        inputs=tuple(examples),
        outputs=outputs,
        lengths=(min(37, limit), min(128, limit)),
        num_bytes=sum(value.const_value.nbytes for value in exported.model.graph.initializers.values()),
    )


def write(output: OutputDirectory, program: Program, *, max_inline_bytes: int = MAX_INLINE_BYTES) -> str:
    """Writes a program and compares it with its model.

    Args:
        output: Receives `model.onnx` and, for large weights, `model.onnx.data`.
        max_inline_bytes: Weights of more lie in ``model.onnx.data``.

    Returns:
        What was compared, in a sentence.

    Raises:
        DebertaDistError: the program computes other numbers than the model.
    """
    import onnx

    path = output.path / PROGRAM_NAME
    with _silent():
        program.exported.save(path, external_data=program.num_bytes > max_inline_bytes)
        onnx.checker.check_model(path)
    for name in (PROGRAM_NAME, DATA_NAME):
        if (output.path / name).exists():
            output.adopt(name)
    return _compare(path, program)


class _Called(nn.Module):
    """A model as a function of tensors to a tuple of tensors."""

    def __init__(self, model: nn.Module, config: DebertaConfig) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = config.vocab_size
        parameters = inspect.signature(model.forward).parameters
        self.num_types = config.type_vocab_size if "token_type_ids" in parameters else 0
        self.outputs: tuple[str, ...] = ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        result = self._call(input_ids, attention_mask, token_type_ids)
        return tuple(getattr(result, name) for name in self.outputs)

    def find_outputs(self, examples: dict[str, Tensor]) -> tuple[str, ...]:
        """Which of ``OUTPUT_NAMES`` the model has; `forward` returns them from now on."""
        result = self._call(**examples)
        self.outputs = tuple(name for name in OUTPUT_NAMES if getattr(result, name, None) is not None)
        assert self.outputs, f"{type(self.model).__name__} returns none of {', '.join(OUTPUT_NAMES)}"
        return self.outputs

    def examples(self, rows: tuple[int, ...], *, length: int) -> dict[str, Tensor]:
        """Inputs by name, [*rows, length], the first row padded."""
        shape = (*rows, length)
        generator = torch.Generator().manual_seed(length)
        mask = torch.ones(shape, dtype=torch.int64)
        mask.view(-1, length)[0, length // 2 + 1 :] = 0
        ids = torch.randint(self.vocab_size, shape, generator=generator)
        found = {"input_ids": ids, "attention_mask": mask}
        if self.num_types:
            found["token_type_ids"] = torch.randint(self.num_types, shape, generator=generator)
        return found

    def _call(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if hasattr(self.model, "token_logits"):  # its own forward returns as many rows as there are real tokens
            return _Logits(self.model.token_logits(input_ids, attention_mask, **types))
        return self.model(input_ids, attention_mask, **types)


@dataclass(frozen=True)
class _Logits:
    logits: Tensor


def _compare(path: Path, program: Program) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "the program was not compared with the model: onnxruntime is not installed"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tolerance = _TOLERANCES[next(program.model.parameters()).dtype]
    num_dims = len(session.get_inputs()[0].shape) - 1
    largest, sizes = 0.0, []
    for rows, length in zip((3, 1), program.lengths, strict=True):
        inputs = program.model.examples((rows,) * num_dims, length=length)
        sizes.append(f"{' x '.join(map(str, inputs['input_ids'].shape))}")
        with torch.no_grad():
            expected = program.model(**inputs)
        found = session.run(list(program.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, ours, theirs in zip(program.outputs, expected, found, strict=True):
            theirs = torch.from_numpy(theirs)
            difference = (ours.double() - theirs.double()).abs().max().item()
            largest = max(largest, difference)
            # Not-a-number compares as different, too.
            if ours.shape != theirs.shape or not difference <= tolerance * max(1.0, ours.abs().max().item()):
                raise DebertaDistError(
                    f"the exported program computes other {name} than the model for inputs of {sizes[-1]}: they differ by "
                    f"{difference:.3g} (onnxruntime {onnxruntime.__version__}, torch {torch.__version__}); nothing is written"
                )
    return (
        f"compared with the model in onnxruntime {onnxruntime.__version__} for inputs of {' and '.join(sizes)}: the largest "
        f"difference is {largest:.2g}"
    )


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b as one operator that takes the weight as it lies.

    Transposed for a MatMul it would be in the file once more wherever something else uses it: the word embeddings, and
    the projections that the relative table shares.
    """
    from onnxscript import opset20 as op

    outputs, inputs = weight.shape
    rows = op.Reshape(x, op.Constant(value_ints=[-1, inputs]))
    shape = op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[outputs]), axis=0)
    return op.Reshape(op.Gemm(rows, weight, bias, transB=1), shape)


def _strip(model: Any) -> None:
    """Takes out what the exporter says of the code it came from, which names paths of this machine; shortens names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        if value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter says on its own progress and on packages that nothing here needs what no user can use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
