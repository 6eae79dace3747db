# Kernels: what looks like Python here is read by triton's compiler, which has rules of its own.
# ruff: noqa: SIM102, SIM108
# mypy: disable-error-code="no-untyped-def"
"""The step in one launch.

Programs measure tiles (and multiply those of layers selected before, or update by all); the last
program of a layer adds the layer up; the last of all commits the state and decides. Where what is
written depends on this step's sums, the programs wait for that and write in a second phase.

Programs tell each other that they are done by tickets: one more atomic increment each, and the
one that takes the last resets it. Sums are added in the order of tiles, whoever adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    ADDRESS_BITS,
    BUCKET_LOG2,
    CONFIG_EXACT,
    DTYPE_COUNT,
    DTYPE_SHIFT,
    FIRST_BUCKET,
    FIRST_TILE,
    GENERATION,
    GROUPS,
    GROUPS_FROM,
    LAYER,
    LAYER_TICKETS,
    LONG_LOG2,
    NONFINITE,
    NUMEL,
    PROGRAMS,
    ROW,
    ROW_MULTIPLIER,
    ROW_POWER,
    TENSOR_FIELDS,
    TILES,
    TILES_FROM,
    TILING_FIELDS,
    UPDATE_WORDS,
)
from .decide import (
    active_factor,
    amplification,
    apply_norm,
    commit,
    is_finite,
    is_measured,
    needs_norm,
    next_weight,
    skip_call,
)
from .tile import (
    TILE,
    WIDTH,
    fold_buckets,
    measure_elements,
    store_total,
    total,
    write_elements,
)
from .update import count_updates, policy_for

MEASURE, WRITE = tl.constexpr(1), tl.constexpr(2)  # phases
# Tiles of one layer that one program adds up before the last one adds the layer's groups. A program
# looks at WIDTH = 64 rows together, so that even the 65,536 tiles of 268 million elements are added
# up in two rounds of four looks. (csrc/cuda has groups of 32, a tile for each lane of a warp.)
GROUP = tl.constexpr(256)


@triton.constexpr_function
def element(code):
    """The dtype of a code: in the order of ``DTYPES`` in model/gradients.py."""
    return (tl.float32, tl.bfloat16, tl.float16, tl.float64)[code]


@triton.constexpr_function
def words_of(update):
    """Words of each tensor in the table of addresses."""
    return UPDATE_WORDS.value if update else 1


@triton.jit
def _is_last(ticket, count):
    """Whether all ``count`` tickets are taken; the last sees what the others stored before."""
    tl.debug_barrier()
    taken = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = taken == count - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _await(word, before):
    """Until the word is not what it was. Loads wait side by side; of atomics one is done at a time.

    The one at the end makes what was stored before the word changed visible here.
    """
    now = tl.load(word, volatile=True)
    while now == before:
        now = tl.load(word, volatile=True)
    tl.atomic_add(word, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _inverse_scale(grad_scale):
    """1 / grad_scale, rounded once to fp32, given the address of a float or 0."""
    inverse = tl.full([], 1.0, tl.float64)
    if grad_scale != 0:
        scale = tl.load(grad_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
        inverse = (1.0 / scale).to(tl.float32).to(tl.float64)
    return inverse


@triton.jit
def _publish(tile_rows, group_rows, layer_rows, layer_tiles, tickets, tile, layer, layers, inverse):
    """The last program of a group of tiles adds it up, the last of a layer's groups the layer."""
    of_layer = layer_tiles + layer * TILING_FIELDS
    first, tiles = tl.load(of_layer + TILES_FROM), tl.load(of_layer + TILES)
    first_group, groups = tl.load(of_layer + GROUPS_FROM), tl.load(of_layer + GROUPS)
    number = (tile - first) // GROUP
    begin = number * GROUP
    count = tl.minimum(tiles - begin, GROUP)
    group = first_group + number
    if _is_last(tickets + LAYER_TICKETS + layers + 1 + group, count):
        n, mean, m2, power, dot, old, new = total(tile_rows + (first + begin) * ROW, count)
        store_total(group_rows + group * ROW, n, mean, m2, power, dot, old, new)
        if _is_last(tickets + LAYER_TICKETS + layer, groups):
            n, mean, m2, power, dot, old, new = total(group_rows + first_group * ROW, groups)
            mean = mean * inverse
            m2 = m2 * inverse * inverse
            store_total(layer_rows + layer * ROW, n, mean, m2, power, dot, old, new)
            sound = is_finite(m2 + n * mean * mean + power + tl.abs(dot) + new)
            if (layer < layers) & (n > 0) & (not sound):
                tl.store(tickets + NONFINITE, 1)


@triton.jit
def _measure_tile(
    values, sketch, parity, config, tensors, addresses, row, tensor, tile, inverse, own, common,
    acts, buckets, DTYPES: tl.constexpr, BY_BITS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    info = tensors + tensor * TENSOR_FIELDS
    tagged = tl.load(addresses + tensor * words_of(UPDATE))
    dtype = (tagged >> DTYPE_SHIFT).to(tl.int32)
    address = tagged & ADDRESS_BITS
    if address == 0:
        for i in tl.static_range(ROW):
            tl.store(row + i, inverse * 0.0)
    else:
        first = (tile - tl.load(info + FIRST_TILE)) * TILE
        count = tl.minimum(tl.load(info + NUMEL) - first, TILE).to(tl.int32)
        bucket_log2 = tl.load(info + BUCKET_LOG2).to(tl.int32)
        before, after = sketch, sketch
        if bucket_log2 >= 0:
            side = tl.load(parity + tensor).to(tl.int64)
            place = sketch + tl.load(info + FIRST_BUCKET) + (first >> bucket_log2)
            before, after = place + side * buckets, place + (1 - side) * buckets
        policy = policy_for(addresses, tensor, own, common, acts, UPDATE)
        for code in tl.static_range(DTYPE_COUNT):
            if (DTYPES >> code) & 1:
                if dtype == code:
                    measure_elements(
                        address, first, count, policy, after, bucket_log2, row,
                        element(code), BY_BITS, UPDATE,
                    )  # fmt: skip
        tl.debug_barrier()
        if bucket_log2 >= 0:
            weight = next_weight(values, tl.load(info + LAYER), config)
            length = (count + (1 << bucket_log2) - 1) >> bucket_log2
            if bucket_log2 == LONG_LOG2:  # a tile has eight of them
                fold_buckets(before, after, length, inverse, weight, row, 8)
            else:
                fold_buckets(before, after, length, inverse, weight, row, 256)
        else:
            for i in tl.static_range(ROW_POWER, ROW):
                tl.store(row + i, inverse * 0.0)


@triton.jit
def _write_tile(
    tensors, addresses, tensor, tile, own, common,
    DTYPES: tl.constexpr, BY_BITS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    info = tensors + tensor * TENSOR_FIELDS
    tagged = tl.load(addresses + tensor * words_of(UPDATE))
    dtype = (tagged >> DTYPE_SHIFT).to(tl.int32)
    address = tagged & ADDRESS_BITS
    if address != 0:
        first = (tile - tl.load(info + FIRST_TILE)) * TILE
        count = tl.minimum(tl.load(info + NUMEL) - first, TILE).to(tl.int32)
        policy = policy_for(addresses, tensor, own, common, count > 0, UPDATE)
        for code in tl.static_range(DTYPE_COUNT):
            if (DTYPES >> code) & 1:
                if dtype == code:
                    write_elements(address, first, count, policy, element(code), BY_BITS, UPDATE)


@triton.jit
def _conclude(
    values, parity, config, tensors, layer_rows, scores, verdict, tickets, addresses, found_inf,
    measured, layers, begins_round, decides, GROWS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """By the last program, when every tile is measured."""
    factor = active_factor(values, config, begins_round)
    coefficient = factor * 0.0 + 1.0
    nonfinite = tl.load(tickets + NONFINITE, cache_modifier=".cg") != 0
    if nonfinite:
        tl.store(tickets + NONFINITE, 0)
        skip_call(values, config, begins_round)
        if found_inf != 0:
            tl.store(found_inf.to(tl.pointer_type(tl.float32)), 1.0)
    else:
        commit(values, config, layer_rows, scores, layers, factor, begins_round, decides, GROWS)
        tl.debug_barrier()
        if needs_norm(config):
            coefficient = apply_norm(values, config, layer_rows, layers)
        for begin in range(0, measured, WIDTH):
            index = begin + tl.arange(0, WIDTH)
            inside = index < measured
            word = addresses + index * words_of(UPDATE)
            here = tl.load(word, mask=inside, other=0) != 0
            layer = tl.load(tensors + index * TENSOR_FIELDS + LAYER, mask=inside, other=0)
            here = here & is_measured(values, layer_rows, layer, inside)
            side = tl.load(parity + index, mask=inside, other=0)
            tl.store(parity + index, 1 - side, mask=inside & here)
    tl.store(verdict, tl.where(nonfinite, 0.0, 1.0).to(tl.float64))
    tl.store(verdict + 1, coefficient)


# Numbers whose values change nothing in what is compiled.
_NUMBERS = (
    *("grad_scale", "found_inf", "measured", "layers", "buckets", "measured_tiles", "tiles"),
    *("unscale", "begins_round", "decides", "phases", "slots"),
)


@triton.jit(do_not_specialize=_NUMBERS)
def step_kernel(
    values, sketch, parity, config,
    tensors, tile_tensor, layer_tiles,
    tile_rows, group_rows, layer_rows, scores, verdict, tickets,
    addresses, grad_scale: tl.int64, found_inf: tl.int64,
    measured: tl.int32, layers: tl.int32, buckets: tl.int64,
    measured_tiles: tl.int32, tiles: tl.int32, unscale: tl.int32,
    begins_round: tl.int32, decides: tl.int32, phases: tl.int32, slots: tl.int32,
    DTYPES: tl.constexpr, BY_BITS: tl.constexpr, GROWS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """``phases`` has the bits MEASURE and WRITE; both only if all programs run at one time.

    ``grad_scale`` and ``found_inf`` are addresses of floats or 0. ``DTYPES`` has a bit for each
    dtype that is there. ``GROWS`` is the option: without it the kernel has no
    registers to spare for growth. ``UPDATE`` is the optimizer's rule, 0 if gradients are written.
    ``slots`` are the rows of ``addresses``, which has words for each tensor by ``words_of``.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    norm = needs_norm(config)
    inverse = _inverse_scale(grad_scale)
    if UPDATE == 0:
        rescale = tl.where(unscale != 0, inverse, 1.0)
    else:
        rescale = inverse  # gradients are only read
    write_now = (tl.load(config + CONFIG_EXACT) == 0) & (not norm)
    generation = tl.load(tickets + GENERATION, cache_modifier=".cg")
    skipped = program < 0
    if ((phases & MEASURE) != 0) & (found_inf != 0):
        skipped = tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0

    if phases & MEASURE:
        if skipped:
            if program == 0:
                skip_call(values, config, begins_round)
                tl.store(verdict, inverse * 0.0)
        else:
            factor = active_factor(values, config, begins_round)
            for tile in range(program, tl.where(norm, tiles, measured_tiles), programs):
                tensor = tl.load(tile_tensor + tile).to(tl.int64)
                layer = tl.load(tensors + tensor * TENSOR_FIELDS + LAYER).to(tl.int32)
                own = factor * 0.0 + 1.0
                if write_now:
                    # An excluded tensor's layer is -1.
                    own = amplification(values, layer, layer >= 0, factor, GROWS)
                    if UPDATE == 0:
                        own = own * rescale
                _measure_tile(
                    values, sketch, parity, config, tensors, addresses,
                    tile_rows + tile * ROW, tensor, tile, inverse, own, rescale,
                    write_now, buckets, DTYPES, BY_BITS, UPDATE,
                )  # fmt: skip
                _publish(
                    tile_rows, group_rows, layer_rows, layer_tiles, tickets, tile,
                    tl.where(layer < 0, layers, layer), layers, inverse,
                )  # fmt: skip
            if write_now & ((rescale != 1) | (UPDATE != 0)):
                for tile in range(measured_tiles + program, tiles, programs):
                    tensor = tl.load(tile_tensor + tile).to(tl.int64)
                    own = rescale
                    if UPDATE != 0:
                        own = rescale * 0.0 + 1.0
                    _write_tile(
                        tensors, addresses, tensor, tile, own, rescale, DTYPES, BY_BITS, UPDATE
                    )
            if _is_last(tickets + PROGRAMS, programs):
                if UPDATE != 0:
                    if write_now:
                        count_updates(addresses, slots)
                _conclude(
                    values, parity, config, tensors, layer_rows, scores, verdict, tickets,
                    addresses, found_inf, measured, layers, begins_round, decides, GROWS, UPDATE,
                )  # fmt: skip
                tl.debug_barrier()
                tl.atomic_add(tickets + GENERATION, 1, sem="release", scope="gpu")

    if phases & WRITE:
        if ((phases & MEASURE) != 0) & (not skipped):
            _await(tickets + GENERATION, generation)
        counted = tl.load(verdict, cache_modifier=".cg") != 0
        if counted & (not skipped):
            common = rescale * tl.load(verdict + 1, cache_modifier=".cg")
            # Backwards: what was read last may still be cached.
            for i in range(program, tiles, programs):
                tile = tiles - 1 - i
                tensor = tl.load(tile_tensor + tile).to(tl.int64)
                layer = tl.load(tensors + tensor * TENSOR_FIELDS + LAYER).to(tl.int32)
                row = layer_rows + tl.where(layer < 0, layers, layer) * ROW
                own = tl.load(row + ROW_MULTIPLIER, cache_modifier=".cg")
                if UPDATE == 0:
                    own = own * common
                _write_tile(tensors, addresses, tensor, tile, own, common, DTYPES, BY_BITS, UPDATE)
            if UPDATE != 0:
                if _is_last(tickets + PROGRAMS, programs):
                    count_updates(addresses, slots)
