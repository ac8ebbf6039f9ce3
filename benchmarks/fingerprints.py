"""The fingerprint of a program: counts of its operations, without names, numbering or source locations.

A program has two stages that a refactoring must not change (after MaxText's hlo_diff_testing.md):

    lowered    StableHLO as JAX passes it to XLA: the same on every machine
    optimised  HLO as XLA compiles it: for one version of XLA, and possibly one kind of processor

A fingerprint is a dictionary of tables of integers, JSON-serializable. Outlined functions (`func.call`,
`call`) are counted at each call, so that an inner `jit` makes no difference, nor does XLA:CPU's parallel
partitioning of an operation. The contents of TPU kernels are not visible.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.plan import collectives, hlo

Table = dict[str, int]
Fingerprint = dict[str, Table]

# Opcodes whose result bytes are counted: products, and operations that move or store data.
_LOWERED_BYTES = {
    "concatenate",
    "constant",
    "convert",
    "convolution",
    "custom_call",
    "dot_general",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "pad",
    "scatter",
    "sort",
    "transpose",
    "while",  # the state that the loop carries
}
_OPTIMISED_BYTES = {
    "concatenate",
    "constant",
    "convert",
    "convolution",
    "copy",
    "copy-start",
    "custom-call",
    "dot",
    "dynamic-slice",
    "dynamic-update-slice",
    "fusion",
    "gather",
    "scatter",
    "sort",
    "transpose",
    "while",
}
# Opcodes that compute nothing. The bytes of array constants count: a table that was an argument before.
_NON_COMPUTING = {"parameter", "get-tuple-element", "tuple", "call", "constant"}
_CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([^,>]*(?:<\w+>)?)")
_TILING = re.compile(r":[^}]*(?=\})")


def of_lowered(lowered: Any) -> Fingerprint:
    """The fingerprint of a `jax.stages.Lowered`: its StableHLO.

    Tables: `ops`, opcode to count; `bytes`, of the results of some opcodes; `products`, operands and
    contracted dimensions of each product to its count; `arguments` and `results`, types. A loop's body counts
    once: its trip count is not in the text.
    """
    functions = {
        op.operation.attributes["sym_name"].value: op.operation
        for op in lowered.compiler_ir("stablehlo").body.operations
        if op.operation.name == "func.func"
    }
    tables = _tables("ops", "bytes", "products")
    for op in _operations(functions, functions["main"]):
        opcode = op.name.removeprefix("stablehlo.")
        results = [_array(str(value.type)) for value in op.results]
        if opcode in _LOWERED_BYTES:
            tables["bytes"][opcode] += sum(size for kind, size in results if "[]" not in kind)
        if opcode == "custom_call":
            opcode += " " + op.attributes["call_target_name"].value
        tables["ops"][opcode] += opcode != "constant"
        if opcode == "dot_general":
            operands = [_array(str(value.type))[0] for value in op.operands]
            tables["products"][_product(operands, str(op.attributes["dot_dimension_numbers"]))] += 1
    main = functions["main"].attributes["function_type"].value
    tables["arguments"] = collections.Counter(_array(str(kind))[0] for kind in main.inputs)
    tables["results"] = collections.Counter(_array(str(kind))[0] for kind in main.results)
    return _without_zeros(tables)


def of_compiled(compiled: Any) -> Fingerprint:
    """The fingerprint of a `jax.stages.Compiled`: its optimized HLO, and its memory.

    Tables: that of `of_text`, and `memory`, bytes of arguments, results and temporaries.
    """
    tables = of_text(compiled.as_text())
    memory = compiled.memory_analysis()
    parts = ("argument_size", "output_size", "alias_size", "temp_size", "peak_memory")
    sizes = {part: getattr(memory, f"{part}_in_bytes", 0) for part in parts}
    return tables | {"memory": {part: size for part, size in sizes.items() if size}}


def of_text(text: str) -> Fingerprint:
    """The fingerprint of optimized HLO.

    Tables: `ops`, opcode to count, with a fusion's kind and a custom call's target; `fused`, the same for
    instructions inside fusions and reductions; `bytes`, of the results of some opcodes, multiplied by the
    trip counts of their loops; `products`, operand types with layouts and contracted dimensions; `arguments`,
    types with layouts; `loops`, trip count to number of loops; `collectives` and their bytes; `whole`, totals
    of the program.
    """
    module = hlo.parse(text)
    tables = _tables("ops", "fused", "bytes", "products", "loops", "collectives", "arguments", "whole")
    types = {name: {i.name: i.shape for i in lines} for name, lines in module.computations.items()}
    seen_collective = False
    for instruction, home, times, fused in _instructions(module, module.entry, 1, False):
        opcode = instruction.opcode
        seen_collective |= opcode.removesuffix("-start") in collectives.COLLECTIVES
        if opcode == "while":
            tables["loops"][_trip_count(module, instruction) or "unknown"] += 1
        if opcode in ("dot", "convolution"):
            names = re.findall(r"[\w.-]+", _between_parentheses(instruction.rest))
            operands = [_plain(types[home][operand]) for operand in names if operand in types[home]]
            tables["products"][_product(operands, instruction.rest)] += 1
        if home == module.entry and opcode == "parameter":
            tables["arguments"][_plain(instruction.shape)] += 1
        tables["fused" if fused else "ops"][_kind(instruction)] += opcode not in _NON_COMPUTING
        if fused:
            continue
        if opcode in _OPTIMISED_BYTES:
            tables["bytes"][_kind(instruction)] += times * _bytes(instruction)
        tables["whole"]["estimated_cycles"] += times * (instruction.cycles or 0)
    if seen_collective:  # only then do all loops have a known bound
        for one in collectives.find(module):
            how = f"{one.kind} {one.dtype} of {one.group}{' async' if one.overlapped else ''}"
            tables["collectives"][f"{how}, count"] += one.times
            tables["collectives"][f"{how}, bytes"] += one.times * one.bytes
    tables["whole"]["donated"] = len(hlo.donated(module))
    return _without_zeros(tables)


def differences(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The rows that differ between two fingerprints, as `table: row: before -> after`."""
    changed = []
    for name in sorted({*before, *after}):
        old, new = before.get(name, {}), after.get(name, {})
        changed += [
            f"{name}: {row}: {old.get(row, 0):,} -> {new.get(row, 0):,}"
            for row in sorted({*old, *new})
            if old.get(row, 0) != new.get(row, 0)
        ]
    return changed


def _tables(*names: str) -> dict[str, collections.Counter[Any]]:
    return {name: collections.Counter() for name in names}


def _without_zeros(tables: Mapping[str, Mapping[Any, int]]) -> Fingerprint:
    """Tables for JSON: string keys, without zero counts."""
    return {
        name: {str(row): count for row, count in table.items() if count}
        for name, table in tables.items()
        if any(table.values())
    }


def _operations(functions: Mapping[str, Any], operation: Any) -> Iterator[Any]:
    """Every operation inside an operation, with called functions inlined at each call."""
    for region in operation.regions:
        for block in region.blocks:
            for view in block.operations:
                inner = view.operation
                if inner.name in ("func.call", "call"):
                    yield from _operations(functions, functions[inner.attributes["callee"].value])
                elif inner.name not in ("func.return", "stablehlo.return"):
                    yield inner
                    yield from _operations(functions, inner)


def _array(kind: str) -> tuple[str, int]:
    """An MLIR type as XLA writes it, and its bytes: `tensor<8x64xbf16>` is `bf16[8,64]`, 1024."""
    found = _TENSOR.match(kind)
    if found is None:
        return kind, 0
    dims = [int(size) for size in found[1].split("x")[:-1]]
    element = re.sub(r"^i(?=\d)", "s", found[2].replace("ui", "u"))
    bits = sum(map(int, re.findall(r"\d+", element)[:1])) * (2 if element.startswith("complex") else 1)
    name = "pred" if element == "s1" else element
    return f"{name}[{','.join(map(str, dims))}]", math.prod(dims) * max(bits, 8) // 8


def _instructions(
    module: hlo.Module, name: str, times: int, fused: bool
) -> Iterator[tuple[hlo.Instruction, str, int, bool]]:
    """(instruction, computation, number of runs, whether inside a fusion) of all reachable instructions.

    Unlike `hlo.executed` it visits every branch and the inside of fusions, and counts a loop with a
    data-dependent bound, as in decoding, once.
    """
    for instruction in module.computations[name]:
        yield instruction, name, times, fused
        inside, trips = fused, 1
        match instruction.opcode:
            case "while":
                trips = _trip_count(module, instruction) or 1
            case "call" | "async-start" | "conditional":
                pass
            case _:
                inside = True
        callees = [
            callee
            for attribute in _CALLS
            for callee in instruction.called(attribute)
            if callee in module.computations
        ]
        for callee in callees:
            yield from _instructions(module, callee, times * trips, inside)


def _trip_count(module: hlo.Module, loop: hlo.Instruction) -> int | None:
    """A loop's trips where the compiler knows them."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    try:
        return hlo.trip_count(module, loop)
    except ValueError:
        return None


def _kind(instruction: hlo.Instruction) -> str:
    """The opcode, with what tells fusions and custom calls apart."""
    opcode, rest = instruction.opcode, instruction.rest
    if opcode == "fusion":
        found = (re.search(r"\bkind=(\w+)", rest), re.search(r'"fusion_config":\{"kind":"(\w+)"', rest))
        return " ".join([opcode, *(one[1] for one in found if one)])
    if opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', rest)):
        return f"{opcode} {target[1]}"
    return opcode


def _product(operands: Sequence[str], attributes: str) -> str:
    """Operands and what of them is contracted: `f32[8,64] f32[64,32] contracting 1 x 0`.

    A weight that is stored the other way round shows in the dimensions, or in a layout. TPU programs write
    products as convolutions, whose labels say the same.
    """
    dims = {
        (side, what): re.sub(r"\s", "", numbers)
        for side, what, numbers in re.findall(
            r"\b([lr])hs_(batch|contracting)\w* ?= ?[\[{]([\d, ]*)", attributes
        )
    }
    words = [
        f"{what} {dims.get(('l', what), '')} x {dims.get(('r', what), '')}"
        for what in ("batch", "contracting")
        if dims.get(("l", what))
    ]
    return " ".join([*operands, *words, *re.findall(r"\bdim_labels=[\w>-]+", attributes)])


def _between_parentheses(text: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place]
    return text


def _plain(shape: str) -> str:
    """A type with its layout, but for tiles and memory spaces."""
    return _TILING.sub("", shape)


def _bytes(instruction: hlo.Instruction) -> int:
    """Of the arrays that it makes; the start of an asynchronous copy lists what it reads as well."""
    sizes = [
        int(math.prod(dims) * hlo.ITEM_BYTES.get(dtype, 1)) for dtype, dims in instruction.arrays if dims
    ]
    return max(sizes, default=0) if instruction.opcode.endswith("-start") else sum(sizes)
