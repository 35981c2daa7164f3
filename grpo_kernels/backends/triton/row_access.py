"""How the row kernels read and write rows, wherever in memory a row starts.

A row is processed in tiles [UNROLL, LANES, VEC]. A vector is VEC neighbours that belong to one
lane: 16 bytes of logits. With an odd vocabulary most rows start between two vectors of the memory.
ALIGNMENT is what the launcher knows of all rows that a kernel reads and writes:

    "vector"  each row starts where a vector starts
    "equal"   the rows of one token start at the same distance from a vector, in all tensors
    "any"     nothing

A pass that only reads counts its vectors from the row's first entry. The same entries are then
added in the same order wherever the row starts: the bits of its sums do not depend on its address.
Rows that are not aligned are loaded in words of 4 bytes, because a load of 16 bytes would fault.
Each load takes one word of each lane. Loads of neighbouring words would spread a vector over lanes,
and Triton would shuffle it together in the loop.

A pass that writes computes entry by entry. It counts its vectors from the first that starts in the
row of the result, and stores them whole. The entries before the first vector and after the last,
fewer than VEC each, are its edges. In a row that is overwritten, a lane reads only what it writes.
"""

import triton
import triton.language as tl

# Arguments that differ between batches. Triton would compile a kernel again where one of them is 1,
# or a multiple of 16; what a multiple would tell it, ALIGNMENT tells.
UNSPECIALIZED = (
    "rows", "T", "parts", "groups", "stride_logits_b", "stride_logits_t", "stride_ref_logits_b",
    "stride_ref_logits_t", "stride_d_logits_b", "stride_d_logits_t", "stride_x_b", "stride_x_t",
    "stride_temperature",
)  # fmt: skip


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Offset of row b·T + t in a strided [B, T, V] tensor; row is int64, as N·V may pass 2^31."""
    return (row // T) * stride_b + (row % T) * stride_t


@triton.constexpr_function
def itemsize(ptr):
    """Bytes of an entry that `ptr` points to."""
    return ptr.dtype.element_ty.primitive_bitwidth // 8


@triton.jit
def row_pointer(
    ptr, row, T, stride_b, stride_t, VEC: tl.constexpr, ALIGNMENT: tl.constexpr
):  # fmt: skip
    """Pointer to the first entry of row b·T + t of a strided [B, T, V] tensor."""
    row_ptr = ptr + row_offset(row, T, stride_b, stride_t)
    if ALIGNMENT == "vector":
        row_ptr = tl.multiple_of(row_ptr, VEC * itemsize(ptr))
    return row_ptr


@triton.jit
def access_ids(UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """[UNROLL, LANES]: the first offset of each vector of a tile."""
    return tl.arange(0, UNROLL)[:, None] * (LANES * VEC) + tl.arange(0, LANES)[None, :] * VEC


@triton.jit
def tile_offsets(UNROLL: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """[UNROLL, LANES, VEC]: VEC neighbours belong to one lane."""
    return access_ids(UNROLL, LANES, VEC)[:, :, None] + tl.arange(0, VEC)[None, None, :]


@triton.jit
def tail_offsets(offsets):
    """Offsets of the smaller tile [1, LANES, VEC] that processes what the whole tiles leave."""
    return tile_offsets(1, offsets.shape[1], offsets.shape[2])


@triton.jit
def interleave(parts):
    """[UNROLL, LANES, n] of n tensors [UNROLL, LANES]. Each lane keeps its own entries."""
    COUNT: tl.constexpr = len(parts)
    if COUNT == 1:
        return parts[0]
    else:
        pairs = tl.join(interleave(parts[0::2]), interleave(parts[1::2]))
        return tl.reshape(pairs, [parts[0].shape[0], parts[0].shape[1], COUNT])


@triton.jit
def load_words(row_ptr, first, inside, first_entry, VEC: tl.constexpr, POLICY: tl.constexpr):
    """Load vectors of 2-byte entries at `first` [UNROLL, LANES] as words of 4 bytes, in fp32.

    Half of the rows start in the upper half of a word. Their vectors have a word more, and each
    pair of neighbouring words is shifted by 16 bits. In the other rows the last word is loaded
    twice and the shift is 0. A word may hold one entry of the row before or after, which is not
    used. With a first_entry, that of the row before is not even loaded.
    """
    half = ((row_ptr.to(tl.int64, bitcast=True) >> 1) & 1).to(tl.int32)
    words_ptr = (row_ptr - half).to(tl.pointer_type(tl.uint32), bitcast=True) + first // 2
    WORDS: tl.constexpr = VEC // 2
    if first_entry is None:
        words = (tl.load(words_ptr, mask=inside, eviction_policy=POLICY),)
    else:
        word = first_entry.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        words = (tl.load(words_ptr, first >= half, other=word, eviction_policy=POLICY),)
    for j in tl.static_range(1, WORDS):
        words += (tl.load(words_ptr + j, mask=inside, eviction_policy=POLICY),)
    last_ptr = words_ptr + (WORDS - 1 + half)
    words += (tl.load(last_ptr, mask=inside, eviction_policy=POLICY),)
    entries = ()
    for j in tl.static_range(WORDS):
        pair = (words[j + 1].to(tl.uint64) << 32) | words[j].to(tl.uint64)
        word = (pair >> (16 * half).to(tl.uint64)).to(tl.uint32)
        if row_ptr.dtype.element_ty == tl.bfloat16:  # the upper half of an fp32 number
            low = (word << 16).to(tl.float32, bitcast=True)
            high = (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        entries += (low, high)
    return interleave(entries)


@triton.jit
def load_tile(
    row_ptr, start, offsets, end, ACC_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL: tl.constexpr, EVICT_LAST: tl.constexpr,
    WHOLE_VECTORS: tl.constexpr = False, first_entry=None,
):  # fmt: skip
    """Load the tile at `start` in ACC_DTYPE.

    Only a TAIL is masked, and its entries past the end are -inf. WHOLE_VECTORS: the end is the end
    of a vector, and what lies behind it is undefined. ALIGNED: row_ptr starts a vector. EVICT_LAST:
    the tile will be read again, so the L2 should evict something else first. first_entry: that of
    the row, where another program may be overwriting the entry before it.
    """
    POLICY: tl.constexpr = "evict_last" if EVICT_LAST else ""
    VEC: tl.constexpr = offsets.shape[2]
    first = start + access_ids(offsets.shape[0], offsets.shape[1], VEC)
    inside = None
    if TAIL and WHOLE_VECTORS:
        inside = first < end
    if ALIGNED:
        entries = start + offsets
        if TAIL and not WHOLE_VECTORS:
            other = -float("inf")
            x = tl.load(row_ptr + entries, entries < end, other, eviction_policy=POLICY)
        else:
            if TAIL:
                inside = tl.broadcast_to(inside[:, :, None], offsets.shape)
            x = tl.load(row_ptr + entries, inside, eviction_policy=POLICY)
    elif itemsize(row_ptr) == 2 and (WHOLE_VECTORS or not TAIL):
        x = load_words(row_ptr, first, inside, first_entry, VEC, POLICY)
    else:
        loaded = ()
        for j in tl.static_range(VEC):
            entry = first + j
            if TAIL and not WHOLE_VECTORS:
                other = -float("inf")
                part = tl.load(row_ptr + entry, entry < end, other, eviction_policy=POLICY)
            else:
                part = tl.load(row_ptr + entry, inside, eviction_policy=POLICY)
            loaded += (part,)
        x = interleave(loaded)
    return x.to(ACC_DTYPE)


@triton.jit
def vector_span(row_ptr, begin, end, VEC: tl.constexpr, ALIGNMENT: tl.constexpr):
    """(first, last): the whole vectors of entries [begin, end) are [first, last)."""
    first = begin
    if ALIGNMENT != "vector":
        entry = (row_ptr + begin).to(tl.int64, bitcast=True) // itemsize(row_ptr)
        first = min(begin + ((-entry) & (VEC - 1)).to(tl.int32), end)
    return first, first + (end - first) // VEC * VEC


@triton.jit
def edge_entries(begin, first, last, end, VEC: tl.constexpr):
    """(entries, inside): the entries [begin, first) and [last, end), among 2 · VEC."""
    i = tl.arange(0, 2 * VEC)
    entries = tl.where(i < VEC, begin + i, last + i - VEC)
    return entries, entries < tl.where(i < VEC, first, end)


@triton.jit
def store_zeros(row_ptr, begin, end, offsets, ALIGNMENT: tl.constexpr):
    """Store the gradient 0 for entries [begin, end)."""
    VEC: tl.constexpr = offsets.shape[2]
    first, last = vector_span(row_ptr, begin, end, VEC, ALIGNMENT)
    vectors_ptr = tl.multiple_of(row_ptr + first, VEC * itemsize(row_ptr))
    zeros = tl.zeros(offsets.shape, row_ptr.dtype.element_ty)
    for start in range(0, last - first, offsets.numel):
        inside = start + access_ids(offsets.shape[0], offsets.shape[1], VEC) < last - first
        inside = tl.broadcast_to(inside[:, :, None], offsets.shape)
        tl.store(vectors_ptr + start + offsets, zeros, inside)
    entries, inside = edge_entries(begin, first, last, end, VEC)
    tl.store(row_ptr + entries, tl.zeros(entries.shape, row_ptr.dtype.element_ty), inside)


@triton.jit
def map_row(
    FUNCTION: tl.constexpr, x_row, y_row, d_row, begin, end, scalars, offsets,
    ACC_DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, REVERSE_ORDER: tl.constexpr = False,
):  # fmt: skip
    """Store FUNCTION(x, y, scalars) of entries [begin, end) to d_row, which may be x_row.

    x and y are entries of x_row and y_row in ACC_DTYPE; without a y_row, y is None. REVERSE_ORDER
    starts at the end of the row, which the caches still hold after a forward pass over it.
    """
    VEC: tl.constexpr = offsets.shape[2]
    TILE: tl.constexpr = offsets.numel
    first, last = vector_span(d_row, begin, end, VEC, ALIGNMENT)
    # Process the edges. Every warp loads them, and one stores them: the others must have done so.
    edges, is_edge = edge_entries(begin, first, last, end, VEC)
    x_edges = tl.load(x_row + edges, is_edge, other=0.0).to(ACC_DTYPE)
    y_edges = None
    if y_row is not None:
        y_edges = tl.load(y_row + edges, is_edge, other=0.0).to(ACC_DTYPE)
    tl.debug_barrier()
    if (first > begin) | (last < end):
        tl.store(d_row + edges, FUNCTION(x_edges, y_edges, scalars), is_edge)

    # Process the whole vectors.
    ALIGNED: tl.constexpr = ALIGNMENT != "any"
    d_vectors = tl.multiple_of(d_row + first, VEC * itemsize(d_row))
    x_vectors = x_row + first
    y_vectors = None
    if ALIGNED:
        x_vectors = tl.multiple_of(x_vectors, VEC * itemsize(x_row))
    if y_row is not None:
        y_vectors = y_row + first
        if ALIGNED:
            y_vectors = tl.multiple_of(y_vectors, VEC * itemsize(y_row))
    count = last - first
    whole = count // TILE * TILE
    # TAIL is 0 for the whole tiles and 1 for the rest, which comes first in reverse order.
    FIRST: tl.constexpr = 1 if REVERSE_ORDER else 0
    STOP: tl.constexpr = -1 if REVERSE_ORDER else 2
    STEP: tl.constexpr = -1 if REVERSE_ORDER else 1
    for TAIL in tl.static_range(FIRST, STOP, STEP):
        tile = offsets
        if TAIL:
            tile = tail_offsets(offsets)
        lower = TAIL * whole
        upper = whole + TAIL * (count - whole)
        for start in range(lower, upper, tile.numel):
            # Load a tile of each row.
            position = start
            if REVERSE_ORDER and not TAIL:
                position = upper - TILE - start
            x = load_tile(
                x_vectors, position, tile, count, ACC_DTYPE,
                ALIGNED=ALIGNED, TAIL=TAIL, WHOLE_VECTORS=True, EVICT_LAST=False,
            )  # fmt: skip
            y = None
            if y_row is not None:
                y = load_tile(
                    y_vectors, position, tile, count, ACC_DTYPE,
                    ALIGNED=ALIGNED, TAIL=TAIL, WHOLE_VECTORS=True, EVICT_LAST=False,
                )  # fmt: skip
            # Compute and store its result.
            result = FUNCTION(x, y, scalars)
            if TAIL:
                inside = position + access_ids(tile.shape[0], tile.shape[1], VEC) < count
                inside = tl.broadcast_to(inside[:, :, None], tile.shape)
                tl.store(d_vectors + position + tile, result, inside)
            else:
                tl.store(d_vectors + position + tile, result)
