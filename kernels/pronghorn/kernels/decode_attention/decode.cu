// Attention of one new token a sequence over caches of 16-bit numbers or of codes: out = softmax(q K^T) V.
//
// A block takes a stretch of the slots of one key/value head, its warps take turns at tiles of them. Keys and transposed
// values are the A operand of the tensor cores, so that rows are slots, then channels, and columns are the query heads of
// the group: scores [slots, heads] = K q, sums [channels, heads] += V^T weights^T. A lane loads what its own fragments
// need straight from device memory into registers, 16 bytes at a time. Which channels those are, the sums over channels
// do not care, as long as the query is loaded to match; the same holds for the order of the slots.
//
// Macros: SIZE (channels of a head: 64 or 128), GROUP (query heads of a key/value head, at most 16), BITS (16, or 8 or 4
// for codes with a scale and a zero a slot), BFLOAT, PAGED, STARTS (slots before a start are not seen), EXTRA (a token
// that is in no cache), CAPPED (scores have a soft cap), ALONE (one block has all slots of a head), SHORTEST (slots of a
// block's stretch), WARPS, BLOCKS (that must fit a multiprocessor).

#include "lanes.cuh"
#include "pairs.cuh"

#define THREADS (LANES * WARPS)
#define COLUMNS ((GROUP + 7) / 8)     // fragments of eight query heads
#define HEADS (8 * COLUMNS)           // query heads, filled up
#define STEPS (SIZE / 16)             // of 16 channels, in scores
#define TILES (SIZE / 16)             // of 16 channels, in sums
#define ROW_BYTES (SIZE * BITS / 8)   // of a slot
#define SUB 16                        // slots of a fragment; pages hold whole ones
#define SUBS (BITS == 4 ? 2 : 1)      // fragments that a warp loads at once
#define TILE (SUB * SUBS)
#define LOWEST -1e30f                 // below every score, and finite: the difference of two is a number
#define LOG2_E 1.4426950408889634f
#define SLACK 8.0f                    // weights may grow to 2^8 before sums are scaled down

#define KEY_BYTES (ROW_BYTES / 4)     // of a slot, that a lane loads
#define VALUE_BYTES (ROW_BYTES / 8)
#define KEY_WORDS (KEY_BYTES / 4)
#define VALUE_WORDS (VALUE_BYTES / 4)
#define KEY_VECTOR (KEY_BYTES < 16 ? KEY_BYTES : 16)
#define VALUE_VECTOR (VALUE_BYTES < 16 ? VALUE_BYTES : 16)

// ---- Lanes ---------------------------------------------------------------------------------------------------------

// Of the four lanes that share a row, and of the eight that share a column.
__device__ inline float sum_of_row(float x) {
    x += from_other(x, 1);
    return x + from_other(x, 2);
}

__device__ inline float sum_of_column(float x) {
    x += from_other(x, 4);
    x += from_other(x, 8);
    return x + from_other(x, 16);
}

__device__ inline float peak_of_column(float x) {
    x = fmaxf(x, from_other(x, 4));
    x = fmaxf(x, from_other(x, 8));
    return fmaxf(x, from_other(x, 16));
}

// ---- Codes ---------------------------------------------------------------------------------------------------------

// The codes in bits 0 ... 3 and 16 ... 19 as 16-bit floats, exactly.
__device__ inline u32 low_nibbles(u32 word) { return subtract(with_magic<0x000f000fu>(word), MAGIC); }

// Those in bits 4 ... 7 and 20 ... 23.
__device__ inline u32 high_nibbles(u32 word) {
#if BFLOAT
    return low_nibbles(word >> 4);
#else
    return fused_multiply_add(with_magic<0x00f000f0u>(word), 0x2c002c00u, 0xd400d400u);  // (1024 + 16 code) / 16 - 64
#endif
}

// Two bytes of a word as 16-bit floats.
template <int FIRST, int SECOND>
__device__ inline u32 two_bytes(u32 word) {
#if BFLOAT
    // Eight bits and the leading one are more than a bfloat16 has; 2^23 + code is exact in float32.
    float first = __uint_as_float(bytes<0x7440 + FIRST>(word, 0x4b000000u)) - 8388608.0f;
    float second = __uint_as_float(bytes<0x7440 + SECOND>(word, 0x4b000000u)) - 8388608.0f;
    return narrow(first, second);
#else
    return subtract(bytes<0x4040 + SECOND * 0x100 + FIRST>(word, 0x64646464u), MAGIC);
#endif
}

// ---- Fragments -----------------------------------------------------------------------------------------------------

// The channel that lane t of a row has at step `step`, in half 0 or 1 of the fragment, as its element 0 or 1.
__device__ inline int key_channel(int step, int half, int element, int t) {
#if BITS == 4
    int word = step / 2, vector = word / (KEY_VECTOR / 4);
    int byte = vector * (4 * KEY_VECTOR) + t * KEY_VECTOR + word % (KEY_VECTOR / 4) * 4 + step % 2 + 2 * element;
    return 2 * byte + 1 - half;  // the even channel is in the high nibble
#else
    int byte = step * 32 * BITS / 16 / 4;  // of the row's share of a lane
    int at = byte / KEY_VECTOR * (4 * KEY_VECTOR) + t * KEY_VECTOR + byte % KEY_VECTOR;
    return at * 8 / BITS + 2 * half + element;
#endif
}

// The channel of row g of a tile of sums, or of row g + 8 (half 1).
__device__ inline int value_channel(int tile, int half, int g) {
    int index = 2 * tile + half;  // among those of a lane, in the order of its bytes
    constexpr int vector = VALUE_VECTOR * 8 / BITS;
    return index / vector * (8 * vector) + g * vector + index % vector;
}

// Step STEP of the scores' A operand: slots g (even) and g + 8 (odd elements).
template <int STEP>
__device__ inline void key_fragment(u32 a[4], const u32 low[KEY_WORDS], const u32 high[KEY_WORDS]) {
#if BITS == 16
    a[0] = low[2 * STEP], a[1] = high[2 * STEP], a[2] = low[2 * STEP + 1], a[3] = high[2 * STEP + 1];
#elif BITS == 8
    a[0] = two_bytes<0, 1>(low[STEP]), a[1] = two_bytes<0, 1>(high[STEP]);
    a[2] = two_bytes<2, 3>(low[STEP]), a[3] = two_bytes<2, 3>(high[STEP]);
#else
    u32 of_low = low[STEP / 2] >> (STEP % 2 * 8), of_high = high[STEP / 2] >> (STEP % 2 * 8);
    a[0] = low_nibbles(of_low), a[1] = low_nibbles(of_high);
    a[2] = high_nibbles(of_low), a[3] = high_nibbles(of_high);
#endif
}

// Tile TILE_INDEX of the sums' A operand, of two slots: their values in two channels.
template <int INDEX>
__device__ inline void value_fragment(u32 &low, u32 &high, const u32 first[VALUE_WORDS], const u32 second[VALUE_WORDS]) {
#if BITS == 16
    low = bytes<0x5410>(first[INDEX], second[INDEX]);
    high = bytes<0x7632>(first[INDEX], second[INDEX]);
#elif BITS == 8
    constexpr int word = INDEX / 2;
    u32 both = INDEX % 2 ? bytes<0x7362>(first[word], second[word]) : bytes<0x5140>(first[word], second[word]);
    low = two_bytes<0, 1>(both);
    high = two_bytes<2, 3>(both);
#else
    constexpr int word = INDEX / 4;
    u32 both = INDEX % 4 < 2 ? bytes<0x5410>(first[word], second[word]) : bytes<0x7632>(first[word], second[word]);
    if (INDEX % 2)
        both >>= 8;
    low = high_nibbles(both);  // the even channel
    high = low_nibbles(both);
#endif
}

// ---- Caches --------------------------------------------------------------------------------------------------------

// Heads of one kind. Strides are in units of 16 bytes, those of scales in numbers.
struct Cache {
    const u8 *key, *value;
    const u16 *key_scale, *key_zero, *value_scale, *value_zero;
    const int *table;
    int page, slot, scale_page, page_size;
    int sink_stop, jump;      // slots: of the sink's fragments the end, and what lies between it and the recent ones
    int sink_size, recent;    // seen are slots before `sink_size` and from `recent` on
    int start, end;

    // Where in the cache the slots of a fragment are, which never lie in two pages.
    __device__ inline void locate(int slot, u64 &row, u64 &scale) const {
#if PAGED
        int index = slot / page_size, inner = slot - index * page_size;
        u64 number = table[index];
        row = 16 * (number * page + (u64)inner * this->slot);
        scale = number * scale_page + inner;
#else
        row = 16 * ((u64)slot * this->slot);
        scale = slot;
#endif
    }
};

// What a warp has of a tile: codes of its slots, and of slot `lane` scale and zero.
struct Keys {
    u32 words[SUBS][2][KEY_WORDS];
    u32 scale;
};

struct Values {
    u32 words[SUBS][4][VALUE_WORDS];
    u32 scale;
};

// The slots of fragment `sub` of a tile: those between sink and recent ones are passed over.
__device__ inline int first_slot(const Cache &cache, int place) {
    return place < cache.sink_stop ? place : place + cache.jump;
}

__device__ inline u32 load_scale(const Cache &cache, const u16 *scales, const u16 *zeros, int place) {
    int lane = threadIdx.x % LANES, slot = min(first_slot(cache, place + lane / SUB * SUB) + lane % SUB, cache.end - 1);
    u64 row, scale;
    cache.locate(slot, row, scale);
    return (u32)__ldg(scales + scale) | (u32)__ldg(zeros + scale) << 16;
}

// Slots behind the end repeat the last one; their weights are zero.
__device__ inline void load_keys(Keys &keys, const Cache &cache, int place) {
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
        int slot = min(first_slot(cache, place + sub * SUB), (cache.end - 1) / SUB * SUB), last = cache.end - 1 - slot;
        u64 row, scale;
        cache.locate(slot, row, scale);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u8 *at = cache.key + row + 16 * ((u64)min(g + half * 8, last) * cache.slot) + t * KEY_VECTOR;
#pragma unroll
            for (int i = 0; i < KEY_BYTES / KEY_VECTOR; i++)
                load_words<KEY_VECTOR>(keys.words[sub][half] + i * (KEY_VECTOR / 4), at + i * (4 * KEY_VECTOR));
        }
    }
#if BITS < 16
    keys.scale = load_scale(cache, cache.key_scale, cache.key_zero, place);
#endif
}

__device__ inline void load_values(Values &values, const Cache &cache, int place) {
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int sub = 0; sub < SUBS; sub++) {
        int slot = min(first_slot(cache, place + sub * SUB), (cache.end - 1) / SUB * SUB), last = cache.end - 1 - slot;
        u64 row, scale;
        cache.locate(slot, row, scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // slots 2 t, 2 t + 1, 2 t + 8, 2 t + 9
            int inner = min(2 * t + i % 2 + i / 2 * 8, last);
            const u8 *at = cache.value + row + 16 * ((u64)inner * cache.slot) + g * VALUE_VECTOR;
#pragma unroll
            for (int j = 0; j < VALUE_BYTES / VALUE_VECTOR; j++)
                load_words<VALUE_VECTOR>(values.words[sub][i] + j * (VALUE_VECTOR / 4), at + j * (8 * VALUE_VECTOR));
        }
    }
#if BITS < 16
    values.scale = load_scale(cache, cache.value_scale, cache.value_zero, place);
#endif
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// A warp's state: of query heads 2 t and 2 t + 1 of each column fragment.
struct State {
    float sum[COLUMNS][TILES][4];
    float peak[COLUMNS][2], total[COLUMNS][2], zeros[COLUMNS][2];  // totals and zeros of this lane's slots alone
};

template <int STEP>
__device__ inline void add_scores(float scores[COLUMNS][4], const u32 low[KEY_WORDS], const u32 high[KEY_WORDS],
                                  const u32 query[COLUMNS][STEPS][2]) {
    u32 a[4];
    key_fragment<STEP>(a, low, high);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        mma(scores[c], a, query[c][STEP][0], query[c][STEP][1]);
    if constexpr (STEP + 1 < STEPS)
        add_scores<STEP + 1>(scores, low, high, query);
}

template <int INDEX>
__device__ inline void add_values(State &state, const u32 words[4][VALUE_WORDS], const u32 weights[COLUMNS][2]) {
    u32 a[4];
    value_fragment<INDEX>(a[0], a[1], words[0], words[1]);
    value_fragment<INDEX>(a[2], a[3], words[2], words[3]);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        mma(state.sum[c][INDEX], a, weights[c][0], weights[c][1]);
    if constexpr (INDEX + 1 < TILES)
        add_values<INDEX + 1>(state, words, weights);
}

__device__ inline float exponent_of(float score, float scale, float softcap) {
#if CAPPED
    score = softcap - 2 * softcap / (power_of_two(score * scale * (2 * LOG2_E) / softcap) + 1);
    return score * LOG2_E;
#else
    return score * scale;
#endif
}

// Where a higher peak has come, everything is brought down to it.
__device__ inline void raise_peaks(State &state, const float highest[COLUMNS][2]) {
    bool higher = false;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        higher |= highest[c][0] > state.peak[c][0] + SLACK || highest[c][1] > state.peak[c][1] + SLACK;
    if (!any_lane(higher))
        return;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float peak = fmaxf(state.peak[c][e], peak_of_column(highest[c][e]));
            float shrink = power_of_two(state.peak[c][e] - peak);
            state.peak[c][e] = peak, state.total[c][e] *= shrink, state.zeros[c][e] *= shrink;
#pragma unroll
            for (int i = 0; i < TILES; i++)
                state.sum[c][i][e] *= shrink, state.sum[c][i][e + 2] *= shrink;
        }
}

// A token that is in no cache, as a beginning.
__device__ inline void begin_with(State &state, const u16 *key, const u16 *value, const u32 query[COLUMNS][STEPS][2],
                                  float scale, float softcap) {
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        float score = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 pair = query[c][step][half];
                score += widen(pair & 0xffff) * widen(key[key_channel(step, half, 0, t)]);
                score += widen(pair >> 16) * widen(key[key_channel(step, half, 1, t)]);
            }
        score = exponent_of(sum_of_row(score), scale, softcap);  // of query head g
#pragma unroll
        for (int e = 0; e < 2; e++) {
            state.peak[c][e] = from_lane(score, (2 * t + e) * 4);
            state.total[c][e] = g == 0;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                state.sum[c][i][e] = widen(value[value_channel(i, 0, g)]);
                state.sum[c][i][e + 2] = widen(value[value_channel(i, 1, g)]);
            }
        }
    }
}

// ---- The kernel ----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(
    const u16 *query, const u8 *full_key, const u8 *full_value, const u8 *streaming_key, const u8 *streaming_value,
    const u16 *full_key_scale, const u16 *full_key_zero, const u16 *full_value_scale, const u16 *full_value_zero,
    const u16 *streaming_key_scale, const u16 *streaming_key_zero, const u16 *streaming_value_scale,
    const u16 *streaming_value_zero, const int *full_lengths, const int *streaming_lengths, const int *full_start,
    const int *streaming_start, const int *full_table, const int *streaming_table, const int *head_index,
    const u16 *extra_key, const u16 *extra_value, u16 *out, float *partial, float *peaks, float *totals, float scale,
    float softcap, int kinds, int splits, int query_batch, int query_head, int full_page, int full_head, int full_slot,
    int full_scale_page, int full_scale_head, int streaming_page, int streaming_head, int streaming_slot,
    int streaming_scale_page, int streaming_scale_head, int full_pages, int full_page_size, int streaming_pages,
    int streaming_page_size, int full_sink, int full_recent, int streaming_sink, int streaming_recent) {
    __shared__ float sums[WARPS][HEADS][SIZE];
    __shared__ float ends[2][WARPS][HEADS];  // peaks and totals
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    int split = blockIdx.y, b = blockIdx.x / kinds, h = blockIdx.x % kinds;
    int index = head_index[h];
    bool streams = index < 0;
    u64 rank = streams ? -1 - index : index;

    Cache cache;
    cache.page = streams ? streaming_page : full_page;
    cache.slot = streams ? streaming_slot : full_slot;
    cache.scale_page = streams ? streaming_scale_page : full_scale_page;
    cache.page_size = streams ? streaming_page_size : full_page_size;
    int pages = streams ? streaming_pages : full_pages;
    u64 own = rank * (streams ? streaming_head : full_head);
    u64 own_scale = rank * (streams ? streaming_scale_head : full_scale_head);
#if PAGED
    cache.table = (streams ? streaming_table : full_table) + (u64)b * pages;
#else
    own += (u64)b * cache.page;
    own_scale += (u64)b * cache.scale_page;
#endif
    cache.key = (streams ? streaming_key : full_key) + 16 * own;
    cache.value = (streams ? streaming_value : full_value) + 16 * own;
    cache.key_scale = (streams ? streaming_key_scale : full_key_scale) + own_scale;
    cache.key_zero = (streams ? streaming_key_zero : full_key_zero) + own_scale;
    cache.value_scale = (streams ? streaming_value_scale : full_value_scale) + own_scale;
    cache.value_zero = (streams ? streaming_value_zero : full_value_zero) + own_scale;
    cache.end = min((streams ? streaming_lengths : full_lengths)[b], pages * cache.page_size);
    cache.start = 0;
#if STARTS
    cache.start = (streams ? streaming_start : full_start)[b];
#endif
    int sink = streams ? streaming_sink : full_sink, kept = streams ? streaming_recent : full_recent;
    cache.sink_size = cache.recent = cache.sink_stop = cache.jump = 0;
    if (kept >= 0 && cache.end > sink + kept) {
        cache.sink_size = sink, cache.recent = cache.end - kept;
        cache.sink_stop = (sink + SUB - 1) / SUB * SUB;
        cache.jump = max(cache.recent / SUB * SUB - cache.sink_stop, 0);
    }

    // Places count the slots that are not passed over. Every split takes as many, but not fewer than pays.
    int first = cache.start / SUB * SUB;
    first = first < cache.sink_stop ? first : max(first - cache.jump, cache.sink_stop);
    int stop = cache.end - cache.jump, share = (max(stop - first, 0) + splits - 1) / splits;
    share = max((share + TILE - 1) / TILE * TILE, SHORTEST);
    first += split * share;
    stop = min(first + share, stop);

#if !ALONE
    if (first >= stop && !(EXTRA && split == 0)) {  // nothing is left for this block
        if (threadIdx.x < GROUP)
            totals[((u64)blockIdx.x * GROUP + threadIdx.x) * splits + split] = 0;
        return;
    }
#endif

    u32 q[COLUMNS][STEPS][2];
    const u16 *own_query = query + (u64)b * query_batch + (u64)h * GROUP * query_head;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u16 *at = own_query + (u64)min(c * 8 + g, GROUP - 1) * query_head;
                u32 low = __ldg(at + key_channel(step, half, 0, t)), high = __ldg(at + key_channel(step, half, 1, t));
                q[c][step][half] = c * 8 + g < GROUP ? low | high << 16 : 0;
            }

    State state;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
        for (int e = 0; e < 2; e++)
            state.peak[c][e] = LOWEST, state.total[c][e] = state.zeros[c][e] = 0;
#pragma unroll
        for (int i = 0; i < TILES; i++)
            state.sum[c][i][0] = state.sum[c][i][1] = state.sum[c][i][2] = state.sum[c][i][3] = 0;
    }
#if EXTRA
    if (split == 0 && warp == 0)
        begin_with(state, extra_key + (u64)blockIdx.x * SIZE, extra_value + (u64)blockIdx.x * SIZE, q, scale, softcap);
#endif

#if BITS < 16
    float query_sum[COLUMNS][2];  // a key is scale * code + zero: the zero counts with the sum over channels
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        float sum = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                sum += widen(q[c][step][half] & 0xffff) + widen(q[c][step][half] >> 16);
        sum = sum_of_row(sum);
        query_sum[c][0] = from_lane(sum, 8 * t), query_sum[c][1] = from_lane(sum, 8 * t + 4);
    }
#endif

    Keys keys;
    Values values;
    int place = first + warp * TILE;
    if (place < stop) {
        load_keys(keys, cache, place);
        load_values(values, cache, place);
    }
#pragma unroll 1
    for (; place < stop; place += WARPS * TILE) {
        float scores[SUBS][COLUMNS][4];
#pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                scores[sub][c][0] = scores[sub][c][1] = scores[sub][c][2] = scores[sub][c][3] = 0;
            add_scores<0>(scores[sub], keys.words[sub][0], keys.words[sub][1], q);
        }
        u32 key_scale = keys.scale;
        int next = place + WARPS * TILE < stop ? place + WARPS * TILE : place;  // the same again: a branch costs more
        load_keys(keys, cache, next);

        float highest[COLUMNS][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            highest[c][0] = highest[c][1] = LOWEST;
#pragma unroll
        for (int sub = 0; sub < SUBS; sub++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = place + sub * SUB, slot = first_slot(cache, at) + g + half * 8;
                bool seen = at + g + half * 8 < stop && slot < cache.end && slot >= cache.start &&
                            (slot < cache.sink_size || slot >= cache.recent);
#if BITS < 16
                u32 pair = from_lane(key_scale, sub * SUB + half * 8 + g);
                float factor = half_to_float(pair & 0xffff), zero = half_to_float(pair >> 16);
#endif
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &score = scores[sub][c][half * 2 + e];
#if BITS < 16
                        score = score * factor + query_sum[c][e] * zero;
#endif
                        score = seen ? exponent_of(score, scale, softcap) : -__int_as_float(0x7f800000);
                        highest[c][e] = fmaxf(highest[c][e], score);
                    }
            }
        raise_peaks(state, highest);

#pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
            u32 weights[COLUMNS][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
#if BITS < 16
                u32 pair = from_lane(values.scale, sub * SUB + half * 8 + g);
                float factor = half_to_float(pair & 0xffff), zero = half_to_float(pair >> 16);
#endif
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    float weight[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        weight[e] = power_of_two(scores[sub][c][half * 2 + e] - state.peak[c][e]);
                        state.total[c][e] += weight[e];
#if BITS < 16
                        state.zeros[c][e] += weight[e] * zero;
                        weight[e] *= factor;
#endif
                    }
                    weights[c][half] = transposed(narrow(weight[0], weight[1]));
                }
            }
            add_values<0>(state, values.words[sub], weights);
        }
        load_values(values, cache, next);
    }

#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int head = c * 8 + 2 * t + e;
            float total = sum_of_column(state.total[c][e]), zeros = sum_of_column(state.zeros[c][e]);
            if (g == 0)
                ends[0][warp][head] = state.peak[c][e], ends[1][warp][head] = total;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                sums[warp][head][value_channel(i, 0, g)] = state.sum[c][i][e] + zeros;
                sums[warp][head][value_channel(i, 1, g)] = state.sum[c][i][e + 2] + zeros;
            }
        }
    __syncthreads();

    // The block's own sums; of several blocks, the parts are joined by another kernel.
    for (int i = threadIdx.x; i < GROUP * SIZE; i += THREADS) {
        int head = i / SIZE, d = i % SIZE;
        float peak = LOWEST, total = 0, sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            peak = fmaxf(peak, ends[0][w][head]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float share = power_of_two(ends[0][w][head] - peak);
            total += ends[1][w][head] * share;
            sum += sums[w][head][d] * share;
        }
        u64 row = (u64)blockIdx.x * GROUP + head;
#if ALONE
        float result = sum / fmaxf(total, 1e-30f);
        out[row * SIZE + d] = (u16)narrow(result, 0.0f);
#else
        row = row * splits + split;
        partial[row * SIZE + d] = sum;
        if (d == 0)
            peaks[row] = peak, totals[row] = total;
#endif
    }
}
