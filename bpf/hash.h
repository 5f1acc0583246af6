/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The two hashes that the BPF programs and the worker's side must compute alike: SipHash-2-4-128 of names, and the slot
 * of an inode in `opens`. Both work on 64-bit words of a little-endian machine.
 */
#ifndef BPFUSE_HASH_H
#define BPFUSE_HASH_H

#include <linux/types.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "names are hashed as little-endian words");

static inline __u64 bpfuse_rotate(__u64 value, int bits)
{
	return value << bits | value >> (64 - bits);
}

static inline void bpfuse_siphash_round(__u64 v[4])
{
	v[0] += v[1];
	v[2] += v[3];
	v[1] = bpfuse_rotate(v[1], 13) ^ v[0];
	v[3] = bpfuse_rotate(v[3], 16) ^ v[2];
	v[0] = bpfuse_rotate(v[0], 32) + v[3];
	v[2] += v[1];
	v[3] = bpfuse_rotate(v[3], 21) ^ v[0];
	v[1] = bpfuse_rotate(v[1], 17) ^ v[2];
	v[2] = bpfuse_rotate(v[2], 32);
}

static inline void bpfuse_siphash_word(__u64 v[4], __u64 word)
{
	v[3] ^= word;
	bpfuse_siphash_round(v);
	bpfuse_siphash_round(v);
	v[0] ^= word;
}

static inline __u64 bpfuse_siphash_finish(__u64 v[4])
{
	for (int i = 0; i < 4; i++)
		bpfuse_siphash_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/*
 * SipHash-2-4-128 of the first `length` (at most 255) bytes at `words`, of which all of the word they end in must be
 * readable; what lies behind them does not matter. The bound of 31 is for the BPF verifier.
 */
static inline void bpfuse_siphash(const __u64 *words, __u32 length, const __u64 key[2], __u64 out[2])
{
	__u64 v[4] = { key[0] ^ 0x736f6d6570736575ULL, key[1] ^ 0x646f72616e646f6dULL ^ 0xee,
		       key[0] ^ 0x6c7967656e657261ULL, key[1] ^ 0x7465646279746573ULL };
	__u32 i = 0;

	for (; i < 31 && i < length / 8; i++)
		bpfuse_siphash_word(v, words[i]);
	bpfuse_siphash_word(v, (__u64)length << 56 | (words[i] & ((1ULL << length % 8 * 8) - 1)));
	v[2] ^= 0xee;
	out[0] = bpfuse_siphash_finish(v);
	v[1] ^= 0xdd;
	out[1] = bpfuse_siphash_finish(v);
}

/* The slot of an inode in `opens` (2^16 slots); inodes given out one after another lie far apart. */
static inline __u32 bpfuse_open_slot(__u64 ino)
{
	return (ino * 0x9e3779b97f4a7c15ULL) >> 48;
}

#endif
