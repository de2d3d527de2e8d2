// Pairs of 16-bit floats in a register, and the tensor cores' instruction on them. Macro: BFLOAT (bfloat16, or fp16).

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 32

#if BFLOAT
#define MAGIC 0x43004300u  // 128, twice: a code in its low bits adds itself
#define TYPE "bf16"
#else
#define MAGIC 0x64006400u  // 1024, twice
#define TYPE "f16"
#endif

__device__ inline u32 subtract(u32 a, u32 b) {
    u32 d;
    asm("sub.rn." TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ inline u32 multiply(u32 a, u32 b) {
    u32 d;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ inline float widen(u32 half) {
#if BFLOAT
    return __uint_as_float(half << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)half));
    return f;
#endif
}

__device__ inline u32 narrow(float low, float high) {
    u32 d;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ inline u32 fused_multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Bytes of a (0 ... 3) and b (4 ... 7), lowest first in the selector.
template <u32 SELECTOR>
__device__ inline u32 bytes(u32 a, u32 b) {
    return __byte_perm(a, b, SELECTOR);
}

// Both codes of a pair, in the bits of the mask, as 16-bit floats code + magic.
template <u32 MASK>
__device__ inline u32 with_magic(u32 word) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(MASK), "r"(MAGIC));  // (word & MASK) | MAGIC
    return d;
}

// d += a * b: 16 x 16 by 16 x 8, accumulated in float32.
__device__ inline void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
