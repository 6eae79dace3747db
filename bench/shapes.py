"""The parameters of well-known models, written as shapes: nothing is downloaded or built.

Each entry of ``MODELS`` returns parameter name -> shape, in the order of the model's
``parameters()``. Names and shapes are those of torchvision 0.29 and of Hugging Face's GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Named = Iterator[tuple[str, Shape]]


def elements(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _linear(name: str, outputs: int, inputs: int) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Named:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _convolution(name: str, norm: str, outputs: int, inputs: int, size: int) -> Named:
    yield f"{name}.weight", (outputs, inputs, size, size)
    yield from _norm(norm, outputs)


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> Named:
    yield from _convolution("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = width * 4 if bottleneck else width
        for block in range(depth):
            path = f"layer{stage + 1}.{block}"
            sizes = (1, 3, 1) if bottleneck else (3, 3)
            before = inputs
            for number, size in enumerate(sizes, 1):
                after = outputs if number == len(sizes) else width
                yield from _convolution(
                    f"{path}.conv{number}", f"{path}.bn{number}", after, before, size
                )
                before = after
            if inputs != outputs:
                yield from _convolution(
                    f"{path}.downsample.0", f"{path}.downsample.1", outputs, inputs, 1
                )
            inputs = outputs
    yield from _linear("fc", 1000, inputs)


def _vgg19() -> Named:
    layer, inputs = 0, 3
    for channels, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            yield f"features.{layer}.weight", (channels, inputs, 3, 3)
            yield f"features.{layer}.bias", (channels,)
            inputs = channels
            layer += 2
        layer += 1
    for number, (outputs, before) in enumerate(((4096, 25088), (4096, 4096), (1000, 4096))):
        yield from _linear(f"classifier.{3 * number}", outputs, before)


def _vit_b_16() -> Named:
    width, mlp = 768, 3072
    yield "class_token", (1, 1, width)
    yield "conv_proj.weight", (width, 3, 16, 16)
    yield "conv_proj.bias", (width,)
    yield "encoder.pos_embedding", (1, 197, width)
    for block in range(12):
        path = f"encoder.layers.encoder_layer_{block}"
        yield from _norm(f"{path}.ln_1", width)
        yield f"{path}.self_attention.in_proj_weight", (3 * width, width)
        yield f"{path}.self_attention.in_proj_bias", (3 * width,)
        yield from _linear(f"{path}.self_attention.out_proj", width, width)
        yield from _norm(f"{path}.ln_2", width)
        yield from _linear(f"{path}.mlp.0", mlp, width)
        yield from _linear(f"{path}.mlp.3", width, mlp)
    yield from _norm("encoder.ln", width)
    yield from _linear("heads.head", 1000, width)


def _gpt2() -> Named:
    width = 768
    yield "transformer.wte.weight", (50257, width)
    yield "transformer.wpe.weight", (1024, width)
    for block in range(12):
        path = f"transformer.h.{block}"
        yield from _norm(f"{path}.ln_1", width)
        for name, inputs, outputs in (("c_attn", width, 3 * width), ("c_proj", width, width)):
            yield f"{path}.attn.{name}.weight", (inputs, outputs)
            yield f"{path}.attn.{name}.bias", (outputs,)
        yield from _norm(f"{path}.ln_2", width)
        for name, inputs, outputs in (("c_fc", width, 4 * width), ("c_proj", 4 * width, width)):
            yield f"{path}.mlp.{name}.weight", (inputs, outputs)
            yield f"{path}.mlp.{name}.bias", (outputs,)
    yield from _norm("transformer.ln_f", width)


def _llama_1b() -> Named:
    """22 layers of width 2048 with grouped queries, as in TinyLlama: 1.1 billion parameters."""
    width, mlp, keys = 2048, 5632, 256
    yield "model.embed_tokens.weight", (32000, width)
    for block in range(22):
        path = f"model.layers.{block}"
        for name, outputs in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield f"{path}.self_attn.{name}_proj.weight", (outputs, width)
        yield f"{path}.mlp.gate_proj.weight", (mlp, width)
        yield f"{path}.mlp.up_proj.weight", (mlp, width)
        yield f"{path}.mlp.down_proj.weight", (width, mlp)
        yield f"{path}.input_layernorm.weight", (width,)
        yield f"{path}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (32000, width)


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet18": lambda: dict(_resnet((2, 2, 2, 2), bottleneck=False)),
    "resnet50": lambda: dict(_resnet((3, 4, 6, 3), bottleneck=True)),
    "vgg19": lambda: dict(_vgg19()),
    "vit_b_16": lambda: dict(_vit_b_16()),
    "gpt2": lambda: dict(_gpt2()),
    "llama_1b": lambda: dict(_llama_1b()),
}

TITLES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg19": "VGG-19",
    "vit_b_16": "ViT-B/16",
    "gpt2": "GPT-2 small",
    "llama_1b": "Llama-like 1.1 B",
}
