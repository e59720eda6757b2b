"""Names for parameters that were saved as a list, as diffusers' EMAModel does: from their shapes, in their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Sizes = dict[str, int]

LINEAR = "{0}.weight:{1} {2}, {0}.bias:{1}"
DIT_FIRST = "pos_embed:1 n d, x_embedder.proj.weight:d c p p, x_embedder.proj.bias:d, " + ", ".join(
    (LINEAR.format("t_embedder.mlp.0", "d", "f"), LINEAR.format("t_embedder.mlp.2", "d", "d"))
)
DIT_LABELS = "y_embedder.embedding_table.weight:k d"
DIT_QKV = LINEAR.format("attn.qkv", "q", "d")
DIT_NORMS = "attn.q_norm.weight:h, attn.q_norm.bias:h, attn.k_norm.weight:h, attn.k_norm.bias:h"
DIT_REST = ", ".join(
    LINEAR.format(*each)
    for each in (
        ("attn.proj", "d", "d"),
        ("mlp.fc1", "m", "d"),
        ("mlp.fc2", "d", "m"),
        ("adaLN_modulation.1", "a", "d"),
    )
)
DIT_BLOCKS = (f"{DIT_QKV}, {DIT_NORMS}, {DIT_REST}", f"{DIT_QKV}, {DIT_REST}")
DIT_PROJECTOR = ", ".join(LINEAR.format(*each) for each in (("0", "x", "d"), ("2", "x", "x"), ("4", "z", "x")))
DIT_LAST = ", ".join(LINEAR.format(*each) for each in (("linear", "o", "d"), ("adaLN_modulation.1", "b", "d")))

ADM_FIRST = ", ".join((LINEAR.format("time_embed.0", "e", "w"), LINEAR.format("time_embed.2", "e", "e")))
ADM_LABELS = "label_emb.weight:k e"
ADM_INPUT = "input_blocks.0.0.weight:c i 3 3, input_blocks.0.0.bias:c"
RESIDUAL = (
    "in_layers.0.weight:c, in_layers.0.bias:c, in_layers.2.weight:o c 3 3, in_layers.2.bias:o, "
    "emb_layers.1.weight:a e, emb_layers.1.bias:a, out_layers.0.weight:o, out_layers.0.bias:o, "
    "out_layers.3.weight:o o 3 3, out_layers.3.bias:o"
)
SKIP = ", skip_connection.weight:o c 1 1, skip_connection.bias:o"
ATTENTION = "norm.weight:c, norm.bias:c, qkv.weight:q c 1 1, qkv.bias:q, proj_out.weight:c c 1 1, proj_out.bias:c"
RESAMPLING = "weight:c c 3 3, bias:c"
ADM_LAYERS = (RESIDUAL + SKIP, RESIDUAL, ATTENTION, RESAMPLING)
ADM_LAST = "out.0.weight:c, out.0.bias:c, out.2.weight:o c 3 3, out.2.bias:o"
"""Parts of networks: names of parameters in order, and their shapes, in which a letter is one size throughout."""


class Part(NamedTuple):
    """Parameters that follow one another."""

    template: str
    names: list[str]


class Reader:
    """Shapes that are still to be named."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self.parts: list[Part] = []
        self.position = 0

    def take(self, template: str, prefix: str = "", known: Mapping[str, int] | None = None) -> Sizes | None:
        """Name the next shapes by a template; the sizes of its letters, or None where they do not fit."""
        wanted = [each.split(":") for each in template.split(", ")]
        found, sizes = self.shapes[self.position : self.position + len(wanted)], dict(known or {})
        if len(found) < len(wanted):
            return None
        for (_, letters), shape in zip(wanted, found, strict=True):
            if len(letters.split()) != len(shape):
                return None
            for letter, size in zip(letters.split(), shape, strict=True):
                if (int(letter) if letter.isdigit() else sizes.setdefault(letter, size)) != size:
                    return None
        self.parts.append(Part(template, [prefix + name for name, _ in wanted]))
        self.position += len(wanted)
        return sizes

    def names(self) -> list[str] | None:
        """Those of all shapes; None where some have none."""
        return [n for part in self.parts for n in part.names] if self.position == len(self.shapes) else None


def names_of(shapes: Sequence[Shape]) -> list[str] | None:
    """The names of a network's parameters, in the order of `Module.parameters`; None for a network of no known family.

    It may be ADM's, or that of DiT, SiT or REPA.
    """
    for read in (_dit, _adm):
        if names := read(Reader(shapes)):
            return names
    return None


def _dit(reader: Reader) -> list[str] | None:
    sizes = reader.take(DIT_FIRST)
    if sizes is None or reader.take(DIT_LABELS, "", width := {"d": sizes["d"]}) is None:
        return None
    for number in range(len(reader.shapes)):
        if not any(reader.take(block, f"blocks.{number}.", width) for block in DIT_BLOCKS):
            break
    for number in range(len(reader.shapes)):
        if not reader.take(DIT_PROJECTOR, f"projectors.{number}.", width):
            break
    return reader.names() if reader.take(DIT_LAST, "final_layer.", width) else None


def _adm(reader: Reader) -> list[str] | None:
    sizes = reader.take(ADM_FIRST)
    if sizes is None:
        return None
    embedding = {"e": sizes["e"]}
    reader.take(ADM_LABELS, "", embedding)
    reader.take(ADM_INPUT)
    begin = len(reader.parts)
    while any(reader.take(layer, "", embedding) for layer in ADM_LAYERS):
        pass
    layers = reader.parts[begin:]
    if not reader.take(ADM_LAST):
        return None
    kinds = [layer.template for layer in layers]
    inputs = [0, *itertools.accumulate(int(kind != ATTENTION) for kind in kinds)]
    outputs = [0, *itertools.accumulate(int(kind == RESIDUAL + SKIP) for kind in kinds)]
    for middle in range(len(layers) - 2):
        fits = kinds[middle : middle + 3] == [RESIDUAL, ATTENTION, RESIDUAL]
        # As many input blocks, with the first convolution, as output blocks: true of one middle at most.
        if fits and 0 < inputs[middle] == outputs[-1] - outputs[middle] - 1:
            prefixes = _prefixes(kinds[:middle], lambda kind: kind != ATTENTION, "input_blocks", 1, "op.")
            prefixes += [f"middle_block.{i}." for i in range(3)]
            prefixes += _prefixes(
                kinds[middle + 3 :], lambda kind: kind == RESIDUAL + SKIP, "output_blocks", 0, "conv."
            )
            for layer, prefix in zip(layers, prefixes, strict=True):
                layer.names[:] = [prefix + name for name in layer.names]
            return reader.names()
    return None


def _prefixes(kinds: Sequence[str], begins: Callable[[str], bool], name: str, first: int, resampling: str) -> list[str]:
    """The beginning of the names of each layer, in blocks that are numbered from `first`."""
    number, place, prefixes = first - 1, 0, []
    for kind in kinds:
        number, place = (number + 1, 0) if begins(kind) else (number, place + 1)
        prefixes.append(f"{name}.{number}.{place}.{resampling if kind == RESAMPLING else ''}")
    return prefixes
