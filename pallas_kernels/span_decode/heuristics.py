"""Choose the kernels' settings.

Measured on one H200 (JAX 0.11.2, bf16) by `python -m benchmarks.span_decode --tune`; microseconds with
100% / 10% / 2% of the rows named as single tokens; docs/kernel.md has the whole table.
"""

from typing import NamedTuple

from pallas_kernels.common import MULTIPROCESSORS
from pallas_kernels.linear.heuristics import MAX_FEW_ROWS, MAX_INPUTS, largest_power_of_2_below

MAX_UNDIVIDED_BYTES = 5 << 18  # keys and values of a sequence and kv head, read by one program at 30 to 40 GB/s; four times where many wait
MAX_SPARSE_CAPACITY = 4_096  # slots of a sequence that names few of them (a tenth of 2,304 was measured), which one program then reads
MAX_PARTS_BATCH = 2  # sequences whose parts a product combines, row by row
MAX_AHEAD_BYTES = 1 << 24  # weights that are fetched ahead: of 7 MB it was measured to gain
MAX_PARTS_CAPACITY = 12_288  # slots; with more, all of them named, more programs than a product can combine are faster
MOST_ROWS = 512  # of a sequence, with more of which it is divided, where sequences name unequal numbers
MAX_EQUAL_CAPACITY = 4_096  # slots; of more, sequences name some hundreds, and some of them many more than others


class TritonConfig(NamedTuple):
    """Static settings of the Triton kernels."""

    tile_rows: int  # K and V rows that a program gathers at once
    num_warps: int
    num_stages: int  # of the software pipeline: tiles in flight plus one
    splits: int  # of the rows of a sequence of mean length (split-KV); 0: no sequence is divided so
    kv_heads: int = 1  # that a program owns; divides the number there is
    ahead: int = 0  # programs for each of those of a part, which fetch what is read next into the L2 cache
    parts: int = 0  # that each sequence is divided into instead, for the product that follows to combine (`SplitRows`); 0: none
    most_rows: int = 0  # with more a sequence is divided into up to `MAX_DIVIDED` parts, whatever the others have; in place of `splits`


class MosaicConfig(NamedTuple):
    """Static settings of the Mosaic-GPU kernel."""

    tile_rows: int  # rows of 8 kv heads that a program copies at once
    num_stages: int  # tiles in flight
    splits: int  # of the rows of a sequence of mean length (split-KV)


def triton_config(batch: int, num_kv_heads: int, head_size: int, item_bytes: int, capacity: int, sparse: bool = False) -> TritonConfig:
    """Choose settings for a static shape; `item_bytes` is what an element of the pool takes up, `sparse` as in `rotate_and_attend`.

    All programs should be on the machine at once, each with enough bytes in flight that together
    they hide the latency of the memory (some 40 KB per multiprocessor; more does no harm).

    Few programs per multiprocessor, so large tiles:                B 32, K 8, H 128, 8192 rows
        64 rows, 2 warps, 3 stages             250 / 33.7 / 13.1
        64 rows, 4 warps, 3 stages             265 / 35.0 / 13.6    more warps only wait for each other
        32 rows, 2 warps, 3 stages             376 / 44.7 / 14.5    too little in flight
        64 rows, 2 warps, 3 stages, 2 splits   279 / 41.7 / 18.1    a second wave, and splits to combine
        32 rows, 1 warp, 4 stages, 2 splits    254 / 36.4 / 14.5
    Many programs, so small tiles and one warp, which needs no barriers:
        64 rows, 2 warps, 3 stages             254 / 41.0 / 16.9       B 32, K 32, H 128, 2048 rows
        32 rows, 1 warp, 4 stages              251 / 37.3 / 15.5
        16 rows, 1 warp, 4 stages              310 / 39.9 / 15.1
        16 rows of 2 heads, 1 warp, 4 stages   251 / 34.1 / 13.2    all programs on the machine at once
        16 rows of 2 heads, 2 warps, 4 stages    -  / 43.4 /  -     these two without the combining kernel
        16 rows of 4 heads, 2 warps, 3 stages    -  / 36.7 /  -
        64 rows, 2 warps, 3 stages             373 / 50.3 / 20.1       B 128, K 12, H 64, 4096 rows
        32 rows, 1 warp, 4 stages              387 / 50.3 / 18.2
        16 rows, 1 warp, 4 stages              371 / 47.5 / 17.0
    A step with its rotation and pool writes, H 64, on an H100 (its 1.1 us of launch in it), divided and combined / undivided:
        B 256, K 4, 36 of 900 rows      16 rows, 1 warp, 4 stages    12.6 / 8.4
        B 1024, K 4, 35 of 1,500 rows   16 rows, 1 warp, 4 stages    39.9 / 26.3, in another run - / 25.9; 3 stages - / 24.1
        B 64, K 3, 205 of 2,048 rows    64 rows, 2 warps, 3 stages   10.8 / 8.7
        B 128, K 12, 205 of 2,048 rows  16 rows, 1 warp, 4 stages    37.8 / 34.8
        B 32, K 32, H 128, 205 of 2,048 16 rows of 2 heads, 1 warp   46.2 / 43.7
    The same on an H200 (1.1 us of another launch in it), undivided:       all rows /
        B 64, K 3, 205 of 2,048 rows    64 rows, 2 warps, 3 stages    44.5 / 11.5
                                        128 rows, 4 warps, 3 stages   37.4 / 11.2
                                        256 rows, 4 warps, 2 stages   38.4 / 12.5    8 warps 43.5 / -
        B 256, K 4, 36 of 900 rows      16 rows, 1 warp, 4 stages        - / 13.2    3 stages 12.2
    Many sequences of 5,000 slots, K 3, H 64, on an H200, undivided; the last column: 5,376 slots, of which sequences name unequal numbers,
    4% in the mean, the longest of a step 600. One warp alone takes twice as long for that one:
        B 192    16 rows, 1 warp, 3 stages    272 / 33.3 /  9.5 /   -
                 64 rows, 2 warps, 3 stages   169 / 22.7 /  8.3 /   -
        B 256    16 rows, 1 warp, 3 stages    291 / 35.9 / 10.4 / 36.1
                 64 rows, 2 warps, 3 stages   229 / 29.4 / 10.0 / 19.4
                 128 rows, 4 warps, 3 stages  230 / 30.6 / 11.2 / 20.2
        B 384    16 rows, 1 warp, 3 stages    357 / 42.9 / 12.4 / 38.6
                 64 rows, 2 warps, 3 stages   354 / 42.2 / 14.8 / 24.5
                 128 rows, 4 warps, 3 stages  337 / 43.4 / 14.9 / 26.6
        B 768    16 rows, 1 warp, 3 stages     -  /  -   /   -  / 53.4
                 64 rows, 2 warps, 3 stages    -  /  -   /   -  / 39.9
    With the rows that 512 places had in a queue of papers, 206 in the mean, the longest 1,156, 1,435 and 1,536 of 256, 384 and 512:
        64 rows, 2 warps, 3 stages 25.4, 34.7, 39.0; 4 stages 25.5, 36.1, 39.7; 128 rows, 4 warps, 3 stages 22.2, 30.8, 36.2.
        The first with 512 places in whole steps (30 layers, the numbers of another chunk), ms: 0.86; with more than 512 rows divided
        0.65, 0.11 of it to combine. Where no sequence has so many, the four times as many programs were not timed.
    The same with 37 rows in the mean and 90 for the longest, 16 rows / 64 rows: B 256 7.4 / 6.5, B 384 8.2 / 9.0, B 768 11.9 / 14.0.
    Few sequences, each with few of its rows (`sparse`): whole steps of SmolLM2-135M on an H200, 205 of 2,304 slots, ms; maps as chosen:
        B 8    divided and combined 0.634, undivided 0.592, and weights fetched ahead 0.569;  all rows 0.736 / 1.277 /  -
        B 32   divided and combined 0.763, undivided, 2 stages 0.689, 3 stages 0.679;         all rows 1.247 / 1.508 /  -
        B 16 and 32, weights fetched ahead (15 layers, an H100): attention 2 us longer, the maps after it 1 us shorter
    Larger heads (`sparse`): 8 layers of Llama 3 8B (K 8, H 128) on an H200, a tenth of the rows named, ms a step, divided / undivided:
        B 32, 8,192 rows    1.589 / 1.512;  attention alone, us  32.3 / 28.6, one sequence names everything 41.6 / 145.5, all do 240 / 233
        B 8, 2,048 rows     1.284 / 1.269
        B 1, 2,048 rows     1.212 / 1.208
    Int8 rows cost instructions, not bytes (43 per row and warp against 14), so they want more warps
    on the machine: twice as many programs.
    """
    programs = batch * num_kv_heads
    few = MAX_PARTS_BATCH < batch and programs < MULTIPROCESSORS and head_size <= 64 and item_bytes == 2
    if sparse and few and capacity <= MAX_SPARSE_CAPACITY:
        ahead = max(0, MULTIPROCESSORS // num_kv_heads - batch) if batch <= MAX_FEW_ROWS else 0
        return TritonConfig(128, num_warps=4, num_stages=2 if programs < 64 else 3, splits=0, ahead=ahead)
    tile_rows = max(16, min(64, 8192 // head_size, 16384 // (head_size * item_bytes)))
    many = item_bytes != 1 and programs >= 4 * MULTIPROCESSORS
    # Sequences are not divided where one alone, all its rows named, would not hold up the others for long.
    longest_bytes = capacity * 2 * head_size * item_bytes
    splits = 1 if longest_bytes > (MAX_UNDIVIDED_BYTES << 2 * many) else 0
    most_bytes = MAX_UNDIVIDED_BYTES << 2 * (programs >= MULTIPROCESSORS)  # of which few are read
    undivided = sparse and head_size == 128 and item_bytes == 2 and longest_bytes <= most_bytes
    if not many:
        per_multiprocessor = 4 if item_bytes == 1 and programs >= MULTIPROCESSORS else 2
        wanted = max(1, min(per_multiprocessor * MULTIPROCESSORS // programs, capacity // tile_rows))
        splits = 0 if undivided else wanted if wanted > 1 or item_bytes == 1 else splits
        if wanted == 1 and head_size == 64 and item_bytes == 2:
            return TritonConfig(128, num_warps=4, num_stages=3, splits=splits)
        return TritonConfig(tile_rows, num_warps=2, num_stages=3, splits=splits)
    if head_size == 128 and item_bytes == 2 and num_kv_heads % 2 == 0 and programs >= 6 * MULTIPROCESSORS:
        return TritonConfig(16, num_warps=1, num_stages=4, splits=splits, kv_heads=2)
    if head_size == 64 and item_bytes == 2:
        # Where most programs wait for others to end, less memory for each lets more of them run.
        small = programs >= 7 * MULTIPROCESSORS and capacity <= MAX_EQUAL_CAPACITY
        unequal = sparse and not splits and capacity > MAX_EQUAL_CAPACITY
        return TritonConfig(*((16, 1) if small else (64, 2)), num_stages=3, splits=splits, most_rows=MOST_ROWS if unequal else 0)
    return TritonConfig(32 if head_size == 128 else 16, num_warps=1 if head_size <= 128 else 2, num_stages=4, splits=splits)


def parts_config(batch: int, num_heads: int, num_kv_heads: int, head_size: int, capacity: int) -> TritonConfig | None:
    """Choose settings of attention whose parts the product that follows combines; None where it is divided otherwise, or not at all.

    Every program of that product reads all parts, so there are few, and it is a product of one row with a small matrix. Microseconds of
    both on an H200 (JAX 0.11.2, bf16; 1.1 of another launch in it), N 9, K 3, H 64, so many of 2,048 rows (8,192 of 8,192):
                                            36     205   1,024   2,048   8,192
        divided, and combined             13.5    14.4    14.7    18.2    18.7
        undivided, 64 rows, 2 warps        8.6    14.0    19.8    33.3   109.1
         4 parts, 64 rows, 2 warps         8.9    10.6    13.6    17.0    35.1
         8 parts, 64 rows, 2 warps         9.9     9.8    12.9    14.4    23.9
         8 parts, 128 rows, 4 warps       12.4    11.9    10.7    14.0    22.3
        16 parts, 64 rows, 4 warps        11.5    11.8    12.1    14.3    19.0
    Single figures are uncertain by 1 us; the same setting before other settings of the map took up to that much more or less.
    Programs that fetch the weights of the other maps (`ahead`) make a step of SmolLM2-135M 5% faster: 0.449 against 0.475 ms, 30 layers.
    Of two sequences it takes 0.537 ms with 8 parts (all rows 0.630), 0.542 without `ahead`, 0.571 undivided. Of four, with maps for the
    matrix unit, 0.595 with 4 parts, 0.572 undivided.
    """
    if batch > MAX_PARTS_BATCH or num_heads * head_size > MAX_INPUTS or head_size > 128 or capacity > MAX_PARTS_CAPACITY:
        return None
    parts = min(16, max(4, largest_power_of_2_below(max(1, capacity // 256))))
    ahead = max(0, MULTIPROCESSORS // num_kv_heads - parts)  # a program for every multiprocessor
    return TritonConfig(tile_rows=64, num_warps=2 if parts < 16 else 4, num_stages=3, splits=0, ahead=ahead, parts=parts)


def mosaic_config(batch: int, num_kv_heads: int, head_size: int, capacity: int) -> MosaicConfig:
    """Choose settings for a static shape: one wave of programs, all the shared memory in flight."""
    wanted = MULTIPROCESSORS * (128 // head_size) // (batch * num_kv_heads // 8)
    return MosaicConfig(tile_rows=8, num_stages=5, splits=max(1, min(wanted, capacity // 64, 16)))
