"""Writes tests/golden/quantized: a tiny Llama that reference packages quantize, and what they make of it.

    pip install torch==2.13.0 transformers==5.9.0 bitsandbytes==0.50.2 compressed-tensors==0.20.1
    pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9
    python -m tests.golden.make_quantized

AutoGPTQ and AutoAWQ need CUDA to be imported; the files of their layers, which pack, are loaded alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.golden.quantized import FOLDER

Made = tuple[dict[str, torch.Tensor], torch.Tensor]  # the parts of one matrix by suffix, and its values
CONFIG = transformers.LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
GROUP = 32


def main() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    for name, (settings, quantize) in METHODS.items():
        folder, expected = FOLDER / name, {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tensors = {key: value for key, value in model.state_dict().items() if not key.endswith("proj.weight")}
        for key, value in model.state_dict().items():
            if key.endswith("proj.weight"):
                module = key.removesuffix(".weight")
                parts, values = quantize(value)
                tensors |= {module + suffix: part.contiguous() for suffix, part in parts.items()}
                expected[key] = hashlib.sha256(
                    values.detach().float().contiguous().numpy().tobytes()
                ).hexdigest()
        save_file(tensors, folder / "model.safetensors")
        fields = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(fields, indent=1, default=str) + "\n")
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def bitsandbytes_4bit(kind: str, nested: bool) -> Callable[[torch.Tensor], Made]:
    from bitsandbytes import functional

    def quantize(weight: torch.Tensor) -> Made:
        packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        parts = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {".weight": packed, **parts}, functional.dequantize_4bit(packed, state)

    return quantize


def bitsandbytes_8bit(weight: torch.Tensor) -> Made:
    from bitsandbytes import functional

    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    parts = {".weight": codes, ".SCB": scale, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, functional.int8_vectorwise_dequant(codes, scale)


def auto_gptq(bits: int, act_order: bool) -> Callable[[torch.Tensor], Made]:
    layer_type = _load("auto_gptq", "nn_modules/qlinear/qlinear_cuda_old.py").QuantLinear

    def quantize(weight: torch.Tensor) -> Made:
        outputs, inputs = weight.shape
        linear = torch.nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = weight.half()
        groups = torch.arange(inputs, dtype=torch.int32) // GROUP
        if act_order:
            groups = groups[torch.randperm(inputs)]
        low = torch.stack([weight.float()[:, groups == g].amin(1) for g in range(inputs // GROUP)], 1)
        high = torch.stack([weight.float()[:, groups == g].amax(1) for g in range(inputs // GROUP)], 1)
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(-low / scale).clamp(1, 2**bits - 1)
        layer = layer_type(bits, GROUP, inputs, outputs, bias=False)
        layer.pack(linear, scale, zero, groups)
        parts = {f".{key}": value for key, value in layer.state_dict().items()}
        layer.use_cuda_fp16 = False
        return parts, layer.eval()(torch.eye(inputs, dtype=torch.float16)).T

    return quantize


def auto_awq(weight: torch.Tensor) -> Made:
    for name in ("awq", "awq.utils", "awq.utils.module", "awq.utils.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["awq.utils.module"].try_import = lambda _: (None, "no extension")  # type: ignore[attr-defined]
    sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
    packing = _load("awq", "utils/packing_utils.py")
    sys.modules["awq.utils.packing_utils"] = packing
    gemm = _load("awq", "modules/linear/gemm.py")
    outputs, inputs = weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    grouped = weight.float().reshape(outputs, -1, GROUP)
    scale = ((grouped.amax(-1) - grouped.amin(-1)) / 15).half()
    zero = torch.round(-grouped.amin(-1) / scale).clamp(0, 15)
    codes = torch.round(grouped / scale[..., None] + zero[..., None]).clamp(0, 15)
    linear.weight.data = ((codes - zero[..., None]) * scale[..., None]).reshape(outputs, inputs).half()
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scale.T, zeros=zero.T.float())
    parts = {f".{key}": value for key, value in layer.state_dict().items()}
    values = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP)
    return parts, values.T


def fine_grained_fp8(weight: torch.Tensor) -> Made:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    blocks = weight.float().reshape(weight.shape[0] // GROUP, GROUP, -1, GROUP)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scale}, Fp8Dequantize(None)._dequantize_one(codes, scale)


def compressed(settings: dict[str, Any]) -> Callable[[torch.Tensor], Made]:
    import compressed_tensors.compressors  # noqa: F401
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    (scheme,) = QuantizationConfig.model_validate(settings).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(settings["format"])

    def quantize(weight: torch.Tensor) -> Made:
        rows = weight.reshape(len(weight), -1, GROUP) if scheme.weights.group_size else weight[:, None]
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        parts = compressor.compress(state, scheme)
        values = compressor.decompress(dict(parts), scheme)["weight"]
        return {f".{key}": value for key, value in parts.items()}, values

    return quantize


def _load(package: str, path: str) -> types.ModuleType:
    """Loads one file of a package without importing the package."""
    root = importlib.metadata.distribution({"awq": "autoawq", "auto_gptq": "auto-gptq"}[package])
    file = Path(str(root.locate_file(package))) / path
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _scheme(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_GROUPED = {"type": "int", "strategy": "group", "group_size": GROUP}
_SCHEMES = {
    "compressed-int4": _scheme("pack-quantized", num_bits=4, symmetric=True, **_GROUPED),
    "compressed-int4-zeros": _scheme("pack-quantized", num_bits=4, symmetric=False, **_GROUPED),
    "compressed-int8": _scheme("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "compressed-fp8": _scheme(
        "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True
    ),
}
_BNB = {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}
_GPTQ = {"quant_method": "gptq", "group_size": GROUP}
METHODS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Made]]] = {
    "nf4": (_BNB | {"load_in_4bit": True}, bitsandbytes_4bit("nf4", False)),
    "nf4-nested": (_BNB | {"load_in_4bit": True}, bitsandbytes_4bit("nf4", True)),
    "fp4": (_BNB | {"load_in_4bit": True}, bitsandbytes_4bit("fp4", False)),
    "int8": (_BNB | {"load_in_8bit": True}, bitsandbytes_8bit),
    **{f"gptq-{bits}": (_GPTQ | {"bits": bits}, auto_gptq(bits, False)) for bits in (2, 3, 4, 8)},
    "gptq-4-act-order": (_GPTQ | {"bits": 4, "desc_act": True}, auto_gptq(4, True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, auto_awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, fine_grained_fp8),
    **{name: (settings, compressed(settings)) for name, settings in _SCHEMES.items()},
}

if __name__ == "__main__":
    main()
