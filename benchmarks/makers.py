"""What the tools of other makers make of a float32 network, used as their documentation says.

Every function writes files for one engine: `model.onnx` for ONNX Runtime, `model.xml` and `model.bin` for OpenVINO, or
`model.pt2` for AOTInductor. Calibration data are the task's, all of them.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from optpipe.lower import to_onnx, trace
from optpipe.progress import quiet
from optpipe.target import InstructionSet, Target
from optpipe.task import Task, batch_of, call, tensors_in

ONNX, OPENVINO, AOTINDUCTOR = "model.onnx", "model.xml", "model.pt2"
# On processors that add pairs of products in int16, as optpipe's own do.
SEVEN_BITS = Target().int8_instructions() is InstructionSet.avx2


def export(model: nn.Module, task: Task, path: Path, *, rewrite: bool = True) -> None:
    """Write the ONNX file of `model`; without `rewrite` as torch exports it, with it as optpipe does."""
    names = {"input_names": task.input_names, "output_names": task.output_names}
    to_onnx(trace(model, task), path, rewrite=rewrite, **names)


def feed(inputs: Any, task: Task) -> dict[str, Any]:
    """A batch by the names that the exported file gives its inputs."""
    tensors = tensors_in(inputs)
    return dict(zip(task.input_names or ["input"], (tensor.numpy() for tensor in tensors), strict=True))


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """The task's calibration split as ONNX Runtime's quantiser reads it."""

    def __init__(self, task: Task) -> None:
        self._feeds: Iterator[dict[str, Any]] = (feed(batch, task) for batch, _ in task.calibration)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


# ONNX Runtime, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html


def onnxruntime_static(
    exported: Path, path: Path, task: Task, *, operators: Sequence[str] = (), symbolic_shapes: bool = True
) -> None:
    """Pre-processed, weights per channel, unsigned activations and signed weights; `operators`, or all that it can."""
    prepared = exported.with_name("prepared.onnx")
    quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=not symbolic_shapes)
    quantize_static(
        str(prepared),
        str(path),
        Calibration(task),
        op_types_to_quantize=list(operators) or None,
        per_channel=True,
        reduce_range=SEVEN_BITS,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def onnxruntime_static_defaults(exported: Path, path: Path, task: Task) -> None:
    quantize_static(str(exported), str(path), Calibration(task))


def onnxruntime_dynamic(exported: Path, path: Path, *, symbolic_shapes: bool = True) -> None:
    """Pre-processed, weights per channel."""
    prepared = exported.with_name("prepared.onnx")
    quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=not symbolic_shapes)
    quantize_dynamic(str(prepared), str(path), per_channel=True, reduce_range=SEVEN_BITS)


def onnxruntime_dynamic_defaults(exported: Path, path: Path) -> None:
    quantize_dynamic(str(exported), str(path))


# NNCF, https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html


def nncf_onnx(exported: Path, path: Path, task: Task, *, transformer: bool = False) -> None:
    """Write to `path` what NNCF makes of the ONNX file `exported`."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    batches = [feed(batch, task) for batch, _ in task.calibration]
    quantised = nncf.quantize(
        onnx.load(exported),
        nncf.Dataset(batches),
        subset_size=len(batches),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    onnx.save(quantised, path)


def nncf_openvino(
    model: nn.Module, folder: Path, task: Task, *, transformer: bool = False, batch_size: int = 0, mixed: bool = False
) -> None:
    """What NNCF makes of `model` as OpenVINO converts it, with free batch size, or for `batch_size` samples alone.

    mixed: activations with both signs get ranges that need not be symmetric (its documentation's advice for what is
        not a relu).
    """
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    example = batch_of(task.example_inputs, 2)
    converted = ov.convert_model(copy.deepcopy(model).eval(), example_input=example)
    free = [[-1, *tensor.shape[1:]] for tensor in tensors_in(example)]
    converted.reshape(dict(zip(converted.inputs, map(ov.PartialShape, free), strict=True)))
    batches = [[tensor.numpy() for tensor in tensors_in(inputs)] for inputs, _ in task.calibration]
    quantised = nncf.quantize(
        converted,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        **({"preset": nncf.QuantizationPreset.MIXED} if mixed else {}),
    )
    if batch_size:
        fixed = [[batch_size, *shape[1:]] for shape in free]
        quantised.reshape(dict(zip(quantised.inputs, map(ov.PartialShape, fixed), strict=True)))
    ov.save_model(quantised, folder / OPENVINO)


# AOTInductor, https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html


def aotinductor(
    model: nn.Module, folder: Path, task: Task, *, int8: bool = False, batch_size: int = 0, **configs: Any
) -> None:
    """`model` compiled with free batch size, or for `batch_size` samples; in int8 by torchao's quantiser for x86.

    configs: Inductor's. Its loops are compiled for one thread, which all contenders have: for two, they would wait for
        each other on one core.
    """
    import torch
    from torch.export import Dim
    from torch.export import export as torch_export

    model = copy.deepcopy(model).eval()
    example = tuple(tensors_in(batch_of(task.example_inputs, batch_size or 2)))
    free = tuple({0: Dim("batch", min=1, max=1024)} for _ in example)
    with torch.no_grad(), quiet("torch"):
        if int8:
            several = tuple(tensors_in(batch_of(task.example_inputs, 2)))
            model = in_int8(torch_export(model, several, dynamic_shapes=free).module(), task)
        program = torch_export(model, example, dynamic_shapes=None if batch_size else free)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / AOTINDUCTOR), inductor_configs={"cpp.threads": 1, **configs}
        )


def in_int8(graph: nn.Module, task: Task) -> nn.Module:
    """https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html"""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    for inputs, _ in task.calibration:
        call(prepared, inputs)
    return move_exported_model_to_eval(convert_pt2e(prepared))  # type: ignore[no-any-return]


# Olive, https://microsoft.github.io/Olive


def olive(exported: Path, path: Path, task: Task, passes: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Write to `path` what Olive's `passes`, each with its settings, make of the file `exported`."""
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes.olive_pass import create_pass_from_dict

    @Registry.register_dataloader(name="task_calibration")  # type: ignore[untyped-decorator]
    def batches(dataset: Any, **_: Any) -> list[Any]:
        return [(feed(inputs, task), target) for inputs, target in task.calibration]

    @Registry.register_dataset(name="task_samples")  # type: ignore[untyped-decorator]
    def samples(**_: Any) -> list[Any]:
        return []

    data = DataConfig(
        name="calibration",
        load_dataset_config=DataComponentConfig(type="task_samples"),
        pre_process_data_config=DataComponentConfig(type="skip_pre_process"),
        post_process_data_config=DataComponentConfig(type="skip_post_process"),
        dataloader_config=DataComponentConfig(type="task_calibration"),
    )
    model = ONNXModelHandler(str(exported))
    packages = OlivePackageConfig.load_default_config()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, settings) in enumerate(passes):
            kind = packages.import_pass_module(name)
            of_data = {"data_config": data} if "Static" in name else {}
            made = create_pass_from_dict(kind, {**of_data, **settings}, disable_search=True)
            model = made.run(model, str(Path(scratch) / str(number) / ONNX))
        shutil.copyfile(model.model_path, path)
